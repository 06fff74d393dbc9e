"""The ways to push a blob, all of which must come to the same."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest

from registry.config import Settings
from registry.contents import Contents
from registry.errors import MetadataUnavailable
from storage.digest import HEX_LENGTH
from tests.content import Client, Pusher, digest_of, make_image
from tests.registry.talk import Answer, ask, begin, in_pieces, stored

ALGORITHMS = sorted(HEX_LENGTH)
CONTENT = secrets.token_bytes(3000)
UPLOADS = "/v2/org/team/app/blobs/uploads/"


async def post_then_put(client: Client, digest: str) -> Answer:
    location = await begin(client)
    return await ask(client, "PUT", f"{location}?digest={digest}", data=CONTENT)


async def post_then_put_of_unknown_length(client: Client, digest: str) -> Answer:
    location = await begin(client)
    return await ask(client, "PUT", f"{location}?digest={digest}", data=in_pieces(CONTENT))


async def single_post(client: Client, digest: str) -> Answer:
    return await ask(client, "POST", f"{UPLOADS}?digest={digest}", data=CONTENT)


async def streamed_patch(client: Client, digest: str) -> Answer:
    location = await begin(client)
    streamed = await ask(client, "PATCH", location, data=in_pieces(CONTENT))
    assert (streamed.status, streamed.headers["Range"]) == (202, "0-2999")
    return await ask(client, "PUT", f"{streamed.headers['Location']}?digest={digest}")


async def send_chunks(client: Client, *offsets: int) -> str:
    location = await begin(client)
    for start, stop in pairwise(offsets):
        headers = {"Content-Range": f"{start}-{stop - 1}"}
        sent = await ask(client, "PATCH", location, data=CONTENT[start:stop], headers=headers)
        assert (sent.status, sent.headers["Range"]) == (202, f"0-{stop - 1}")
        location = sent.headers["Location"]
    return location


async def chunks_and_an_empty_put(client: Client, digest: str) -> Answer:
    location = await send_chunks(client, 0, 1, 1000, 3000)
    return await ask(client, "PUT", f"{location}?digest={digest}")


async def chunks_the_last_in_the_put(client: Client, digest: str) -> Answer:
    location = await send_chunks(client, 0, 1000, 2500)
    headers = {"Content-Range": "2500-2999"}
    return await ask(client, "PUT", f"{location}?digest={digest}", data=CONTENT[2500:], headers=headers)


async def mount(client: Client, digest: str) -> Answer:
    await Pusher(client, "org/other").blob(CONTENT, digest.partition(":")[0])
    return await ask(client, "POST", f"{UPLOADS}?mount={digest}&from=org/other")


async def anonymous_mount(client: Client, digest: str) -> Answer:
    await Pusher(client, "org/other").blob(CONTENT, digest.partition(":")[0])
    return await ask(client, "POST", f"{UPLOADS}?mount={digest}")


Way = Callable[[Client, str], Awaitable[Answer]]
WAYS: list[Way] = [
    post_then_put,
    post_then_put_of_unknown_length,
    single_post,
    streamed_patch,
    chunks_and_an_empty_put,
    chunks_the_last_in_the_put,
    mount,
    anonymous_mount,
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("push", WAYS)
async def test_every_way_to_push_a_blob_ends_with_the_blob_there(client: Client, push: Way, algorithm: str) -> None:
    digest = digest_of(CONTENT, algorithm)
    response = await push(client, digest)
    assert response.status == 201, response
    assert response.headers["Docker-Content-Digest"] == digest
    assert response.headers["Content-Length"] == "0"
    pulled = await ask(client, "GET", response.headers["Location"])
    assert pulled.body == CONTENT
    assert pulled.headers["Docker-Content-Digest"] == digest


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_an_empty_blob_can_be_pushed(client: Client, algorithm: str) -> None:
    digest = digest_of(b"", algorithm)
    location = await begin(client)
    created = await ask(client, "PUT", f"{location}?digest={digest}")
    assert created.status == 201
    pulled = await ask(client, "GET", created.headers["Location"])
    assert (pulled.status, pulled.body) == (200, b"")


@pytest.mark.parametrize("announced", ALGORITHMS)
@pytest.mark.parametrize("closed_with", ALGORITHMS)
async def test_a_blob_may_be_closed_with_another_algorithm_than_announced(
    client: Client, announced: str, closed_with: str
) -> None:
    location = await begin(client, query=f"?digest-algorithm={announced}")
    await ask(client, "PATCH", location, data=CONTENT[:1000])
    digest = digest_of(CONTENT, closed_with)
    created = await ask(client, "PUT", f"{location}?digest={digest}", data=CONTENT[1000:])
    assert (created.status, created.headers["Docker-Content-Digest"]) == (201, digest)
    assert (await ask(client, "GET", created.headers["Location"])).body == CONTENT


async def test_one_content_can_be_held_under_both_algorithms(client: Client) -> None:
    for algorithm in ALGORITHMS:
        digest = await Pusher(client).blob(CONTENT, algorithm)
        assert (await ask(client, "GET", f"/v2/org/team/app/blobs/{digest}")).body == CONTENT


async def test_a_layer_pushed_by_many_at_once_is_stored_once(client: Client, settings: Settings) -> None:
    content = secrets.token_bytes(300_000)
    digest = digest_of(content)

    async def push(number: int) -> int:
        location = await begin(client, f"org/app{number}")
        await ask(client, "PATCH", location, data=in_pieces(content, 50_000))
        return (await ask(client, "PUT", f"{location}?digest={digest}")).status

    assert await asyncio.gather(*map(push, range(10))) == [201] * 10
    for number in range(10):
        pulled = await ask(client, "GET", f"/v2/org/app{number}/blobs/{digest}")
        assert pulled.body == content
    assert await stored(settings) == [content]


async def test_pushing_what_is_there_already_is_no_error_and_keeps_no_second_copy(
    client: Client, settings: Settings
) -> None:
    for _ in range(3):
        await Pusher(client).blob(CONTENT)
    assert await stored(settings) == [CONTENT]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_an_image_is_pushed_and_pulled(client: Client, algorithm: str) -> None:
    push = Pusher(client)
    image = make_image(algorithm=algorithm)
    digests = [await push.blob(blob, algorithm) for blob in image.blobs]
    await push.manifest(image.manifest, "v1")
    pulled = await ask(client, "GET", "/v2/org/team/app/manifests/v1")
    assert (pulled.status, pulled.body) == (200, image.manifest)
    assert pulled.headers["Docker-Content-Digest"] == image.digest
    for digest, blob in zip(digests, image.blobs, strict=True):
        assert (await ask(client, "GET", f"/v2/org/team/app/blobs/{digest}")).body == blob


@pytest.mark.parametrize("is_written", [False, True], ids=["never written", "written all the same"])
async def test_a_row_whose_fate_is_unknown_costs_no_bytes(
    client: Client, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    finish = Contents.finish_upload

    async def lose_answer(self: Contents, *args: Any, **kwargs: Any) -> bool:
        monkeypatch.setattr(Contents, "finish_upload", finish)
        if is_written:
            await finish(self, *args, **kwargs)
        raise MetadataUnavailable("the database was lost during a commit")

    content = secrets.token_bytes(300_000)
    digest = digest_of(content)
    location = await begin(client)
    assert (await ask(client, "PATCH", location, data=in_pieces(content, 50_000))).status == 202
    monkeypatch.setattr(Contents, "finish_upload", lose_answer)
    assert (await ask(client, "PUT", f"{location}?digest={digest}")).status == 503
    again = await ask(client, "PUT", f"{location}?digest={digest}")
    if again.status == 404:
        # Over, or its bytes were taken back: whoever is told so looks whether it is there, and pushes it if not.
        if not is_written:
            await Pusher(client).blob(content)
    else:
        assert again.status == 201
    assert (await ask(client, "GET", f"/v2/org/team/app/blobs/{digest}")).body == content
