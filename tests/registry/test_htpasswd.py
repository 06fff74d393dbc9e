"""An htpasswd file whose users are accounts here: what it may say, and that accounts follow it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import bcrypt
import pytest
from structlog.testing import capture_logs

from registry.access.accounts import Follower, make_accounts
from registry.access.passwords import hash_password, read_htpasswd
from registry.config import AccountSettings
from registry.errors import AccountsError, ConfigurationError
from registry.metadata import accounts, rules
from registry.metadata.engine import Database
from tests.conftest import Start
from tests.registry.accounts import NAME, PASSWORD, Registry, basic
from tests.registry.talk import ask
from tests.registry.test_server import refused

UPLOADS = f"/v2/{NAME}/blobs/uploads/"
OTHER = "another horse"
#: Lines that other tools, and other options of the same one, make of a password; and what is not even that.
OTHERS = {
    "md5": "bob:$apr1$ZjTqBB3f$IF9gdYAGlMrs2fuINjHsz.",
    "sha": "bob:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=",
    "crypt": "bob:rqXexS6ZhobKA",
    "plain": "bob:correct horse",
    "argon2": f"bob:{hash_password(PASSWORD)}",
    "no hash": "bob:",
    "no colon": "bob",
}


def line(name: str, password: str = PASSWORD, kind: str = "2y") -> str:
    """Return a line as `htpasswd -B` writes it, of the least cost."""
    hashed = bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(4)).decode()
    return f"{name}:{hashed.replace('$2b$', f'${kind}$')}\n"


def write(users: Path, *content: str | bytes) -> None:
    users.write_bytes(b"".join(each.encode() if isinstance(each, str) else each for each in content))


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    write(path, line("alice"))
    return path


@pytest.fixture
async def registry(registry: Registry, users: Path) -> Registry:
    """One with alice of the file, who may push."""
    await make_accounts(registry.database, AccountSettings(htpasswd=str(users)))
    await registry.database.write(rules.grant, "org", "push", "alice", "")
    return registry


@pytest.fixture
async def follower(registry: Registry, users: Path) -> Follower:
    made = Follower(registry.database, users)
    await made.read()
    return made


async def follow(follower: Follower) -> None:
    """Look until the file is read: it must stand still between two looks."""
    await follower.look()
    await follower.look()


async def status(registry: Registry, name: str, password: str = PASSWORD) -> int:
    """Return what somebody is answered who begins a push."""
    return (await ask(registry.client, "POST", UPLOADS, headers=basic(name, password))).status


async def comes(database: Database, name: str) -> None:
    """Wait until there is an account of a name."""
    for _ in range(2000):
        if await database.read(accounts.find, name):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{name} did not come")


async def state(database: Database, name: str) -> accounts.Account:
    found = await database.read(accounts.find, name)
    assert found is not None
    return found


# --- what it may say -----------------------------------------------------------------------------------------


def test_users_are_named_by_lines_of_bcrypt_and_anything_else_there_is_refused(users: Path) -> None:
    hashed = {kind: line(kind, kind=kind).partition(":")[2].strip() for kind in ("2y", "2b", "2a")}
    text = "".join(f"{kind}:{each}\r\n\n# a comment\n" for kind, each in hashed.items())
    write(users, text.rstrip())
    assert read_htpasswd(users) == hashed


@pytest.mark.parametrize("kind", OTHERS)
def test_a_line_of_another_kind_is_refused_and_not_shown(users: Path, kind: str) -> None:
    write(users, line("alice"), OTHERS[kind])
    with pytest.raises(ConfigurationError, match="users, line 2: not a bcrypt hash: make it with htpasswd -B") as error:
        read_htpasswd(users)
    assert "horse" not in str(error.value)
    assert "$" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OTHERS["md5"], "users, line 1: not a bcrypt hash: make it with htpasswd -B\n"),
        (line("bob") + line("Bob"), "users: there is an account bob already\n"),
        (line("everybody"), "users: 'everybody' cannot be a name"),
        (None, "users: No such file or directory\n"),
    ],
    ids=["another kind", "two of a name", "no name", "gone"],
)
def test_a_file_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path, text: str | None, said: str) -> None:
    users = tmp_path / "users"
    if text is not None:
        write(users, text)
    assert said in refused(tmp_path, "--listen", "127.0.0.1:0", HYTHE_ACCOUNTS__HTPASSWD=str(users))


@pytest.mark.parametrize("kind", ["2y", "2b", "2a"])
async def test_who_is_named_in_it_logs_in(registry: Registry, follower: Follower, users: Path, kind: str) -> None:
    write(users, line("alice", OTHER, kind))
    await follow(follower)
    assert await status(registry, "alice", OTHER) == 202
    assert await status(registry, "alice", OTHER + "s") == 401


async def test_of_a_long_password_72_bytes_count(registry: Registry, follower: Follower, users: Path) -> None:
    # As for everybody who checks it by bcrypt; the end of them may lie within a letter.
    password = "x" * 71 + "é" + "y" * 100
    write(users, line("alice", password))
    await follow(follower)
    assert await status(registry, "alice", password) == 202
    assert await status(registry, "alice", password[:71]) == 401
    assert await status(registry, "alice", "y" + password[1:]) == 401
    assert await status(registry, "alice", password * 10) == 401


# --- that it is followed -------------------------------------------------------------------------------------


async def test_who_is_added_to_it_has_an_account(registry: Registry, follower: Follower, users: Path) -> None:
    write(users, line("alice"), line("bob"))
    await follow(follower)
    assert await status(registry, "bob") == 403
    await registry.database.write(rules.grant, "org", "push", "bob", "")
    assert await status(registry, "bob") == 202


async def test_a_password_that_changes_there_ends_what_the_old_one_gave(
    registry: Registry, follower: Follower, users: Path
) -> None:
    token = await registry.bearer("alice")
    assert (await ask(registry.client, "POST", UPLOADS, headers=token)).status == 202
    write(users, line("alice", OTHER))
    await follow(follower)
    assert (await ask(registry.client, "POST", UPLOADS, headers=token)).status == 401
    assert await status(registry, "alice") == 401
    assert await status(registry, "alice", OTHER) == 202


async def test_who_is_taken_out_of_it_is_disabled_at_once_and_may_what_he_might_if_he_comes_back(
    registry: Registry, follower: Follower, users: Path
) -> None:
    personal = await registry.personal("alice")
    before = line("alice")
    write(users, before)
    await follow(follower)
    assert await status(registry, "alice") == 202
    write(users, "")
    await follow(follower)
    assert await status(registry, "alice") == 401
    assert await status(registry, "alice", personal) == 401
    write(users, before)
    await follow(follower)
    assert await status(registry, "alice") == 202
    assert await status(registry, "alice", personal) == 202


async def test_who_was_disabled_by_hand_stays_so_whatever_the_file_says(
    registry: Registry, follower: Follower, users: Path
) -> None:
    await registry.database.write(accounts.set_disabled, "alice", disabled=True)
    await follower.read()
    write(users, line("alice", OTHER))
    await follow(follower)
    assert await status(registry, "alice", OTHER) == 401
    write(users, "")
    await follow(follower)
    write(users, line("alice", OTHER))
    await follow(follower)
    assert await status(registry, "alice", OTHER) == 401
    await registry.database.write(accounts.set_disabled, "alice", disabled=False)
    assert await status(registry, "alice", OTHER) == 202


async def test_a_file_that_is_still_being_written_is_left_alone(
    registry: Registry, follower: Follower, users: Path
) -> None:
    for text in ("", line("bob"), line("bob") + line("alice")):
        write(users, text)
        await follower.look()
        assert await status(registry, "alice") == 202
    await follower.look()
    assert await registry.database.read(accounts.find, "bob") is not None


@pytest.mark.parametrize("kind", ["gone", "cut", "of another kind", "no text", "two of a name"])
async def test_a_file_that_cannot_be_used_changes_nothing_and_that_is_said(
    registry: Registry, follower: Follower, users: Path, kind: str
) -> None:
    contents: dict[str, list[str | bytes]] = {
        "cut": [line("bob"), line("alice", OTHER)[:-20]],
        "of another kind": [line("bob"), OTHERS["md5"]],
        "no text": [line("bob"), b"\xff"],
        "two of a name": [line("bob"), line("BOB")],
    }
    if kind in contents:
        write(users, *contents[kind])
    else:
        await asyncio.to_thread(users.unlink)
    with capture_logs() as said:
        await follow(follower)
    errors = [event["error"] for event in said if event["log_level"] == "error"]
    assert errors
    assert all(str(users) in error for error in errors)
    assert await status(registry, "alice") == 202
    assert await registry.database.read(accounts.find, "bob") is None
    write(users, line("alice"), line("bob"))
    await follow(follower)
    assert await status(registry, "bob") == 403


@pytest.mark.parametrize("name", ["root", "Root"])
async def test_an_account_of_our_own_stays_as_it_is_and_that_is_said(
    registry: Registry, follower: Follower, users: Path, name: str
) -> None:
    write(users, line("alice"), line(name, OTHER))
    with capture_logs() as said:
        await follow(follower)
    assert [event["name"] for event in said if event["log_level"] == "warning"] == [name]
    assert await status(registry, "root", OTHER) == 401
    assert await status(registry, "root") == 202
    write(users, line("alice"))
    await follow(follower)
    assert await status(registry, "root") == 202


async def test_a_password_of_the_file_is_changed_there_alone(registry: Registry) -> None:
    with pytest.raises(AccountsError, match="comes from the file"):
        await registry.database.write(accounts.set_password, "alice", "hash")
    with pytest.raises(AccountsError, match="comes from the file"):
        await registry.database.write(accounts.remove, "alice")
    # Nor is its hash exchanged for one of our own when he logs in.
    before = await state(registry.database, "alice")
    assert await status(registry, "alice") == 202
    assert (await state(registry.database, "alice")).password == before.password


async def test_a_server_follows_it_by_itself(
    start: Start, database: Database, users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.access.accounts._PAUSE", 0.02)
    await start(accounts={"htpasswd": str(users)})
    for name in ("alice", "bob", "carol"):
        write(users, line(name))
        await comes(database, name)
