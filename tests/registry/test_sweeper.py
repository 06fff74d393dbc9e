"""Uploads that nobody goes on with, and what a crash left: dropped, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, select, update

from registry.metadata import blobs, leftovers, sessions
from registry.metadata.blobs import StoredBlob
from registry.metadata.engine import Database
from registry.metadata.tables import leftover, now, upload_session
from registry.sweeper import Doubt, Sweeper
from storage.base import Checkpoint
from storage.digest import Digest
from storage.errors import StorageError
from storage.filesystem import FilesystemStore
from storage.names import RepositoryName
from tests.services.processes import wait_until

NAME = RepositoryName("org/team/app")
IDLE = 60
#: The clock that stamps files; `time` has no name for it. [clock_gettime(2)]
CLOCK_REALTIME_COARSE = 5


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FilesystemStore]:
    made = FilesystemStore(tmp_path / "store")
    yield made
    await made.close()


@pytest.fixture
async def sweeper(store: FilesystemStore, database: Database) -> AsyncIterator[Sweeper]:
    made = Sweeper(store, database, IDLE, 3600)
    yield made
    await made.stop()


async def put_bytes(store: FilesystemStore, name: str) -> Checkpoint:
    upload = store.resume(store.begin(name, "sha256"))
    await upload.write([name.encode()])
    await upload.suspend()
    return upload.checkpoint()


async def open_session(store: FilesystemStore, database: Database, name: str, idle: float) -> str:
    checkpoint = await put_bytes(store, name)
    await database.note(sessions.create, name, NAME, checkpoint)
    at = now() - int(idle * 1_000_000)
    await database.note(set_times, name, updated_at=at, created_at=at)
    return checkpoint.key


def set_times(connection: Connection, session_id: str, /, **values: int) -> None:
    connection.execute(update(upload_session).where(upload_session.c.id == session_id).values(**values))


async def put_blob(store: FilesystemStore, database: Database, *, row: bool = True) -> str:
    name = secrets.token_hex(8)
    await database.note(sessions.create, name, NAME, store.begin(name, "sha256"))
    session, _ = await database.note(sessions.claim, name, NAME, "writer")
    upload = store.resume(session.checkpoint)
    await upload.write([name.encode()])
    digest = Digest.of(name.encode())
    key = await upload.commit(digest)
    if row:
        await database.write(blobs.finish_upload, name, "writer", NAME, digest, StoredBlob(key, len(name)))
    return key


async def keys(store: FilesystemStore) -> set[str]:
    return {found.key async for found in store.objects()}


def ids(connection: Connection) -> set[str]:
    return set(connection.scalars(select(upload_session.c.id)))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - what is waited for is a row or a file
            await asyncio.sleep(0.005)


def age(store: FilesystemStore, key: str) -> None:
    """Make a file look old. Its ctime cannot be set, so those who look must be told of a later start."""
    os.utime(store.root / key, (1, 1))


async def test_an_idle_upload_is_dropped_with_its_bytes(
    store: FilesystemStore, database: Database, sweeper: Sweeper
) -> None:
    await open_session(store, database, "idle", IDLE + 5)
    young = await open_session(store, database, "young", IDLE - 30)
    assert await sweeper.sweep() == 1
    assert await keys(store) == {young}
    assert await database.read(ids) == {"young"}
    assert await sweeper.sweep() == 0


async def test_an_upload_that_somebody_writes_to_is_kept(
    store: FilesystemStore, database: Database, sweeper: Sweeper
) -> None:
    key = await open_session(store, database, "slow", IDLE + 5)
    await database.note(sessions.claim, "slow", NAME, "writer")
    assert await sweeper.sweep() == 0
    assert await keys(store) == {key}
    assert await database.read(ids) == {"slow"}


async def test_an_upload_whose_writer_died_is_dropped(
    store: FilesystemStore, database: Database, sweeper: Sweeper
) -> None:
    await open_session(store, database, "dead", IDLE + 5)
    await database.note(sessions.claim, "dead", NAME, "writer")
    await database.note(set_times, "dead", claimed_at=now() - sessions.LEASE - 1_000_000)
    assert await sweeper.sweep() == 1
    assert await keys(store) == set()


async def test_an_idle_upload_without_any_bytes_is_dropped(database: Database, sweeper: Sweeper) -> None:
    await database.note(sessions.create, "empty", NAME, Checkpoint("uploads/empty", "sha256"))
    await database.note(set_times, "empty", updated_at=0)
    assert await sweeper.sweep() == 1
    assert await database.read(ids) == set()


async def test_more_idle_uploads_than_one_transaction_takes_are_dropped(database: Database, sweeper: Sweeper) -> None:
    def many(connection: Connection) -> None:
        for number in range(1100):
            sessions.create(connection, f"s{number}", NAME, Checkpoint(f"uploads/s{number}", "sha256"))
        connection.execute(update(upload_session).values(updated_at=0))

    await database.note(many)
    assert await sweeper.sweep() == 1100
    assert await database.read(ids) == set()


async def test_blobs_are_no_concern_of_the_sweep(store: FilesystemStore, database: Database, sweeper: Sweeper) -> None:
    key = await put_blob(store, database)
    await sweeper.sweep()
    assert await keys(store) == {key}


async def test_after_a_crash_what_has_no_row_is_cleared_and_all_else_is_kept(
    store: FilesystemStore, database: Database, sweeper: Sweeper
) -> None:
    known = {await put_blob(store, database), await open_session(store, database, "open", 1)}
    await put_blob(store, database, row=False)
    await put_bytes(store, "without-a-row")
    assert await sweeper.clear(time.time() + 1) == 2
    assert await keys(store) == known


async def test_what_came_after_the_start_is_not_taken_for_a_leftover(
    store: FilesystemStore, database: Database, sweeper: Sweeper
) -> None:
    key = await put_blob(store, database, row=False)
    # Renamed a moment ago, though its bytes are old: an upload that is being published right now.
    age(store, key)
    assert await sweeper.clear(time.time() - 5) == 0
    assert await keys(store) == {key}


async def test_more_leftovers_than_one_look_takes_are_cleared(
    store: FilesystemStore, database: Database, sweeper: Sweeper
) -> None:
    known = await put_blob(store, database)
    for number in range(1203):
        (store.root / f"uploads/left-{number}").touch()
    assert await sweeper.clear(time.time() + 1) == 1203
    assert await keys(store) == {known}


async def test_a_file_that_is_not_ours_does_not_keep_leftovers_from_being_cleared(
    store: FilesystemStore, database: Database, sweeper: Sweeper
) -> None:
    key = await put_blob(store, database, row=False)
    (store.root / key).with_name(".nfs0001").touch()
    await put_bytes(store, "without-a-row")
    await sweeper.clear(time.time() + 1)
    assert not await keys(store) & {key, "uploads/without-a-row"}


@pytest.mark.parametrize(("first", "recover"), [(True, True), (True, False), (False, True), (False, False)])
async def test_the_first_process_sweeps_and_recovers_only_after_a_crash(
    store: FilesystemStore, database: Database, sweeper: Sweeper, first: bool, recover: bool
) -> None:
    await put_bytes(store, "left")
    await open_session(store, database, "idle", IDLE + 5)
    # The coarse clock that stamps files must have ticked on.
    stamped = max([found.modified async for found in store.objects()])
    wait_until(lambda: time.clock_gettime(CLOCK_REALTIME_COARSE) > stamped, "a tick")
    await sweeper.start(first=first, doubt=Doubt(time.time()) if recover else None)
    expected = {"uploads/left", "uploads/idle"}
    expected -= {"uploads/idle"} if first else set()
    expected -= {"uploads/left"} if first and recover else set()

    async def is_done() -> bool:
        return await keys(store) == expected

    await until(is_done)
    await sweeper.stop()
    assert await is_done()


@pytest.fixture
async def odd(store: FilesystemStore, database: Database) -> AsyncIterator[str]:
    """An idle upload whose bytes cannot be unlinked: they are no file."""
    await database.note(sessions.create, "odd", NAME, Checkpoint("uploads/odd", "sha256"))
    await database.note(set_times, "odd", updated_at=0)
    (store.root / "uploads/odd").mkdir()
    yield "uploads/odd"
    (store.root / "uploads/odd").rmdir()


async def test_a_sweep_that_failed_is_tried_again(store: FilesystemStore, database: Database, odd: str) -> None:
    sweeper = Sweeper(store, database, IDLE, 0)
    await sweeper.start(first=True, doubt=None)

    async def is_swept() -> bool:
        return await keys(store) == {odd} and not await database.read(ids)

    await until(is_swept)
    await open_session(store, database, "next", IDLE + 5)
    await until(is_swept)
    await sweeper.stop()


async def test_bytes_that_cannot_be_deleted_do_not_keep_those_of_others(
    store: FilesystemStore, database: Database, sweeper: Sweeper, odd: str
) -> None:
    for number in range(5):
        await open_session(store, database, f"idle-{number}", IDLE + 5)
    with contextlib.suppress(OSError, StorageError):
        await sweeper.sweep()
    assert await keys(store) <= {odd}


async def test_a_sweep_that_is_stopped_ends_soon_and_forgets_nothing(
    store: FilesystemStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        await open_session(store, database, f"idle-{number}", IDLE + 5)
    forget, begun = store.forget, asyncio.Event()

    async def slowly(name: str, kept: str | None = None) -> None:
        begun.set()
        await asyncio.sleep(0.05)
        await forget(name, kept)

    monkeypatch.setattr(store, "forget", slowly)
    stopped = Sweeper(store, database, IDLE, 3600)
    await stopped.start(first=True, doubt=None)
    await begun.wait()
    await stopped.stop()
    left = {key.removeprefix("uploads/") for key in await keys(store)}
    assert 30 < len(left) < 40
    noted = await database.read(lambda connection: leftovers.due(connection, grace=-1))
    assert left <= {each.upload for each in noted}


async def test_what_cannot_be_swept_keeps_nothing_from_being_tidied(
    store: FilesystemStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Sweeper) -> int:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(Sweeper, "sweep", fail)
    await put_bytes(store, "left")
    await database.write(leftovers.add, ["left"])
    await database.write(lambda connection: connection.execute(update(leftover).values(at=1)))
    sweeper = Sweeper(store, database, IDLE, 3600)
    await sweeper.start(first=True, doubt=None)

    async def is_gone() -> bool:
        return not await keys(store)

    await until(is_gone)
    await sweeper.stop()


async def test_a_crash_whose_leftovers_cannot_be_deleted_is_not_settled(
    store: FilesystemStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: str) -> None:
        raise StorageError("not now")

    await put_bytes(store, "left")
    monkeypatch.setattr(store, "delete", fail)
    settled: list[None] = []
    sweeper = Sweeper(store, database, IDLE, 3600)
    await sweeper.start(first=True, doubt=Doubt(time.time() + 1, 0, lambda: settled.append(None)))

    async def is_tried() -> bool:
        return sweeper._stuck == 1

    await until(is_tried)
    await sweeper.stop()
    assert not settled


async def test_what_a_dead_run_left_is_settled_when_it_is_gone_and_not_before(
    store: FilesystemStore, database: Database
) -> None:
    await put_bytes(store, "left")
    settled: list[bool] = []
    hurried = Sweeper(store, database, IDLE, 3600)
    await hurried.start(first=True, doubt=Doubt(time.time() + 1, 60, lambda: settled.append(False)))
    await asyncio.sleep(0.05)
    await hurried.stop()
    assert not settled
    assert await keys(store) == {"uploads/left"}
    patient = Sweeper(store, database, IDLE, 3600)
    await patient.start(first=True, doubt=Doubt(time.time() + 1, 0.01, lambda: settled.append(True)))

    async def is_settled() -> bool:
        return bool(settled)

    await until(is_settled)
    await patient.stop()
    assert settled == [True]
    assert await keys(store) == set()


async def test_whatever_fails_once_in_a_sweep_the_next_one_comes(
    store: FilesystemStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[None] = []

    async def fail(_: Sweeper) -> int:
        tries.append(None)
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(Sweeper, "sweep", fail)
    sweeper = Sweeper(store, database, IDLE, 0)
    await sweeper.start(first=True, doubt=None)

    async def is_tried_again() -> bool:
        return len(tries) > 2

    await until(is_tried_again)
    await sweeper.stop()


async def test_leftovers_that_cannot_be_deleted_let_younger_ones_by(
    store: FilesystemStore, database: Database, sweeper: Sweeper
) -> None:
    stuck = [f"stuck-{number:03}" for number in range(500)]
    for name in stuck:
        (store.root / "uploads" / name).mkdir()
    await put_bytes(store, "younger")
    long_ago = now() - 2 * leftovers.GRACE
    await database.write(leftovers.add, [*stuck, "younger"])
    await database.write(lambda connection: connection.execute(update(leftover).values(at=long_ago)))
    await database.write(
        lambda connection: connection.execute(
            update(leftover).where(leftover.c.upload == "younger").values(at=long_ago + 1)
        )
    )
    await sweeper.tidy()
    assert not (store.root / "uploads/younger").exists()
    assert len(await database.read(lambda connection: leftovers.due(connection, grace=-1, limit=1000))) == 500
