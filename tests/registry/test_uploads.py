"""Upload sessions, and what may go wrong with them. [distribution-spec: end-4a, 5, 6, 13, 14]"""

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from registry.app import Process
from registry.config import Settings
from storage.digest import HEX_LENGTH
from tests.conftest import Start
from tests.content import Client, digest_of
from tests.facts import query
from tests.registry.talk import Answer, Wire, ask, begin, files_below, in_pieces, stored, wire
from tests.storage.conftest import open_files

CONTENT = secrets.token_bytes(3000)
DIGEST = digest_of(CONTENT)
UPLOADS = "/v2/org/team/app/blobs/uploads/"


@pytest.fixture(params=[True, False], ids=["alone", "one of several"])
def process(request: pytest.FixtureRequest) -> Process:
    """A registry that may keep new sessions to itself for a moment, and one that may not."""
    return Process(alone=request.param)


async def patch(client: Client, location: str, begin: int, end: int, content: bytes = CONTENT) -> Answer:
    headers = {"Content-Range": f"{begin}-{end - 1}"}
    return await ask(client, "PATCH", location, data=content[begin:end], headers=headers)


async def close(client: Client, location: str, digest: str = DIGEST, rest: bytes = b"") -> Answer:
    return await ask(client, "PUT", f"{location}?digest={digest}", data=rest)


async def status(client: Client, location: str) -> Answer:
    return await ask(client, "GET", location)


async def range_comes_to(client: Client, location: str, expected: str) -> None:
    """Wait until the registry noticed what befell a connection, and let go of the session."""
    for _ in range(500):
        current = (await status(client, location)).headers["Range"]
        if current == expected:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the session stands at {current}")


async def check_it_can_be_finished(client: Client, location: str) -> None:
    """Go on from where the session says it stands, as a client does that lost its way."""
    answer = await status(client, location)
    last = int(answer.headers["Range"].removeprefix("0-"))
    stands_at = last + 1 if last else 0
    created = await close(client, answer.headers["Location"], rest=CONTENT[stands_at:])
    assert created.status == 201, created
    assert (await ask(client, "GET", created.headers["Location"])).body == CONTENT


async def test_a_session_has_a_uuid_and_nothing_yet(client: Client) -> None:
    answer = await ask(client, "POST", UPLOADS)
    assert answer.status == 202
    session_id = answer.headers["Location"].removeprefix(UPLOADS)
    assert str(uuid.UUID(session_id)) == session_id
    assert answer.headers["Docker-Upload-UUID"] == session_id
    assert answer.headers["Range"] == "0-0"
    assert answer.headers["Content-Length"] == "0"


async def test_sessions_may_be_opened_without_the_last_slash(client: Client) -> None:
    assert (await ask(client, "POST", UPLOADS.rstrip("/"))).status == 202


@pytest.mark.parametrize(("received", "expected"), [(0, "0-0"), (1, "0-0"), (1000, "0-999")])
async def test_the_status_of_a_session_says_how_far_it_came(client: Client, received: int, expected: str) -> None:
    location = await begin(client)
    if received:
        await patch(client, location, 0, received)
    answer = await status(client, location)
    assert (answer.status, answer.body) == (204, b"")
    assert (answer.headers["Location"], answer.headers["Range"]) == (location, expected)


async def test_each_chunk_is_answered_with_the_range_so_far(client: Client) -> None:
    location = await begin(client)
    for start, stop in ((0, 1), (1, 500), (500, 3000)):
        answer = await patch(client, location, start, stop)
        assert (answer.status, answer.headers["Range"]) == (202, f"0-{stop - 1}")
        assert answer.headers["Location"] == location


@pytest.mark.parametrize("method", ["GET", "PATCH", "PUT", "DELETE"])
@pytest.mark.parametrize("session", ["unknown", "not-a-uuid", "finished", "cancelled", "of another repository"])
async def test_a_session_that_is_not_open_is_unknown(client: Client, method: str, session: str) -> None:
    location = await begin(client)
    if session == "unknown":
        location = UPLOADS + str(uuid.uuid4())
    elif session == "not-a-uuid":
        location = UPLOADS + "nothing"
    elif session == "finished":
        assert (await close(client, location, rest=CONTENT)).status == 201
    elif session == "cancelled":
        assert (await ask(client, "DELETE", location)).status == 204
    else:
        location = location.replace("org/team/app", "org/team/other")
    answer = await ask(client, method, f"{location}?digest={DIGEST}")
    assert (answer.status, answer.codes) == (404, ["BLOB_UPLOAD_UNKNOWN"])


async def test_a_cancelled_upload_leaves_no_bytes(client: Client, settings: Settings) -> None:
    location = await begin(client)
    await patch(client, location, 0, 1000)
    assert await stored(settings)
    answer = await ask(client, "DELETE", location)
    assert (answer.status, answer.body) == (204, b"")
    assert not await stored(settings)


OUT_OF_ORDER = {"a gap": (1500, 2000), "an overlap": (500, 1500), "the start again": (0, 1000), "far off": (10**18, 0)}


@pytest.mark.parametrize("chunk", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_a_chunk_out_of_order_is_refused_and_tells_where_to_go_on(
    client: Client, method: str, chunk: tuple[int, int]
) -> None:
    location = await begin(client)
    await patch(client, location, 0, 1000)
    start, stop = chunk
    body = CONTENT[start:stop] or b"x"
    headers = {"Content-Range": f"{start}-{start + len(body) - 1}"}
    answer = await ask(client, method, f"{location}?digest={DIGEST}", data=body, headers=headers)
    assert (answer.status, answer.codes) == (416, ["BLOB_UPLOAD_INVALID"])
    assert (answer.headers["Location"], answer.headers["Range"]) == (location, "0-999")


@pytest.mark.parametrize("chunk", list(OUT_OF_ORDER.values())[:3], ids=list(OUT_OF_ORDER)[:3])
async def test_after_a_chunk_out_of_order_the_session_goes_on_by_patch(client: Client, chunk: tuple[int, int]) -> None:
    location = await begin(client)
    await patch(client, location, 0, 1000)
    assert (await patch(client, location, *chunk)).status == 416
    assert (await patch(client, location, 1000, 3000)).status == 202
    assert (await close(client, location)).status == 201


@pytest.mark.parametrize("chunk", list(OUT_OF_ORDER.values())[:3], ids=list(OUT_OF_ORDER)[:3])
async def test_after_a_chunk_out_of_order_the_session_goes_on_by_put(client: Client, chunk: tuple[int, int]) -> None:
    location = await begin(client)
    await patch(client, location, 0, 1000)
    assert (await patch(client, location, *chunk)).status == 416
    await check_it_can_be_finished(client, location)


async def test_a_first_chunk_that_does_not_begin_at_zero_is_refused(client: Client) -> None:
    location = await begin(client)
    answer = await patch(client, location, 1000, 2000)
    assert (answer.status, answer.headers["Range"]) == (416, "0-0")
    await check_it_can_be_finished(client, location)


MALFORMED = ["", "x", "1000", "1000-", "-1999", "1999-1000", "1000-1999-", "bytes", "1000-1999/x", "0x3e8-0x7cf"]
OF_ANOTHER_LENGTH = ["1000-1998", "1000-2000", "1000-1000"]


@pytest.mark.parametrize("header", MALFORMED + OF_ANOTHER_LENGTH)
@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_a_content_range_that_makes_no_sense_is_refused_and_the_session_goes_on(
    client: Client, method: str, header: str
) -> None:
    location = await begin(client)
    await patch(client, location, 0, 1000)
    headers = {"Content-Range": header}
    answer = await ask(client, method, f"{location}?digest={DIGEST}", data=CONTENT[1000:2000], headers=headers)
    assert (answer.status, answer.codes) == (400, ["BLOB_UPLOAD_INVALID"])
    assert (await status(client, location)).headers["Range"] == "0-999"
    await check_it_can_be_finished(client, location)


@pytest.mark.parametrize("header", ["bytes 0-2999/3000", "bytes=0-2999", "0-2999/*", "0-2999"])
async def test_a_content_range_may_be_written_as_the_rfc_has_it(client: Client, header: str) -> None:
    location = await begin(client)
    answer = await ask(client, "PATCH", location, data=CONTENT, headers={"Content-Range": header})
    assert (answer.status, answer.headers["Range"]) == (202, "0-2999")


@pytest.mark.parametrize("announced", [2999, 3001])
async def test_a_stream_of_another_length_than_its_range_is_refused_and_can_be_resumed(
    client: Client, announced: int
) -> None:
    location = await begin(client)
    headers = {"Content-Range": f"0-{announced - 1}"}
    answer = await ask(client, "PATCH", location, data=in_pieces(CONTENT), headers=headers)
    assert (answer.status, answer.codes) == (400, ["SIZE_INVALID"])
    await check_it_can_be_finished(client, location)


@pytest.mark.parametrize("query", ["", "digest=", "digest=sha256:abc", "digest=nothing", "digest=md5:" + "0" * 32])
async def test_closing_without_a_good_digest_is_refused_and_the_session_goes_on(client: Client, query: str) -> None:
    location = await begin(client)
    await patch(client, location, 0, 1000)
    answer = await ask(client, "PUT", f"{location}?{query}")
    assert (answer.status, answer.codes) == (400, ["DIGEST_INVALID"])
    await check_it_can_be_finished(client, location)


@pytest.mark.parametrize("query", ["digest=", "digest=sha256:abc", "digest=md5:" + "0" * 32, "digest-algorithm=md5"])
async def test_an_upload_for_a_bad_digest_is_not_begun(client: Client, settings: Settings, query: str) -> None:
    answer = await ask(client, "POST", f"{UPLOADS}?{query}", data=CONTENT)
    assert (answer.status, answer.codes) == (400, ["DIGEST_INVALID"])
    assert not await stored(settings)


@pytest.mark.parametrize("algorithm", sorted(HEX_LENGTH))
@pytest.mark.parametrize("announced", sorted(HEX_LENGTH))
async def test_content_of_another_digest_is_refused_and_nothing_is_kept(
    client: Client, settings: Settings, algorithm: str, announced: str
) -> None:
    wrong = digest_of(b"something else", algorithm)
    location = await begin(client, query=f"?digest-algorithm={announced}")
    answer = await close(client, location, wrong, CONTENT)
    assert (answer.status, answer.codes) == (400, ["DIGEST_INVALID"])
    assert (await status(client, location)).status == 404
    await check_nothing_is_kept(client, settings, wrong, digest_of(CONTENT, algorithm))


async def test_a_single_post_of_another_digest_is_refused_and_nothing_is_kept(
    client: Client, settings: Settings
) -> None:
    wrong = digest_of(b"something else")
    answer = await ask(client, "POST", f"{UPLOADS}?digest={wrong}", data=CONTENT)
    assert (answer.status, answer.codes) == (400, ["DIGEST_INVALID"])
    await check_nothing_is_kept(client, settings, wrong, DIGEST)


async def check_nothing_is_kept(client: Client, settings: Settings, *digests: str) -> None:
    for digest in digests:
        assert (await ask(client, "HEAD", f"/v2/org/team/app/blobs/{digest}")).status == 404
    assert not await stored(settings)


def chunked(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


FRAMES = {
    "with a length": ("Content-Length: 3000", CONTENT[:1000]),
    "streamed": ("Transfer-Encoding: chunked", chunked(CONTENT[:1000])),
    "streamed, cut inside of a chunk": ("Transfer-Encoding: chunked", b"bb8\r\n" + CONTENT[:1000]),
}


@pytest.mark.parametrize(("header", "sent"), FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_a_cut_connection_loses_nothing_that_arrived(
    client: Client, method: str, header: str, sent: bytes
) -> None:
    location = await begin(client)
    async with wire(client) as connection:
        await send_part(connection, method, f"{location}?digest={DIGEST}", header, sent)
    await range_comes_to(client, location, "0-999")
    await check_it_can_be_finished(client, location)


async def send_part(connection: Wire, method: str, path: str, header: str, sent: bytes) -> None:
    """Send a part of a body, once the request holds its session."""
    await connection.request(method, path, [header, "Expect: 100-continue"])
    assert (await connection.answer()).status == 100
    await connection.send(sent)


@pytest.mark.parametrize(("header", "sent"), FRAMES.values(), ids=FRAMES)
async def test_a_body_that_ends_early_is_refused_and_the_session_keeps_what_came(
    client: Client, header: str, sent: bytes
) -> None:
    location = await begin(client)
    async with wire(client) as connection:
        await send_part(connection, "PATCH", location, header, sent)
        connection.end_of_requests()
        answer = await connection.rest()
        assert not answer or (b" 400 " in answer and b"SIZE_INVALID" in answer)
    await range_comes_to(client, location, "0-999")
    await check_it_can_be_finished(client, location)


async def test_a_blob_whose_single_post_was_cut_is_not_there(client: Client) -> None:
    async with wire(client) as connection:
        headers = ["Content-Length: 3000", "Expect: 100-continue"]
        await connection.request("POST", f"{UPLOADS}?digest={DIGEST}", headers)
        assert (await connection.answer()).status == 100
        await connection.send(CONTENT[:2999])
    assert (await ask(client, "HEAD", f"/v2/org/team/app/blobs/{DIGEST}")).status == 404
    assert (await ask(client, "POST", f"{UPLOADS}?digest={DIGEST}", data=CONTENT)).status == 201


@pytest.fixture
async def location(client: Client) -> str:
    return await begin(client)


@pytest.fixture
async def held(client: Client, location: str) -> AsyncIterator[Wire]:
    """A PATCH of all of CONTENT that holds its session and has sent nothing yet."""
    async with wire(client) as connection:
        await connection.request("PATCH", location, ["Content-Length: 3000", "Expect: 100-continue"])
        # The body is invited only once the session is claimed.
        assert (await connection.answer()).status == 100
        yield connection


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_a_second_writer_is_told_to_wait_and_the_first_is_not_disturbed(
    client: Client, location: str, held: Wire, method: str
) -> None:
    await held.send(CONTENT[:1000])
    second = await ask(client, method, f"{location}?digest={DIGEST}", data=b"\0" * 3000)
    assert (second.status, second.codes) == (409, ["BLOB_UPLOAD_INVALID"])
    await held.send(CONTENT[1000:])
    first = await held.answer()
    assert (first.status, first.headers["Range"]) == (202, "0-2999")
    created = await close(client, location)
    assert (await ask(client, "GET", created.headers["Location"])).body == CONTENT


async def test_the_status_can_be_asked_for_while_bytes_arrive(client: Client, location: str, held: Wire) -> None:
    assert (await status(client, location)).status == 204


async def test_an_upload_can_be_cancelled_while_bytes_arrive(
    client: Client, settings: Settings, location: str, held: Wire
) -> None:
    await held.send(CONTENT[:1000])
    assert (await ask(client, "DELETE", location)).status == 204
    await held.send(CONTENT[1000:])
    answer = await held.answer()
    assert (answer.status, answer.codes) == (404, ["BLOB_UPLOAD_UNKNOWN"])
    await check_nothing_is_kept(client, settings, DIGEST)


async def test_bytes_of_writers_that_race_are_never_mixed(client: Client) -> None:
    location = await begin(client)
    contents = [bytes([number]) * 200_000 for number in range(8)]

    async def race(content: bytes) -> int:
        return (await patch(client, location, 0, len(content), content)).status

    answers = await asyncio.gather(*map(race, contents))
    assert sorted(set(answers) - {409, 416}) == [202]
    assert answers.count(202) == 1
    winner = contents[answers.index(202)]
    assert (await close(client, location, digest_of(winner))).status == 201


async def test_an_upload_too_many_is_told_when_to_come_back(start: Start) -> None:
    client = await start(uploads={"concurrent": 1})
    first, second = await begin(client), await begin(client)
    async with wire(client) as connection:
        await connection.request("PATCH", first, ["Content-Length: 3000", "Expect: 100-continue"])
        assert (await connection.answer()).status == 100
        answer = await ask(client, "PATCH", second, data=CONTENT)
        assert (answer.status, answer.codes) == (429, ["TOOMANYREQUESTS"])
        assert int(answer.headers["Retry-After"]) > 0
        await connection.send(CONTENT)
        assert (await connection.answer()).status == 202
    assert (await ask(client, "PATCH", second, data=CONTENT)).status == 202


async def test_a_client_that_stops_sending_is_let_go_and_its_bytes_are_kept(start: Start) -> None:
    # For so long what still comes is read, after the last word.
    client = await start(uploads={"stall_seconds": 1}, lingering_time=1)
    location = await begin(client)
    async with wire(client) as connection:
        await connection.request("PATCH", location, ["Content-Length: 3000"], CONTENT[:1000])
        answer = await connection.answer()
        assert (answer.status, answer.codes) == (408, ["UNSUPPORTED"])
        assert await connection.rest() == b""
    await check_it_can_be_finished(client, location)


@pytest.mark.parametrize("query", ["", "&digest-algorithm=sha512"])
async def test_an_upload_whose_bytes_were_lost_is_over_and_leaves_nothing(
    client: Client, settings: Settings, query: str
) -> None:
    if settings.storage.driver == "s3":
        pytest.skip("an object is there or not: tests/storage/test_s3.py takes it away")
    uploads = Path(settings.storage.filesystem.root) / "uploads"
    content = secrets.token_bytes(50_000)
    location = await begin(client, query=query.replace("&", "?"))
    assert (await ask(client, "PATCH", location, data=content)).status == 202
    (file,) = files_below(uploads)
    with file.open("r+b") as damaged:
        damaged.truncate(100)
    answer = await ask(client, "PUT", f"{location}?digest={digest_of(content)}")
    assert (answer.status, answer.codes) == (404, ["BLOB_UPLOAD_UNKNOWN"])
    assert not files_below(uploads)
    assert not open_files(uploads)
    assert (await ask(client, "GET", location)).status == 404


async def test_a_single_post_that_fails_leaves_no_session(client: Client, settings: Settings) -> None:
    async with wire(client) as cut:
        await cut.request("POST", f"{UPLOADS}?digest={DIGEST}", ["Content-Length: 90000"], b"x" * 50_000)
        await asyncio.sleep(0.3)
    for _ in range(500):
        rows = query(settings.database.url, "SELECT id FROM upload_session")
        if not rows and not await stored(settings):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it is there still")
