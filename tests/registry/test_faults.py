"""A registry whose object store or database fails: clients get what they asked for, or are told to come again."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import requests

import registry.metadata.postgres
from registry.config import Settings
from registry.metadata import sessions
from registry.metadata.schema import upgrade
from registry.metadata.tables import now
from tests.conftest import Bucket, Start
from tests.content import Client, Pusher, digest_of
from tests.facts import query
from tests.registry.talk import Answer, ask, begin, in_pieces, stored, wire
from tests.services.faults import FaultyProxy
from tests.services.messages import Kind
from tests.services.postgres import Postgres, postgres

pytestmark = pytest.mark.usefixtures("hasty_store")

MIB = 1 << 20
APP = "/v2/org/team/app"
SMALL, LARGE = 100_000, 14 * MIB
CUT: list[tuple[Kind, int]] = [("PutObject", SMALL), ("UploadPart", LARGE)]
WRITES: list[tuple[Kind, int]] = [*CUT, ("CreateMultipartUpload", LARGE), ("CompleteMultipartUpload", LARGE)]


@pytest.fixture
def proxy(ceph_bucket: Bucket) -> Iterator[FaultyProxy]:
    with FaultyProxy(ceph_bucket.server.endpoint) as made:
        yield made


@pytest.fixture
async def client(start: Start) -> Client:
    """A registry whose store is behind the proxy, with small parts and little patience."""
    return await start()


@pytest.fixture
def settings(settings: Settings, proxy: FaultyProxy) -> Settings:
    tree = msgspec.to_builtins(settings)
    tree["storage"]["s3"] |= {"endpoint": proxy.endpoint, "part_bytes": 5 * MIB, "timeout_seconds": 1}
    return msgspec.convert(tree, Settings)


async def push(client: Client, content: bytes) -> Answer:
    """Push as docker does; return the first answer that is no success, or the last."""
    location = await begin(client)
    answer = await ask(client, "PATCH", location, data=in_pieces(content, 300_000))
    if answer.status != 202:
        return answer
    return await ask(client, "PUT", f"{location}?digest={digest_of(content)}")


def check_come_again(answer: Answer) -> None:
    assert (answer.status, answer.codes) == (503, ["UNKNOWN"]), answer
    assert int(answer.headers["Retry-After"]) > 0


async def check_whole(client: Client, content: bytes) -> None:
    assert (await ask(client, "GET", f"{APP}/blobs/{digest_of(content)}")).body == content


@pytest.mark.parametrize(("kind", "size"), WRITES)
@pytest.mark.parametrize("how", ["SlowDown", "InternalError", "hang", "lost answer"])
async def test_a_push_outlives_a_store_that_fails_for_a_moment(
    client: Client, proxy: FaultyProxy, kind: Kind, size: int, how: str
) -> None:
    content = secrets.token_bytes(size)
    if how == "hang":
        proxy.hang(kind)
    elif how == "lost answer":
        proxy.lose_answer(kind)
    else:
        proxy.fail(kind, 2, 503 if how == "SlowDown" else 500, how)
    assert (await push(client, content)).status == 201
    await check_whole(client, content)


@pytest.mark.parametrize(("kind", "size"), CUT)
async def test_a_push_outlives_a_connection_that_is_cut(
    client: Client, proxy: FaultyProxy, kind: Kind, size: int
) -> None:
    content = secrets.token_bytes(size)
    proxy.cut_request(kind, 5000)
    assert (await push(client, content)).status == 201
    await check_whole(client, content)


@pytest.mark.parametrize(("kind", "size"), CUT)
async def test_a_push_to_a_store_that_is_away_is_told_to_come_again_and_goes_on_when_it_is_back(
    client: Client, proxy: FaultyProxy, settings: Settings, kind: Kind, size: int
) -> None:
    content = secrets.token_bytes(size)
    proxy.fail("PutObject", 1000)
    proxy.fail("UploadPart", 1000)
    location = await begin(client)
    check_come_again(await ask(client, "PATCH", location, data=in_pieces(content, 300_000)))
    proxy.clear()
    kept = (await ask(client, "GET", location)).headers["Range"]
    reached = 0 if kept == "0-0" else int(kept.partition("-")[2]) + 1
    assert (await ask(client, "PATCH", location, data=in_pieces(content[reached:], 300_000))).status == 202
    assert (await ask(client, "PUT", f"{location}?digest={digest_of(content)}")).status == 201
    await check_whole(client, content)
    assert query(settings.database.url, "SELECT id FROM upload_session") == []


async def test_a_pull_outlives_connections_that_are_cut(client: Client, proxy: FaultyProxy) -> None:
    content = secrets.token_bytes(LARGE)
    await push(client, content)
    proxy.cut_response("GetObject", 3 * MIB, 2)
    await check_whole(client, content)


async def test_a_pull_from_a_store_that_is_away_is_told_to_come_again(client: Client, proxy: FaultyProxy) -> None:
    content = secrets.token_bytes(SMALL)
    await push(client, content)
    proxy.fail("GetObject", 1000)
    check_come_again(await ask(client, "GET", f"{APP}/blobs/{digest_of(content)}"))
    assert (await ask(client, "HEAD", f"{APP}/blobs/{digest_of(content)}")).status == 200
    proxy.clear()
    await check_whole(client, content)


async def test_a_pull_that_cannot_go_on_ends_before_its_end(client: Client, proxy: FaultyProxy) -> None:
    content = secrets.token_bytes(LARGE)
    await push(client, content)
    proxy.cut_response("GetObject", 3 * MIB)
    proxy.fail("GetObject", 1000)
    async with wire(client) as talk:
        await talk.request("GET", f"{APP}/blobs/{digest_of(content)}")
        assert len(await talk.rest()) < len(content)


async def test_readiness_names_the_store_that_is_away(client: Client, proxy: FaultyProxy) -> None:
    proxy.fail("PutObject", 1000)
    answer = await ask(client, "GET", "/readyz")
    assert answer.status == 503
    assert answer.json["database"] == "ok"
    # Anybody may ask, and what stands behind us is nobody's business.
    assert answer.json["store"] == "failed: see the log"
    proxy.clear()
    assert (await ask(client, "GET", "/readyz")).status == 200


# --- redirects ------------------------------------------------------------------------------------------


@pytest.fixture
async def redirecting(start: Start, settings: Settings) -> Client:
    return await start(storage={"s3": msgspec.to_builtins(settings.storage.s3) | {"redirect": True}})


async def test_clients_are_sent_to_the_bucket(redirecting: Client, proxy: FaultyProxy) -> None:
    content = secrets.token_bytes(SMALL)
    await push(redirecting, content)
    path = f"{APP}/blobs/{digest_of(content)}"
    for headers in ({}, {"Range": "bytes=10-19"}):
        answer = await ask(redirecting, "GET", path, headers=headers)
        assert (answer.status, answer.body) == (307, b"")
        found = await asyncio.to_thread(requests.get, answer.headers["Location"], headers=headers, timeout=10)
        assert found.content == (content[10:20] if headers else content)
        assert answer.headers["Location"].startswith(proxy.endpoint)
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Docker-Content-Digest"] == digest_of(content)
    # What the bucket cannot say is said here.
    assert (await ask(redirecting, "HEAD", path)).headers["Content-Length"] == str(SMALL)
    several = await ask(redirecting, "GET", path, headers={"Range": "bytes=0-1,5-6"})
    assert several.status == 206
    empty = await Pusher(redirecting).blob(b"")
    assert (await ask(redirecting, "GET", f"{APP}/blobs/{empty}")).status == 200


async def test_an_address_is_signed_anew_for_everybody(redirecting: Client) -> None:
    content = secrets.token_bytes(SMALL)
    await push(redirecting, content)
    path = f"{APP}/blobs/{digest_of(content)}"
    first = await ask(redirecting, "GET", path)
    # Signatures count in seconds.
    await asyncio.sleep(1.1)
    again = await ask(redirecting, "GET", path)
    assert first.headers["Location"] != again.headers["Location"]


# --- the database ---------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Postgres]:
    """A PostgreSQL that nobody else needs."""
    with postgres(tmp_path) as server:
        yield server


@pytest.fixture
async def fragile(start: Start, own: Postgres) -> tuple[Client, str]:
    url = own.create()
    upgrade(url)
    return await start(database={"url": url}), url


async def test_a_push_and_pulls_outlive_restarts_of_the_database(own: Postgres, fragile: tuple[Client, str]) -> None:
    client, url = fragile
    image = await Pusher(client).image("latest")

    def crash() -> None:
        own.kill()
        own.start()

    for restart in (own.restart, crash):
        location = await begin(client)
        content = secrets.token_bytes(SMALL)
        await asyncio.to_thread(restart)
        assert (await ask(client, "GET", f"{APP}/manifests/latest")).body == image.manifest
        assert (await ask(client, "PATCH", location, data=content)).status == 202
        await asyncio.to_thread(restart)
        assert (await ask(client, "PUT", f"{location}?digest={digest_of(content)}")).status == 201
        await check_whole(client, content)
    assert query(url, "SELECT id FROM upload_session") == []


async def test_pushes_while_the_database_is_restarted_are_done_or_told_to_come_again(
    own: Postgres, fragile: tuple[Client, str]
) -> None:
    client, url = fragile
    done: list[bytes] = []

    async def push_some() -> None:
        for _ in range(12):
            content = secrets.token_bytes(SMALL)
            location = await ask(client, "POST", f"{APP}/blobs/uploads/?digest={digest_of(content)}", data=content)
            if location.status == 201:
                done.append(content)
            else:
                check_come_again(location)

    pushing = [asyncio.create_task(push_some()) for _ in range(6)]
    for _ in range(3):
        await asyncio.sleep(0.3)
        await asyncio.to_thread(own.restart)
    await asyncio.gather(*pushing)
    assert done
    for content in done:
        await check_whole(client, content)
    # A claim that could not be let go of ends by itself; then the sweep may have the session.
    old = now() - 2 * sessions.LEASE
    assert query(url, f"SELECT id FROM upload_session WHERE claimed_at > {old} AND writer IS NULL") is not None


async def test_a_database_that_is_away_is_said_to_be_so(
    own: Postgres, fragile: tuple[Client, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = fragile
    image = await Pusher(client).image("latest")
    own.stop()
    with monkeypatch.context() as hasty:
        hasty.setattr(registry.metadata.postgres, "_PATIENCE", 1.0)
        answers = await asyncio.gather(
            ask(client, "GET", f"{APP}/manifests/latest"),
            ask(client, "POST", f"{APP}/blobs/uploads/"),
            ask(client, "GET", "/v2/_catalog"),
        )
    for answer in answers:
        check_come_again(answer)
    own.start()
    assert (await ask(client, "GET", f"{APP}/manifests/latest")).body == image.manifest


async def test_nothing_is_left_of_pushes_that_failed(client: Client, proxy: FaultyProxy, settings: Settings) -> None:
    content = secrets.token_bytes(SMALL)
    wrong = digest_of(b"something else")
    location = await begin(client)
    assert (await ask(client, "PATCH", location, data=content)).status == 202
    assert (await ask(client, "PUT", f"{location}?digest={wrong}")).status == 400
    answer = await ask(client, "POST", f"{APP}/blobs/uploads/?digest={wrong}", data=content)
    assert answer.status == 400
    assert await stored(settings) == []
