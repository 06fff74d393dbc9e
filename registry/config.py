"""Settings: frozen, read once, passed down.

A file in TOML, over it environment variables: `HYTHE_SERVER__LISTEN` is `[server] listen`. Unknown keys and wrong
types are refused with the key's path. `config.example.toml` names every key with its default; a test holds it.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct, structs

from registry.errors import ConfigurationError
from registry.metadata.engine import parse_url

_Positive = Annotated[int, Meta(ge=1)]
_Count = Annotated[int, Meta(ge=0)]
_Bytes = Annotated[int, Meta(ge=0)]
_ENVIRONMENT_PREFIX: Final = "HYTHE_"
_LISTEN: Final = re.compile(r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_PUBLIC_URL: Final = re.compile(r"https?://[A-Za-z0-9._:\[\]-]+(/[A-Za-z0-9._~-]+)*/?")


#: Where keys may be fetched without TLS: nobody is between. Elsewhere he would sign whatever he likes.
_NEAR: Final = r"http://(?:127\.0\.0\.1|localhost|\[::1\])[:/]"


class _Table(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ServerSettings(_Table, frozen=True):
    """Where and how the server listens."""

    listen: str = "127.0.0.1:5000"
    workers: _Positive = 1
    affinity: bool = True
    drain_seconds: _Positive = 20
    allow_open: bool = False
    behind_proxy: bool = False
    trusted_proxies: tuple[str, ...] = ()
    public_url: str = ""
    connections: _Positive = 10_000
    head_seconds: _Positive = 20


class TlsSettings(_Table, frozen=True):
    """Encryption, and whose certificates clients may show."""

    certificate: str = ""
    key: str = ""
    client_ca: str = ""
    client_required: bool = False


class AccountSettings(_Table, frozen=True):
    """Who can log in, and tokens."""

    admin: str = "admin"
    admin_password: str = ""
    htpasswd: str = ""
    service: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:/-]+$")] = "hythe"
    token_seconds: Annotated[int, Meta(ge=60, le=86400)] = 300
    refresh_days: _Count = 90
    key_days: _Positive = 30


class IssuerRule(_Table, frozen=True):
    """Which of an issuer's tokens stand for which account."""

    account: Annotated[str, Meta(min_length=1)]
    claims: Annotated[dict[str, str], Meta(min_length=1)]


class IssuerSettings(_Table, frozen=True):
    """Somebody else whose tokens are good to log in by."""

    issuer: Annotated[str, Meta(pattern=rf"^(?:https://|{_NEAR})[^ ?#]+$")]
    audience: Annotated[str, Meta(min_length=1)]
    rules: Annotated[tuple[IssuerRule, ...], Meta(min_length=1)]
    ca_file: str = ""


class LimitSettings(_Table, frozen=True):
    """How much of something one client may do; 0 is as much as it likes."""

    requests_per_second: _Count = 0
    anonymous_pulls_per_hour: _Count = 0


class AuditSettings(_Table, frozen=True):
    """What is kept of who did what."""

    days: _Count = 90


class FilesystemSettings(_Table, frozen=True):
    """The filesystem driver."""

    root: Annotated[str, Meta(min_length=1)] = "data"
    sync: bool = True


class S3Settings(_Table, frozen=True):
    """The driver for object stores that speak S3."""

    bucket: str = ""
    prefix: Annotated[str, Meta(pattern=r"^([A-Za-z0-9._-]+/)*$")] = ""
    region: str = "us-east-1"
    endpoint: str = ""
    public_endpoint: str = ""
    redirect: bool = False
    addressing: Literal["auto", "path", "virtual"] = "auto"
    access_key: str = ""
    secret_key: str = ""
    session_token: str = ""
    ca_file: str = ""
    part_bytes: Annotated[int, Meta(ge=5 << 20, le=1 << 30)] = 16 << 20
    buffer_bytes: Annotated[int, Meta(ge=32 << 20)] = 96 << 20
    timeout_seconds: Annotated[int, Meta(ge=1, le=120)] = 30


class StorageSettings(_Table, frozen=True):
    """Where blobs lie."""

    driver: Literal["filesystem", "s3"] = "filesystem"
    filesystem: FilesystemSettings = FilesystemSettings()
    s3: S3Settings = S3Settings()


class DatabaseSettings(_Table, frozen=True):
    """Where the facts lie."""

    url: str = "sqlite:///data/hythe.db"
    sync: bool = True
    connections: Annotated[int, Meta(ge=1, le=256)] = 8


class RegistrySettings(_Table, frozen=True):
    """What the protocol allows."""

    delete: bool = True
    sparse_manifests: bool = False
    manifest_bytes: Annotated[int, Meta(ge=65536)] = 4 << 20


class UploadSettings(_Table, frozen=True):
    """Bytes on their way in."""

    idle_seconds: _Positive = 86400
    sweep_seconds: _Positive = 600
    stall_seconds: Annotated[int, Meta(ge=1, le=120)] = 60
    concurrent: _Positive = 512
    buffer_bytes: Annotated[int, Meta(ge=1 << 20)] = 64 << 20


class CacheSettings(_Table, frozen=True):
    """What is answered from memory."""

    bytes: _Bytes = 32 << 20


class LogSettings(_Table, frozen=True):
    """What is said, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"
    access: bool = True


class Settings(_Table, frozen=True):
    """All there is to set."""

    server: ServerSettings = ServerSettings()
    tls: TlsSettings = TlsSettings()
    accounts: AccountSettings = AccountSettings()
    issuers: tuple[IssuerSettings, ...] = ()
    limits: LimitSettings = LimitSettings()
    audit: AuditSettings = AuditSettings()
    storage: StorageSettings = StorageSettings()
    database: DatabaseSettings = DatabaseSettings()
    registry: RegistrySettings = RegistrySettings()
    uploads: UploadSettings = UploadSettings()
    cache: CacheSettings = CacheSettings()
    log: LogSettings = LogSettings()


def load(path: Path | None, environment: Mapping[str, str], overrides: Mapping[str, str] | None = None) -> Settings:
    """Read the settings.

    Args:
        path: a TOML file, or None for the defaults.
        environment: variables; those that begin with `HYTHE_` count.
        overrides: from the command line, `server.listen` → value; they win.

    Raises:
        ConfigurationError: says which key, and what was expected.
    """
    tree: dict[str, Any] = _read(path) if path else {}
    for key, text in [*_from_environment(environment), *(overrides or {}).items()]:
        _set(tree, key.split("."), text)
    try:
        settings = msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise ConfigurationError(_explain(error)) from None
    _check(settings)
    return settings


def parse_listen(text: str) -> tuple[str, int]:
    """Split `HOST:PORT`, the host perhaps an IPv6 address in brackets.

    Raises:
        ConfigurationError: it is something else.
    """
    match = _LISTEN.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ConfigurationError(f"server.listen: expected HOST:PORT, such as 127.0.0.1:5000, got {text!r}")
    return match["ipv6"] or match["host"], int(match["port"])


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from None


def _from_environment(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    return [
        (name.removeprefix(_ENVIRONMENT_PREFIX).lower().replace("__", "."), value)
        for name, value in sorted(environment.items())
        if name.startswith(_ENVIRONMENT_PREFIX) and "__" in name
    ]


def _set(tree: dict[str, Any], keys: list[str], text: str) -> None:
    """Put a value that came as text where it belongs, as the type that is expected there."""
    expected: Any = Settings
    for key in keys:
        fields = {field.name: field.type for field in structs.fields(expected)} if _is_table(expected) else {}
        if key not in fields:
            raise ConfigurationError(f"{'.'.join(keys)}: there is no such setting")
        expected = fields[key]
    if _is_table(expected):
        raise ConfigurationError(f"{'.'.join(keys)}: this is a table of settings, name one of them")
    for depth, key in enumerate(keys[:-1], 1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigurationError(f"{'.'.join(keys[:depth])}: expected a table, got {tree!r}")
    try:
        value = [each.strip() for each in text.split(",") if each.strip()] if expected == tuple[str, ...] else text
        tree[keys[-1]] = msgspec.convert(value, expected, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{'.'.join(keys)}: {error}, got {text!r}") from None


def _is_table(expected: Any) -> bool:
    return isinstance(expected, type) and issubclass(expected, Struct)


def _explain(error: msgspec.ValidationError) -> str:
    """Turn `Expected int, got str - at $.server.workers` into `server.workers: expected int, got str`."""
    text, _, place = str(error).partition(" - at `")
    place = place.removesuffix("`").removeprefix("$").removeprefix(".")
    if text.startswith("Object contains unknown field"):
        unknown = text.split("`")[1]
        return f"{'.'.join(filter(None, [place, unknown]))}: there is no such setting"
    return f"{place}: {text[0].lower()}{text[1:]}"


def _check(settings: Settings) -> None:
    """Refuse what cannot work, and what would be open by accident."""
    parse_url(settings.database.url)
    if settings.storage.driver == "s3":
        check_s3(settings.storage.s3)
    _check_tls(settings.tls)
    _check_proxies(settings.server)
    host, _ = parse_listen(settings.server.listen)
    if not (is_loopback(host) or settings.tls.certificate or settings.server.behind_proxy):
        raise ConfigurationError(
            f"server.listen: {host} can be reached from other machines without encryption, and passwords with it: "
            "set tls.certificate and tls.key, or put a reverse proxy with TLS before it and set "
            "server.behind_proxy = true; without accounts, set server.allow_open = true too, if everybody who reaches "
            "it may push and delete"
        )


def check_open(settings: Settings, *, has_accounts: bool) -> None:
    """Refuse to let everybody in by accident; raises `ConfigurationError`."""
    host, _ = parse_listen(settings.server.listen)
    if has_accounts or settings.server.allow_open:
        return
    # A proxy lets others in, though nobody else reaches us.
    if settings.server.behind_proxy:
        found = "server.behind_proxy: others come in through a proxy"
    elif not is_loopback(host):
        found = f"server.listen: {host} can be reached from other machines"
    else:
        return
    raise ConfigurationError(
        f"{found}, and this registry has no accounts: make one (hythe user add --admin NAME, or "
        "accounts.admin_password), or set server.allow_open = true if everybody who reaches it may push and delete"
    )


def _check_tls(settings: TlsSettings) -> None:
    if bool(settings.certificate) != bool(settings.key):
        raise ConfigurationError("tls.certificate, tls.key: one needs the other")
    if settings.client_ca and not settings.certificate:
        raise ConfigurationError("tls.client_ca: means nothing without tls.certificate")
    if settings.client_required and not settings.client_ca:
        raise ConfigurationError("tls.client_required: needs tls.client_ca, by whom clients' certificates are signed")


def _check_proxies(settings: ServerSettings) -> None:
    for network in settings.trusted_proxies:
        try:
            ipaddress.ip_network(network, strict=False)
        except ValueError:
            raise ConfigurationError(
                f"server.trusted_proxies: expected addresses or networks such as 10.0.0.0/8, got {network!r}"
            ) from None
    if settings.public_url and not _PUBLIC_URL.fullmatch(settings.public_url):
        raise ConfigurationError(
            f"server.public_url: expected https://HOST[:PORT][/PREFIX], got {settings.public_url!r}"
        )


def check_s3(settings: S3Settings) -> None:
    """Refuse settings by which no bucket can be used; raises `ConfigurationError`."""
    if not settings.bucket:
        raise ConfigurationError('storage.s3.bucket: storage.driver = "s3" needs the name of a bucket')
    if bool(settings.access_key) != bool(settings.secret_key):
        raise ConfigurationError(
            "storage.s3.access_key, storage.s3.secret_key: one needs the other; without both, credentials are looked "
            "for where AWS's own tools look"
        )
    if settings.session_token and not settings.access_key:
        raise ConfigurationError("storage.s3.session_token: goes with access_key and secret_key")
    for key in ("endpoint", "public_endpoint"):
        if (url := getattr(settings, key)) and not re.fullmatch(r"https?://[^/]+/?", url):
            raise ConfigurationError(f"storage.s3.{key}: expected http://HOST[:PORT] or https://…, got {url!r}")
    if settings.public_endpoint and not settings.redirect:
        raise ConfigurationError("storage.s3.public_endpoint: means nothing without storage.s3.redirect = true")
    if settings.buffer_bytes < 2 * settings.part_bytes:
        raise ConfigurationError("storage.s3.buffer_bytes: expected at least twice storage.s3.part_bytes")
