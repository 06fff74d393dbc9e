"""Credentials where docker keeps them: its `config.json`, and the helpers that are named there.

[docker/cli: docker login, Credential stores; docker-credential-helpers: the protocol on standard input and output]
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from runner.errors import RunnerError
from runner.reference import HUB

#: What docker calls the hub in its file.
_HUB_KEY: Final = "https://index.docker.io/v1/"
#: What a helper says for a user where it keeps a refresh token. [docker/cli: credentials, native store]
_TOKEN_USER: Final = "<token>"  # noqa: S105 - no secret
_NOT_FOUND: Final = "credentials not found"
_PATIENCE: Final = 30.0


@dataclass(frozen=True, slots=True)
class Login:
    """Who to be at a registry: by a password, or by a refresh token that was given for one."""

    user: str = ""
    password: str = ""
    refresh_token: str = ""


class Logins:
    """docker's `config.json`."""

    def __init__(self, directory: Path | None = None) -> None:
        """Use the file in `directory`; where docker would look where absent."""
        default = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
        self._path = (directory or default) / "config.json"

    def find(self, host: str) -> Login | None:
        """Return who to be at a registry, None for nobody. Raises `RunnerError`."""
        config = self._read()
        helper = self._helper(config, host)
        for key in _keys(host):
            found = _ask(helper, key) if helper else _entry(config, key)
            if found is not None:
                return found
        return None

    def keep(self, host: str, login: Login) -> None:
        """Keep who to be at a registry. Raises `RunnerError`."""
        config = self._read()
        key = _keys(host)[0]
        if helper := self._helper(config, host):
            user, secret = (_TOKEN_USER, login.refresh_token) if login.refresh_token else (login.user, login.password)
            _run(helper, "store", json.dumps({"ServerURL": key, "Username": user, "Secret": secret}))
            entry: dict[str, str] = {}
        else:
            password = "" if login.refresh_token else login.password
            entry = {"auth": base64.b64encode(f"{login.user}:{password}".encode()).decode()}
            entry |= {"identitytoken": login.refresh_token} if login.refresh_token else {}
        config.setdefault("auths", {})[key] = entry
        self._write(config)

    def forget(self, host: str) -> bool:
        """Forget who to be at a registry; return whether there was anything. Raises `RunnerError`."""
        config = self._read()
        helper = self._helper(config, host)
        known = [key for key in _keys(host) if key in config.get("auths", {})]
        for key in known:
            if helper:
                _run(helper, "erase", key)
            del config["auths"][key]
        if known:
            self._write(config)
        return bool(known)

    def _read(self) -> dict[str, Any]:
        try:
            config = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunnerError(f"{self._path} cannot be read: {error}") from None
        if not isinstance(config, dict) or not isinstance(config.get("auths", {}), dict):
            raise RunnerError(f"{self._path} is no configuration of docker's")
        return config

    def _write(self, config: dict[str, Any]) -> None:
        """Put a new file in the place of the old one, for its owner alone."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(config, file, indent="\t")
                Path(name).replace(self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            raise RunnerError(f"{self._path} cannot be written: {error.strerror}") from None

    @staticmethod
    def _helper(config: dict[str, Any], host: str) -> str:
        """Return the name of the helper that keeps a registry's credentials, empty for the file itself."""
        own = config.get("credHelpers") or {}
        for key in _keys(host):
            if isinstance(own.get(key), str):
                return str(own[key])
        return str(config.get("credsStore") or "")


def _keys(host: str) -> list[str]:
    """Return what a registry may be called in the file; the first one is written."""
    if host == HUB:
        return [_HUB_KEY, HUB, "index.docker.io"]
    return [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]


def _entry(config: dict[str, Any], key: str) -> Login | None:
    entry = config.get("auths", {}).get(key)
    if not isinstance(entry, dict):
        return None
    user, password = str(entry.get("username", "")), str(entry.get("password", ""))
    if entry.get("auth"):
        with contextlib.suppress(binascii.Error, UnicodeDecodeError, ValueError):
            user, _, password = base64.b64decode(str(entry["auth"])).decode().rstrip("\0").partition(":")
    token = str(entry.get("identitytoken", ""))
    return Login(user, password, token) if token or user else None


def _ask(helper: str, key: str) -> Login | None:
    try:
        found = json.loads(_run(helper, "get", key))
        user, secret = str(found["Username"]), str(found["Secret"])
    except _NotFound:
        return None
    except (ValueError, KeyError, TypeError):
        raise RunnerError(f"docker-credential-{helper} answered what no such helper should") from None
    return Login(refresh_token=secret) if user == _TOKEN_USER else Login(user, secret)


class _NotFound(RunnerError):
    pass


def _run(helper: str, action: str, sent: str) -> str:
    program = f"docker-credential-{helper}"
    if "/" in helper:
        raise RunnerError(f"{helper!r} is not the name of a credential helper")
    try:
        done = subprocess.run(  # noqa: S603 - docker's file names it, as for docker
            [program, action], input=sent, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunnerError(f"{program}, which keeps credentials, cannot be asked: {error}") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        if _NOT_FOUND in said:
            raise _NotFound(said)
        raise RunnerError(f"{program} failed: {said[:300]}")
    return done.stdout
