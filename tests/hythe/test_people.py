"""The commands about who may do what: on the database here, and on a registry elsewhere."""

from __future__ import annotations

import contextlib
import http.server
import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import bcrypt
import pytest
import requests

from registry.lock import held
from tests.hythe.test_cli import hythe
from tests.services.processes import HytheServer, hythe_server

PASSWORD = "correct horse"


@dataclass
class Desk:
    """Where somebody sits who may write to the database; and what he is told."""

    data: Path

    def run(self, *arguments: str, code: int = 0, standard_input: str = PASSWORD) -> str:
        """Run a command; return what it printed, on standard error where it fails as expected."""
        done = hythe(*arguments, "--data", str(self.data), standard_input=standard_input)
        assert done.returncode == code, done.stderr
        assert not (done.stderr if code == 0 else done.stdout)
        return done.stderr if code else done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def execute(self, sql: str) -> None:
        with contextlib.closing(sqlite3.connect(self.data / "hythe.db")) as connection, connection:
            connection.execute(sql)

    def content(self) -> list[str]:
        """Return all there is in the database."""
        with contextlib.closing(sqlite3.connect(self.data / "hythe.db")) as connection:
            return list(connection.iterdump())


def make_desk(directory: Path) -> Desk:
    made = Desk(directory / "data")
    made.run("user", "add", "--admin", "alice", "--password-stdin")
    made.run("user", "add", "bob", "--password-stdin")
    return made


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_desk(tmp_path)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """For commands that change nothing."""
    return make_desk(tmp_path_factory.mktemp("quiet"))


@pytest.fixture
def served(desk: Desk, tmp_path: Path) -> Iterator[HytheServer]:
    with hythe_server(tmp_path) as server:
        yield server


def status(server: HytheServer, name: str, password: str = PASSWORD, path: str = "/v2/") -> int:
    return requests.get(server.url + path, auth=(name, password), timeout=30).status_code


def test_the_first_account_must_be_an_administrator(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "data")
    assert "add --admin" in desk.run("user", "add", "bob", "--password-stdin", code=1)
    assert "bob is a user now" in desk.run("user", "add", "bob", "--admin", "--password-stdin")


def test_a_database_of_an_older_version_is_left_alone_while_a_server_uses_it(desk: Desk) -> None:
    desk.execute("UPDATE alembic_version SET version_num = '0002'")
    before = desk.content()
    with held([desk.data / "hythe.lock"]):
        assert "another server uses the data" in desk.run("user", "list", code=1)
    assert desk.content() == before


def test_users_are_listed_disabled_enabled_and_removed(desk: Desk, served: HytheServer) -> None:
    assert status(served, "bob") == 200
    desk.run("user", "disable", "bob")
    assert [(each["name"], each["is_disabled"]) for each in desk.json("user", "list")] == [
        ("alice", False),
        ("bob", True),
    ]
    assert status(served, "bob") == 401
    desk.run("user", "enable", "bob")
    assert status(served, "bob") == 200
    desk.run("user", "password", "bob", "--password-stdin", standard_input="another one\n")
    assert status(served, "bob") == 401
    assert status(served, "bob", "another one") == 200
    assert "removed" in desk.run("user", "remove", "bob")
    assert status(served, "bob", "another one") == 401
    assert [each["name"] for each in desk.json("user", "list")] == ["alice"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["user", "add", "bob", "--password-stdin"], "there is an account bob already"),
        (["user", "add", "BOB", "--password-stdin"], "there is an account bob already"),
        (["user", "add", "every body", "--password-stdin"], "cannot be a name"),
        (["user", "add", "everybody", "--password-stdin"], "cannot be a name"),
        (["user", "remove", "alice"], "nobody could administer"),
        (["user", "disable", "alice"], "nobody could administer"),
        (["user", "password", "carol", "--password-stdin"], "there is no account carol"),
        (["team", "join", "dev", "bob"], "there is no team dev"),
        (["grant", "push", "org", "carol"], "there is no account carol"),
        (["grant", "push", "", "bob"], "is not a repository name"),
        (["grant", "push", "Org", "bob"], "is not a repository name"),
        (["revoke", "push", "org", "bob"], "there is no rule"),
        (["revoke", "admin", "/", "alice"], "nobody could administer"),
        (["token", "create", "build"], "--user"),
        (["token", "create", "build", "--user", "bob", "--scope", "org"], "a scope must look like"),
        (["token", "revoke", "99"], "there is no token 99"),
        (["audit", "--since", "yesterday"], "--since must look like"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_changes_nothing(
    quiet: Desk, command: list[str], reason: str
) -> None:
    before = quiet.content()
    said = quiet.run(*command, code=1)
    assert reason in said
    assert said.startswith("hythe: ")
    assert said.count("\n") == 1
    assert quiet.content() == before


@pytest.mark.parametrize("command", [["user", "list"], ["grants"], ["audit"], ["read-only"]])
def test_nobody_looks_for_something_in_a_database_that_is_not_there(tmp_path: Path, command: list[str]) -> None:
    said = Desk(tmp_path / "data").run(*command, code=1)
    assert f"there is no {tmp_path}/data/hythe.db" in said
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_nobody_is_asked_for_a_password(desk: Desk) -> None:
    assert "--password-stdin" in desk.run("user", "add", "carol", code=2)


def test_a_password_that_is_too_short_is_refused(desk: Desk) -> None:
    said = desk.run("user", "add", "carol", "--password-stdin", code=1, standard_input="short")
    assert "8 to 1024 characters" in said


def test_teams_are_made_joined_left_and_removed(desk: Desk) -> None:
    desk.run("team", "add", "dev")
    desk.run("team", "join", "dev", "alice", "bob")
    desk.run("grant", "push", "org", "team:dev")
    assert desk.json("team", "list") == [{"name": "dev", "members": ["alice", "bob"]}]
    desk.run("team", "leave", "dev", "alice")
    assert {"name": "bob", "rule": "push on org to team:dev"} in desk.json("who-can", "push", "org/app")
    desk.run("team", "remove", "dev")
    assert desk.json("team", "list") == []
    assert [each["name"] for each in desk.json("who-can", "push", "org/app")] == ["alice"]


def test_a_rule_is_given_listed_explained_and_taken_back(desk: Desk) -> None:
    assert desk.run("grant", "push", "org", "bob") == "bob has push on org, and on all below it\n"
    assert [(each["node"], each["right"], each["subject"]) for each in desk.json("grants", "org/app")] == [
        ("/", "admin", "alice"),
        ("org", "push", "bob"),
    ]
    assert desk.json("grants", "other")[1:] == []
    lines = desk.run("who-can", "pull", "org/app").splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["alice", "admin", "on", "/", "to", "alice"],
        ["bob", "push", "on", "org", "to", "bob"],
    ]
    desk.run("revoke", "push", "org", "bob")
    assert len(desk.json("grants")) == 1


def test_a_robot_works_by_its_token_until_that_is_revoked(desk: Desk, served: HytheServer) -> None:
    desk.run("user", "add", "--robot", "ci")
    desk.run("grant", "push", "org", "ci")
    token = desk.run("token", "create", "build", "--user", "ci", "--scope", "pull:org", "--days", "30").strip()
    assert status(served, "ci", token) == 200
    (kept,) = desk.json("token", "list", "--user", "ci")
    assert (kept["owner"], kept["name"], kept["scope"]) == ("ci", "build", ["pull:org"])
    assert kept["used_at"]
    assert token not in desk.run("token", "list")
    assert token not in (desk.data.parent / "hythe.log").read_text()
    desk.run("token", "revoke", str(kept["id"]))
    assert status(served, "ci", token) == 401


def test_users_of_an_htpasswd_file_are_imported_with_their_passwords(
    desk: Desk, served: HytheServer, tmp_path: Path
) -> None:
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    (tmp_path / "users").write_text(f"# ours\ncarol:{hashed}\nbob:{hashed}\n")
    assert desk.json("user", "import", str(tmp_path / "users")) == {"imported": ["carol"], "left": ["bob"]}
    assert status(served, "carol") == 200
    (tmp_path / "users").write_text("dave:{SHA}fEqNCco3Yq9h5ZUglD3CZJT4lBs=\n")
    assert "not a bcrypt hash" in desk.run("user", "import", str(tmp_path / "users"), code=1)


def test_maintenance_is_switched_on_told_and_switched_off(desk: Desk, served: HytheServer) -> None:
    url = f"{served.url}/v2/org/app/blobs/uploads/"
    desk.run("read-only", "on", "--reason", "the disk is being moved")
    assert desk.run("read-only") == "read-only: the disk is being moved\n"
    answer = requests.post(url, auth=("alice", PASSWORD), timeout=30)
    assert answer.status_code == 503
    assert "the disk is being moved" in answer.text
    desk.run("read-only", "off")
    assert requests.post(url, auth=("alice", PASSWORD), timeout=30).status_code == 202


def test_the_audit_is_shown_by_time_user_and_repository(desk: Desk, served: HytheServer) -> None:
    desk.run("grant", "pull", "org", "bob")
    requests.post(f"{served.url}/v2/org/app/blobs/uploads/", auth=("bob", PASSWORD), timeout=30)
    served.stop()
    refused = desk.json("audit", "--user", "bob")
    assert [(event["action"], event["outcome"], event["repository"]) for event in refused] == [
        ("push", "refused", "org/app")
    ]
    assert [event["action"] for event in desk.json("audit", "--repo", "org")] == ["grant", "push"]
    assert desk.json("audit", "--since", "2999-01-01") == []
    assert [event["action"] for event in desk.json("audit", "--limit", "1")] == ["push"]
    assert "bob" in desk.run("audit").splitlines()[-1]


def elsewhere(server: HytheServer, *arguments: str, user: str = "alice", password: str = PASSWORD) -> Any:
    """Run a command on a registry by its API; return its JSON, or what went wrong."""
    environment = {"HYTHE_USER": user, "HYTHE_PASSWORD": password}
    done = hythe(*arguments, "--server", server.url, "--json", **environment)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Leads to another host, and remembers what came there."""

    came: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if self.path == "/there":
            self.came.append(self.headers.get("Authorization", ""))
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_port}/there")  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_password_goes_to_nobody_but_the_registry(desk: Desk) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        done = hythe(
            "ls", "--server", f"http://127.0.0.1:{server.server_port}", HYTHE_USER="alice", HYTHE_PASSWORD=PASSWORD
        )
        server.shutdown()
        thread.join()
    assert done.returncode == 1
    assert "302" in done.stderr
    assert Elsewhere.came == []


def test_rights_and_tokens_are_handed_on_without_the_database(desk: Desk, served: HytheServer) -> None:
    desk.run("grant", "admin", "org", "bob")
    desk.run("user", "add", "carol", "--password-stdin")
    assert elsewhere(served, "grant", "push", "org/app", "carol", user="bob") == {
        "node": "org/app",
        "right": "push",
        "subject": "carol",
    }
    assert "does not administer other" in elsewhere(served, "grant", "push", "other", "carol", user="bob")
    assert {"name": "carol", "rule": "push on org/app to carol"} in elsewhere(
        served, "who-can", "push", "org/app", user="bob"
    )
    assert elsewhere(served, "grants", "org/app", user="bob") == desk.json("grants", "org/app")
    assert "which node" in elsewhere(served, "grants")
    made = elsewhere(
        served, "token", "create", "laptop", "--scope", "pull:org", "--scope", "push:org/app", user="carol"
    )
    assert status(served, "carol", made["token"]) == 200
    (kept,) = elsewhere(served, "token", "list", user="carol")
    assert kept["scope"] == ["pull:org", "push:org/app"]
    assert "everybody makes his own" in elsewhere(served, "token", "create", "x", "--user", "alice", user="carol")
    assert "there is no token" in elsewhere(served, "token", "revoke", str(kept["id"]), user="bob")
    assert elsewhere(served, "token", "revoke", str(kept["id"]), user="carol")["name"] == "laptop"
    assert status(served, "carol", made["token"]) == 401
    elsewhere(served, "revoke", "push", "org/app", "carol", user="bob")
    assert "wrong" in elsewhere(served, "grants", "org", user="bob", password="not the password")
