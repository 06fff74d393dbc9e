"""What an object store asks for that no disk does: few requests, parts, and servers that fail in every way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests

from storage.base import Checkpoint, Upload
from storage.digest import Digest
from storage.errors import ContentMissing, DigestMismatch, OutOfSpace, StoreUnavailable, UploadLost
from storage.parts import State, grown
from storage.s3 import S3Store
from tests.conftest import Bucket, needs
from tests.services.faults import FaultyProxy
from tests.services.messages import Kind
from tests.services.processes import Program, free_port, is_open, run, wait_until
from tests.services.s3 import needs_ceph, needs_juicefs
from tests.storage.conftest import begun, keys, read, resumed, uploads

pytestmark = pytest.mark.usefixtures("hasty_store")

MIB = 1 << 20
LEAST = 5 * MIB
SMALL = secrets.token_bytes(3000)
LARGE = secrets.token_bytes(24 * MIB)


@pytest.fixture(params=[pytest.param("ceph", marks=needs_ceph), pytest.param("juicefs", marks=needs_juicefs)])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    found: Bucket = request.getfixturevalue(f"{request.param}_bucket")
    return found


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[FaultyProxy]:
    """What stands between us and the server, and counts."""
    with FaultyProxy(bucket.server.endpoint) as made:
        yield made


Open = Callable[..., S3Store]


@pytest.fixture
async def open_store(bucket: Bucket, proxy: FaultyProxy) -> AsyncIterator[Open]:
    """Open stores on one prefix, each another replica's; small parts, and little patience."""
    settings: dict[str, Any] = bucket.settings() | {"endpoint": proxy.endpoint}
    made: list[S3Store] = []

    def open_one(**more: Any) -> S3Store:
        small = {"part_bytes": LEAST, "buffer_bytes": 64 * MIB, "timeout_seconds": 1}
        made.append(S3Store(**(settings | small | more)))
        return made[-1]

    yield open_one
    for store in made:
        await store.close()


@pytest.fixture
async def store(open_store: Open) -> S3Store:
    return open_store()


def kinds(proxy: FaultyProxy) -> dict[Kind, int]:
    return dict(Counter(seen.kind for seen in proxy.requests))


async def send(upload: Upload, content: bytes) -> None:
    """Send content as a client would, piece by piece."""
    for start in range(0, len(content), 2 * MIB):
        await upload.write([content[start : start + 2 * MIB]])


async def sent(store: S3Store, content: bytes, name: str = "one") -> Checkpoint:
    upload = store.resume(store.begin(name, "sha256"))
    await send(upload, content)
    await upload.suspend()
    return upload.checkpoint()


async def check(store: S3Store, key: str, content: bytes) -> None:
    """Check that the content is there, and after a while nothing else."""
    assert await read(store, key, 0, len(content)) == content
    await store.forget("one", key)
    assert [found.key async for found in store.objects()] == [key]


# --- requests -------------------------------------------------------------------------------------------


async def test_a_small_layer_is_one_request_in_and_one_out(open_store: Open, proxy: FaultyProxy) -> None:
    first, second = open_store(), open_store()
    checkpoint = await sent(first, SMALL)
    upload = second.resume(checkpoint)
    key = await upload.commit(Digest.of(SMALL))
    assert upload.is_tidy
    assert kinds(proxy) == {"PutObject": 1}
    assert await read(second, key, 0, len(SMALL)) == SMALL
    assert kinds(proxy) == {"PutObject": 1, "GetObject": 1}
    assert first.requests + second.requests == Counter(kinds(proxy))


async def test_a_blob_in_one_request_is_one_request(store: S3Store, proxy: FaultyProxy) -> None:
    key = await store.resume(store.begin("one", "sha256")).commit(Digest.of(SMALL), [SMALL])
    assert kinds(proxy) == {"PutObject": 1}
    await check(store, key, SMALL)


async def test_a_large_layer_is_its_parts_and_two_requests_more(open_store: Open, proxy: FaultyProxy) -> None:
    first, second = open_store(), open_store()
    checkpoint = await sent(first, LARGE)
    upload = second.resume(checkpoint)
    key = await upload.commit(Digest.of(LARGE))
    assert upload.is_tidy
    assert kinds(proxy) == {"CreateMultipartUpload": 1, "UploadPart": 4, "CompleteMultipartUpload": 1}
    assert first.requests + second.requests == Counter(kinds(proxy))
    await check(second, key, LARGE)


def test_parts_grow_so_that_ten_thousand_hold_500_gib() -> None:
    sizes = [grown(16 * MIB, number) for number in range(10_000)]
    assert sum(sizes) > 500 << 30
    assert max(sizes) <= 64 * MIB


# --- parts and what makes none yet ----------------------------------------------------------------------


async def test_a_layer_in_small_chunks_becomes_parts_whichever_replica_gets_them(
    open_store: Open, proxy: FaultyProxy
) -> None:
    stores = [open_store(), open_store(), open_store()]
    checkpoint = stores[0].begin("one", "sha256")
    for number in range(14):
        upload = await resumed(stores[number % 3], checkpoint)
        await upload.write([LARGE[number * MIB : (number + 1) * MIB]])
        await upload.suspend()
        checkpoint = upload.checkpoint()
        assert checkpoint.offset == (number + 1) * MIB
    assert kinds(proxy)["UploadPart"] == 2
    upload = stores[1].resume(checkpoint)
    key = await upload.commit(Digest.of(LARGE[: 14 * MIB]))
    assert not upload.is_tidy
    await check(stores[0], key, LARGE[: 14 * MIB])


async def test_what_was_loose_and_a_last_piece_are_one_object(store: S3Store, proxy: FaultyProxy) -> None:
    checkpoint = await sent(store, SMALL[:1000])
    upload = store.resume(checkpoint)
    key = await upload.commit(Digest.of(SMALL), [SMALL[1000:]])
    assert not upload.is_tidy
    assert kinds(proxy) == {"PutObject": 2, "GetObject": 1}
    await check(store, key, SMALL)


def without_hash(checkpoint: Checkpoint) -> Checkpoint:
    """Return what a Python that cannot save a hash would have noted."""
    state = msgspec.msgpack.decode(checkpoint.state, type=State)
    assert state.hashed
    state.hashed = b""
    return replace(checkpoint, state=msgspec.msgpack.encode(state))


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["an object", "parts"])
async def test_where_the_hash_was_lost_the_bytes_are_read_again(store: S3Store, content: bytes) -> None:
    checkpoint = without_hash(await sent(store, content[:-100]))
    upload = await resumed(store, checkpoint)
    await upload.write([content[-100:]])
    with pytest.raises(DigestMismatch):
        await upload.verify(Digest.of(b"something else"))
    await check(store, await upload.commit(Digest.of(content)), content)


async def test_parts_can_be_asked_for_by_the_other_algorithm(store: S3Store) -> None:
    upload = store.resume(await sent(store, LARGE))
    with pytest.raises(DigestMismatch):
        await upload.verify(Digest.of(b"something else", "sha512"))
    await check(store, await upload.commit(Digest.of(LARGE, "sha512")), LARGE)


async def test_an_upload_begun_in_another_store_cannot_go_on(store: S3Store) -> None:
    checkpoint = await sent(store, SMALL)
    for state in (b"", b"x" * 128, b"\x90", b"\xff"):
        with pytest.raises(UploadLost):
            await resumed(store, replace(checkpoint, state=state))


async def test_parts_that_a_lost_writer_sent_and_never_noted_are_sent_again_alike(open_store: Open) -> None:
    lost, other = open_store(), open_store(part_bytes=16 * MIB)
    checkpoint = await sent(lost, LARGE[: 7 * MIB])
    upload = await resumed(lost, checkpoint)
    await send(upload, LARGE[7 * MIB : 12 * MIB])
    await upload.suspend()
    noted = upload.checkpoint()
    zombie = await resumed(lost, noted)
    await send(zombie, LARGE[12 * MIB :])
    await zombie.suspend()
    # Whoever goes on makes larger parts, if he may choose; here he may not.
    upload = await resumed(other, noted)
    await send(upload, LARGE[12 * MIB :])
    await check(other, await upload.commit(Digest.of(LARGE)), LARGE)


async def test_an_object_that_was_taken_away_is_missed(store: S3Store) -> None:
    checkpoint = await sent(store, SMALL)
    await store.forget("one")
    with pytest.raises(UploadLost):
        await store.resume(checkpoint).commit(Digest.of(SMALL + b"more"), [b"more"])


# --- memory ---------------------------------------------------------------------------------------------


async def test_many_uploads_at_once_keep_within_the_memory_they_are_given(open_store: Open) -> None:
    store = open_store(buffer_bytes=32 * MIB, part_bytes=16 * MIB)
    most = 0

    async def push(number: int) -> str:
        nonlocal most
        upload = store.resume(store.begin(f"upload-{number}", "sha256"))
        for start in range(0, len(LARGE), 2 * MIB):
            await upload.write([LARGE[start : start + 2 * MIB]])
            most = max(most, store._shared.memory._used)
        return await upload.commit(Digest.of(LARGE))

    async with asyncio.timeout(60):
        pushed = await asyncio.gather(*map(push, range(8)))
    assert most <= 32 * MIB
    assert store._shared.memory._used == 0
    assert await read(store, pushed[3], 0, len(LARGE)) == LARGE


async def test_slow_uploads_that_hold_bytes_do_not_keep_others_waiting(open_store: Open) -> None:
    store = open_store(buffer_bytes=32 * MIB, part_bytes=16 * MIB)
    slow = [await begun(store, LARGE[: 4 * MIB - 1], f"slow-{number}") for number in range(8)]
    async with asyncio.timeout(60):
        key = await (await begun(store, LARGE, "fast")).commit(Digest.of(LARGE))
        assert await read(store, key, 0, len(LARGE)) == LARGE
        for upload in slow:
            await upload.write([LARGE[4 * MIB - 1 : 9 * MIB]])
            assert await upload.commit(Digest.of(LARGE[: 9 * MIB]))
    assert store._shared.memory._used == 0


async def test_an_upload_that_cannot_be_put_away_harms_none_that_needs_its_room(
    open_store: Open, proxy: FaultyProxy
) -> None:
    store = open_store(buffer_bytes=8 * MIB, part_bytes=16 * MIB)
    broken = await begun(store, LARGE[: 7 * MIB], "broken")
    proxy.fail("CreateMultipartUpload", 1000, 403, "AccessDenied")
    good = await begun(store, SMALL, "good")
    await good.write([LARGE[: 2 * MIB]])
    assert await good.commit(Digest.of(SMALL + LARGE[: 2 * MIB]))
    with pytest.raises(StoreUnavailable, match="AccessDenied"):
        await broken.write([SMALL])
    # Its client must not hear that all is kept, if this was its last step.
    with pytest.raises(StoreUnavailable, match="AccessDenied"):
        await broken.suspend()
    await broken.abandon()
    assert broken.checkpoint().offset == 0
    assert store._shared.memory._used == 0


# --- requests that end at any moment --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["CreateMultipartUpload", "UploadPart", "PutObject", "CompleteMultipartUpload"])
@pytest.mark.parametrize("loose", [0, 1000], ids=["from the start", "after a loose object"])
async def test_an_upload_whose_request_was_cancelled_anywhere_is_whole_afterwards(
    open_store: Open, proxy: FaultyProxy, kind: Kind, loose: int
) -> None:
    store = open_store(timeout_seconds=20)
    content = LARGE[: 12 * MIB] if kind != "PutObject" else LARGE[:MIB]
    upload = await resumed(store, await sent(store, content[:loose]))
    proxy.requests.clear()
    proxy.slow("UploadPart", 40 * MIB)
    proxy.hang(kind, seconds=0.3)

    async def go_on() -> str:
        await send(upload, content[upload.offset :])
        return await upload.commit(Digest.of(content))

    request = asyncio.create_task(go_on())
    async with asyncio.timeout(10):
        while kind not in kinds(proxy):  # noqa: ASYNC110 - what is waited for is a request at a server
            await asyncio.sleep(0.005)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    proxy.clear()
    await upload.suspend()
    checkpoint = upload.checkpoint()
    assert store._shared.memory._used == 0
    again = store.resume(checkpoint)
    await send(again, content[checkpoint.offset :])
    await check(store, await again.commit(Digest.of(content)), content)


async def test_bytes_that_are_hashed_while_their_request_is_cancelled_are_counted(store: S3Store) -> None:
    upload = await begun(store, SMALL)
    writing = asyncio.create_task(upload.write([LARGE[: 4 * MIB]]))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    content = SMALL + LARGE[: upload.offset - len(SMALL)]
    await check(store, await upload.commit(Digest.of(content)), content)


async def test_a_part_that_fails_takes_nothing_of_the_rest_with_it(store: S3Store, proxy: FaultyProxy) -> None:
    upload = await begun(store)
    proxy.fail("UploadPart", 1000)
    await upload.write([LARGE[: 11 * MIB]])
    with pytest.raises(StoreUnavailable):
        await upload.commit(Digest.of(LARGE[: 11 * MIB]))
    proxy.clear()
    await check(store, await upload.commit(Digest.of(LARGE[: 11 * MIB])), LARGE[: 11 * MIB])


# --- others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3000, len(LARGE)], ids=["an object", "parts"])
async def test_what_is_left_in_parts_goes_without_the_blob_that_came_of_the_same_upload(
    bucket: Bucket, store: S3Store, size: int
) -> None:
    key = await store.resume(await sent(store, LARGE[:size])).commit(Digest.of(LARGE[:size]))
    with contextlib.closing(bucket.server.client()) as client:
        client.create_multipart_upload(Bucket=bucket.name, Key=f"{store.bucket._prefix}blobs/on/one.ffffffff")
    left = {found.key async for found in store.objects()} - {key}
    assert left == {"uploads/one"}
    await store.delete("uploads/one")
    assert await keys(store) == {key}
    assert await read(store, key, 0, size) == LARGE[:size]


@pytest.mark.parametrize("size", [2000, 12 * MIB], ids=["an object", "parts"])
async def test_a_writer_that_was_thought_to_be_dead_spoils_nothing(open_store: Open, size: int) -> None:
    lost, winner = open_store(), open_store()
    content = LARGE[: size + 12 * MIB]
    checkpoint = await sent(lost, content[:size])
    zombie = await resumed(lost, checkpoint)
    await send(zombie, content[size : size + 6 * MIB])
    upload = await resumed(winner, checkpoint)
    await send(upload, content[size:])
    key = await upload.commit(Digest.of(content))
    # Now the other one wakes up, and goes on as if nothing were. What fits one object is another object of its own,
    # that no row will name; parts are not to be had any more.
    with contextlib.suppress(UploadLost, StoreUnavailable):
        await send(zombie, b"x" * (12 * MIB))
        assert await zombie.commit(Digest.of(content[: size + 6 * MIB] + b"x" * (12 * MIB))) != key
    await zombie.abandon()
    await check(winner, key, content)


async def test_what_another_made_of_the_same_parts_is_not_taken_for_ours(bucket: Bucket, store: S3Store) -> None:
    upload = await resumed(store, await sent(store, LARGE))
    state = upload._stored  # type: ignore[attr-defined]
    client = bucket.server.client()
    where: Any = {"Bucket": bucket.name, "Key": store.bucket._prefix + state.target}
    client.abort_multipart_upload(**where, UploadId=state.upload_id)
    client.put_object(**where, Body=b"x" * len(LARGE))
    client.close()
    with pytest.raises(UploadLost):
        await upload.commit(Digest.of(LARGE))


# --- servers that fail ----------------------------------------------------------------------------------

WRITES: list[Kind] = ["PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"]


async def push(store: S3Store, kind: Kind) -> tuple[str, bytes]:
    """Push a blob that takes a request of this kind."""
    content = SMALL if kind == "PutObject" else LARGE
    return await store.resume(await sent(store, content)).commit(Digest.of(content)), content


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (502, "")])
async def test_a_server_that_is_busy_is_asked_again(
    store: S3Store, proxy: FaultyProxy, kind: Kind, status: int, code: str
) -> None:
    proxy.fail(kind, 2, status, code)
    key, content = await push(store, kind)
    await check(store, key, content)


@pytest.mark.parametrize("kind", WRITES)
async def test_a_server_that_hangs_is_asked_again(store: S3Store, proxy: FaultyProxy, kind: Kind) -> None:
    proxy.hang(kind)
    key, content = await push(store, kind)
    await check(store, key, content)


@pytest.mark.parametrize("kind", ["PutObject", "UploadPart"])
async def test_a_connection_that_is_cut_in_a_body_is_made_again(store: S3Store, proxy: FaultyProxy, kind: Kind) -> None:
    proxy.cut_request(kind, 1000)
    key, content = await push(store, kind)
    await check(store, key, content)


@pytest.mark.parametrize("kind", WRITES)
async def test_an_answer_that_is_lost_loses_nothing(store: S3Store, proxy: FaultyProxy, kind: Kind) -> None:
    proxy.lose_answer(kind)
    key, content = await push(store, kind)
    await check(store, key, content)


@pytest.mark.parametrize("kind", ["PutObject", "CreateMultipartUpload", "UploadPart"])
async def test_an_upload_goes_on_when_the_server_is_back(open_store: Open, proxy: FaultyProxy, kind: Kind) -> None:
    store = open_store(timeout_seconds=1)
    content = LARGE[:2_000_000] if kind == "PutObject" else LARGE
    proxy.fail(kind, 1000)
    broken = store.resume(store.begin("one", "sha256"))

    async def send_all() -> None:
        await send(broken, content)
        await broken.suspend()

    with pytest.raises(StoreUnavailable, match=r"503|SlowDown"):
        await send_all()
    await broken.abandon()
    checkpoint = broken.checkpoint()
    assert checkpoint.offset < len(content)
    proxy.clear()
    upload = await resumed(store, checkpoint)
    await send(upload, content[checkpoint.offset :])
    await check(store, await upload.commit(Digest.of(content)), content)


async def test_a_full_server_refuses_and_the_upload_goes_on_when_there_is_room(
    store: S3Store, proxy: FaultyProxy
) -> None:
    proxy.fail("PutObject", 1, 403, "QuotaExceeded")
    upload = await begun(store, SMALL)
    with pytest.raises(OutOfSpace):
        await upload.commit(Digest.of(SMALL))
    await check(store, await upload.commit(Digest.of(SMALL)), SMALL)
    assert kinds(proxy)["PutObject"] == 2


@pytest.mark.parametrize("after", [0, 1, 10 * MIB])
async def test_a_blob_whose_sending_is_cut_is_read_to_its_end(store: S3Store, proxy: FaultyProxy, after: int) -> None:
    key, _ = await push(store, "UploadPart")
    proxy.cut_response("GetObject", after, 2)
    assert await read(store, key, 0, len(LARGE)) == LARGE
    proxy.hang("GetObject")
    assert await read(store, key, 7, len(LARGE) - 7) == LARGE[7:-7]


async def test_a_blob_that_cannot_be_read_is_said_to_be_so(open_store: Open, proxy: FaultyProxy) -> None:
    store = open_store(timeout_seconds=1)
    key, _ = await push(store, "PutObject")
    proxy.fail("GetObject", 1000)
    with pytest.raises(StoreUnavailable):
        await read(store, key, 0, len(SMALL))


async def test_a_reader_that_leaves_keeps_no_connection(store: S3Store) -> None:
    key, _ = await push(store, "UploadPart")
    for _ in range(100):
        async with aclosing(store.open(key).read(0, len(LARGE))) as pieces:
            await anext(pieces)
    assert await read(store, key, 0, len(LARGE)) == LARGE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"secret_key": "n0t-the-s3cret"}, "SignatureDoesNotMatch"),
        ({"access_key": "nobody"}, "InvalidAccessKeyId"),
        ({"bucket": "no-such-bucket"}, "NoSuchBucket"),
    ],
)
async def test_credentials_that_are_refused_are_said_to_be_so(
    open_store: Open, change: dict[str, str], said: str
) -> None:
    store = open_store(**change)
    for attempt in (store.probe(), sent(store, SMALL), store.forget("one")):
        with pytest.raises(StoreUnavailable, match=said) as raised:
            await attempt
        assert "s3cret" not in str(raised.value)


async def test_an_answer_that_cannot_be_read_is_told_without_what_is_secret() -> None:
    async def garble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 nonsense\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(garble, "127.0.0.1", 0) as server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        store = S3Store(bucket="b", endpoint=endpoint, access_key="key", secret_key="s3cret", timeout_seconds=1)
        for attempt in (read(store, "x", 0, 9), store.probe()):
            with pytest.raises(StoreUnavailable) as raised:
                await attempt
            assert "X-Amz" not in str(raised.value)
        await store.close()


# --- addresses ------------------------------------------------------------------------------------------


async def test_a_signed_address_gives_anybody_a_range(open_store: Open, bucket: Bucket, proxy: FaultyProxy) -> None:
    store = open_store(redirect=True, public_endpoint=bucket.server.endpoint)
    key, content = await push(store, "PutObject")
    address = await store.open(key).address()
    assert address
    assert address.startswith(bucket.server.endpoint)
    answer = await asyncio.to_thread(requests.get, address, headers={"Range": "bytes=10-19"}, timeout=10)
    assert (answer.status_code, answer.content) == (206, content[10:20])
    assert "GetObject" not in kinds(proxy)


async def test_without_redirect_there_is_no_address(store: S3Store) -> None:
    key, _ = await push(store, "PutObject")
    assert await store.open(key).address() is None


# --- bringing -------------------------------------------------------------------------------------------

BROUGHT = f"blobs/sha256/ab/{'ab' * 32}.one"


async def flow(content: bytes, cut: int = 1 << 40) -> AsyncIterator[bytes]:
    for start in range(0, len(content), MIB):
        if start >= cut:
            raise ContentMissing("it is gone")
        yield content[start : start + MIB]


@pytest.mark.parametrize("content", [b"", SMALL, LARGE], ids=["nothing", "an object", "parts"])
async def test_what_is_brought_lies_under_the_key_it_had(store: S3Store, proxy: FaultyProxy, content: bytes) -> None:
    assert await store.size(BROUGHT) is None
    await store.bring(BROUGHT, Digest.of(content), flow(content))
    assert await store.size(BROUGHT) == len(content)
    assert await read(store, BROUGHT, 0, len(content)) == content
    assert await uploads(store) == {"one"}
    if len(content) < LEAST:
        assert kinds(proxy)["PutObject"] == 1


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["an object", "parts"])
async def test_what_is_brought_wrong_or_not_whole_is_not_there(store: S3Store, content: bytes) -> None:
    with pytest.raises(DigestMismatch):
        await store.bring(BROUGHT, Digest.of(b"something else"), flow(content))
    with pytest.raises(ContentMissing):
        await store.bring(BROUGHT, Digest.of(content), flow(content, cut=len(content) - MIB))
    assert await keys(store) == set()


async def test_what_was_begun_to_be_brought_and_never_was_is_gone_when_it_is(bucket: Bucket, store: S3Store) -> None:
    with contextlib.closing(bucket.server.client()) as client:
        for _ in range(2):
            client.create_multipart_upload(Bucket=bucket.name, Key=store.bucket._prefix + BROUGHT)
    assert await keys(store) == {"uploads/one"}
    await store.bring(BROUGHT, Digest.of(LARGE), flow(LARGE))
    assert await keys(store) == {BROUGHT}


# --- ways to a bucket -----------------------------------------------------------------------------------

TLS = """
{user}
daemon off;
pid {directory}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {directory}/server.crt;
        ssl_certificate_key {directory}/server.key;
        client_max_body_size 0;
        location / {{
            proxy_pass {upstream};
            proxy_set_header Host $http_host;
        }}
    }}
}}
"""


@pytest.fixture
def over_tls(tmp_path: Path, bucket: Bucket) -> Iterator[str]:
    """The address of the server behind TLS, by a certificate that only those trust who are told to."""
    files = {"-keyout": tmp_path / "server.key", "-out": tmp_path / "server.crt"}
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names),
        *(str(word) for pair in files.items() for word in pair),
    )
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(
        TLS.format(directory=tmp_path, port=port, user=user, upstream=bucket.server.endpoint)
    )
    command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"]
    proxy = Program(command, tmp_path / "log")
    proxy.start()
    try:
        wait_until(lambda: is_open(port), "nginx")
        yield f"https://127.0.0.1:{port}"
    finally:
        proxy.stop()


@needs("nginx", "openssl")
async def test_a_server_with_its_own_authority_is_trusted_if_that_is_said(
    open_store: Open, over_tls: str, tmp_path: Path
) -> None:
    store = open_store(endpoint=over_tls, ca_file=str(tmp_path / "server.crt"))
    key, content = await push(store, "UploadPart")
    await check(store, key, content)
    stranger = open_store(endpoint=over_tls)
    for attempt in (stranger.probe(), stranger.forget("one")):
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate|ssl"):
            await attempt


async def test_a_bucket_can_be_named_by_its_host(open_store: Open, bucket: Bucket) -> None:
    # Such names resolve nowhere here, so what is asked for is read off an address.
    store = open_store(addressing="virtual", endpoint="https://s3.example.org", redirect=True)
    address = await store.open("blobs/on/one.12345678").address()
    assert address
    assert address.startswith(f"https://{bucket.name}.s3.example.org/")


async def test_credentials_are_looked_for_where_aws_keeps_them(
    open_store: Open, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.server.secret_key)
    key, content = await push(open_store(access_key="", secret_key=""), "PutObject")
    assert await read(open_store(), key, 0, len(content)) == content
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreUnavailable):
        await open_store(access_key="", secret_key="").probe()


async def test_a_session_token_goes_along(open_store: Open) -> None:
    store = open_store(session_token="t0ken", redirect=True)
    address = await store.open("blobs/on/one.12345678").address()
    assert address
    assert "X-Amz-Security-Token=t0ken" in address
