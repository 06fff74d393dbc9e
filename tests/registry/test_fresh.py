"""Sessions of the last moment: quick uploads leave no row, all others lose nothing."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import registry.fresh
from registry.config import Settings
from registry.contents import Contents
from registry.errors import BlobUploadUnknown, MetadataUnavailable, UploadConflict
from registry.fresh import FreshSessions
from registry.metadata import leftovers, sessions
from registry.metadata.engine import Database
from registry.metadata.sessions import Session
from registry.sessions import Sessions
from storage.base import Checkpoint
from storage.digest import Digest
from storage.errors import OutOfSpace, StoreUnavailable
from storage.filesystem import FilesystemStore
from storage.memory import MemoryStore, _MemoryUpload
from storage.names import RepositoryName
from tests.conftest import Start
from tests.content import Client, digest_of
from tests.facts import query
from tests.registry.talk import ask, begin, files_below, in_pieces

NAME = RepositoryName("org/app")
CONTENT = secrets.token_bytes(3000)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def fresh(store: MemoryStore, database: Database) -> AsyncIterator[FreshSessions]:
    made = FreshSessions(store, database, enabled=True)
    yield made
    await made.close()


@pytest.fixture
def long_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is settled for its age alone."""
    monkeypatch.setattr(registry.fresh, "_MOMENT", 60)


async def opened(fresh: FreshSessions, store: MemoryStore, content: bytes = b"", name: str = "one") -> None:
    await fresh.add(name, NAME, store.begin(name, "sha256"))
    if content:
        assert fresh.keep(name, NAME, content)


async def found(database: Database, name: str = "one") -> Session | None:
    try:
        return await database.look_up(sessions.find, name, NAME)
    except BlobUploadUnknown:
        return None


async def comes_to_have_a_row(database: Database, name: str = "one") -> Session:
    for _ in range(500):
        if session := await found(database, name):
            return session
        await asyncio.sleep(0.01)
    raise AssertionError("no row")


@pytest.mark.parametrize("content", [b"", CONTENT])
async def test_after_a_moment_a_session_has_its_row_and_the_store_its_bytes(
    fresh: FreshSessions, store: MemoryStore, database: Database, content: bytes
) -> None:
    await opened(fresh, store, content)
    assert fresh.offset("one", NAME) == len(content)
    session = await comes_to_have_a_row(database)
    assert session.checkpoint.offset == len(content)
    assert len(fresh) == 0
    assert fresh.offset("one", NAME) is None
    upload = store.resume(session.checkpoint)
    await upload.write([b"more"])
    assert await upload.commit(Digest.of(content + b"more"))


@pytest.mark.usefixtures("long_moment")
async def test_only_the_first_bytes_are_kept_and_only_few(fresh: FreshSessions, store: MemoryStore) -> None:
    await opened(fresh, store)
    assert not fresh.keep("one", NAME, bytes((32 << 10) + 1))
    assert fresh.keep("one", NAME, bytes(32 << 10))
    assert not fresh.keep("one", NAME, b"x")
    assert not fresh.keep("another", NAME, b"x")
    assert fresh.offset("one", NAME) == 32 << 10


async def test_a_session_is_there_for_its_own_repository_only(fresh: FreshSessions, store: MemoryStore) -> None:
    await opened(fresh, store)
    other = RepositoryName("org/other")
    assert fresh.offset("one", other) is None
    with pytest.raises(BlobUploadUnknown):
        fresh.take("one", other)
    with pytest.raises(BlobUploadUnknown):
        fresh.keep("one", other, b"x")
    assert fresh.offset("one", NAME) == 0


async def test_a_session_that_was_taken_is_nobody_elses(
    fresh: FreshSessions, store: MemoryStore, database: Database
) -> None:
    await opened(fresh, store, CONTENT)
    taken = fresh.take("one", NAME)
    assert taken
    assert taken.content == CONTENT
    with pytest.raises(UploadConflict):
        fresh.take("one", NAME)
    with pytest.raises(UploadConflict):
        fresh.keep("one", NAME, b"x")
    with pytest.raises(UploadConflict):
        await fresh.settle("one")
    await asyncio.sleep(0.3)
    assert await found(database) is None
    fresh.give_back(taken)
    assert (await comes_to_have_a_row(database)).checkpoint.offset == len(CONTENT)


async def test_a_session_that_ended_leaves_nothing(
    fresh: FreshSessions, store: MemoryStore, database: Database
) -> None:
    await opened(fresh, store, CONTENT)
    taken = fresh.take("one", NAME)
    assert taken
    fresh.forget(taken)
    assert not fresh.take("one", NAME)
    await asyncio.sleep(0.3)
    assert await found(database) is None
    assert not [item async for item in store.objects()]


async def test_whoever_wants_more_of_a_session_settles_it_once(
    fresh: FreshSessions, store: MemoryStore, database: Database
) -> None:
    await opened(fresh, store, CONTENT)
    await asyncio.gather(*(fresh.settle("one") for _ in range(5)))
    session = await found(database)
    assert session
    assert session.checkpoint.offset == len(CONTENT)
    await fresh.settle("one")
    await fresh.settle("never")


async def test_a_request_that_gives_up_does_not_stop_the_settling(
    fresh: FreshSessions, store: MemoryStore, database: Database
) -> None:
    await opened(fresh, store, CONTENT)
    task = asyncio.create_task(fresh.settle("one"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await comes_to_have_a_row(database)


async def test_on_a_full_disk_a_session_waits_for_room(
    fresh: FreshSessions, store: MemoryStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.fresh, "_PATIENCE", 0.05)
    store.capacity = 0
    await opened(fresh, store, CONTENT)
    with pytest.raises(OutOfSpace):
        await fresh.settle("one")
    await asyncio.sleep(0.3)
    assert fresh.offset("one", NAME) == len(CONTENT)
    store.capacity = 1 << 20
    assert (await comes_to_have_a_row(database)).checkpoint.offset == len(CONTENT)


@pytest.mark.usefixtures("long_moment")
async def test_too_many_at_once_have_their_rows_at_once(
    fresh: FreshSessions, store: MemoryStore, database: Database
) -> None:
    fresh._limit = 3
    for number in range(5):
        await opened(fresh, store, name=f"upload-{number}")
    assert len(fresh) == 3
    assert [bool(await found(database, f"upload-{number}")) for number in range(5)] == [False] * 3 + [True] * 2


async def test_where_others_might_ask_every_session_has_its_row_at_once(store: MemoryStore, database: Database) -> None:
    fresh = FreshSessions(store, database, enabled=False)
    await opened(fresh, store)
    assert len(fresh) == 0
    assert await found(database)
    await fresh.close()


@pytest.mark.usefixtures("long_moment")
async def test_the_end_of_the_server_loses_no_session(
    fresh: FreshSessions, store: MemoryStore, database: Database
) -> None:
    for number in range(20):
        await opened(fresh, store, CONTENT, f"upload-{number}")
    await fresh.close()
    for number in range(20):
        session = await found(database, f"upload-{number}")
        assert session
        assert session.checkpoint.offset == len(CONTENT)


async def test_one_that_cannot_be_settled_keeps_no_other_from_it(
    fresh: FreshSessions, store: MemoryStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A row that is there already: nothing that should happen, and nothing that may harm the rest.
    await database.note(sessions.create, "upload-0", NAME, store.begin("upload-0", "sha256"))
    for number in range(3):
        await opened(fresh, store, CONTENT, f"upload-{number}")
    for number in (1, 2):
        assert (await comes_to_have_a_row(database, f"upload-{number}")).checkpoint.offset == len(CONTENT)
    assert len(fresh) == 1
    stuck = fresh.take("upload-0", NAME)
    assert stuck
    fresh.forget(stuck)


async def test_while_the_database_hangs_nothing_piles_up(
    fresh: FreshSessions, store: MemoryStore, database: Database
) -> None:
    may_go_on = threading.Event()
    blocking = asyncio.create_task(database.note(lambda _: may_go_on.wait(30)))
    await asyncio.sleep(0.05)
    await opened(fresh, store, CONTENT)
    before = len(asyncio.all_tasks())
    await asyncio.sleep(0.6)
    assert len(asyncio.all_tasks()) <= before + 4
    may_go_on.set()
    await blocking
    await comes_to_have_a_row(database)


# --- seen from outside ----------------------------------------------------------------------------------------


def rows(settings: Settings) -> int:
    """Return how many sessions are in the database now."""
    return len(query(settings.database.url, "SELECT id FROM upload_session"))


@pytest.mark.usefixtures("long_moment")
async def test_a_quick_push_never_has_a_row(client: Client, settings: Settings) -> None:
    seen = set()
    for number in range(5):
        content = CONTENT + bytes([number])
        location = await begin(client)
        seen.add(rows(settings))
        assert (await ask(client, "PATCH", location, data=in_pieces(content))).status == 202
        seen.add(rows(settings))
        created = await ask(client, "PUT", f"{location}?digest={digest_of(content)}")
        assert created.status == 201
        assert (await ask(client, "GET", created.headers["Location"])).body == content
    assert seen == {0}
    assert not files_below(Path(settings.storage.filesystem.root) / "uploads")


@pytest.mark.parametrize("pause", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [[3000], [1000, 2000], [0, 3000], [40_000], [1000, 40_000, 5]])
async def test_a_push_in_any_pieces_at_any_pace_arrives(client: Client, sizes: list[int], pause: float) -> None:
    pieces = [secrets.token_bytes(size) for size in sizes]
    location = await begin(client)
    sent = 0
    for piece in pieces[:-1]:
        await asyncio.sleep(pause)
        answer = await ask(client, "PATCH", location, data=piece)
        sent += len(piece)
        assert (answer.status, answer.headers["Range"]) == (202, f"0-{max(0, sent - 1)}")
        assert (await ask(client, "GET", location)).headers["Range"] == f"0-{max(0, sent - 1)}"
    await asyncio.sleep(pause)
    whole = b"".join(pieces)
    created = await ask(client, "PUT", f"{location}?digest={digest_of(whole)}", data=pieces[-1])
    assert created.status == 201
    assert (await ask(client, "GET", created.headers["Location"])).body == whole
    assert (await ask(client, "GET", location)).status == 404
    assert (await ask(client, "PUT", f"{location}?digest={digest_of(whole)}")).status == 404


class UnluckyStore(FilesystemStore):
    """A store that has no room for a name until it is told otherwise."""

    has_room = False

    def _publish(self, source: str, key: str) -> None:
        if not self.has_room:
            raise OutOfSpace("no space left for blobs")
        super()._publish(source, key)


@pytest.fixture
async def unlucky(start: Start, tmp_path: Path) -> tuple[Client, UnluckyStore, str]:
    """A registry in which a push just failed for want of room, its store, and where the upload is."""
    store = UnluckyStore(tmp_path / "store")
    client = await start(store=store)
    location = await begin(client)
    assert (await ask(client, "PATCH", location, data=CONTENT)).status == 202
    assert (await ask(client, "PUT", f"{location}?digest={digest_of(CONTENT)}")).status == 507
    return client, store, location


async def test_a_push_that_found_no_room_can_be_repeated(unlucky: tuple[Client, UnluckyStore, str]) -> None:
    client, store, location = unlucky
    assert (await ask(client, "GET", location)).headers["Range"] == f"0-{len(CONTENT) - 1}"
    store.has_room = True
    created = await ask(client, "PUT", f"{location}?digest={digest_of(CONTENT)}")
    assert created.status == 201
    assert (await ask(client, "GET", created.headers["Location"])).body == CONTENT
    assert not files_below(store.root / "uploads")


async def test_a_push_that_found_no_room_can_be_gone_on_with(unlucky: tuple[Client, UnluckyStore, str]) -> None:
    client, store, location = unlucky
    store.has_room = True
    assert (await ask(client, "PATCH", location, data=b"more")).status == 202
    created = await ask(client, "PUT", f"{location}?digest={digest_of(CONTENT + b'more')}")
    assert created.status == 201
    assert (await ask(client, "GET", created.headers["Location"])).body == CONTENT + b"more"


async def test_a_push_that_found_no_room_can_be_cancelled_and_leaves_nothing(
    unlucky: tuple[Client, UnluckyStore, str],
) -> None:
    client, store, location = unlucky
    assert (await ask(client, "DELETE", location)).status == 204
    assert not files_below(store.root / "uploads")


async def test_of_two_who_finish_at_once_one_wins(client: Client) -> None:
    for number in range(10):
        content = CONTENT + bytes([number])
        location = await begin(client)
        assert (await ask(client, "PATCH", location, data=content)).status == 202
        closing_put = f"{location}?digest={digest_of(content)}"
        answers = await asyncio.gather(*(ask(client, "PUT", closing_put) for _ in range(3)))
        statuses = sorted(answer.status for answer in answers)
        assert statuses[0] == 201
        assert set(statuses[1:]) <= {404, 409}


# --- what a step that failed may have left ------------------------------------------------------------------------


class VagueStore(MemoryStore):
    """A store whose first answer gets lost, after it did what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 1

    def resume(self, checkpoint: Checkpoint) -> _VagueUpload:
        return _VagueUpload(self, checkpoint)


class _VagueUpload(_MemoryUpload):
    async def commit(self, digest: Digest, last: Sequence[bytes | memoryview] = ()) -> str:
        key = await super().commit(digest, last)
        if self._store.failures:  # type: ignore[attr-defined]
            self._store.failures -= 1  # type: ignore[attr-defined]
            self._store._put(f"{key}-stray", b"stray")
            raise StoreUnavailable("no answer")
        return key


def left(settings: Settings) -> list[tuple[str | None]]:
    """Return what is to be kept of uploads that the store is still to forget."""
    return query(settings.database.url, "SELECT kept FROM leftover")


@pytest.fixture
async def vague(start: Start) -> tuple[Client, str]:
    """A registry in which a push has just failed in a way that nobody knows the outcome of, and where the upload is."""
    client = await start(store=VagueStore())
    location = await begin(client)
    assert (await ask(client, "PATCH", location, data=CONTENT)).status == 202
    assert (await ask(client, "PUT", f"{location}?digest={digest_of(CONTENT)}")).status == 503
    return client, location


@pytest.mark.usefixtures("long_moment")
async def test_strays_of_a_quick_push_that_was_repeated_are_remembered(
    vague: tuple[Client, str], settings: Settings
) -> None:
    client, location = vague
    assert (await ask(client, "PUT", f"{location}?digest={digest_of(CONTENT)}")).status == 201
    assert left(settings) == query(settings.database.url, "SELECT key FROM blob")


@pytest.mark.usefixtures("long_moment")
async def test_strays_of_a_quick_push_that_was_given_up_are_remembered(
    vague: tuple[Client, str], settings: Settings
) -> None:
    client, location = vague
    assert (await ask(client, "DELETE", location)).status == 204
    assert left(settings) == [(None,)]


async def test_strays_of_a_quick_push_that_went_on_slowly_are_remembered(
    vague: tuple[Client, str], settings: Settings
) -> None:
    client, location = vague
    assert (await ask(client, "PATCH", location, data=b"more")).status == 202
    assert (await ask(client, "PUT", f"{location}?digest={digest_of(CONTENT + b'more')}")).status == 201
    assert left(settings) == query(settings.database.url, "SELECT key FROM blob")


@pytest.mark.usefixtures("long_moment")
@pytest.mark.parametrize("is_committed", [True, False])
@pytest.mark.parametrize("failure", [asyncio.CancelledError(), MetadataUnavailable("it is gone")], ids=repr)
async def test_a_quick_push_whose_row_nobody_heard_of_is_never_deleted_with_its_session(
    fresh: FreshSessions,
    store: MemoryStore,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    is_committed: bool,
) -> None:
    contents = Contents(database, 0, alone=True)
    sessions_of = Sessions(store, database, contents, fresh)
    session_id, digest = await sessions_of.open(NAME, "sha256"), Digest.of(CONTENT)
    add_blob = contents.add_blob

    async def fail(*args: Any) -> bool:
        if is_committed:
            await add_blob(*args)
        raise failure

    monkeypatch.setattr(contents, "add_blob", fail)
    with pytest.raises(type(failure)):
        await sessions_of.publish_fresh(NAME, session_id, CONTENT, digest)
    monkeypatch.setattr(contents, "add_blob", add_blob)
    if is_committed:
        # It became a blob, so nobody can end it as anything else any more.
        with pytest.raises(BlobUploadUnknown):
            await sessions_of.cancel(NAME, session_id)
    else:
        assert await sessions_of.publish_fresh(NAME, session_id, CONTENT, digest)
    blob = await contents.blob(NAME, digest)
    assert await store.size(blob.key) == len(CONTENT)
    assert len(store._bytes) == 1


async def test_a_leftover_is_noted_once_with_what_is_kept_of_it(database: Database) -> None:
    await database.write(leftovers.add, ["one"], "blobs/on/one.a")
    await database.write(leftovers.add, ["one", "two"])
    noted = await database.read(lambda connection: leftovers.due(connection, grace=-1))
    assert sorted(noted) == [("one", "blobs/on/one.a"), ("two", None)]
