"""Whatever arrives: never a failure of ours, never silence, never anything outside the data directory."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storage.oci import DOCKER_LIST, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from tests.content import LAYER, digest_of
from tests.registry.raw import PATIENCE, exchange
from tests.services.processes import HytheServer, hythe_server

CODES = {
    "BLOB_UNKNOWN",
    "BLOB_UPLOAD_INVALID",
    "BLOB_UPLOAD_UNKNOWN",
    "DIGEST_INVALID",
    "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID",
    "MANIFEST_UNKNOWN",
    "NAME_INVALID",
    "NAME_UNKNOWN",
    "SIZE_INVALID",
    "UNAUTHORIZED",
    "DENIED",
    "UNSUPPORTED",
    "TOOMANYREQUESTS",
}
KNOWN_TYPES = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST]
FOREIGN_LAYER = "application/vnd.oci.image.layer.nondistributable.v1.tar"
NAME = "org/app"
CONTENT = bytes(range(256)) * 8
DIGEST = digest_of(CONTENT)
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": DIGEST, "size": len(CONTENT)},
        "layers": [{"mediaType": LAYER, "digest": DIGEST, "size": len(CONTENT)}],
    }
).encode()

examples = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(
    server: HytheServer, method: str, target: str, body: bytes | None = None, headers: dict[str, Any] | None = None
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    # It would refuse to send what is to be tried here.
    connection._validate_path = connection._validate_method = lambda _: None  # type: ignore[attr-defined]
    with contextlib.closing(connection):
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": "x", "Connection": "close", **(headers or {})}.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(body or b"")
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def check(answer: Answer, method: str, path: str) -> None:
    assert answer.status < 500, answer
    # What is no HTTP never becomes a request for /v2/: the HTTP library refuses it in its own words.
    if answer.status < 400 or not path.startswith("/v2/") or "x-request-id" not in answer.headers:
        assert answer.status < 400 or answer.status in (400, 403, 404, 405, 413, 414, 416, 417, 431), answer
        return
    assert answer.headers["content-type"] == "application/json"
    if method != "HEAD":
        body = json.loads(answer.body)
        assert body["request_id"] == answer.headers["x-request-id"]
        assert body["errors"]
        for error in body["errors"]:
            assert error["code"] in CODES
            assert error["message"]


@dataclass
class Around:
    """What lies beside the data directory, and must stay as it is."""

    root: Path

    def state(self) -> dict[str, tuple[int, str]]:
        found = {}
        for directory, directories, files in os.walk(self.root):
            if directory == str(self.root) and "data" in directories:
                directories.remove("data")
            for name in files:
                path = Path(directory, name)
                if name != "hythe.log":
                    found[str(path)] = (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest())
        return found


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HytheServer]:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "blobs").mkdir()
    for name in ("secret", "hythe.db", "blobs/secret", "uploads"):
        (root / name).write_text("OUTSIDE")
    before = Around(root).state()
    environment = {
        "HYTHE_UPLOADS__STALL_SECONDS": "1",
        "HYTHE_DATABASE__SYNC": "false",
        "HYTHE_STORAGE__FILESYSTEM__SYNC": "false",
        # JSON is what programs get, and it must be able to say anything.
        "HYTHE_LOG__FORMAT": "json",
    }
    with hythe_server(root, environment=environment) as server:
        pushed = ask(server, "POST", f"/v2/{NAME}/blobs/uploads/?digest={DIGEST}", CONTENT)
        assert pushed.status == 201
        headers = {"Content-Type": OCI_MANIFEST}
        assert ask(server, "PUT", f"/v2/{NAME}/manifests/v1", MANIFEST, headers).status == 201
        yield server
        check_alive(server)
        log = server.output.read_text(encoding="utf-8")
    assert "internal error" not in log
    assert "Traceback" not in log
    assert Around(root).state() == before
    check_data_directory(root / "data")


def check_alive(server: HytheServer) -> None:
    """The registry still has what was pushed, whatever was tried."""
    assert ask(server, "GET", f"/v2/{NAME}/blobs/{DIGEST}").body == CONTENT
    assert ask(server, "GET", f"/v2/{NAME}/manifests/v1").body == MANIFEST
    assert ask(server, "GET", "/readyz").status == 200


def check_data_directory(data: Path) -> None:
    """Only what the layout names lies there, and each blob is what its name says."""
    for path in data.rglob("*"):
        relative = path.relative_to(data)
        assert not path.is_symlink()
        assert relative.parts[0] in ("blobs", "uploads", "hythe.lock", "registry") or relative.name.startswith(
            "hythe.db"
        ), relative
        if path.is_file() and relative.parts[0] == "blobs":
            _, algorithm, two, name = relative.parts
            expected = hashlib.new(algorithm, path.read_bytes()).hexdigest()
            assert name.startswith(f"{expected}.")
            assert two == expected[:2]


nasty = st.sampled_from(
    [
        "..",
        "../../secret",
        "..%2f..%2fsecret",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "%252e%252e%252f",
        "....//",
        "..\\..\\secret",
        "/etc/passwd",
        "file:///etc/passwd",
        "%00",
        "a%00b",
        "%0d%0aX-Injected:%201",
        "%0a",
        "%ff%fe",
        "%ed%a0%80",
        "%C0%AE%C0%AE",
        "%zz",
        "%",
        "' OR '1'='1",
        "'; DROP TABLE tag; --",
        '" UNION SELECT name FROM sqlite_master --',
        "%' AND 1=CAST(x AS INT)",
        "${jndi:ldap://127.0.0.1/a}",
        "{{7*7}}",
        "<script>alert(1)</script>",
        "a" * 256,
        "a" * 3000,
        "a/" * 120 + "a",
        "\uff41\uff50\uff50",
        "app\u202egnp",
        "\U0001f433",
        "e\u0301",
        "-1",
        "0",
        "9" * 30,
        "1e9",
        "NaN",
        "null",
        "",
        " ",
        "sha256:",
        "sha256:" + "g" * 64,
        "sha256:" + "A" * 64,
        "SHA256:" + "a" * 64,
        "md5:" + "a" * 32,
        "sha512:" + "a" * 64,
        DIGEST,
        DIGEST + "%00",
        digest_of(CONTENT, "sha512"),
        "v1",
        NAME,
    ]
)
printable = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#?"), max_size=30)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
segments = nasty | printable | unicode_text.map(lambda text: quote(text, safe=""))
words = st.sampled_from(
    ["blobs", "manifests", "tags", "list", "uploads", "referrers", "_catalog", "_oci", "ext", "discover", "v2", "", "."]
)
methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "PURGE"])


def as_target(text: str) -> str:
    """Keep what can stand in a request line, escape what cannot."""
    return quote(text, safe="".join(set(string.printable) - set(string.whitespace)))


@st.composite
def paths(draw: st.DrawFn) -> str:
    name = draw(st.just(NAME) | segments)
    end = draw(segments)
    shapes = [
        f"/v2/{name}/manifests/{end}",
        f"/v2/{name}/blobs/{end}",
        f"/v2/{name}/blobs/uploads/{end}",
        f"/v2/{name}/blobs/uploads/",
        f"/v2/{name}/tags/list",
        f"/v2/{name}/referrers/{end}",
        "/v2/_catalog",
        "/v2/" + "/".join(draw(st.lists(words | segments, max_size=6))),
        f"/api/v1/{end}",
        f"/{end}",
    ]
    return as_target(draw(st.sampled_from(shapes)))


parameters = st.sampled_from(
    [
        "n",
        "last",
        "digest",
        "mount",
        "from",
        "digest-algorithm",
        "tag",
        "artifactType",
        "ns",
        "repository",
        "reference",
        "path",
    ]
)
queries = st.lists(st.tuples(parameters | segments, segments), max_size=4).map(
    lambda pairs: urlencode(pairs, safe="%:/") if pairs else ""
)
ranges = st.sampled_from(
    [
        "bytes=0-0",
        "bytes=-1",
        "bytes=-0",
        "bytes=5-",
        "bytes=2047-2047",
        "bytes=2048-",
        "bytes=9-3",
        "bytes=0-0,5-9,-3",
        "bytes=" + ",".join(["0-"] * 500),
        "bytes=0-99999999999999999999999999",
        "bytes=٣-٤",
        "bytes=",
        "bytes",
        "items=0-1",
        "0-0",
        "0-5",
        "0-9223372036854775807",
        "99999999999999999999-99999999999999999999",
        "bytes 0-5/6",
        "bytes */6",
        "5-0",
        "-",
        "a-b",
    ]
) | st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20)
header_names = st.sampled_from(
    [
        "Range",
        "Content-Range",
        "If-Range",
        "If-None-Match",
        "If-Match",
        "Accept",
        "Accept-Encoding",
        "Content-Type",
        "Content-Encoding",
        "Expect",
        "Authorization",
        "X-Forwarded-Prefix",
        "X-Forwarded-Proto",
        "X-Forwarded-Host",
        "Forwarded",
        "X-Request-Id",
        "User-Agent",
        "Cookie",
        "OCI-Namespace",
        "Upgrade",
        "Transfer-Encoding",
    ]
)
header_values = (
    ranges
    | nasty
    | st.sampled_from(
        ["*", '"', f'"{DIGEST}"', f'W/"{DIGEST}"', "100-continue", "chunked", "gzip", "h2c", OCI_MANIFEST]
    )
    | st.binary(max_size=20).map(lambda raw: raw.translate(None, b"\r\n\0").decode("latin-1"))
    | st.just("x" * 7000)
)
headers = st.dictionaries(header_names, header_values, max_size=4).map(
    lambda found: {name: value.encode("utf-8") for name, value in found.items()}
)


@examples
@given(method=methods, path=paths(), query=queries, headers=headers, body=st.none() | st.binary(max_size=200))
@example("GET", "/v2/_catalog", "", {"User-Agent": b"\xff"}, None)
@example("GET", "/v2/_catalog", "last=%ff", {}, None)
@example("GET", "/v2/_catalog", "last=%ed%a0%80", {}, None)
@example("GET", f"/v2/{NAME}/tags/list", "n=%d9%a3", {}, None)
@example("PUT", f"/v2/{NAME}/manifests/x", "", {"Content-Type": b"\xff/\xfe"}, b"{}")
@example("POST", f"/v2/{NAME}/blobs/uploads/", "digest-algorithm=%00", {}, b"")
@example("GET", "/v2/%ff/tags/list", "", {}, None)
def test_any_request_is_answered_and_no_answer_is_a_failure(
    target: HytheServer, method: str, path: str, query: str, headers: dict[str, bytes], body: bytes | None
) -> None:
    answer = ask(target, method, path + (f"?{query}" if query else ""), body, headers)
    check(answer, method, path)
    assert b"OUTSIDE" not in answer.body
    assert "x-injected" not in answer.headers


@examples
@given(method=st.sampled_from(["GET", "HEAD"]), value=ranges, condition=st.none() | header_values)
def test_any_range_is_answered_with_bytes_of_the_blob(
    target: HytheServer, method: str, value: str, condition: str | None
) -> None:
    sent = {"Range": value.encode()} | ({"If-Range": condition.encode()} if condition is not None else {})
    answer = ask(target, method, f"/v2/{NAME}/blobs/{DIGEST}", None, sent)
    # HTTP knows values that no header may have.
    assert answer.status in ((200, 206, 416, 400) if method == "GET" else (200, 400))
    check(answer, method, "/v2/")
    if answer.status == 206 and "multipart" not in answer.headers["content-type"]:
        first, last = answer.headers["content-range"].removeprefix("bytes ").partition("/")[0].split("-")
        assert answer.body == CONTENT[int(first) : int(last) + 1]
    elif answer.status == 200:
        assert answer.body == (CONTENT if method == "GET" else b"")


@examples
@given(
    chunks=st.lists(
        st.tuples(ranges, st.binary(max_size=30), st.sampled_from(["PATCH", "PUT"])), min_size=1, max_size=5
    )
)
def test_an_upload_takes_exactly_what_it_accepted_whatever_else_was_tried(
    target: HytheServer, chunks: list[tuple[str, bytes, str]]
) -> None:
    place = ask(target, "POST", "/v2/fuzzed/blobs/uploads/").headers["location"]
    taken = b""
    for value, body, method in chunks:
        wrong = f"?digest={DIGEST[:-1]}" if method == "PUT" else ""
        answer = ask(target, method, place + wrong, body, {"Content-Range": value.encode()})
        check(answer, method, place)
        if answer.status == 202:
            taken += body
    status = ask(target, "GET", place)
    assert status.status == 204
    assert status.headers["range"] == f"0-{max(0, len(taken) - 1)}"
    assert ask(target, "PUT", f"{place}?digest={digest_of(taken)}").status == 201
    assert ask(target, "GET", f"/v2/fuzzed/blobs/{digest_of(taken)}").body == taken


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.sampled_from(["", "\0", "x" * 300, OCI_MANIFEST, OCI_INDEX, DIGEST, "data:,", "\ud800", "\U0001f433", "' --"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def or_anything(sensible: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(sensible, sensible, sensible, anything)


def some_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: or_anything(value) for name, value in fields.items()})


notes = st.dictionaries(st.text(max_size=5), or_anything(st.text(max_size=5)), max_size=2)
sizes = st.sampled_from([0, len(CONTENT), -1, 2**63 - 1, 2**63, 2**64, 1.5, "1"])
descriptors = some_of(
    {
        "mediaType": st.sampled_from(
            [LAYER, OCI_CONFIG, OCI_MANIFEST, "application/vnd.oci.image.layer.nondistributable.v1"]
        ),
        "digest": st.sampled_from([DIGEST, digest_of(MANIFEST), "sha256:" + "0" * 64]),
        "size": sizes,
        "urls": st.lists(st.text(max_size=5), max_size=2),
        "annotations": notes,
        "data": st.sampled_from(["", "e30=", "!", "\ud800"]),
        "platform": some_of({"os": st.just("linux"), "architecture": st.just("amd64"), "variant": st.text(max_size=3)}),
        "artifactType": st.text(max_size=5),
    }
)
documents = some_of(
    {
        "schemaVersion": st.just(2),
        "mediaType": st.sampled_from(
            [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST, "application/x", "\u202e"]
        ),
        "config": descriptors,
        "layers": st.lists(descriptors, max_size=3),
        "manifests": st.lists(descriptors, max_size=3),
        "subject": descriptors,
        "artifactType": st.text(max_size=5),
        "annotations": notes,
        "fsLayers": st.just([]),
    }
)
content_types = st.sampled_from(
    [
        "",
        OCI_MANIFEST,
        OCI_INDEX,
        DOCKER_MANIFEST,
        DOCKER_LIST,
        "application/x",
        "text/html; charset=utf-8",
        "a/b/c",
        "é",
    ]
)


def foreign(*sizes: int) -> dict[str, Any]:
    """Return an image whose layers lie elsewhere: their sizes are believed."""
    layers = [
        {"mediaType": LAYER, "digest": f"sha256:{number:064}", "size": size, "urls": ["http://127.0.0.1/"]}
        for number, size in enumerate(sizes)
    ]
    config = {"mediaType": OCI_CONFIG, "digest": DIGEST, "size": len(CONTENT)}
    return {"schemaVersion": 2, "config": config, "layers": layers}


@examples
@given(document=documents | anything, content_type=content_types, tag=st.sampled_from(["t", DIGEST.replace(":", "-")]))
@example(foreign(2**63 - 1), OCI_MANIFEST, "big")
@example(foreign(2**63 - 1, 2**63 - 1), OCI_MANIFEST, "bigger")
@example({"schemaVersion": 2, "manifests": [], "annotations": {"a": "\ud800"}}, OCI_INDEX, "t")
@example({"schemaVersion": 2, "manifests": [], "artifactType": "\ud800"}, OCI_INDEX, "t")
@example({"artifactType": "\0", "annotations": {"\0": "\0"}}, "application/x", "t")
@example([], "application/x", DIGEST.replace(":", "-"))
@example({"manifests": 5}, "application/x", DIGEST.replace(":", "-"))
@example({"manifests": [{"digest": 5}, {"digest": []}, {}]}, "application/x", DIGEST.replace(":", "-"))
@example({"manifests": [{"digest": digest_of(MANIFEST)}]}, "application/x", DIGEST.replace(":", "-"))
def test_any_json_is_kept_as_a_manifest_or_refused_and_breaks_nothing_that_reads_it(
    target: HytheServer, document: Any, content_type: str, tag: str
) -> None:
    body = json.dumps(document).encode()
    path = f"/v2/{NAME}/manifests/{tag}"
    sent = {"Content-Type": content_type.encode()} if content_type else {}
    answer = ask(target, "PUT", path, body, sent)
    check(answer, "PUT", path)
    if answer.status == 201:
        found = ask(target, "GET", path)
        assert found.body == body
        assert found.headers["docker-content-digest"] == digest_of(body)
    for reader in (
        f"/v2/{NAME}/tags/list",
        f"/v2/{NAME}/referrers/{DIGEST}",
        f"/v2/{NAME}/referrers/{digest_of(MANIFEST)}?artifactType=%00",
        f"/api/v1/manifest?repository={NAME}&reference={quote(tag)}",
        f"/api/v1/tags?repository={NAME}",
        "/api/v1/repositories",
    ):
        check(ask(target, "GET", reader), "GET", reader)


@examples
@given(body=st.binary(max_size=300), content_type=content_types)
@example(b"[" * 100_000, OCI_MANIFEST)
@example(b'{"a":' * 100_000, "application/x")
@example(b"\xff\xfe{\0}\0", "")
@example(b"\xef\xbb\xbf{}", "")
@example(b'{"schemaVersion":' + b"9" * 5000 + b"}", OCI_MANIFEST)
@example(b'{"schemaVersion":1e999}', OCI_MANIFEST)
@example(b"", OCI_MANIFEST)
@example(b"null", OCI_MANIFEST)
@example(b'{"artifactType":"\\ud800"}', "application/x")
def test_any_bytes_are_kept_as_a_manifest_or_refused(target: HytheServer, body: bytes, content_type: str) -> None:
    path = f"/v2/{NAME}/manifests/bytes"
    answer = ask(target, "PUT", path, body, {"Content-Type": content_type.encode()})
    check(answer, "PUT", path)
    if answer.status == 201:
        assert ask(target, "GET", path).body == body


@examples
@given(config=anything | st.binary(max_size=100), shape=st.sampled_from([OCI_CONFIG, "application/x+json"]))
@example(b"[" * 100_000, OCI_CONFIG)
@example(b'{"a":' * 100_000, OCI_CONFIG)
@example({"architecture": "\ud800", "os": "linux"}, OCI_CONFIG)
@example({"architecture": 5}, OCI_CONFIG)
def test_any_bytes_can_be_the_configuration_of_an_image(target: HytheServer, config: Any, shape: str) -> None:
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    assert ask(target, "POST", f"/v2/{NAME}/blobs/uploads/?digest={digest_of(content)}", content).status == 201
    described = {"mediaType": shape, "digest": digest_of(content), "size": len(content)}
    manifest = json.dumps({"schemaVersion": 2, "config": described, "layers": []}).encode()
    answer = ask(target, "PUT", f"/v2/{NAME}/manifests/configured", manifest, {"Content-Type": OCI_MANIFEST})
    assert answer.status == 201
    check(ask(target, "GET", f"/api/v1/tags?repository={NAME}"), "GET", "/api/v1/tags")


request_lines = st.sampled_from(
    [
        b"GET /v2/ HTTP/1.1",
        b"GET /v2/_catalog HTTP/1.0",
        b"GET /v2/ HTTP/9.9",
        b"GET /v2/ HTTP/0.9",
        b"GET /v2/",
        b"GET  /v2/  HTTP/1.1",
        b"GET http://127.0.0.1/v2/ HTTP/1.1",
        b"GET http://[::1/v2/ HTTP/1.1",
        b"GET //etc/passwd HTTP/1.1",
        b"GET * HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"CONNECT 127.0.0.1:1 HTTP/1.1",
        b"CONNECT /v2/ HTTP/1.1",
        b"GET \xff\xfe HTTP/1.1",
        b"GET /v2/\xc3\xa9/tags/list HTTP/1.1",
        b"GET /v2/" + b"a" * 9000 + b" HTTP/1.1",
        b"GET /v2/../../secret HTTP/1.1",
        b"GET /v2/\0 HTTP/1.1",
        b"get /v2/ HTTP/1.1",
        b"WHATEVER /v2/ HTTP/1.1",
        b"POST /v2/org/app/blobs/uploads/ HTTP/1.1",
        b"PATCH /v2/org/app/blobs/uploads/x HTTP/1.1",
        b"PUT /v2/org/app/manifests/raw HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ]
)
raw_headers = st.sampled_from(
    [
        b"Host: x",
        b"Host: a\r\nHost: b",
        b"Connection: close",
        b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
        b"Content-Length: 5",
        b"Content-Length: 0",
        b"Content-Length: -1",
        b"Content-Length: 5, 5",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 99999999999999999999",
        b"Content-Length: 0x5",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding : chunked",
        b"Expect: 100-continue",
        b"Expect: 200-ok",
        b"Content-Encoding: gzip",
        b"Content-Encoding: br",
        b"Content-Type: \xff",
        b"User-Agent: \xff",
        b"X: " + b"x" * 20000,
        b"No colon",
        b": no name",
        b" folded",
        b"N\xc3\xa4me: x",
        b"X: a\rb",
        b"X: a\0b",
    ]
)
raw_bodies = st.binary(max_size=50) | st.sampled_from(
    [
        b"",
        b"hello",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhel",
        b"5;ext=1\r\nhello\r\n0\r\nTrailer: x\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"-5\r\nhello\r\n",
        b"fffffffffffffffff\r\n",
        b"7fffffffffffffff\r\nx",
        b"0x5\r\nhello\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"\r\n",
        b"5\r\nhelloXX0\r\n\r\n",
        b"zz\r\n",
        b"a" * 5000,
        b"0\r\n\r\nGET /secret HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x1f\x8b\x08\x00garbage",
    ]
)


@examples
@given(
    line=request_lines,
    headers=st.lists(raw_headers, max_size=4),
    body=raw_bodies,
    separator=st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n"]),
)
@example(b"PATCH /v2/org/app/blobs/uploads/x HTTP/1.1", [b"Host: x", b"Transfer-Encoding: chunked"], b"zz\r\n", b"\r\n")
@example(b"POST /v2/org/app/blobs/uploads/ HTTP/1.1", [b"Host: x", b"Transfer-Encoding: chunked"], b"5\r\nhel", b"\r\n")
@example(b"GET /v2/ HTTP/1.1", [b"Host: x", b"User-Agent: \xff"], b"", b"\r\n")
def test_any_bytes_on_a_connection_end_it_in_time_and_never_in_a_failure(
    target: HytheServer, line: bytes, headers: list[bytes], body: bytes, separator: bytes
) -> None:
    answer = exchange(target.port, separator.join([line, *headers, b"", b""]) + body)
    check_stream(answer)


@examples
@given(sent=st.binary(max_size=400))
def test_noise_on_a_connection_ends_it_in_time(target: HytheServer, sent: bytes) -> None:
    check_stream(exchange(target.port, sent))


chunked_bodies = st.lists(st.binary(min_size=1, max_size=20), max_size=5).map(
    lambda chunks: b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
)


@examples
@given(body=chunked_bodies, cut=st.integers(0, 100), junk=raw_bodies)
def test_a_chunked_upload_that_is_spoiled_or_left_anywhere_ends_in_time(
    target: HytheServer, body: bytes, cut: int, junk: bytes
) -> None:
    send_chunked(target, body[:cut] + junk, end=True)


@settings(examples, max_examples=10)
@given(body=chunked_bodies, cut=st.integers(0, 100), junk=st.just(b"") | raw_bodies)
@example(b"5\r\nhel", 100, b"")
@example(b"5\r\nhello\r\n", 100, b"")
@example(b"5\r\nhello\r\n", 100, b"zz\r\n")
@example(b"", 100, b"")
def test_a_chunked_upload_that_stops_anywhere_is_given_up_in_time(
    target: HytheServer, body: bytes, cut: int, junk: bytes
) -> None:
    send_chunked(target, body[:cut] + junk, end=False)


def send_chunked(server: HytheServer, body: bytes, *, end: bool) -> None:
    place = ask(server, "POST", "/v2/fuzzed/blobs/uploads/").headers["location"]
    head = f"PATCH {place} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    # aiohttp keeps a connection that it closes open for some seconds more, so that its last words arrive.
    until = b"" if end else b"\r\n\r\n"
    check_stream(exchange(server.port, head.encode() + body, end=end, until=until))
    status = ask(server, "GET", place)
    assert status.status == 204
    # Never more than was sent, whatever the chunks said.
    assert int(status.headers["range"].removeprefix("0-")) <= len(body)
    assert ask(server, "DELETE", place).status == 204


def check_stream(answer: bytes) -> None:
    """Nothing in a stream of answers is a failure of the server or comes from outside."""
    assert b"OUTSIDE" not in answer
    assert not any(line.startswith((b"HTTP/1.1 5", b"HTTP/1.0 5")) for line in answer.split(b"\r\n")), answer


@pytest.mark.parametrize("name", ["../../secret", "..", "a/../../../secret", "/etc/passwd", "a%2f..%2f..%2fsecret"])
@pytest.mark.parametrize("shape", ["manifests/{}", "blobs/{}", "blobs/uploads/{}", "referrers/{}"])
def test_a_path_never_leads_out_of_the_store(target: HytheServer, name: str, shape: str) -> None:
    for path in (f"/v2/{NAME}/{shape.format(name)}", f"/v2/{name}/{shape.format(DIGEST)}"):
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            answer = ask(target, method, path, b"x" if method in ("PUT", "PATCH") else None)
            assert 400 <= answer.status < 500, answer
            check(answer, method, path)
            assert b"OUTSIDE" not in answer.body
    check_alive(target)


def test_very_many_parameters_and_headers_are_answered(target: HytheServer) -> None:
    query = "&".join(f"p{number}=x" for number in range(900))
    check(ask(target, "GET", f"/v2/_catalog?{query}"), "GET", "/v2/_catalog")
    many = {f"X-{number}": "x" for number in range(300)}
    check(ask(target, "GET", "/v2/_catalog", headers=many), "GET", "/v2/_catalog")
    check_alive(target)


def test_the_tags_that_one_push_may_have_fit_an_answer_that_clients_can_read(target: HytheServer) -> None:
    # Python's http.client, and what is built on it, reads at most 100 header lines.
    path = f"/v2/{NAME}/manifests/{digest_of(MANIFEST)}?" + "&".join(f"tag=t{number}" for number in range(100))
    answer = ask(target, "PUT", path, MANIFEST, {"Content-Type": OCI_MANIFEST})
    assert answer.status in (201, 414)
