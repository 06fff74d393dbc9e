"""The administrator whom the configuration names: made where there is no account at all, and left alone ever after."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import bcrypt
import pytest
import requests

from registry.access.accounts import make_accounts
from registry.access.passwords import hash_password
from registry.config import AccountSettings
from registry.errors import ConfigurationError
from registry.metadata import accounts, audit, principals
from registry.metadata.accounts import Account
from registry.metadata.engine import Database, open_database
from tests.services.processes import hythe_server

PASSWORD = "the first password"
BOSS = AccountSettings(admin="boss", admin_password=PASSWORD)


async def everyone(database: Database) -> list[Account]:
    return await database.read(accounts.everyone)


async def test_an_administrator_is_made_where_there_is_no_account(database: Database) -> None:
    assert not await make_accounts(database, AccountSettings(admin="boss"))
    assert await everyone(database) == []
    assert await make_accounts(database, BOSS)
    found = await database.read(principals.by_name, "boss")
    assert found is not None
    assert found.rules == [("", "admin")]


async def test_he_and_those_of_a_file_are_in_the_audit_once(database: Database, tmp_path: Path) -> None:
    users = tmp_path / "users"
    hashed = bcrypt.hashpw(b"another one", bcrypt.gensalt(4)).decode()
    await asyncio.to_thread(users.write_text, f"alice:{hashed}\n")
    for _ in range(2):
        await make_accounts(database, AccountSettings(admin="boss", admin_password=PASSWORD, htpasswd=str(users)))
    found = await database.read(audit.find, since=0, user=None, repository=None, before=None, limit=9)
    assert [(event.credential, event.action, event.target, event.detail) for _, event in reversed(found)] == [
        ("accounts.admin_password", "user.add", "boss", "administrator"),
        ("accounts.htpasswd", "user.follow", "", "alice"),
    ]


async def test_where_there_is_any_account_nobody_is_made(database: Database) -> None:
    await database.write(accounts.add, "alice", accounts.USER, hash_password("another one"), admin=True)
    assert await make_accounts(database, BOSS)
    assert [found.name for found in await everyone(database)] == ["alice"]


async def test_it_is_not_changed_by_a_later_start(database: Database) -> None:
    await make_accounts(database, BOSS)
    await database.write(accounts.add, "alice", accounts.USER, hash_password("another one"), admin=True)
    await database.write(accounts.set_disabled, "boss", disabled=True)
    before = await everyone(database)
    await make_accounts(database, AccountSettings(admin="boss", admin_password="quite another"))
    assert await everyone(database) == before


async def test_servers_that_start_at_once_make_one(database: Database, database_url: str) -> None:
    other = open_database(database_url)
    try:
        second = AccountSettings(admin="chief", admin_password=PASSWORD)
        assert all(await asyncio.gather(make_accounts(database, BOSS), make_accounts(other, second)))
    finally:
        await other.close()
    assert len(await everyone(database)) == 1


async def test_users_of_an_htpasswd_file_do_not_take_its_place(database: Database, tmp_path: Path) -> None:
    users = tmp_path / "users"
    hashed = bcrypt.hashpw(b"another one", bcrypt.gensalt(4)).decode()
    await asyncio.to_thread(users.write_text, f"alice:{hashed}\nboss:{hashed}\n")
    await make_accounts(database, AccountSettings(admin="boss", admin_password=PASSWORD, htpasswd=str(users)))
    assert {found.name: found.source for found in await everyone(database)} == {"alice": "htpasswd", "boss": "own"}


@pytest.mark.parametrize(("admin", "password"), [("boss", "2short"), ("boss", "x" * 1025), ("users", PASSWORD)])
async def test_one_that_cannot_be_made_is_refused_without_a_word_of_its_password(
    database: Database, admin: str, password: str
) -> None:
    with pytest.raises(ConfigurationError, match=r"^accounts\.admin, accounts\.admin_password: ") as error:
        await make_accounts(database, AccountSettings(admin=admin, admin_password=password))
    assert password not in str(error.value)
    assert await everyone(database) == []


def test_its_password_is_in_no_log_in_no_file_and_in_nothing_that_is_printed(tmp_path: Path) -> None:
    named = {"HYTHE_ACCOUNTS__ADMIN": "boss", "HYTHE_ACCOUNTS__ADMIN_PASSWORD": PASSWORD, "HYTHE_LOG__LEVEL": "debug"}
    with hythe_server(tmp_path, environment=named) as server:
        for password, status in ((PASSWORD, 200), (f"not {PASSWORD}", 401)):
            url = f"{server.url}/v2/token?service=hythe&offline_token=true"
            assert requests.get(url, auth=("boss", password), timeout=20).status_code == status
    checked = subprocess.run(
        [sys.executable, "-m", "hythe", "config", "check"],
        check=True,
        capture_output=True,
        env={**os.environ, **named},
        timeout=60,
    )
    said = {"check": checked.stdout + checked.stderr, "log": server.output.read_bytes()}
    assert b"the first account was made" in said["log"]
    said |= {str(path): path.read_bytes() for path in server.data.rglob("*") if path.is_file()}
    assert [name for name, text in said.items() if PASSWORD.encode() in text] == []
