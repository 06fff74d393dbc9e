"""Pulling blobs. [distribution-spec: end-2; RFC 9110, 13 and 14]"""

import asyncio
import secrets
from email import message_from_bytes, policy
from io import BytesIO

import pytest

from storage.digest import HEX_LENGTH
from tests.conftest import Start
from tests.content import Client, Pusher, digest_of
from tests.registry.talk import Answer, ask, wire

#: Small content is sent from memory, large content by the kernel.
SIZES = [1000, 200_000]
UNKNOWN = digest_of(b"never pushed")
CHANGING = {"date", "x-request-id"}


@pytest.fixture(params=SIZES)
def content(request: pytest.FixtureRequest) -> bytes:
    return secrets.token_bytes(request.param)


async def pull(client: Client, content: bytes, **headers: str) -> Answer:
    digest = await Pusher(client).blob(content)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await ask(client, "GET", f"/v2/org/team/app/blobs/{digest}", headers=named)


def lasting(response: Answer) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.lower() not in CHANGING}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_base_says_yes(client: Client, method: str) -> None:
    response = await ask(client, method, "/v2/")
    assert response.status == 200
    assert response.headers["Docker-Distribution-API-Version"] == "registry/2.0"


@pytest.mark.parametrize("algorithm", sorted(HEX_LENGTH))
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_blob_comes_with_its_digest_and_length(
    client: Client, content: bytes, method: str, algorithm: str
) -> None:
    digest = await Pusher(client).blob(content, algorithm)
    response = await ask(client, method, f"/v2/org/team/app/blobs/{digest}")
    assert response.status == 200
    assert response.headers["Docker-Content-Digest"] == digest
    assert response.headers["ETag"] == f'"{digest}"'
    assert response.headers["Accept-Ranges"] == "bytes"
    assert response.headers["Content-Length"] == str(len(content))
    assert response.body == (content if method == "GET" else b"")


async def test_head_and_get_of_a_blob_have_the_same_headers(client: Client, content: bytes) -> None:
    path = f"/v2/org/team/app/blobs/{await Pusher(client).blob(content)}"
    assert lasting(await ask(client, "HEAD", path)) == lasting(await ask(client, "GET", path))


async def test_head_of_a_blob_that_never_was_is_404_and_nothing_follows(client: Client) -> None:
    async with wire(client) as connection:
        await connection.request("HEAD", f"/v2/org/team/app/blobs/{UNKNOWN}")
        answer = await connection.answer(has_body=False)
        assert answer.status == 404
        # Had a body followed, this answer would begin in the middle of it.
        await connection.request("GET", "/v2/")
        assert (await connection.answer()).status == 200


async def test_a_blob_that_never_was_is_unknown(client: Client) -> None:
    response = await ask(client, "GET", f"/v2/org/team/app/blobs/{UNKNOWN}")
    assert response.status == 404
    assert response.codes == ["BLOB_UNKNOWN"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_blob_is_only_visible_in_the_repositories_that_hold_it(client: Client, method: str) -> None:
    digest = await Pusher(client, "org/team/app").blob(b"ours")
    await Pusher(client, "org/team/other").blob(b"theirs")
    for name in ("org/team/other", "org/team", "org/team/app/deeper"):
        assert (await ask(client, method, f"/v2/{name}/blobs/{digest}")).status == 404


@pytest.mark.parametrize(
    ("header", "begin", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=10-10", 10, 11),
        ("bytes=100-", 100, None),
        ("bytes=-100", -100, None),
        ("bytes=-999999999", 0, None),
        ("bytes=500-999999999", 500, None),
        ("BYTES=0-9", 0, 10),
        ("bytes= 5-9 ,", 5, 10),
        ("bytes=999999999-,5-9", 5, 10),
    ],
)
async def test_one_range_is_sent_as_it_is(
    client: Client, content: bytes, header: str, begin: int, end: int | None
) -> None:
    response = await pull(client, content, Range=header)
    expected = content[begin:end]
    first = begin % len(content) if begin < 0 else begin
    assert response.status == 206
    assert response.headers["Content-Range"] == f"bytes {first}-{first + len(expected) - 1}/{len(content)}"
    assert response.headers["Content-Length"] == str(len(expected))
    assert response.headers["Docker-Content-Digest"] == digest_of(content)
    assert response.body == expected


@pytest.mark.parametrize("ranges", [[(0, 9), (100, 199)], [(990, 999), (0, 0), (5, 500)], [(0, 9), (5, 19)]])
async def test_several_ranges_come_as_parts(client: Client, content: bytes, ranges: list[tuple[int, int]]) -> None:
    response = await pull(client, content, Range="bytes=" + ", ".join(f"{first}-{last}" for first, last in ranges))
    assert response.status == 206
    assert "Content-Range" not in response.headers
    head = f"Content-Type: {response.headers['Content-Type']}\r\n\r\n".encode()
    message = message_from_bytes(head + response.body, policy=policy.HTTP)
    assert message.get_content_type() == "multipart/byteranges"
    assert not message.defects
    parts = list(message.iter_parts())
    assert [part["Content-Range"] for part in parts] == [f"bytes {a}-{b}/{len(content)}" for a, b in ranges]


async def test_the_parts_of_several_ranges_are_the_bytes_asked_for(client: Client, content: bytes) -> None:
    response = await pull(client, content, Range="bytes=0-9,50-,-3")
    boundary = response.headers["Content-Type"].partition("boundary=")[2].encode()
    parts = (response.body).split(b"\r\n--" + boundary)
    # MIME parsers may mend line ends inside of bytes, so the bodies are cut out by hand.
    bodies = [part.partition(b"\r\n\r\n")[2] for part in parts[1:-1]]
    assert bodies == [content[:10], content[50:], content[-3:]]
    assert parts[-1] == b"--\r\n"


@pytest.mark.parametrize("header", ["bytes=999999999-", "bytes=-0", "bytes=999999998-999999999,-0"])
async def test_ranges_outside_are_refused_with_the_size(client: Client, content: bytes, header: str) -> None:
    response = await pull(client, content, Range=header)
    assert response.status == 416
    assert response.headers["Content-Range"] == f"bytes */{len(content)}"
    assert response.codes == ["SIZE_INVALID"]


@pytest.mark.parametrize(
    "header",
    ["lines=0-9", "bytes=9-0", "bytes=a-b", "bytes=-", "bytes=", "bytes", "bytes=0-9;10-19", "bytes=" + "0-0," * 500],
)
async def test_a_range_that_cannot_be_read_is_ignored(client: Client, content: bytes, header: str) -> None:
    response = await pull(client, content, Range=header)
    assert (response.status, response.body) == (200, content)


async def test_a_range_is_sent_if_the_content_is_still_the_same(client: Client, content: bytes) -> None:
    response = await pull(client, content, Range="bytes=0-9", If_Range=f'"{digest_of(content)}"')
    assert (response.status, response.body) == (206, content[:10])


@pytest.mark.parametrize(
    "condition", ['"other"', 'W/"{digest}"', "{digest}", "Sat, 29 Oct 1994 19:43:31 GMT", "nonsense"]
)
async def test_all_is_sent_if_the_content_is_not_surely_the_same(
    client: Client, content: bytes, condition: str
) -> None:
    condition = condition.format(digest=digest_of(content))
    response = await pull(client, content, Range="bytes=0-9", If_Range=condition)
    assert (response.status, response.body) == (200, content)


async def test_a_range_means_nothing_to_head(client: Client, content: bytes) -> None:
    path = f"/v2/org/team/app/blobs/{await Pusher(client).blob(content)}"
    response = await ask(client, "HEAD", path, headers={"Range": "bytes=0-9"})
    assert (response.status, response.headers["Content-Length"]) == (200, str(len(content)))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("condition", ['"{digest}"', 'W/"{digest}"', '"other", "{digest}"', "*"])
async def test_a_blob_that_the_client_has_is_not_sent(client: Client, method: str, condition: str) -> None:
    digest = await Pusher(client).blob(b"known")
    headers = {"If-None-Match": condition.format(digest=digest), "Range": "bytes=0-1"}
    response = await ask(client, method, f"/v2/org/team/app/blobs/{digest}", headers=headers)
    assert (response.status, response.body) == (304, b"")
    assert response.headers["ETag"] == f'"{digest}"'


async def test_a_blob_that_the_client_does_not_have_is_sent(client: Client, content: bytes) -> None:
    response = await pull(client, content, If_None_Match='"other"')
    assert (response.status, response.body) == (200, content)


async def test_the_namespace_of_a_proxying_client_changes_nothing(client: Client, content: bytes) -> None:
    path = f"/v2/org/team/app/blobs/{await Pusher(client).blob(content)}?ns=docker.io"
    assert (await ask(client, "GET", path)).body == content


@pytest.mark.parametrize("digest", ["sha256:abc", "sha256:" + "A" * 64, "md5:" + "0" * 32, "sha256:" + "0" * 65, "x"])
async def test_a_malformed_digest_is_refused(client: Client, digest: str) -> None:
    response = await ask(client, "GET", f"/v2/org/team/app/blobs/{digest}")
    assert response.status == 400
    assert response.codes == ["DIGEST_INVALID"]


async def push_large(client: Client, content: bytes) -> str:
    """Push content that is too large to be sent in one piece, and return where it is."""
    digest = digest_of(content)
    pushed = await ask(client, "POST", f"/v2/org/team/app/blobs/uploads/?digest={digest}", data=BytesIO(content))
    assert pushed.status == 201
    return f"/v2/org/team/app/blobs/{digest}"


async def test_a_client_that_takes_nothing_is_let_go(start: Start) -> None:
    client = await start(uploads={"stall_seconds": 1})
    # More than two sockets hold.
    content = secrets.token_bytes(32 << 20)
    path = await push_large(client, content)
    async with wire(client) as connection:
        await connection.request("GET", path)
        await asyncio.sleep(2.5)
        assert len(await connection.rest()) < len(content)


async def test_a_client_that_is_slow_gets_all_of_it(start: Start) -> None:
    client = await start(uploads={"stall_seconds": 1})
    content = secrets.token_bytes(24 << 20)
    path = await push_large(client, content)
    async with wire(client) as connection:
        await connection.request("GET", path, ["Connection: close"])
        received = bytearray()
        while piece := await connection.some(1 << 20):
            received += piece
            # The whole takes several times as long as it may take nothing.
            await asyncio.sleep(0.05)
    assert received.endswith(content)
