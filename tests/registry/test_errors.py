"""What the registry says when it says no, and that a connection survives it. [distribution-spec: Error Codes]"""

import json
import secrets
from typing import Any

import pytest

from registry import errors
from registry.errors import RegistryError
from storage.digest import HEX_LENGTH
from storage.memory import MemoryStore
from storage.oci import OCI_MANIFEST
from tests.conftest import Start
from tests.content import Client, Pusher, digest_of, make_image
from tests.registry.talk import Answer, Wire, ask, begin, wire

APP = "/v2/org/team/app"
UNKNOWN = digest_of(b"never pushed")
SESSION = f"{APP}/blobs/uploads/00000000-0000-4000-8000-000000000000"

#: The specification's table, code-1 to code-14, with the status that goes with the plain code.
TABLE = [
    ("BLOB_UNKNOWN", "BlobUnknown", 404),
    ("BLOB_UPLOAD_INVALID", "BlobUploadInvalid", 400),
    ("BLOB_UPLOAD_UNKNOWN", "BlobUploadUnknown", 404),
    ("DIGEST_INVALID", "DigestInvalid", 400),
    ("MANIFEST_BLOB_UNKNOWN", "ManifestBlobUnknown", 404),
    ("MANIFEST_INVALID", "ManifestInvalid", 400),
    ("MANIFEST_UNKNOWN", "ManifestUnknown", 404),
    ("NAME_INVALID", "NameInvalid", 400),
    ("NAME_UNKNOWN", "NameUnknown", 404),
    ("SIZE_INVALID", "SizeInvalid", 400),
    ("UNAUTHORIZED", "Unauthorized", 401),
    ("DENIED", "Denied", 403),
    ("UNSUPPORTED", "Unsupported", 405),
    ("TOOMANYREQUESTS", "TooManyRequests", 429),
]


def descendants(kind: type[RegistryError]) -> list[type[RegistryError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in descendants(below))]


@pytest.mark.parametrize(("code", "name", "status"), TABLE)
def test_each_code_of_the_specification_has_its_class(code: str, name: str, status: int) -> None:
    kind: type[RegistryError] = getattr(errors, name)
    assert (kind.code, kind.status) == (code, status)
    assert kind.__bases__ == (RegistryError,)


def test_no_code_is_used_that_the_specification_does_not_have() -> None:
    # What is nobody's doing but ours has no code there.
    used = {kind.code for kind in descendants(RegistryError)[1:] if kind.status not in (500, 503)}
    assert used == {code for code, _, _ in TABLE}


def test_a_narrower_error_keeps_the_code_it_narrows() -> None:
    for kind in descendants(RegistryError)[1:]:
        assert kind.message
        (parent,) = kind.__bases__
        if issubclass(parent, RegistryError) and parent is not RegistryError:
            assert kind.code == parent.code


REFUSALS: dict[str, tuple[str, str, dict[str, Any], int, str]] = {
    "blob": ("GET", f"{APP}/blobs/{UNKNOWN}", {}, 404, "BLOB_UNKNOWN"),
    "blob digest": ("GET", f"{APP}/blobs/sha256:x", {}, 400, "DIGEST_INVALID"),
    "manifest": ("GET", f"{APP}/manifests/v1", {}, 404, "MANIFEST_UNKNOWN"),
    "manifest body": ("PUT", f"{APP}/manifests/v1", {"data": b"{"}, 400, "MANIFEST_INVALID"),
    "session": ("PATCH", SESSION, {"data": b"x"}, 404, "BLOB_UPLOAD_UNKNOWN"),
    "tags": ("GET", "/v2/no/such/tags/list", {}, 404, "NAME_UNKNOWN"),
    "name": ("GET", "/v2/NO/tags/list", {}, 400, "NAME_INVALID"),
    "page": ("GET", "/v2/_catalog?n=x", {}, 400, "UNSUPPORTED"),
    "path": ("GET", "/v2/nothing", {}, 404, "UNSUPPORTED"),
    "referrers": ("GET", f"{APP}/referrers/sha256:x", {}, 400, "DIGEST_INVALID"),
    "method": ("POST", f"{APP}/manifests/v1", {"data": b"{}"}, 405, "UNSUPPORTED"),
}


@pytest.mark.parametrize(("method", "path", "options", "status", "code"), REFUSALS.values(), ids=REFUSALS)
async def test_a_refusal_is_json_with_the_id_of_the_request(
    client: Client, method: str, path: str, options: dict[str, Any], status: int, code: str
) -> None:
    answer = await ask(client, method, path, **options)
    assert (answer.status, answer.codes) == (status, [code])
    assert answer.headers["X-Request-Id"] == answer.json["request_id"]
    assert answer.headers["Docker-Distribution-API-Version"] == "registry/2.0"


async def test_every_answer_has_an_id_of_its_own(client: Client) -> None:
    digest = await Pusher(client).blob(b"x" * 200_000)
    paths = ["/v2/", f"{APP}/blobs/{digest}", f"{APP}/blobs/{UNKNOWN}"]
    ids = [(await ask(client, "GET", path)).headers["X-Request-Id"] for path in paths]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("path", ["/v2/", f"{APP}/blobs/{UNKNOWN}"])
async def test_an_id_that_the_client_sent_is_used(client: Client, path: str) -> None:
    answer = await ask(client, "GET", path, headers={"X-Request-Id": "from-the-proxy.1"})
    assert answer.headers["X-Request-Id"] == "from-the-proxy.1"


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "<script>", "é"])
async def test_an_id_that_could_do_harm_is_not_used(client: Client, sent: str) -> None:
    answer = await ask(client, "GET", "/v2/", headers={"X-Request-Id": sent})
    assert answer.headers["X-Request-Id"] != sent


METHODS = {"GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "PURGE"}
ALLOWED = {
    "/v2/": {"GET", "HEAD"},
    "/v2/_catalog": {"GET"},
    f"{APP}/tags/list": {"GET"},
    f"{APP}/referrers/{UNKNOWN}": {"GET"},
    f"{APP}/manifests/v1": {"GET", "HEAD", "PUT", "DELETE"},
    f"{APP}/blobs/{UNKNOWN}": {"GET", "HEAD", "DELETE"},
    f"{APP}/blobs/uploads/": {"POST"},
    SESSION: {"GET", "PATCH", "PUT", "DELETE"},
}


@pytest.mark.parametrize(("path", "allowed"), ALLOWED.items())
async def test_a_method_that_is_not_allowed_is_told_which_are(client: Client, path: str, allowed: set[str]) -> None:
    for method in METHODS - allowed:
        answer = await ask(client, method, path)
        assert answer.status == 405, method
        assert set(answer.headers["Allow"].split(", ")) >= allowed
        if method != "HEAD":
            assert answer.codes == ["UNSUPPORTED"]


class BrokenStore(MemoryStore):
    """A store with a bug."""

    def open(self, key: str) -> Any:
        raise RuntimeError(f"the secret is in {key}")


async def test_a_bug_is_an_opaque_500_whose_cause_is_in_the_log(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    client = await start(store=BrokenStore())
    digest = await Pusher(client).blob(b"a layer")
    answer = await ask(client, "GET", f"{APP}/blobs/{digest}")
    assert (answer.status, answer.codes) == (500, ["UNKNOWN"])
    assert "secret" not in answer.body.decode()
    assert answer.headers["X-Request-Id"] == answer.json["request_id"]
    logged = "".join(capfd.readouterr())
    assert answer.json["request_id"] in logged
    assert "the secret is in" in logged
    assert (await ask(client, "GET", "/v2/")).status == 200


async def test_a_full_store_says_so_and_the_upload_goes_on_when_there_is_room(start: Start) -> None:
    store = MemoryStore(capacity=1000)
    client = await start(store=store)
    content = secrets.token_bytes(3000)
    location = await begin(client)
    assert (await ask(client, "PATCH", location, data=content[:1000])).status == 202
    full = await ask(client, "PATCH", location, data=content[1000:])
    assert (full.status, full.codes) == (507, ["DENIED"])
    store.capacity = 10_000
    assert (await ask(client, "GET", location)).headers["Range"] == "0-999"
    created = await ask(client, "PUT", f"{location}?digest={digest_of(content)}", data=content[1000:])
    assert created.status == 201
    assert (await ask(client, "GET", created.headers["Location"])).body == content


# --- the connection afterwards --------------------------------------------------------------------------


BIG = secrets.token_bytes(600_000)
REFUSED_BY_HEAD: dict[str, tuple[str, str, list[str], int]] = {
    "no such session": ("PATCH", SESSION, [], 404),
    "no digest": ("PUT", SESSION, [], 400),
    "bad digest": ("POST", f"{APP}/blobs/uploads/?digest=sha256:x", [], 400),
    "bad name": ("PATCH", SESSION.replace("org", "ORG"), [], 400),
    "a method that is not allowed": ("PATCH", f"{APP}/manifests/v1", [], 405),
    "no such path": ("PUT", "/v2/nothing", [], 404),
    "no such session, a chunk": ("PATCH", SESSION, ["Content-Range: 0-599999"], 404),
}
REFUSED_UPLOADS = REFUSED_BY_HEAD | {
    "another digest": ("POST", f"{APP}/blobs/uploads/?digest={UNKNOWN}", [], 400),
    "no manifest": ("PUT", f"{APP}/manifests/v1", [f"Content-Type: {OCI_MANIFEST}"], 400),
}


def framed(body: bytes, *, is_streamed: bool) -> tuple[str, bytes]:
    if not is_streamed:
        return f"Content-Length: {len(body)}", body
    pieces = [body[start : start + 32768] for start in range(0, len(body), 32768)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return "Transfer-Encoding: chunked", chunks + b"0\r\n\r\n"


async def check_the_connection_goes_on(connection: Wire) -> None:
    for _ in range(2):
        await connection.request("GET", "/v2/")
        assert (await connection.answer()).status == 200


@pytest.mark.parametrize("is_streamed", [False, True], ids=["with a length", "streamed"])
@pytest.mark.parametrize(("method", "path", "headers", "status"), REFUSED_UPLOADS.values(), ids=REFUSED_UPLOADS)
async def test_a_refused_upload_does_not_spoil_the_connection(
    client: Client, method: str, path: str, headers: list[str], status: int, is_streamed: bool
) -> None:
    framing, body = framed(BIG, is_streamed=is_streamed)
    async with wire(client) as connection:
        await connection.request(method, path, [*headers, framing], body)
        answer = await connection.answer()
        assert answer.status == status
        assert answer.codes
        await check_the_connection_goes_on(connection)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["with a length", "streamed"])
@pytest.mark.parametrize("header", ["Content-Range: 5-600004", "Content-Range: x", "Content-Range: 0-0"])
async def test_a_refused_chunk_does_not_spoil_the_connection(client: Client, header: str, is_streamed: bool) -> None:
    location = await begin(client)
    framing, body = framed(BIG, is_streamed=is_streamed)
    async with wire(client) as connection:
        await connection.request("PATCH", location, [header, framing], body)
        assert (await connection.answer()).status in (400, 416)
        await check_the_connection_goes_on(connection)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["with a length", "streamed"])
async def test_a_manifest_that_is_too_large_does_not_spoil_the_connection(start: Start, is_streamed: bool) -> None:
    client = await start(registry={"manifest_bytes": 65536})
    framing, body = framed(BIG, is_streamed=is_streamed)
    async with wire(client) as connection:
        await connection.request("PUT", f"{APP}/manifests/v1", [f"Content-Type: {OCI_MANIFEST}", framing], body)
        assert (await connection.answer()).status == 413
        await check_the_connection_goes_on(connection)


async def test_errors_without_a_body_do_not_spoil_the_connection(client: Client) -> None:
    async with wire(client) as connection:
        for method, path, _, status, _ in REFUSALS.values():
            if method == "GET":
                await connection.request(method, path)
                assert (await connection.answer()).status == status
        await check_the_connection_goes_on(connection)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["with a length", "streamed"])
async def test_requests_sent_without_waiting_are_answered_in_order(client: Client, is_streamed: bool) -> None:
    digest = digest_of(BIG)
    framing, body = framed(BIG, is_streamed=is_streamed)
    async with wire(client) as connection:
        await connection.request("PATCH", SESSION, [framing], body)
        await connection.request("POST", f"{APP}/blobs/uploads/?digest={digest}", [framing], body)
        await connection.request("HEAD", f"{APP}/blobs/{digest}")
        await connection.request("GET", "/v2/")
        answers = [await connection.answer(), await connection.answer(), await connection.answer(has_body=False)]
        assert [answer.status for answer in [*answers, await connection.answer()]] == [404, 201, 200, 200]


# --- Expect: 100-continue. [RFC 9110, 10.1.1] -----------------------------------------------------------


WAITING = ["Expect: 100-continue"]


async def finish(connection: Wire, framing: str, body: bytes, method: str, path: str, *headers: str) -> Answer:
    await connection.request(method, path, [*WAITING, framing, *headers])
    invited = await connection.answer()
    assert invited.status == 100, invited
    await connection.send(body)
    return await connection.answer()


@pytest.mark.parametrize("algorithm", sorted(HEX_LENGTH))
@pytest.mark.parametrize("is_streamed", [False, True], ids=["with a length", "streamed"])
async def test_a_body_that_waits_to_be_invited_is_invited(client: Client, is_streamed: bool, algorithm: str) -> None:
    digest = digest_of(BIG, algorithm)
    framing, body = framed(BIG, is_streamed=is_streamed)
    async with wire(client) as connection:
        created = await finish(connection, framing, body, "POST", f"{APP}/blobs/uploads/?digest={digest}")
        assert created.status == 201
        await check_the_connection_goes_on(connection)
    assert (await ask(client, "GET", f"{APP}/blobs/{digest}")).body == BIG


@pytest.mark.parametrize("is_streamed", [False, True], ids=["with a length", "streamed"])
async def test_a_manifest_that_waits_to_be_invited_is_invited(client: Client, is_streamed: bool) -> None:
    image = make_image()
    for blob in image.blobs:
        await Pusher(client).blob(blob)
    framing, body = framed(image.manifest, is_streamed=is_streamed)
    async with wire(client) as connection:
        content_type = f"Content-Type: {OCI_MANIFEST}"
        created = await finish(connection, framing, body, "PUT", f"{APP}/manifests/v1", content_type)
        assert created.status == 201
        await check_the_connection_goes_on(connection)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["with a length", "streamed"])
@pytest.mark.parametrize(("method", "path", "headers", "status"), REFUSED_BY_HEAD.values(), ids=REFUSED_BY_HEAD)
async def test_a_body_that_waits_is_refused_without_being_invited(
    client: Client, method: str, path: str, headers: list[str], status: int, is_streamed: bool
) -> None:
    framing, _ = framed(BIG, is_streamed=is_streamed)
    async with wire(client) as connection:
        await connection.request(method, path, [*headers, *WAITING, framing])
        answer = await connection.answer()
        assert answer.status == status
        # Whether the client sends its body all the same cannot be known, so nothing may follow.
        assert answer.headers["Connection"] == "close"
        await connection.request("GET", "/v2/")
        connection.end_of_requests()
        assert await connection.rest() == b""


async def test_a_manifest_too_large_that_waits_is_refused_without_being_invited(start: Start) -> None:
    client = await start(registry={"manifest_bytes": 65536})
    async with wire(client) as connection:
        headers = [f"Content-Type: {OCI_MANIFEST}", "Content-Length: 65537", *WAITING]
        await connection.request("PUT", f"{APP}/manifests/v1", headers)
        assert (await connection.answer()).status == 413


@pytest.mark.parametrize("has_blob", [True, False])
async def test_a_session_opened_while_a_body_waits_does_not_mistake_the_body(client: Client, has_blob: bool) -> None:
    digest = await Pusher(client, "org/other").blob(b"there") if has_blob else UNKNOWN
    async with wire(client) as connection:
        await connection.request("POST", f"{APP}/blobs/uploads/?mount={digest}", [*WAITING, "Content-Length: 17"])
        answer = await connection.answer()
        assert answer.status == (201 if has_blob else 202)
        # The client may take the answer for leave to send, or not: no byte of this may be read as a request.
        await connection.send(b"DELETE / HTTP/9\r\n")
        assert answer.headers.get("Connection") == "close" or await went_on(connection)


async def went_on(connection: Wire) -> bool:
    await connection.request("GET", "/v2/")
    return (await connection.answer()).status == 200


async def test_an_error_body_is_what_the_specification_draws(client: Client) -> None:
    answer = await ask(client, "GET", f"{APP}/manifests/v1")
    (entry,) = json.loads(answer.body)["errors"]
    assert entry.keys() <= {"code", "message", "detail"}
    assert entry["code"] == "MANIFEST_UNKNOWN"
    assert "org/team/app" in entry["message"]


@pytest.mark.parametrize("head", ["?x=" + "x" * 200_000 + " HTTP/1.1", " HTTP/1.1\r\nCookie: " + "x" * 200_000])
async def test_a_head_that_is_too_long_is_refused_as_json(client: Client, head: str) -> None:
    async with wire(client) as connection:
        await connection.send(f"GET /v2/{head}\r\nHost: registry.test\r\n\r\n".encode())
        answer = await connection.answer()
        assert 400 <= answer.status < 500
        assert answer.codes


@pytest.mark.parametrize("upload", ["%00", "no-such", "0" * 36, "A" * 8 + "-0000-0000-0000-" + "0" * 12, "x" * 5000])
@pytest.mark.parametrize("method", ["GET", "PATCH", "PUT", "DELETE"])
async def test_an_upload_that_cannot_be_one_of_ours_is_unknown(client: Client, method: str, upload: str) -> None:
    answer = await ask(client, method, f"{APP}/blobs/uploads/{upload}?digest={digest_of(b'x')}")
    assert (answer.status, answer.codes) == (404, ["BLOB_UPLOAD_UNKNOWN"])
