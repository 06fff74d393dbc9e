"""The keys that tokens are signed by: one after another, for all processes of a registry."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import jwt
import pytest
import requests

from registry.access.signing import GRACE, InvalidToken, Signer
from registry.config import AccountSettings
from registry.metadata import keys
from registry.metadata.engine import Database, open_database
from tests.services.clock import Clock
from tests.services.processes import hythe_server

HOUR, DAY = 3600, 86400
#: A token may be good for so long.
LONGEST = DAY
SETTINGS = AccountSettings(key_days=30, token_seconds=LONGEST)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that is behind by so much that no test gets to the present, in which tokens are not valid yet."""
    made = Clock(monkeypatch, "registry.access.signing")
    made.advance(-100 * DAY)
    monkeypatch.setattr("registry.metadata.keys.now", lambda: made.time_ns() // 1000)
    return made


@pytest.fixture
async def signers(database: Database, database_url: str, clock: Clock) -> AsyncIterator[tuple[Signer, Signer]]:
    """Those of two processes."""
    other = open_database(database_url)
    yield Signer(database, SETTINGS), Signer(other, SETTINGS)
    await other.close()


async def sign(signer: Signer) -> str:
    return await signer.sign("alice", LONGEST, {})


def key_of(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


async def kept(database: Database) -> list[str]:
    return [key.id for key in await database.read(keys.everything)]


async def test_each_process_reads_what_another_one_signed_at_once(signers: tuple[Signer, Signer], clock: Clock) -> None:
    one, other = signers
    for _ in range(2):
        for signer, reader in ((one, other), (other, one)):
            assert (await reader.read(await sign(signer)))["sub"] == "alice"
        # A new key comes, which none of them has seen.
        clock.advance(31 * DAY)


async def test_requests_that_come_at_once_with_a_key_that_is_new_here_are_all_read(
    signers: tuple[Signer, Signer],
) -> None:
    one, other = signers
    token = await sign(one)
    read = await asyncio.gather(*[other.read(token) for _ in range(10)])
    assert [claims["sub"] for claims in read] == ["alice"] * 10


async def test_after_its_days_a_new_key_signs_and_what_the_old_one_signed_stays_good(
    signers: tuple[Signer, Signer], database: Database, clock: Clock
) -> None:
    one, other = signers
    first = await sign(one)
    clock.advance(30 * DAY - HOUR)
    last = await sign(one)
    assert key_of(last) == key_of(first)
    clock.advance(2 * HOUR)
    fresh = await sign(one)
    assert key_of(fresh) != key_of(first)
    assert await kept(database) == [key_of(fresh), key_of(first)]
    for reader in (one, other, Signer(database, SETTINGS)):
        for token in (last, fresh):
            assert await reader.read(token)
    assert key_of(await sign(other)) == key_of(fresh)


async def test_a_key_is_kept_as_long_as_what_it_signed_may_be_asked_about(database: Database, clock: Clock) -> None:
    first = await sign(Signer(database, SETTINGS))
    clock.advance(30 * DAY - 60)
    last = await sign(Signer(database, SETTINGS))
    clock.advance(60)
    # What a token began may be finished for a while after its end.
    for seconds, is_kept in ((LONGEST + GRACE - 60, True), (HOUR, False)):
        clock.advance(seconds)
        restarted = Signer(database, SETTINGS)
        fresh = await sign(restarted)
        assert (key_of(first) in await kept(database)) == is_kept
        assert await restarted.read(fresh)
        if is_kept:
            assert await restarted.read(last)
        else:
            with pytest.raises(InvalidToken, match="a key that is not known here"):
                await restarted.read(last)


async def test_two_that_need_a_new_key_at_the_same_moment_make_one(
    signers: tuple[Signer, Signer], database: Database, clock: Clock
) -> None:
    for number in (1, 2):
        tokens = await asyncio.gather(*[sign(signer) for signer in signers * 3])
        assert len({key_of(token) for token in tokens}) == 1
        assert len(await kept(database)) == number
        clock.advance(31 * DAY)


def test_the_private_half_of_a_key_is_in_no_log(tmp_path: Path) -> None:
    environment = {"HYTHE_ACCOUNTS__ADMIN_PASSWORD": "the first password", "HYTHE_LOG__LEVEL": "debug"}
    with hythe_server(tmp_path, environment=environment) as server:
        refuse = "CREATE TRIGGER refuse AFTER INSERT ON signing_key BEGIN SELECT RAISE(ABORT, 'refused'); END"
        for statement, status in ((refuse, 500), ("DROP TRIGGER refuse", 200)):
            with closing(sqlite3.connect(server.data / "hythe.db")) as connection:
                connection.execute(statement)
            assert requests.get(f"{server.url}/v2/token", timeout=20).status_code == status
        with closing(sqlite3.connect(server.data / "hythe.db")) as connection:
            ((private,),) = connection.execute("SELECT private FROM signing_key")
    log = server.output.read_text()
    assert "refused" in log
    assert "PRIVATE KEY" not in log
    assert not [line for line in private.splitlines() if line in log]
