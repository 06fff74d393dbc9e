"""Credentials where docker keeps them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from runner.errors import RunnerError
from runner.logins import Login, Logins

HELPER = """#!/bin/sh
# The real protocol, in a file beside this one.
store=$(dirname "$0")/kept
case $1 in
store) cat > "$store" ;;
get) if [ -e "$store" ]; then cat "$store"; else echo "credentials not found in native keychain"; exit 1; fi ;;
erase) rm -f "$store" ;;
*) echo "no such action"; exit 1 ;;
esac
"""


@pytest.fixture
def logins(tmp_path: Path) -> Logins:
    return Logins(tmp_path / "docker")


def config(logins: Logins) -> dict[str, object]:
    found: dict[str, object] = json.loads(logins._path.read_text())
    return found


def write(logins: Logins, content: object) -> None:
    logins._path.parent.mkdir(exist_ok=True)
    logins._path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "docker-credential-test").write_text(HELPER)
    (directory / "docker-credential-test").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return directory / "kept"


def test_nobody_is_known_where_there_is_no_file(logins: Logins) -> None:
    assert logins.find("example.org") is None
    assert not logins.forget("example.org")


@pytest.mark.parametrize("login", [Login("alice", "pass:word"), Login("alice", "", "refresh")])
def test_a_login_is_kept_as_docker_keeps_it_until_it_is_forgotten(logins: Logins, login: Login) -> None:
    write(logins, {"auths": {"other.org": {"auth": "eDp5"}}, "detachKeys": "ctrl-e"})
    logins.keep("example.org:5000", login)
    assert logins.find("example.org:5000") == login
    assert logins.find("example.org") is None
    assert config(logins)["detachKeys"] == "ctrl-e"
    assert logins._path.stat().st_mode & 0o777 == 0o600
    assert logins.find("other.org") == Login("x", "y")
    assert logins.forget("example.org:5000")
    assert logins.find("example.org:5000") is None
    assert logins.find("other.org") == Login("x", "y")


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io"])
def test_the_hub_is_known_by_the_names_that_docker_gives_it(logins: Logins, key: str) -> None:
    write(logins, {"auths": {key: {"auth": base64.b64encode(b"alice:secret").decode()}}})
    assert logins.find("docker.io") == Login("alice", "secret")


@pytest.mark.parametrize("setting", [{"credsStore": "test"}, {"credHelpers": {"example.org": "test"}}])
@pytest.mark.parametrize("login", [Login("alice", "secret"), Login("", "", "refresh")])
def test_a_helper_keeps_what_the_file_does_not(logins: Logins, helper: Path, setting: object, login: Login) -> None:
    write(logins, setting)
    assert logins.find("example.org") is None
    logins.keep("example.org", login)
    assert json.loads(helper.read_text())["ServerURL"] == "example.org"
    assert config(logins)["auths"] == {"example.org": {}}
    assert logins.find("example.org") == login
    assert logins.forget("example.org")
    assert not helper.exists()


def test_a_helper_for_one_registry_is_not_asked_about_another(logins: Logins, helper: Path) -> None:
    write(logins, {"credHelpers": {"example.org": "test"}})
    logins.keep("other.org", Login("bob", "secret"))
    assert not helper.exists()
    assert logins.find("other.org") == Login("bob", "secret")


@pytest.mark.parametrize("name", ["none-such", "../../bin/sh"])
def test_a_helper_that_cannot_be_asked_is_named(logins: Logins, helper: Path, name: str) -> None:
    write(logins, {"credsStore": name})
    with pytest.raises(RunnerError, match="credential"):
        logins.find("example.org")


@pytest.mark.parametrize("content", ["{", "[]", '{"auths": []}'])
def test_a_file_that_is_not_dockers_is_named_and_not_overwritten(logins: Logins, content: str) -> None:
    write(logins, content)
    with pytest.raises(RunnerError, match=r"config\.json"):
        logins.find("a")
    with pytest.raises(RunnerError, match=r"config\.json"):
        logins.keep("a", Login("b", "c"))
    assert logins._path.read_text() == content
