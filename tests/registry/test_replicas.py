"""Several servers that are one registry: PostgreSQL and S3 in common, and nothing else."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import requests

from registry.affinity import Affinity
from registry.app import open_facts, open_store
from registry.config import Settings
from registry.contents import Contents
from registry.errors import BlobUploadUnknown, ConfigurationError, MetadataUnavailable
from registry.fresh import FreshSessions
from registry.lock import check_local
from registry.metadata import sessions
from registry.metadata.engine import Database
from registry.metadata.schema import upgrade
from registry.metadata.tables import now
from registry.sessions import Sessions
from registry.sweeper import Sweeper
from storage.base import Store
from storage.digest import Digest
from storage.errors import DigestMismatch, StoreUnavailable
from storage.names import RepositoryName
from tests.conftest import Bucket, Start, environment_of
from tests.content import Client, Pusher, digest_of, make_image
from tests.facts import query
from tests.hythe.test_cli import hythe
from tests.registry.talk import ask, in_pieces, stored, wire
from tests.services.postgres import Postgres
from tests.services.processes import HytheServer, hythe_server, wait_until

MIB = 1 << 20
APP = "/v2/org/team/app"


@pytest.fixture
async def replicas(start: Start) -> list[Client]:
    return [await start() for _ in range(3)]


async def begin(client: Client, query: str = "") -> str:
    answer = await ask(client, "POST", f"{APP}/blobs/uploads/{query}")
    assert answer.status == 202
    return answer.headers["Location"]


# --- one upload at several ------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_each_request_of_an_upload_may_go_to_another_replica(
    replicas: list[Client], algorithm: str, is_streamed: bool
) -> None:
    one, two, three = replicas
    content = secrets.token_bytes(3 * 300_000 + 17)
    location = await begin(one, f"?digest-algorithm={algorithm}")
    for number, client in enumerate((two, three, one, two)):
        chunk = content[number * 300_000 : (number + 1) * 300_000]
        headers = {"Content-Range": f"{number * 300_000}-{number * 300_000 + len(chunk) - 1}"}
        if is_streamed:
            answer = await ask(client, "PATCH", location, data=in_pieces(chunk, 70_000))
        else:
            answer = await ask(client, "PATCH", location, data=chunk, headers=headers)
        assert answer.status == 202
        location = answer.headers["Location"]
        assert (await ask(one, "GET", location)).headers["Range"] == f"0-{number * 300_000 + len(chunk) - 1}"
    digest = digest_of(content, algorithm)
    assert (await ask(three, "PUT", f"{location}?digest={digest}")).status == 201
    for client in replicas:
        assert (await ask(client, "GET", f"{APP}/blobs/{digest}")).body == content


async def requests_of(client: Client) -> dict[str, int]:
    """Return what a replica asked of S3 so far, by its metrics."""
    text = (await ask(client, "GET", "/metrics")).body.decode()
    lines = [line for line in text.splitlines() if line.startswith("hythe_store_requests_total{")]
    return {line.split('"')[1]: int(float(line.split(" ")[1])) for line in lines}


async def test_a_large_layer_in_two_requests_is_read_by_nobody(replicas: list[Client]) -> None:
    one, two, three = replicas
    content = secrets.token_bytes(40 * MIB)
    location = await begin(one)
    for start in (0, 25 * MIB):
        chunk = content[start : start + 25 * MIB]
        answer = await ask((two, three)[start > 0], "PATCH", location, data=in_pieces(chunk, MIB))
        assert answer.status == 202
        location = answer.headers["Location"]
    assert (await ask(one, "PUT", f"{location}?digest={digest_of(content)}")).status == 201
    total = [await requests_of(client) for client in replicas]
    assert not any("GetObject" in each or "HeadObject" in each or "ListObjectsV2" in each for each in total)
    assert sum(each.get("CreateMultipartUpload", 0) for each in total) == 1
    assert sum(each.get("CompleteMultipartUpload", 0) for each in total) == 1


async def claimed(settings: Settings) -> None:
    """Wait until a request writes to the upload."""
    held = "SELECT id FROM upload_session WHERE writer IS NOT NULL"
    await asyncio.to_thread(wait_until, lambda: query(settings.database.url, held), "a claim")


async def test_of_two_that_append_at_once_one_wins_and_the_other_is_told(
    replicas: list[Client], settings: Settings
) -> None:
    one, two, three = replicas
    location = await begin(three)
    first, second = secrets.token_bytes(400_000), secrets.token_bytes(400_000)
    async with wire(one) as slow:
        await slow.send(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(first)}\r\n\r\n".encode())
        await slow.send(first[:300_000])
        await claimed(settings)
        answer = await ask(two, "PATCH", location, data=second)
        assert (answer.status, answer.codes) == (409, ["BLOB_UPLOAD_INVALID"])
        await slow.send(first[300_000:])
        assert (await slow.answer()).status == 202
    assert (await ask(two, "PUT", f"{location}?digest={digest_of(first)}")).status == 201
    assert (await ask(three, "GET", f"{APP}/blobs/{digest_of(first)}")).body == first


# --- what one does, all see -----------------------------------------------------------------------------


async def test_what_changes_at_one_is_seen_at_once_at_the_others(replicas: list[Client]) -> None:
    for number in range(12):
        writer = replicas[number % 3]
        image = await Pusher(writer).image("latest")
        for client in replicas:
            for _ in range(3):
                assert (await ask(client, "GET", f"{APP}/manifests/latest")).body == image.manifest
                assert (await ask(client, "HEAD", f"{APP}/blobs/{digest_of(image.layers[0])}")).status == 200
        assert (await ask(writer, "DELETE", f"{APP}/manifests/{image.digest}")).status == 202
        assert (await ask(writer, "DELETE", f"{APP}/blobs/{digest_of(image.layers[0])}")).status == 202
        for client in replicas:
            assert (await ask(client, "GET", f"{APP}/manifests/latest")).status == 404
            assert (await ask(client, "GET", f"{APP}/manifests/{image.digest}")).status == 404
            assert (await ask(client, "HEAD", f"{APP}/blobs/{digest_of(image.layers[0])}")).status == 404


async def everywhere(replicas: list[Client], work: Callable[[Client], Awaitable[object]]) -> None:
    await asyncio.gather(*(work(client) for client in replicas for _ in range(3)))


async def test_the_same_image_pushed_at_all_of_them_at_once_is_there_once(
    replicas: list[Client], settings: Settings
) -> None:
    for number in range(5):
        image = make_image(layers=2)

        async def push(client: Client, name: str = f"new/path{number}/app", pushed: object = image) -> None:
            assert pushed is image  # noqa: B023 - each round waits for its own
            push = Pusher(client, name)
            for blob in image.blobs:  # noqa: B023
                await push.blob(blob)
            await push.manifest(image.manifest, "latest")  # noqa: B023

        await everywhere(replicas, push)
    url = settings.database.url
    assert query(url, "SELECT count(*) FROM blob") == [(15,)]
    assert query(url, "SELECT count(*) FROM manifest") == [(5,)]
    assert query(url, "SELECT count(*) FROM tag_event") == [(5,)]
    assert len(await stored(settings)) == 15


# --- replicas that die ----------------------------------------------------------------------------------


@pytest.fixture
def mortal(tmp_path: Path, settings: Settings) -> Iterator[HytheServer]:
    """A replica in a process of its own."""
    small_parts = {"HYTHE_STORAGE__S3__PART_BYTES": str(5 * MIB)}
    with hythe_server(tmp_path, environment=environment_of(settings) | small_parts) as server:
        yield server


async def test_an_upload_goes_on_elsewhere_when_its_replica_was_killed(
    mortal: HytheServer, start: Start, settings: Settings
) -> None:
    survivor = await start()
    content = secrets.token_bytes(80 * MIB)
    location = urlsplit(await begin(survivor)).path
    reader, writer = await asyncio.open_connection("127.0.0.1", mortal.port)
    writer.write(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    for at in range(0, 75 * MIB, MIB):
        writer.write(f"{MIB:x}\r\n".encode() + content[at : at + MIB] + b"\r\n")
        await writer.drain()
    url = settings.database.url
    # A long request notes how far it came, but not before 64 MiB.
    await asyncio.to_thread(wait_until, lambda: query(url, 'SELECT "offset" FROM upload_session') > [(0,)], "a note")
    mortal.kill()
    writer.close()
    # Its claim ends by itself after a while, which nobody wants to wait for here.
    await put_back(settings)
    reached = int((await ask(survivor, "GET", location)).headers["Range"].partition("-")[2]) + 1
    assert reached >= 20 * MIB
    assert (await ask(survivor, "PATCH", location, data=in_pieces(content[reached:], MIB))).status == 202
    created = await ask(survivor, "PUT", f"{location}?digest={digest_of(content)}")
    assert created.status == 201, created.body
    assert (await ask(survivor, "GET", f"{APP}/blobs/{digest_of(content)}")).body == content
    await tidy(settings)
    assert await stored(settings) == [content]
    reader.feed_eof()


async def anything_lies_in(settings: Settings) -> bool:
    store = open_store(settings, Affinity(enabled=False))
    found = [each async for each in store.objects()]
    await store.close()
    return bool(found)


async def put_back(settings: Settings) -> None:
    """Let time pass for those who claim a session, and for what is left of others."""
    long_ago = now() - 10 * sessions.LEASE
    database = open_facts(settings, Affinity(enabled=False))
    await database.write(lambda connection: set_back(connection, long_ago))
    await database.close()


def set_back(connection: object, at: int) -> None:
    for statement in (f"UPDATE upload_session SET claimed_at = {at}", f"UPDATE leftover SET at = {at}"):
        connection.exec_driver_sql(statement)  # type: ignore[attr-defined]


async def tidy(settings: Settings) -> None:
    """Sweep, when the time has come."""
    await put_back(settings)
    database, store = open_facts(settings, Affinity(enabled=False)), open_store(settings, Affinity(enabled=False))
    await Sweeper(store, database, 3600, 3600).tidy()
    assert [found async for found in store.objects() if found.key.startswith("uploads/")] == []
    await store.close()
    await database.close()
    assert query(settings.database.url, "SELECT upload FROM leftover") == []


async def test_a_lost_part_upload_of_a_session_that_ended_well_is_gone_after_the_sweep(
    mortal: HytheServer, start: Start, settings: Settings
) -> None:
    survivor = await start()
    location = urlsplit(await begin(survivor)).path
    _, writer = await asyncio.open_connection("127.0.0.1", mortal.port)
    writer.write(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    for _ in range(20):
        writer.write(f"{MIB:x}\r\n".encode() + bytes(MIB) + b"\r\n")
        await writer.drain()

    async with asyncio.timeout(20):
        while not await anything_lies_in(settings):  # noqa: ASYNC110 - what is waited for is an object
            await asyncio.sleep(0.05)
    mortal.kill()
    writer.close()
    await put_back(settings)
    # Nothing of it was noted, so the client begins at the beginning, and is done with little.
    assert (await ask(survivor, "GET", location)).headers["Range"] == "0-0"
    assert (await ask(survivor, "PUT", f"{location}?digest={digest_of(b'little')}", data=b"little")).status == 201
    await tidy(settings)
    assert await stored(settings) == [b"little"]


async def test_a_replica_that_wakes_up_past_its_claim_spoils_nothing_of_who_went_on(
    mortal: HytheServer, start: Start, settings: Settings
) -> None:
    survivor = await start(storage={"s3": msgspec.to_builtins(settings.storage.s3) | {"part_bytes": 5 * MIB}})
    content = secrets.token_bytes(33 * MIB + 5)
    location = urlsplit(await begin(survivor)).path
    assert (await ask(survivor, "PATCH", location, data=in_pieces(content[: 12 * MIB], MIB))).status == 202
    reader, writer = await asyncio.open_connection("127.0.0.1", mortal.port)
    writer.write(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    for at in range(12 * MIB, 20 * MIB, MIB):
        writer.write(f"{MIB:x}\r\n".encode() + content[at : at + MIB] + b"\r\n")
        await writer.drain()
    await claimed(settings)
    await asyncio.sleep(0.3)
    os.kill(mortal.pid, signal.SIGSTOP)
    await put_back(settings)
    assert (await ask(survivor, "GET", location)).headers["Range"] == f"0-{12 * MIB - 1}"
    assert (await ask(survivor, "PATCH", location, data=in_pieces(content[12 * MIB :], MIB))).status == 202
    # It finds its connection cut, and wants to keep what it has.
    writer.close()
    os.kill(mortal.pid, signal.SIGCONT)
    await asyncio.to_thread(wait_until, lambda: b'"PATCH"' in mortal.output.read_bytes(), "the end of the request")
    created = await ask(survivor, "PUT", f"{location}?digest={digest_of(content)}")
    assert created.status == 201, created.body
    assert (await ask(survivor, "GET", f"{APP}/blobs/{digest_of(content)}")).body == content
    await tidy(settings)
    assert await stored(settings) == [content]
    reader.feed_eof()


# --- claims ---------------------------------------------------------------------------------------------


@pytest.fixture
async def kept(settings: Settings) -> AsyncIterator[tuple[Sessions, Database, Store]]:
    """The sessions of a replica, without a server around them."""
    upgrade(settings.database.url)
    affinity = Affinity(enabled=False)
    database, store = open_facts(settings, affinity), open_store(settings, affinity)
    fresh = FreshSessions(store, database, enabled=False)
    yield Sessions(store, database, Contents(database, 0, alone=False), fresh), database, store
    await store.close()
    await database.close()


NAME = RepositoryName("org/team/app")


async def steal(settings: Settings, database: Database, session_id: str) -> None:
    """Let another replica claim a session that somebody holds."""
    await put_back(settings)
    await database.note(sessions.claim, session_id, NAME, "another")


def writers(settings: Settings) -> list[str | None]:
    return [row[0] for row in query(settings.database.url, "SELECT writer FROM upload_session")]


async def test_a_writer_that_lost_its_claim_does_not_end_the_session_of_the_next(
    kept: tuple[Sessions, Database, Store], settings: Settings
) -> None:
    held, database, _ = kept
    session_id = await held.open(NAME, "sha256")

    async def request() -> None:
        async with held.claimed(NAME, session_id) as claim:
            await claim.upload.write([b"wrong"])
            await steal(settings, database, session_id)
            await held.publish(claim, Digest.of(b"right"))

    with pytest.raises(DigestMismatch):
        await request()
    assert writers(settings) == ["another"]


async def test_before_anything_is_written_under_an_old_claim_it_is_renewed_or_found_lost(
    kept: tuple[Sessions, Database, Store], settings: Settings
) -> None:
    held, database, store = kept
    session_id = await held.open(NAME, "sha256")

    async def request() -> None:
        async with held.claimed(NAME, session_id) as claim:
            await claim.upload.write([b"some"])
            claim.renewed_at -= sessions.LEASE
            await put_back(settings)
            await held.hold(claim)
            assert query(settings.database.url, "SELECT claimed_at FROM upload_session")[0][0] > now() - 5_000_000
            await steal(settings, database, session_id)
            # Nobody was away for long, so nobody asks.
            await held.hold(claim)
            claim.renewed_at -= sessions.LEASE
            await held.let_go(claim)

    with pytest.raises(BlobUploadUnknown):
        await request()
    assert writers(settings) == ["another"]
    assert [found async for found in store.objects()] == []


async def test_a_claim_is_kept_for_as_long_as_publishing_takes(
    kept: tuple[Sessions, Database, Store], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, _, _ = kept
    monkeypatch.setattr("registry.sessions._RENEWAL", 0.05)
    session_id = await held.open(NAME, "sha256")
    async with held.claimed(NAME, session_id) as claim:
        await claim.upload.write([b"slow"])
        verify = claim.upload.verify

        async def verify_slowly(digest: Digest) -> None:
            await put_back(settings)
            await asyncio.to_thread(wait_until, is_renewed, "a renewal")
            await verify(digest)

        def is_renewed() -> bool:
            return bool(query(settings.database.url, "SELECT claimed_at FROM upload_session")[0][0] > now() - 5_000_000)

        monkeypatch.setattr(claim.upload, "verify", verify_slowly)
        await held.publish(claim, Digest.of(b"slow"))
    assert writers(settings) == []


@pytest.mark.parametrize("failure", [asyncio.CancelledError(), MetadataUnavailable("it is gone")], ids=repr)
async def test_a_claim_whose_answer_was_lost_is_let_go_of(
    kept: tuple[Sessions, Database, Store],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
) -> None:
    held, database, _ = kept
    session_id = await held.open(NAME, "sha256")
    note = database.note

    async def lose(unit: Any, *args: Any, **kwargs: Any) -> Any:
        result = await note(unit, *args, **kwargs)
        if unit is sessions.claim:
            raise failure
        return result

    monkeypatch.setattr(database, "note", lose)
    with pytest.raises(type(failure)):
        async with held.claimed(NAME, session_id):
            raise AssertionError("nobody may write")
    assert writers(settings) == [None]


async def test_bytes_that_cannot_be_deleted_now_are_not_what_the_client_is_told(
    kept: tuple[Sessions, Database, Store], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, _, store = kept

    async def fail(*_: object) -> None:
        raise StoreUnavailable("not now")

    monkeypatch.setattr(store, "forget", fail)
    monkeypatch.setattr(store, "delete", fail)
    session_id = await held.open(NAME, "sha256")
    with pytest.raises(DigestMismatch):
        async with held.claimed(NAME, session_id) as claim:
            await held.publish(claim, Digest.of(b"right"))
    for _ in range(2):
        # The second time the bytes are there already, and ours are not needed.
        session_id = await held.open(NAME, "sha256")
        async with held.claimed(NAME, session_id) as claim:
            await claim.upload.write([b"right"])
            await held.publish(claim, Digest.of(b"right"))
    await held.cancel(NAME, await held.open(NAME, "sha256"))
    assert writers(settings) == []
    assert len(query(settings.database.url, "SELECT upload FROM leftover")) == 3


# --- starting -------------------------------------------------------------------------------------------


@pytest.fixture
def empty(postgres_server: Postgres) -> Iterator[str]:
    made = postgres_server.create()
    yield made
    postgres_server.drop(made)


def test_replicas_that_start_at_once_on_an_empty_database_all_serve(
    tmp_path: Path, settings: Settings, empty: str
) -> None:
    environment = environment_of(settings) | {"HYTHE_DATABASE__URL": empty}
    with ExitStack() as stack:
        servers = []
        for number in range(3):
            (tmp_path / str(number)).mkdir()
            made = hythe_server(tmp_path / str(number), environment=environment, start=False)
            servers.append(stack.enter_context(made))
        for server in servers:
            super(HytheServer, server).start()
        for server in servers:
            server.wait_for(f"{server.url}/readyz")


@pytest.mark.parametrize("mix", ["SQLite and S3", "PostgreSQL and files"])
def test_any_mix_serves_and_goes_on_after_a_restart(tmp_path: Path, settings: Settings, mix: str) -> None:
    environment = environment_of(settings)
    if mix == "SQLite and S3":
        del environment["HYTHE_DATABASE__URL"]
    else:
        environment["HYTHE_STORAGE__DRIVER"] = "filesystem"
    content = secrets.token_bytes(100_000)
    for is_first in (True, False):
        with hythe_server(tmp_path, environment=environment) as server:
            address = f"{server.url}{APP}/blobs"
            if is_first:
                pushed = requests.post(f"{address}/uploads/?digest={digest_of(content)}", data=content, timeout=30)
                assert pushed.status_code == 201
            assert requests.get(f"{address}/{digest_of(content)}", timeout=30).content == content


def test_two_sqlite_files_do_not_share_a_bucket(tmp_path: Path, settings: Settings, ceph_bucket: Bucket) -> None:
    environment = environment_of(settings)
    del environment["HYTHE_DATABASE__URL"]
    (tmp_path / "one").mkdir()
    with hythe_server(tmp_path / "one", environment=environment):
        other = hythe("serve", "--data", str(tmp_path / "two"), "--listen", "127.0.0.1:0", **environment)
    assert other.returncode == 1
    assert "belong to another registry" in other.stderr


@pytest.mark.parametrize(
    ("place", "is_refused"),
    [("/srv/nfs/hythe.db", True), ("/srv/nfs/deep er/hythe.db", True), ("/srv/hythe.db", False), ("/x.db", False)],
)
def test_a_sqlite_file_that_other_hosts_may_open_is_refused(tmp_path: Path, place: str, is_refused: bool) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
        "30 22 0:26 / /srv/nfs rw,relatime shared:2 - nfs4 host:/export rw,vers=4.2\n"
    )
    if not is_refused:
        check_local(Path(place), mounts)
        return
    with pytest.raises(ConfigurationError, match=r"network filesystem \(nfs4\)"):
        check_local(Path(place), mounts)
