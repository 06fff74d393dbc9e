"""Units of work on a SQLite file: one writer, which commits together what stands together."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, select, text
from sqlalchemy.exc import IntegrityError

from registry.errors import (
    ManifestBlobUnknown,
    MetadataUnavailable,
    NameUnknown,
)
from registry.metadata import blobs, manifests, sessions
from registry.metadata.blobs import StoredBlob
from registry.metadata.engine import open_database
from registry.metadata.manifests import PushedManifest
from registry.metadata.schema import upgrade
from registry.metadata.sqlite import SqliteDatabase
from registry.metadata.tables import blob, upload_session
from storage.base import Checkpoint
from storage.digest import Digest
from storage.names import RepositoryName
from storage.oci import parse_manifest
from tests.content import make_image

NAME = RepositoryName("org/team/app")
OTHER = RepositoryName("other")


def add(connection: Connection, session_id: str) -> None:
    sessions.create(connection, session_id, NAME, Checkpoint(f"uploads/{session_id}", "sha256"))


def add_twice(connection: Connection, session_id: str) -> None:
    add(connection, session_id)
    add(connection, session_id)


def add_and_fail(connection: Connection, session_id: str) -> None:
    add(connection, session_id)
    raise NameUnknown


def ids(connection: Connection) -> set[str]:
    return set(connection.scalars(select(upload_session.c.id)))


def synchronous(connection: Connection) -> int:
    return int(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())


FULL, NORMAL = 2, 1


def opened(url: str) -> SqliteDatabase:
    database = open_database(url)
    assert isinstance(database, SqliteDatabase)
    return database


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[SqliteDatabase]:
    url = f"sqlite:///{tmp_path / 'hythe.db'}"
    upgrade(url)
    made = opened(url)
    yield made
    await made.close()


class Blocked:
    """The writer, kept busy: what is queued meanwhile is one batch."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self._began, self._may_end = threading.Event(), threading.Event()

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._database.note(self._wait))
        await asyncio.to_thread(self._began.wait, 30)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)  # the tasks that were made meanwhile queue their units
        self._may_end.set()
        await self._task

    def _wait(self, _: Connection) -> None:
        self._began.set()
        self._may_end.wait(30)


async def batch(database: SqliteDatabase, *units: tuple[Callable[..., Any], Any]) -> list[Any]:
    async with Blocked(database):
        tasks = [asyncio.create_task(database.write(unit, argument)) for unit, argument in units]
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_unit_that_fails_in_a_batch_undoes_itself_alone(database: SqliteDatabase) -> None:
    results = await batch(database, (add, "a"), (add_and_fail, "b"), (add, "c"), (add_twice, "d"), (add, "e"))
    assert [type(result) for result in results] == [type(None), NameUnknown, type(None), IntegrityError, type(None)]
    assert await database.read(ids) == {"a", "c", "e"}


@pytest.mark.parametrize(("changes_first", "runs"), [(False, 1), (True, 2)])
async def test_a_unit_that_fails_before_it_changed_anything_costs_the_others_nothing(
    database: SqliteDatabase, changes_first: bool, runs: int
) -> None:
    ran: list[str] = []

    def counted(connection: Connection, name: str) -> None:
        ran.append(name)
        add(connection, name)

    def failing(connection: Connection, name: str) -> None:
        if changes_first:
            add(connection, name)
        raise NameUnknown

    results = await batch(database, (counted, "a"), (failing, "b"), (counted, "c"))
    assert [type(result) for result in results] == [type(None), NameUnknown, type(None)]
    assert await database.read(ids) == {"a", "c"}
    assert ran.count("a") == runs


async def test_a_look_up_is_one_prepared_statement(database: SqliteDatabase) -> None:
    await database.write(add, "a")
    assert await database.look_up(blobs.find, NAME, Digest.of(b"absent")) is None
    with pytest.raises(AssertionError, match="not a prepared statement"):
        await database.look_up(ids)


async def test_a_prepared_statement_fails_as_any_other_and_tells_no_values(database: SqliteDatabase) -> None:
    start = Checkpoint("uploads/secret-key", "sha256")
    await database.write(sessions.create, "a", NAME, start)
    with pytest.raises(IntegrityError) as raised:
        await database.write(sessions.create, "b", NAME, start)
    assert "secret-key" not in str(raised.value)


@pytest.mark.parametrize("unit", [add_and_fail, add_twice])
async def test_a_unit_that_fails_alone_undoes_itself(database: SqliteDatabase, unit: Callable[..., None]) -> None:
    with pytest.raises((NameUnknown, IntegrityError)):
        await database.write(unit, "a")
    assert await database.read(ids) == set()
    await database.write(add, "b")
    assert await database.read(ids) == {"b"}


async def test_where_the_database_itself_fails_no_unit_of_the_batch_is_acknowledged(database: SqliteDatabase) -> None:
    def broken(connection: Connection, _: str) -> None:
        connection.execute(text("SELECT * FROM nowhere"))

    results = await batch(database, (add, "a"), (broken, ""), (add, "b"))
    assert [type(result) for result in results] == [MetadataUnavailable] * 3
    assert await database.read(ids) == set()
    await database.write(add, "c")
    assert await database.read(ids) == {"c"}


async def test_a_damaged_database_is_no_fault_of_what_was_asked(database: SqliteDatabase) -> None:
    def damaged(_: Connection, __: str = "") -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    for attempt in (database.write(damaged), database.note(damaged), database.read(damaged)):
        with pytest.raises(MetadataUnavailable):
            await attempt
    results = await batch(database, (add, "a"), (damaged, ""), (add, "b"))
    assert [type(result) for result in results] == [MetadataUnavailable] * 3


async def test_what_stands_in_the_queue_together_is_committed_together(database: SqliteDatabase) -> None:
    def version(_: Connection) -> int:
        return int(watcher.execute("PRAGMA data_version").fetchone()[0])

    with closing(sqlite3.connect(database._path, check_same_thread=False)) as watcher:
        await database.note(add, "first")
        seen = await batch(database, *[(lambda connection, _: version(connection), "")] * 5, (add, "a"), (add, "b"))
        assert len(set(seen[:5])) == 1
        assert watcher.execute("PRAGMA data_version").fetchone()[0] == seen[0] + 1


async def test_a_write_is_seen_by_every_read_after_it(database: SqliteDatabase) -> None:
    for number in range(50):
        await database.write(add, f"{number}")
        reads = await asyncio.gather(*(database.read(ids) for _ in range(8)))
        assert all(len(found) == number + 1 for found in reads)


async def test_a_write_is_synced_and_a_note_is_not(database: SqliteDatabase) -> None:
    assert await database.write(synchronous) == FULL
    assert await database.note(synchronous) == NORMAL
    assert await database.write(synchronous) == FULL


async def test_a_note_beside_a_write_is_synced_with_it(database: SqliteDatabase) -> None:
    async with Blocked(database):
        noted = asyncio.create_task(database.note(synchronous))
        written = asyncio.create_task(database.write(synchronous))
    assert (await noted, await written) == (FULL, FULL)


async def test_without_sync_nothing_is_synced(database: SqliteDatabase) -> None:
    other = open_database(f"sqlite:///{database._path}", sync=False)
    assert await other.write(synchronous) == NORMAL
    await other.close()


async def test_a_note_survives_the_death_of_the_process(database: SqliteDatabase) -> None:
    await database.note(add, "a")
    with closing(sqlite3.connect(database._path)) as another:
        assert another.execute("SELECT id FROM upload_session").fetchall() == [("a",)]


async def test_closing_finishes_the_queue(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hythe.db'}"
    upgrade(url)
    database = opened(url)
    async with Blocked(database):
        tasks = [asyncio.create_task(database.write(add, f"{number}")) for number in range(150)]
        await asyncio.sleep(0)
        closing_task = asyncio.create_task(database.close())
    await asyncio.gather(*tasks, closing_task)
    with closing(sqlite3.connect(tmp_path / "hythe.db")) as connection:
        assert connection.execute("SELECT count(*) FROM upload_session").fetchone() == (150,)


async def test_a_write_after_closing_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hythe.db'}"
    upgrade(url)
    database = opened(url)
    await database.close()
    task = asyncio.ensure_future(database.write(add, "late"))
    done, _ = await asyncio.wait({task}, timeout=2)
    try:
        assert done
        assert task.exception()
    finally:
        # A unit that nobody will ever answer would keep the loop from ending.
        if not done and (job := database._queue.get_nowait()):
            job.job.fail(TimeoutError())
            await asyncio.wait({task})


async def test_a_read_sees_one_moment_whatever_is_written_meanwhile(database: SqliteDatabase) -> None:
    began, may_go_on = threading.Event(), threading.Event()

    def look_twice(connection: Connection) -> tuple[set[str], set[str]]:
        first = ids(connection)
        began.set()
        may_go_on.wait(30)
        return first, ids(connection)

    await database.write(add, "a")
    reading = asyncio.create_task(database.read(look_twice))
    await asyncio.to_thread(began.wait, 30)
    await database.write(add, "b")
    may_go_on.set()
    assert await reading == ({"a"}, {"a"})
    assert await database.read(ids) == {"a", "b"}


async def test_a_cancelled_write_has_happened_when_the_cancellation_is_over(database: SqliteDatabase) -> None:
    async with Blocked(database):
        task = asyncio.create_task(database.write(add, "a"))
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await database.read(ids) == {"a"}


async def test_foreign_keys_hold_for_writers_and_readers(database: SqliteDatabase) -> None:
    def foreign_keys(connection: Connection) -> int:
        return int(connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one())

    assert await database.write(foreign_keys) == await database.read(foreign_keys) == 1


async def test_a_manifest_cannot_point_to_a_blob_that_is_just_being_deleted(database: SqliteDatabase) -> None:
    image = make_image()
    for data in image.blobs:
        await database.write(blobs.add, NAME, Digest.of(data), StoredBlob(f"blobs/{Digest.of(data).hex}", len(data)))

    def collect(connection: Connection, digest: Digest) -> None:
        blobs.remove(connection, NAME, digest)
        connection.execute(delete(blob).where(blob.c.digest == str(digest)))

    pushed = PushedManifest(parse_manifest(image.manifest, ""), Digest.of(image.manifest), image.manifest)

    def put(connection: Connection, _: None) -> None:
        manifests.put(connection, NAME, pushed, [], "", sparse=False)

    results = await batch(database, (collect, Digest.of(image.config)), (put, None))
    assert [type(result) for result in results] == [type(None), ManifestBlobUnknown]
