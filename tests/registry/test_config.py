"""Settings: every key is named, everything else is refused with its name, and nothing is open by accident."""

from __future__ import annotations

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.config import Settings, check_open, is_loopback, load, parse_listen
from registry.errors import ConfigurationError

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"
OPEN = {"server.allow_open": "true", "server.behind_proxy": "true"}


def load_text(tmp_path: Path, text: str, environment: dict[str, str] | None = None) -> Settings:
    path = tmp_path / "hythe.toml"
    path.write_text(text)
    return load(path, environment or {})


def leaves(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        leaf = list(value) if isinstance(value, tuple) else value
        found |= leaves(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": leaf}
    return found


def test_the_example_names_every_key_with_its_default() -> None:
    assert leaves(tomllib.loads(EXAMPLE.read_text())) == leaves(msgspec.to_builtins(Settings()))
    assert load(EXAMPLE, {}) == Settings()


def test_the_example_has_a_comment_before_every_key() -> None:
    lines = EXAMPLE.read_text().splitlines()
    keys = [(above, line) for above, line in pairwise(lines) if " = " in line and not line.startswith("#")]
    assert keys
    assert not [line for above, line in keys if not above.startswith("# ")]


def test_without_anything_the_defaults_hold() -> None:
    assert load(None, {}) == Settings()
    assert load(None, {"HOME": "/root", "HYTHE_SERVER": "http://elsewhere"}) == Settings()


def test_file_environment_and_command_line_win_in_this_order(tmp_path: Path) -> None:
    path = tmp_path / "hythe.toml"
    path.write_text("[server]\nworkers = 2\nlisten = '127.0.0.1:1'\n[log]\naccess = false\n[uploads]\nconcurrent = 9")
    environment = {"HYTHE_SERVER__WORKERS": "3", "HYTHE_SERVER__LISTEN": "127.0.0.1:2"}
    settings = load(path, environment, {"server.workers": "4"})
    assert (settings.server.workers, settings.server.listen) == (4, "127.0.0.1:2")
    assert (settings.log.access, settings.uploads.concurrent) == (False, 9)


#: Keys that are refused alone, or are no single text.
TOGETHER = {"tls.certificate", "tls.key", "tls.client_ca", "tls.client_required", "server.trusted_proxies"}
#: Values of keys that do not take anything.
ODD = {
    "storage.driver": "filesystem",
    "storage.s3.prefix": "hythe/",
    "storage.s3.addressing": "path",
    "storage.s3.part_bytes": str(8 << 20),
    "storage.s3.buffer_bytes": str(64 << 20),
    "storage.s3.timeout_seconds": "90",
    "server.public_url": "https://registry.example",
    "accounts.token_seconds": "90",
    "database.url": "sqlite:///x.db",
    "database.connections": "90",
    "uploads.stall_seconds": "90",
    "uploads.buffer_bytes": str(1 << 20),
    "log.level": "error",
    "log.format": "json",
}


def test_a_list_in_the_environment_has_commas() -> None:
    settings = load(None, {"HYTHE_SERVER__TRUSTED_PROXIES": "10.0.0.0/8, 192.0.2.1"})
    assert settings.server.trusted_proxies == ("10.0.0.0/8", "192.0.2.1")


@pytest.mark.parametrize("key", sorted({*leaves(msgspec.to_builtins(Settings()))} - {"issuers", *TOGETHER}))
def test_every_key_can_be_set_from_the_environment(key: str) -> None:
    value = ODD.get(key)
    default = leaves(msgspec.to_builtins(Settings()))[key]
    if value is None:
        value = {bool: "false" if default else "true", int: "65536", str: "127.0.0.1:9"}[type(default)]
    settings = load(None, {f"HYTHE_{key.upper().replace('.', '__')}": value})
    assert str(leaves(msgspec.to_builtins(settings))[key]).lower() == value
    assert key == "storage.driver" or settings != Settings()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[sever]\nlisten = ''", "sever"),
        ("[server]\nlissten = ''", "server.lissten"),
        ("[storage.filesystem]\nrot = 1", "storage.filesystem.rot"),
        ("[storage.s4]\n", "storage.s4"),
        ("listen = ''", "listen"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key}: there is no such setting"):
        load_text(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("[server]\nworkers = '2'", "server.workers", "expected `int`, got `str`"),
        ("[server]\nworkers = 1.5", "server.workers", "expected `int`, got `float`"),
        ("[server]\nworkers = true", "server.workers", "expected `int`, got `bool`"),
        ("[server]\nworkers = 0", "server.workers", "expected `int` >= 1"),
        ("[server]\ndrain_seconds = -1", "server.drain_seconds", "expected `int` >= 1"),
        ("[server]\nlisten = 5000", "server.listen", "expected `str`, got `int`"),
        ("server = 3", "server", "expected `object`, got `int`"),
        ("[registry]\ndelete = 'no'", "registry.delete", "expected `bool`, got `str`"),
        ("[registry]\ndelete = 0", "registry.delete", "expected `bool`, got `int`"),
        ("[registry]\nmanifest_bytes = 1", "registry.manifest_bytes", "expected `int` >= 65536"),
        ("[storage]\ndriver = 'floppy'", "storage.driver", "'floppy'"),
        ("[storage.filesystem]\nroot = ''", "storage.filesystem.root", "length >= 1"),
        ("[storage.filesystem]\nroot = []", "storage.filesystem.root", "expected `str`, got `array`"),
        ("[uploads]\nstall_seconds = 121", "uploads.stall_seconds", "expected `int` <= 120"),
        ("[log]\nlevel = 'loud'", "log.level", "'loud'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path_and_what_was_expected(
    tmp_path: Path, text: str, key: str, expected: str
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load_text(tmp_path, text)
    assert str(raised.value).startswith(f"{key}: ")
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("HYTHE_SERVER__WORKERS", "two", "server.workers"),
        ("HYTHE_SERVER__WORKERS", "0", "server.workers"),
        ("HYTHE_SERVER__WORKERS", "", "server.workers"),
        ("HYTHE_REGISTRY__DELETE", "perhaps", "registry.delete"),
        ("HYTHE_STORAGE__DRIVER", "floppy", "storage.driver"),
        ("HYTHE_STORAGE__FILESYSTEM__ROOT", "", "storage.filesystem.root"),
        ("HYTHE_STORAGE__FILESYSTEM", "x", "storage.filesystem"),
        ("HYTHE_SERVER__LISSTEN", "x", "server.lissten"),
        ("HYTHE_SERVER__LISTEN__HOST", "x", "server.listen.host"),
        ("HYTHE_SEVER__LISTEN", "x", "sever.listen"),
    ],
)
def test_an_environment_variable_that_cannot_be_used_is_refused_with_the_key(name: str, value: str, key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key}: "):
        load(None, {name: value})


@pytest.mark.parametrize("text", ["server = 3", "server = []", "server = 'x'"])
def test_a_table_that_is_none_is_refused_also_where_the_environment_sets_a_key_of_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^server"):
        load_text(tmp_path, text, {"HYTHE_SERVER__WORKERS": "2"})


@pytest.mark.parametrize("content", [b"[server", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_no_toml_is_refused_with_the_name_of_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hythe.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"hythe\.toml: not TOML"):
        load(path, {})


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_cannot_be_read_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        load(tmp_path / name, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:5000", ("127.0.0.1", 5000)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("registry.example:80", ("registry.example", 80)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, expected: tuple[str, int]) -> None:
    assert parse_listen(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", ":", "5000", ":5000", "localhost", "localhost:", "localhost:http", "localhost:-1", "localhost:65536"]
    + [f"localhost:{port}" for port in ("5000 ", "+5", "5_0", "9" * 5000, "\u00b2")]
    + ["[]:80", "[:80"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^server\.listen: expected HOST:PORT"):
        parse_listen(text)


@given(st.text() | st.from_regex(r"[\w.\[\]:]*:\d+", fullmatch=True))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        host, port = parse_listen(text)
    except ConfigurationError:
        return
    assert host
    assert 0 <= port <= 65535


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "[::1]", "localhost"])
def test_an_address_that_only_this_machine_reaches_needs_no_word(host: str) -> None:
    assert load(None, {"HYTHE_SERVER__LISTEN": f"{host}:5000"})


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "[::]", "10.0.0.1", "192.168.1.1", "registry.example", "[2001:db8::1]", "localhost.example"],
)
def test_an_address_that_others_reach_needs_encryption_and_accounts_or_two_words(host: str) -> None:
    address = {"server.listen": f"{host}:5000"}
    for words in ({}, {"server.allow_open": "true"}):
        with pytest.raises(ConfigurationError, match=r"tls\.certificate"):
            load(None, {}, address | words)
    for words in ({"server.behind_proxy": "true"}, {"tls.certificate": "crt", "tls.key": "key"}):
        settings = load(None, {}, address | words)
        check_open(settings, has_accounts=True)
        with pytest.raises(ConfigurationError, match="allow_open"):
            check_open(settings, has_accounts=False)
    settings = load(None, {}, address | OPEN)
    check_open(settings, has_accounts=False)
    assert settings.server.listen == f"{host}:5000"


def test_what_a_proxy_lets_others_reach_needs_accounts_on_loopback_too() -> None:
    settings = load(None, {}, {"server.behind_proxy": "true"})
    check_open(settings, has_accounts=True)
    with pytest.raises(ConfigurationError, match=r"server\.behind_proxy: others .*hythe user add --admin"):
        check_open(settings, has_accounts=False)
    check_open(load(None, {}, OPEN), has_accounts=False)
    check_open(load(None, {}), has_accounts=False)


@given(st.ip_addresses())
def test_loopback_is_what_the_standards_call_so(address: Any) -> None:
    assert is_loopback(str(address)) == address.is_loopback


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Settings().server.listen = "0.0.0.0:5000"  # type: ignore[misc]
