"""Units of work and the facts they keep, on a real database."""

from __future__ import annotations

import asyncio
import json
import secrets
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, func, insert, select, text
from sqlalchemy.exc import IntegrityError

from registry.errors import (
    BlobUploadUnknown,
    ConfigurationError,
    ManifestBlobUnknown,
    MetadataUnavailable,
    NameUnknown,
    UploadConflict,
)
from registry.metadata import blobs, manifests, repositories, sessions, tags
from registry.metadata.blobs import StoredBlob
from registry.metadata.engine import Database, open_database
from registry.metadata.manifests import PushedManifest
from registry.metadata.schema import upgrade
from registry.metadata.sqlite import sqlite_path
from registry.metadata.tables import blob, manifest, manifest_reference, now, repository, tag_event, upload_session
from storage.base import Checkpoint
from storage.digest import Digest
from storage.names import RepositoryName, Tag
from storage.oci import parse_manifest
from tests.content import Image, make_image, make_index

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


class Blocked:
    """The writer, kept busy: what is queued meanwhile is one batch."""

    def __init__(self, database: Database) -> None:
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


async def batch(database: Database, *units: tuple[Callable[..., Any], Any]) -> list[Any]:
    async with Blocked(database):
        tasks = [asyncio.create_task(database.write(unit, argument)) for unit, argument in units]
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_unit_that_fails_in_a_batch_undoes_itself_alone(database: Database) -> None:
    results = await batch(database, (add, "a"), (add_and_fail, "b"), (add, "c"), (add_twice, "d"), (add, "e"))
    assert [type(result) for result in results] == [type(None), NameUnknown, type(None), IntegrityError, type(None)]
    assert await database.read(ids) == {"a", "c", "e"}


@pytest.mark.parametrize(("changes_first", "runs"), [(False, 1), (True, 2)])
async def test_a_unit_that_fails_before_it_changed_anything_costs_the_others_nothing(
    database: Database, changes_first: bool, runs: int
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


async def test_a_look_up_is_one_prepared_statement(database: Database) -> None:
    await database.write(add, "a")
    assert await database.look_up(blobs.find, NAME, Digest.of(b"absent")) is None
    with pytest.raises(AssertionError, match="not a prepared statement"):
        await database.look_up(ids)


async def test_a_prepared_statement_fails_as_any_other_and_tells_no_values(database: Database) -> None:
    start = Checkpoint("uploads/secret-key", "sha256")
    await database.write(sessions.create, "a", NAME, start)
    with pytest.raises(IntegrityError) as raised:
        await database.write(sessions.create, "b", NAME, start)
    assert "secret-key" not in str(raised.value)


@pytest.mark.parametrize("unit", [add_and_fail, add_twice])
async def test_a_unit_that_fails_alone_undoes_itself(database: Database, unit: Callable[..., None]) -> None:
    with pytest.raises((NameUnknown, IntegrityError)):
        await database.write(unit, "a")
    assert await database.read(ids) == set()
    await database.write(add, "b")
    assert await database.read(ids) == {"b"}


async def test_where_the_database_itself_fails_no_unit_of_the_batch_is_acknowledged(database: Database) -> None:
    def broken(connection: Connection, _: str) -> None:
        connection.execute(text("SELECT * FROM nowhere"))

    results = await batch(database, (add, "a"), (broken, ""), (add, "b"))
    assert [type(result) for result in results] == [MetadataUnavailable] * 3
    assert await database.read(ids) == set()
    await database.write(add, "c")
    assert await database.read(ids) == {"c"}


async def test_a_damaged_database_is_no_fault_of_what_was_asked(database: Database) -> None:
    def damaged(_: Connection, __: str = "") -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    for attempt in (database.write(damaged), database.note(damaged), database.read(damaged)):
        with pytest.raises(MetadataUnavailable):
            await attempt
    results = await batch(database, (add, "a"), (damaged, ""), (add, "b"))
    assert [type(result) for result in results] == [MetadataUnavailable] * 3


async def test_what_stands_in_the_queue_together_is_committed_together(database: Database) -> None:
    def version(_: Connection) -> int:
        return int(watcher.execute("PRAGMA data_version").fetchone()[0])

    with closing(sqlite3.connect(database.path, check_same_thread=False)) as watcher:
        await database.note(add, "first")
        seen = await batch(database, *[(lambda connection, _: version(connection), "")] * 5, (add, "a"), (add, "b"))
        assert len(set(seen[:5])) == 1
        assert watcher.execute("PRAGMA data_version").fetchone()[0] == seen[0] + 1


async def test_a_write_is_seen_by_every_read_after_it(database: Database) -> None:
    for number in range(50):
        await database.write(add, f"{number}")
        reads = await asyncio.gather(*(database.read(ids) for _ in range(8)))
        assert all(len(found) == number + 1 for found in reads)


async def test_a_write_is_synced_and_a_note_is_not(database: Database) -> None:
    assert await database.write(synchronous) == FULL
    assert await database.note(synchronous) == NORMAL
    assert await database.write(synchronous) == FULL


async def test_a_note_beside_a_write_is_synced_with_it(database: Database) -> None:
    async with Blocked(database):
        noted = asyncio.create_task(database.note(synchronous))
        written = asyncio.create_task(database.write(synchronous))
    assert (await noted, await written) == (FULL, FULL)


async def test_without_sync_nothing_is_synced(database: Database) -> None:
    other = open_database(f"sqlite:///{database.path}", sync=False)
    assert await other.write(synchronous) == NORMAL
    await other.close()


async def test_a_note_survives_the_death_of_the_process(database: Database) -> None:
    await database.note(add, "a")
    with closing(sqlite3.connect(database.path)) as another:
        assert another.execute("SELECT id FROM upload_session").fetchall() == [("a",)]


async def test_closing_finishes_the_queue(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hythe.db'}"
    upgrade(url)
    database = open_database(url)
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
    database = open_database(url)
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


async def test_a_read_sees_one_moment_whatever_is_written_meanwhile(database: Database) -> None:
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


async def test_a_cancelled_write_has_happened_when_the_cancellation_is_over(database: Database) -> None:
    async with Blocked(database):
        task = asyncio.create_task(database.write(add, "a"))
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await database.read(ids) == {"a"}


async def test_foreign_keys_hold_for_writers_and_readers(database: Database) -> None:
    def foreign_keys(connection: Connection) -> int:
        return int(connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one())

    assert await database.write(foreign_keys) == await database.read(foreign_keys) == 1


@pytest.mark.parametrize(
    "url", ["", "hythe.db", "sqlite://", "sqlite:///", "postgresql://localhost/hythe", "sqlite:/x", "://"]
)
def test_a_database_that_is_no_sqlite_file_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^database\.url"):
        sqlite_path(url)


# --- facts -----------------------------------------------------------------------------------------------


async def put_blob(database: Database, data: bytes, name: RepositoryName = NAME, algorithm: str = "sha256") -> Digest:
    digest = Digest.of(data, algorithm)
    session_id = secrets.token_hex(8)
    await database.note(add, session_id)
    await database.note(sessions.claim, session_id, NAME, "writer")
    key = f"blobs/{digest.hex}.{session_id}"
    await database.write(blobs.finish_upload, session_id, "writer", name, digest, StoredBlob(key=key, size=len(data)))
    return digest


async def put_manifest(
    database: Database, data: bytes, *moved: str, name: RepositoryName = NAME, sparse: bool = False
) -> Digest:
    digest = Digest.of(data)
    pushed = PushedManifest(parse_manifest(data, ""), digest, data)
    await database.write(manifests.put, name, pushed, [Tag(tag) for tag in moved], "somebody", sparse=sparse)
    return digest


async def put_image(database: Database, *moved: str, **options: Any) -> Image:
    image = make_image(**options)
    for data in image.blobs:
        await put_blob(database, data)
    await put_manifest(database, image.manifest, *moved)
    return image


def drop_blob(connection: Connection, digest: Digest) -> int:
    return connection.execute(delete(blob).where(blob.c.digest == str(digest))).rowcount


def references(connection: Connection, column: str) -> int:
    pointing = select(func.count()).where(manifest_reference.c[column].is_not(None))
    return int(connection.scalar(pointing) or 0)


async def test_a_blob_that_a_manifest_points_to_cannot_be_deleted(database: Database) -> None:
    image = await put_image(database, "latest")
    for data in image.blobs:
        digest = Digest.of(data)
        # In no repository any more; the manifest alone keeps it.
        await database.write(blobs.remove, NAME, digest)
        with pytest.raises(IntegrityError):
            await database.write(drop_blob, digest)
    await database.write(manifests.remove, NAME, Digest.parse(image.digest), "")
    assert [await database.write(drop_blob, Digest.of(data)) for data in image.blobs] == [1, 1]


async def test_a_blob_that_a_repository_holds_cannot_be_deleted(database: Database) -> None:
    digest = await put_blob(database, b"content")
    with pytest.raises(IntegrityError):
        await database.write(drop_blob, digest)
    await database.write(blobs.remove, NAME, digest)
    assert await database.write(drop_blob, digest) == 1


async def test_a_manifest_cannot_point_to_a_blob_that_is_just_being_deleted(database: Database) -> None:
    image = make_image()
    for data in image.blobs:
        await put_blob(database, data)

    def collect(connection: Connection, digest: Digest) -> None:
        blobs.remove(connection, NAME, digest)
        drop_blob(connection, digest)

    pushed = PushedManifest(parse_manifest(image.manifest, ""), Digest.of(image.manifest), image.manifest)

    def put(connection: Connection, _: None) -> None:
        manifests.put(connection, NAME, pushed, [], "", sparse=False)

    results = await batch(database, (collect, Digest.of(image.config)), (put, None))
    assert [type(result) for result in results] == [type(None), ManifestBlobUnknown]


async def test_a_manifest_lists_all_that_it_misses(database: Database) -> None:
    image = make_image(layers=3)
    await put_blob(database, image.layers[1])
    with pytest.raises(ManifestBlobUnknown) as raised:
        await put_manifest(database, image.manifest, "latest")
    missing = [str(Digest.of(data)) for data in (image.config, image.layers[0], image.layers[2])]
    assert [digest for digest, _ in raised.value.missing] == missing
    assert await database.read(manifests.find, NAME, Tag("latest")) is None


async def test_a_sparse_image_keeps_its_blobs_from_the_moment_they_arrive(database: Database) -> None:
    image = make_image()
    await put_manifest(database, image.manifest, sparse=True)
    assert await database.read(references, "blob_id") == 0
    for count, data in enumerate(image.blobs, 1):
        digest = await put_blob(database, data, name=OTHER)
        assert await database.read(references, "blob_id") == count
        await database.write(blobs.remove, OTHER, digest)
        with pytest.raises(IntegrityError):
            await database.write(drop_blob, digest)


async def test_a_sparse_index_finds_its_children_when_they_arrive(database: Database) -> None:
    images = [make_image(), make_image()]
    await put_manifest(database, make_index(*images), sparse=True)
    for count, image in enumerate(images, 1):
        await put_manifest(database, image.manifest, sparse=True)
        assert await database.read(references, "child_id") == count
    await database.write(manifests.remove, NAME, Digest.parse(images[0].digest), "")
    assert await database.read(references, "child_id") == 1


async def test_a_manifest_stays_as_long_as_one_repository_holds_it(database: Database) -> None:
    def count(connection: Connection) -> tuple[int, ...]:
        tables = (manifest, manifest_reference)
        return tuple(connection.scalar(select(func.count()).select_from(table)) or 0 for table in tables)

    image = await put_image(database, "latest")
    digest = Digest.parse(image.digest)
    for data in image.blobs:
        assert await database.write(blobs.mount, NAME, OTHER, Digest.of(data))
    await put_manifest(database, image.manifest, name=OTHER)
    await database.write(manifests.remove, NAME, digest, "")
    assert await database.read(count) == (1, 2)
    found = await database.read(manifests.find, OTHER, digest)
    assert found
    assert found.content == image.manifest
    await database.write(manifests.remove, OTHER, digest, "")
    assert await database.read(count) == (0, 0)


async def test_the_second_upload_of_the_same_bytes_serves_from_the_first(database: Database) -> None:
    digest = await put_blob(database, b"content")
    first = await database.read(blobs.find, NAME, digest)
    await put_blob(database, b"content", name=OTHER)
    assert await database.read(blobs.find, OTHER, digest) == first


async def test_a_mount_needs_the_blob_in_its_source(database: Database) -> None:
    digest = await put_blob(database, b"content")
    assert not await database.write(blobs.mount, OTHER, RepositoryName("third"), digest)
    assert await database.read(blobs.find, RepositoryName("third"), digest) is None
    assert await database.write(blobs.mount, NAME, OTHER, digest)
    assert sorted(await database.read(blobs.holders, digest)) == sorted([NAME, OTHER])


async def test_every_move_of_a_tag_is_in_its_history_for_ever(database: Database) -> None:
    first, second = await put_image(database, "latest"), await put_image(database)
    await put_manifest(database, first.manifest, "latest")  # points there already
    await put_manifest(database, second.manifest, "latest", "v2")
    await database.write(tags.delete_tag, NAME, Tag("latest"), "deleter")
    await database.write(manifests.remove, NAME, Digest.parse(second.digest), "deleter")

    def history(connection: Connection) -> list[Any]:
        columns = (tag_event.c.name, tag_event.c.digest, tag_event.c.by)
        return [tuple(row) for row in connection.execute(select(*columns).order_by(tag_event.c.id))]

    assert await database.read(history) == [
        ("latest", first.digest, "somebody"),
        ("latest", second.digest, "somebody"),
        ("v2", second.digest, "somebody"),
        ("latest", None, "deleter"),
        ("v2", None, "deleter"),
    ]


async def test_all_tags_of_a_push_move_or_none(database: Database) -> None:
    image = make_image()
    with pytest.raises(ManifestBlobUnknown):
        await put_manifest(database, image.manifest, "a", "b")
    with pytest.raises(NameUnknown):
        await database.read(tags.names, NAME, "", 10)
    for data in image.blobs:
        await put_blob(database, data)
    await put_manifest(database, image.manifest, "b", "a")
    assert await database.read(tags.names, NAME, "", 10) == ["a", "b"]


async def test_repositories_are_a_tree(database: Database) -> None:
    for name in ("org/team/app", "org/team/app/sub", "org/team-x", "org/team0", "single"):
        await database.write(repositories.ensure, RepositoryName(name))

    async def children(path: str) -> list[tuple[str, bool, bool]]:
        nodes = await database.read(repositories.children, path, "", 100)
        return [(node.name, node.is_repository, node.has_children) for node in nodes]

    assert await children("") == [("org", False, True), ("single", True, False)]
    assert await children("org") == [
        ("org/team", False, True),
        ("org/team-x", True, False),
        ("org/team0", True, False),
    ]
    assert await children("org/team") == [("org/team/app", True, True)]
    assert await children("org/team/app") == [("org/team/app/sub", True, False)]
    assert await children("org/nobody") == []
    assert await database.read(repositories.find, RepositoryName("org/team")) is None


async def test_a_folder_becomes_a_repository_when_something_is_pushed_to_it(database: Database) -> None:
    await database.write(repositories.ensure, RepositoryName("org/app"))
    folder = await database.write(repositories.ensure, RepositoryName("org"))
    assert await database.read(repositories.find, RepositoryName("org")) == folder
    assert await database.write(repositories.ensure, RepositoryName("org")) == folder
    assert await database.read(repositories.names, "", 10) == ["org", "org/app"]


async def test_below_a_path_lies_what_has_it_as_a_prefix_of_whole_components(database: Database) -> None:
    names = ["org/team", "org/team/app", "org/team/app/sub", "org/team-x", "org/team.y", "org/team0", "org/teams/app"]
    for name in names:
        await database.write(repositories.ensure, RepositoryName(name))

    def below(connection: Connection) -> list[str]:
        found = select(repository.c.name).where(repositories.below("org/team")).order_by(repository.c.name)
        return list(connection.scalars(found))

    assert await database.read(below) == names[:3]


async def test_lists_go_on_after_the_last_entry_of_a_page(database: Database) -> None:
    image = await put_image(database, *"abcde")
    pages = [await database.read(tags.names, NAME, last, 2) for last in ("", "b", "d", "e")]
    assert pages == [["a", "b"], ["c", "d"], ["e"], []]
    assert await database.read(tags.pointing_to, NAME, Digest.parse(image.digest)) == list("abcde")


async def test_a_session_has_one_writer(database: Database) -> None:
    await database.note(add, "a")
    await database.note(sessions.claim, "a", NAME, "first")
    with pytest.raises(UploadConflict):
        await database.note(sessions.claim, "a", NAME, "second")
    checkpoint = Checkpoint("uploads/a", "sha256", 7, b"state")
    with pytest.raises(BlobUploadUnknown):
        await database.note(sessions.advance, "a", "second", checkpoint, release=True)
    await database.note(sessions.advance, "a", "first", checkpoint, release=True)
    session, _ = await database.note(sessions.claim, "a", NAME, "second")
    assert session.checkpoint == checkpoint


async def test_a_claim_ends_with_its_lease_or_with_the_server(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await database.note(add, "a")
    await database.note(sessions.claim, "a", NAME, "first")
    with monkeypatch.context() as patch:
        later = now() + sessions.LEASE + 1
        patch.setattr("registry.metadata.sessions.now", lambda: later)
        await database.note(sessions.claim, "a", NAME, "second")
    await database.note(sessions.release_all)
    await database.note(sessions.claim, "a", NAME, "third")


@pytest.mark.parametrize("name", ["other", "org/team"])
async def test_a_session_belongs_to_its_repository(database: Database, name: str) -> None:
    await database.note(add, "a")
    for unit in (sessions.find, sessions.remove):
        with pytest.raises(BlobUploadUnknown):
            await database.note(unit, "a", RepositoryName(name))
    await database.note(sessions.remove, "a", NAME)
    with pytest.raises(BlobUploadUnknown):
        await database.note(sessions.remove, "a", NAME)
    assert await database.read(leftovers.due, 0) == [Leftover("a", None)]


async def test_who_lost_the_session_cannot_finish_with_it(database: Database) -> None:
    await database.note(add, "a")
    await database.note(sessions.claim, "a", NAME, "writer")
    await database.note(sessions.remove, "a", NAME)
    digest = Digest.of(b"content")
    with pytest.raises(BlobUploadUnknown):
        await database.write(blobs.finish_upload, "a", "writer", NAME, digest, StoredBlob("key", 7))
    assert not await database.read(blobs.known_keys, ["key"])


async def test_annotations_and_platforms_are_kept_as_json(database: Database) -> None:
    image = await put_image(database, annotations={"org.example": "ä\u2028"})

    def row(connection: Connection) -> Any:
        return connection.execute(select(manifest).where(manifest.c.digest == image.digest)).one()

    found = await database.read(row)
    assert json.loads(found.annotations) == {"org.example": "ä\u2028"}
    assert found.image_size == sum(map(len, image.blobs))
    assert found.content == image.manifest


async def test_a_key_is_never_used_twice(database: Database) -> None:
    await database.note(add, "a")
    with pytest.raises(IntegrityError):
        await database.note(sessions.create, "b", NAME, Checkpoint("uploads/a", "sha256"))

    def same_key(connection: Connection) -> None:
        for digest in ("x", "y"):
            connection.execute(insert(blob).values(digest=digest, size=1, key="k", created_at=0, touched_at=0))

    with pytest.raises(IntegrityError):
        await database.write(same_key)
