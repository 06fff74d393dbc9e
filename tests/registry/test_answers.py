"""Answers given again: the same as before, counted as any other, never a wrong one."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import registry.wire
from registry.answers import Answers, is_plain
from registry.app import ANSWERS
from registry.cache import Cache, WriteCounter
from registry.config import Settings
from registry.connections import Connections
from registry.metrics import Metrics
from registry.record import Recorder
from registry.wire import Connection
from storage.memory import MemoryStore, _MemoryContent
from storage.oci import OCI_MANIFEST
from tests.conftest import Start
from tests.content import Client, Image, Pusher, digest_of, make_image
from tests.registry.talk import Answer, Wire, ask, files_below, wire

MANIFEST = "/v2/org/team/app/manifests/latest"
#: Headers that every answer has for itself.
OWN = ("Date", "X-Request-Id")


@pytest.fixture
async def image(client: Client) -> Image:
    return await Pusher(client).image("latest")


@pytest.fixture
async def talk(client: Client, image: Image) -> AsyncIterator[Wire]:
    """A connection on which nothing was said yet."""
    async with wire(client) as connection:
        yield connection


def handled(client: Client) -> int:
    """Return how many requests went the long way, through aiohttp."""
    server: Any = client.server
    count: int = server.runner._server.requests_count
    return count


def head(path: str = MANIFEST, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: registry.test", *headers, "", ""]).encode()


async def asked(talk: Wire, data: bytes) -> Answer:
    await talk.send(data)
    return await talk.answer(has_body=not data.startswith(b"HEAD"))


async def known(client: Client, talk: Wire, data: bytes) -> Answer:
    """Ask until the answer is known by heart."""
    for _ in range(2):
        answer = await asked(talk, data)
    before = handled(client)
    again = await asked(talk, data)
    assert handled(client) == before, "it was not given again"
    assert again.status == answer.status
    return again


def lasting(answer: Answer) -> dict[str, str]:
    return {name.title(): value for name, value in answer.headers.items() if name.title() not in OWN}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("what", ["tag", "digest", "config"])
async def test_what_is_asked_again_gets_the_same_answer(
    client: Client, talk: Wire, image: Image, method: str, what: str
) -> None:
    path = {
        "tag": MANIFEST,
        "digest": f"/v2/org/team/app/manifests/{image.digest}",
        "config": f"/v2/org/team/app/blobs/{digest_of(image.config)}",
    }[what]
    first = await asked(talk, head(path, method=method))
    again = await known(client, talk, head(path, method=method))
    assert again.status == 200
    assert again.body == first.body
    assert lasting(again) == lasting(first)
    assert again.headers["X-Request-Id"] != first.headers["X-Request-Id"]
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", again.headers["Date"])
    for name in first.headers:
        assert len(again.headers.getall(name)) == 1


async def test_a_client_that_has_it_already_is_told_so_again(client: Client, talk: Wire, image: Image) -> None:
    answer = await known(client, talk, head(MANIFEST, f'If-None-Match: "{image.digest}"'))
    assert (answer.status, answer.body) == (304, b"")
    assert (await asked(talk, head(MANIFEST, 'If-None-Match: "other"'))).body == image.manifest


async def test_ranges_are_given_again_too(client: Client, talk: Wire, image: Image) -> None:
    path = f"/v2/org/team/app/blobs/{digest_of(image.config)}"
    answer = await known(client, talk, head(path, "Range: bytes=2-5"))
    assert (answer.status, answer.body) == (206, image.config[2:6])
    assert (await asked(talk, head(path, "Range: bytes=3-5"))).body == image.config[3:6]


async def test_another_connection_gets_it_at_once(client: Client, talk: Wire, image: Image) -> None:
    await known(client, talk, head())
    before = handled(client)
    async with wire(client) as other:
        assert (await asked(other, head())).body == image.manifest
    assert handled(client) == before


async def test_answers_given_again_are_counted_as_any_other(client: Client, talk: Wire) -> None:
    line = re.compile(r'hythe_requests_total\{code="200",method="GET",route="manifest"\} (\d+)')

    async def count() -> int:
        found = line.search((await ask(client, "GET", "/metrics")).body.decode())
        return int(float(found[1])) if found else 0

    await known(client, talk, head())
    before = await count()
    for _ in range(5):
        await asked(talk, head())
    assert await count() == before + 5


async def test_a_tag_that_moved_is_answered_anew(client: Client, talk: Wire) -> None:
    for _ in range(3):
        await known(client, talk, head())
        moved = await Pusher(client).image("latest")
        assert (await asked(talk, head())).body == moved.manifest
    assert (await ask(client, "DELETE", MANIFEST)).status == 202
    assert (await asked(talk, head())).status == 404


async def test_a_deleted_blob_is_not_given_again(client: Client, talk: Wire, image: Image) -> None:
    path = f"/v2/org/team/app/blobs/{digest_of(image.config)}"
    await known(client, talk, head(path))
    assert (await ask(client, "DELETE", path)).status == 202
    assert (await asked(talk, head(path))).status == 404


async def test_what_failed_is_tried_anew(client: Client, talk: Wire, image: Image, settings: Settings) -> None:
    digest = digest_of(image.config)
    path = f"/v2/org/team/app/blobs/{digest}"
    files = files_below(Path(settings.storage.filesystem.root))
    file = next(file for file in files if file.name.startswith(digest.removeprefix("sha256:")))
    elsewhere = file.rename(file.with_suffix(".away"))
    for _ in range(4):
        assert (await asked(talk, head(path))).status == 404
    elsewhere.rename(file)
    assert (await asked(talk, head(path))).body == image.config


async def test_what_is_not_there_is_looked_for_anew(client: Client, talk: Wire) -> None:
    path = "/v2/org/team/app/manifests/soon"
    for _ in range(4):
        assert (await asked(talk, head(path))).status == 404
    image = await Pusher(client).image("soon")
    assert (await asked(talk, head(path))).body == image.manifest


@pytest.mark.parametrize("header", ["X-Request-Id: mine", "Content-Length: 0", "Expect: nothing"])
async def test_some_heads_always_go_the_long_way(client: Client, talk: Wire, header: str) -> None:
    for _ in range(4):
        before = handled(client)
        await asked(talk, head(MANIFEST, header))
        assert handled(client) == before + 1


async def test_a_large_answer_is_not_kept(client: Client, talk: Wire) -> None:
    push = Pusher(client)
    image = make_image(annotations={"filling": "x" * 20_000})
    for blob in image.blobs:
        await push.blob(blob)
    await push.manifest(image.manifest, "large")
    for _ in range(4):
        before = handled(client)
        answer = await asked(talk, head("/v2/org/team/app/manifests/large"))
        assert answer.body == image.manifest
        assert handled(client) == before + 1


async def test_without_memory_nothing_is_given_again(start: Start) -> None:
    client = await start(cache={"bytes": 0})
    image = await Pusher(client).image("latest")
    async with wire(client) as talk:
        for _ in range(4):
            before = handled(client)
            assert (await asked(talk, head())).body == image.manifest
            assert handled(client) == before + 1


# --- whose turn it is -----------------------------------------------------------------------------------------


async def test_a_body_that_looks_like_a_request_is_a_body(client: Client, talk: Wire) -> None:
    await known(client, talk, head())
    async with wire(client) as other:
        await other.request("PUT", MANIFEST, [f"Content-Type: {OCI_MANIFEST}", f"Content-Length: {2 * len(head())}"])
        await asyncio.sleep(0.05)
        await other.send(head())
        await asyncio.sleep(0.05)
        await other.send(head())
        answer = await other.answer()
        assert (answer.status, answer.codes) == (400, ["MANIFEST_INVALID"])
        # Nothing else came, and the connection goes on.
        assert (await asked(other, head("/v2/"))).body == b"{}"


async def test_the_rest_of_a_head_that_looks_like_a_request_is_the_rest_of_a_head(client: Client, talk: Wire) -> None:
    await known(client, talk, head())
    async with wire(client) as other:
        await other.send(b"GET /v2/ HTTP/1.1\r\nX-Filling: ")
        await asyncio.sleep(0.05)
        await other.send(head())
        assert (await other.answer()).body == b"{}"
        assert (await asked(other, head("/v2/org/team/app/tags/list"))).json["tags"] == ["latest"]


async def test_requests_sent_together_are_answered_in_their_order(client: Client, talk: Wire, image: Image) -> None:
    await known(client, talk, head())
    async with wire(client) as other:
        await other.send(head("/v2/") + head() + head("/v2/") + head())
        assert [(await other.answer()).body for _ in range(4)] == [b"{}", image.manifest] * 2


class _SlowStore(MemoryStore):
    """A store whose content comes when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    def open(self, key: str) -> _SlowContent:
        return _SlowContent(self, key)


class _SlowContent(_MemoryContent):
    def __init__(self, store: _SlowStore, key: str) -> None:
        super().__init__(store._bytes, key)
        self._store = store

    async def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        await self._store.may_go_on.wait()
        async for piece in super().read(start, stop):
            yield piece


async def test_a_request_behind_a_slow_one_waits_for_its_turn(start: Start) -> None:
    store = _SlowStore()
    client = await start(store=store)
    image = await Pusher(client).image("latest")
    slow = f"/v2/org/team/app/blobs/{digest_of(image.layers[0])}"
    async with wire(client) as talk, wire(client) as other:
        await known(client, talk, head())
        store.may_go_on.clear()
        await other.send(head(slow))
        await asyncio.sleep(0.05)
        await other.send(head())
        await asyncio.sleep(0.05)
        store.may_go_on.set()
        assert (await other.answer()).body == image.layers[0]
        assert (await other.answer()).body == image.manifest


async def test_a_server_that_drains_gives_nothing_again(client: Client, talk: Wire) -> None:
    await known(client, talk, head())
    assert client.app is not None
    client.app[ANSWERS].end()
    before = handled(client)
    await asked(talk, head())
    assert handled(client) == before + 1


async def test_a_busy_connection_is_not_taken_for_a_silent_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # aiohttp ends a connection on which it heard nothing for `keepalive_timeout`.
    monkeypatch.setattr(registry.wire, "_REFRESH", 0.2)
    client = await start(keepalive_timeout=2)
    image = await Pusher(client).image("latest")
    async with wire(client) as talk:
        for _ in range(50):
            assert (await asked(talk, head())).body == image.manifest
            await asyncio.sleep(0.06)


class _Inner(asyncio.Protocol):
    """Hears what is passed on."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.heard.append(data)

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass


class _Transport(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Any] = []

    def write(self, data: Any) -> None:
        self.written.append(data)


async def test_a_client_that_takes_nothing_is_given_no_more() -> None:
    answers = Answers(Cache(1 << 20, WriteCounter()), Recorder(Metrics(), None))
    start = b"HTTP/1.1 200 OK\r\n"
    answer = registry.answers.Answer(start, b"", "GET", "/", "manifest", 200, 0, "", "", "", "", "", math.inf)
    answers._cache.put(head(), answer, 0, 1)
    inner, transport = _Inner(), _Transport()
    connection = Connection(inner, answers, Connections(10, 20))
    connection.connection_made(transport)
    connection.data_received(head())
    assert (len(transport.written), inner.heard) == (1, [])
    connection.pause_writing()
    connection.data_received(head())
    assert (len(transport.written), inner.heard) == (1, [head()])


PLAIN = head(MANIFEST, "Accept: */*", "User-Agent: someone/1.0 (\xe4)")


@pytest.mark.parametrize("data", [PLAIN, PLAIN.replace(b"GET", b"HEAD"), b"GET / HTTP/1.1\r\nA:\r\n\r\n"])
def test_a_whole_head_without_a_body_is_plain(data: bytes) -> None:
    assert is_plain(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PLAIN[:-1],
        PLAIN[1:],
        PLAIN + b"\r\n",
        PLAIN + PLAIN,
        b"\r\n" + PLAIN,
        PLAIN.replace(b"GET", b"PUT"),
        PLAIN.replace(b"GET", b"get"),
        PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
        PLAIN.replace(b"/v2/", b"/v 2/"),
        PLAIN.replace(b"\r\n", b"\n"),
        PLAIN.replace(b"\r\nAccept", b"\nAccept"),
        PLAIN.replace(b"Accept: */*", b"Accept: *\r/*"),
        PLAIN.replace(b"Accept: */*", b"Accept: *\n/*"),
        PLAIN.replace(b"Accept: */*", b"Accept : */*"),
        PLAIN.replace(b"Accept: */*", b" Accept: */*"),
        PLAIN.replace(b"Accept: */*", b"Accept: \x00"),
        PLAIN.replace(b"Accept: */*", b"no colon"),
        PLAIN.replace(b"Accept: */*", b"content-LENGTH: 5"),
        PLAIN.replace(b"Accept: */*", b"Content-Length:5"),
        PLAIN.replace(b"Accept: */*", b"Transfer-Encoding: chunked"),
        PLAIN.replace(b"Accept: */*", b"Upgrade: websocket"),
        PLAIN.replace(b"Accept: */*", b"Expect: 100-continue"),
        PLAIN.replace(b"Host: registry.test", b"Content-Length: 5"),
    ],
)
def test_anything_else_is_not(data: bytes) -> None:
    assert not is_plain(data)


def test_only_what_is_asked_twice_takes_memory() -> None:
    answers = Answers(Cache(1 << 20, WriteCounter()), Recorder(Metrics(), None))
    for number in range(10_000):
        answers._is_asked_again(b"%d" % number)
    assert len(answers._marks) <= 4096
    assert answers._is_asked_again(b"9999")
