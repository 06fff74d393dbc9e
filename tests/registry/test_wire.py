"""Chunked uploads over raw sockets: every way to cut them, and what the connection is good for afterwards."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.wire import _bytes_to_come
from tests.content import digest_of
from tests.registry.wires import END, REPOSITORY, Raw, Server, chunk, connected, head, served
from tests.services.processes import wait_until


@pytest.fixture(scope="module", params=["plain", "TLS"])
def with_tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "TLS")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, with_tls: bool) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("wire"), with_tls=with_tls) as server:
        yield server


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 70_000), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 60_000), max_size=12),
    seed=st.integers(0, 2**32),
    extension=st.sampled_from([b"", b";a=b", b";x"]),
    trailer=st.sampled_from([b"", b"X-Checksum: 1\r\n"]),
)
def test_chunks_of_any_size_cut_anywhere_arrive_whole(
    running: Server, sizes: list[int], cuts: list[int], seed: int, extension: bytes, trailer: bytes
) -> None:
    content = random.Random(seed).randbytes(sum(sizes))
    stream, position = b"", 0
    for size in sizes:
        stream += chunk(content[position : position + size], extension)
        position += size
    stream += b"0\r\n" + trailer + b"\r\n"
    with connected(running) as raw:
        location = raw.start_upload()
        stream = head(location) + stream
        for cut in cuts:
            raw.send(stream[:cut])
            stream = stream[cut:]
        raw.send(stream)
        answer = raw.answer()
        assert answer.status == 202
        assert answer.getheader("Range") == f"0-{len(content) - 1}"
        assert raw.finish(location, content).status == 201
        assert raw.ask(f"GET /v2/org/app/blobs/{digest_of(content)}").body == content  # type: ignore[attr-defined]


def test_a_request_sent_right_behind_an_upload_is_answered_too(running: Server) -> None:
    with connected(running) as raw:
        location = raw.start_upload()
        raw.send(head(location) + chunk(b"abc") + END + b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.answer().status == 202
        assert raw.answer().status == 200
        assert raw.finish(location, b"abc").status == 201


def test_many_requests_sent_right_behind_a_large_upload_are_all_answered(running: Server) -> None:
    # The body ends just before the buffer does that it is received into: what is behind it comes with it in part.
    size = (2 << 20) - 300
    request = b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Long: %s\r\n\r\n" % (b"x" * 2000)
    with connected(running) as raw:
        location = raw.start_upload()
        raw.send(head(location))
        raw.send(chunk(b"x" * size) + END + request * 20)
        assert raw.answer().getheader("Range") == f"0-{size - 1}"
        assert [raw.answer().status for _ in range(20)] == [200] * 20


def test_two_uploads_sent_right_behind_each_other_both_arrive(running: Server) -> None:
    with connected(running) as raw:
        first, second = raw.start_upload(), raw.start_upload()
        raw.send(head(first) + chunk(b"abc") + END + head(second) + chunk(b"defg") + END)
        assert raw.answer().getheader("Range") == "0-2"
        assert raw.answer().getheader("Range") == "0-3"


def test_an_empty_body_is_no_bytes(running: Server) -> None:
    with connected(running) as raw:
        location = raw.start_upload()
        raw.send(head(location) + END)
        assert raw.answer().status == 202
        assert raw.finish(location, b"").status == 201


def test_a_body_that_nobody_wants_does_not_poison_the_connection(running: Server) -> None:
    with connected(running) as raw:
        raw.send(head(REPOSITORY + "no-such-upload") + chunk(b"x" * 300_000))
        answer = raw.answer()
        assert answer.status == 404
        assert json.loads(answer.body)["errors"][0]["code"] == "BLOB_UPLOAD_UNKNOWN"  # type: ignore[attr-defined]
        raw.send(chunk(b"y" * 300_000) + END)
        assert raw.ask("GET /v2/").status == 200


def test_a_chunk_out_of_order_in_chunked_encoding_is_refused_and_the_connection_goes_on(running: Server) -> None:
    with connected(running) as raw:
        location = raw.start_upload()
        raw.send(head(location, "Content-Range: 5-7") + chunk(b"abc") + END)
        assert raw.answer().status == 416
        raw.send(head(location, "Content-Range: 0-2") + chunk(b"abc") + END)
        assert raw.answer().status == 202
        assert raw.finish(location, b"abc").status == 201


@pytest.mark.parametrize("broken", [b"zz\r\nabc\r\n", b"3\r\nabcXX", b"-3\r\nabc\r\n", b"f" * 2000, b"\r\n\r\n"])
def test_chunks_that_cannot_be_read_are_refused_and_what_came_before_is_kept(running: Server, broken: bytes) -> None:
    with connected(running) as raw:
        location = raw.start_upload()
        raw.send(head(location) + chunk(b"abc") + broken)
        assert raw.answer().status == 400
    with connected(running) as raw:
        assert raw.ask(f"GET {location}").getheader("Range") in ("0-2", "0-5")


def test_the_body_is_invited_only_when_it_is_wanted(running: Server) -> None:
    with connected(running) as raw:
        location = raw.start_upload()
        raw.send(head(location, "Expect: 100-continue"))
        assert raw.socket.recv(64) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.send(chunk(b"abc") + END)
        assert raw.answer().status == 202
        raw.send(head(REPOSITORY + "no-such-upload", "Expect: 100-continue"))
        answer = raw.answer()
        assert answer.status == 404
        assert answer.getheader("Connection") == "close"


def refused(server: Server) -> int:
    """Return how many PATCHes ended early so far."""
    with connected(server) as raw:
        text = raw.ask("GET /metrics").body.decode()  # type: ignore[attr-defined]
    found = re.search(r'hythe_requests_total\{code="400",method="PATCH",route="upload"\} (\d+)', text)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("sent", [0, 1, 3, 100_000, 3_000_000])
def test_a_client_that_vanishes_leaves_what_it_sent(running: Server, sent: int) -> None:
    content = random.Random(sent).randbytes(sent)
    before = refused(running)
    with connected(running) as raw:
        location = raw.start_upload()
        raw.send(head(location), b"%x\r\n" % (sent + 10), content)

    def is_there() -> bool:
        with connected(running) as raw:
            return raw.ask(f"GET {location}").getheader("Range") == f"0-{max(0, sent - 1)}"

    def goes_on() -> bool:
        with connected(running) as raw:
            raw.send(head(location, f"Content-Range: {sent}-{sent + 2}") + chunk(b"end") + END)
            status = raw.answer().status
            assert status in (202, 409)
            return status == 202

    # No byte and one byte look the same in a Range: the end of the request tells that the one was counted.
    wait_until(lambda: refused(running) > before, "the end of a request that nobody waits for")
    wait_until(is_there, f"{sent} bytes to be counted")
    wait_until(goes_on, "the vanished client to be let go of")
    with connected(running) as raw:
        assert raw.finish(location, content + b"end").status == 201


def test_a_client_that_falls_silent_is_told_so(tmp_path: Path, with_tls: bool) -> None:
    impatient = {"HYTHE_UPLOADS__STALL_SECONDS": "1"}
    with served(tmp_path, with_tls=with_tls, environment=impatient) as server, connected(server) as raw:
        location = raw.start_upload()
        raw.send(head(location) + chunk(b"abc"))
        assert raw.answer().status == 408
        with connected(server) as other:
            assert other.ask(f"GET {location}").getheader("Range") == "0-2"


def test_a_slow_client_keeps_no_thread(tmp_path: Path, with_tls: bool) -> None:
    with served(tmp_path, with_tls=with_tls) as server:
        slow = [Raw(server) for _ in range(40)]
        locations = [raw.start_upload() for raw in slow]
        for raw, location in zip(slow, locations, strict=True):
            raw.send(head(location) + chunk(b"abc"))
        with connected(server) as raw:
            location = raw.start_upload()
            raw.send(head(location) + chunk(b"x" * 500_000) + END)
            assert raw.answer().status == 202
        for raw in slow:
            raw.send(END)
            assert raw.answer().getheader("Range") == "0-2"
            raw.socket.close()


# --- bodies that look like uploads --------------------------------------------------------------------------------

#: The head of an upload, a body in chunks, and something behind it.
LOOKALIKE = (
    b"PATCH /v2/a/blobs/uploads/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"64\r\n" + b"Z" * 100 + b"\r\n0\r\n\r\n"
    b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Request-Id: smuggled\r\n\r\n"
)


@pytest.mark.parametrize("pause", [0, 0.0005, 0.002, 0.1])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_body_that_looks_like_an_upload_is_a_body(running: Server, pause: float, is_fresh: bool) -> None:
    with connected(running) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        location = raw.start_upload()
        if not is_fresh:
            time.sleep(0.3)
        content = b"#" + LOOKALIKE
        lines = [f"PATCH {location} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}", "", ""]
        raw.send("\r\n".join(lines).encode() + b"#")
        time.sleep(pause)
        raw.send(LOOKALIKE)
        answer = raw.answer()
        assert (answer.status, answer.getheader("Range")) == (202, f"0-{len(content) - 1}")
        assert raw.ask("GET /v2/", "X-Request-Id: next").getheader("X-Request-Id") == "next"
        # And what comes next may be an upload in truth.
        other = raw.start_upload()
        raw.send(head(other) + chunk(b"x" * 100_000))
        raw.send(END)
        assert raw.answer().getheader("Range") == "0-99999"
        assert raw.finish(location, content).status == 201


def test_each_of_two_uploads_gets_its_own_body(running: Server) -> None:
    with connected(running) as raw:
        first, second = raw.start_upload(), raw.start_upload()
        time.sleep(0.3)
        lines = [f"PATCH {first} HTTP/1.1", "Host: x", "Expect: 100-continue", "Content-Length: 5", "", ""]
        raw.send("\r\n".join(lines).encode() + b"AAAAA")
        time.sleep(0.0005)
        raw.send(head(second) + chunk(b"B" * 20) + END + b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        text = b""
        while text.count(b"HTTP/1.1 2") < 3:
            text += raw.socket.recv(65536)
        with connected(running) as other:
            assert other.finish(first, b"AAAAA").status == 201
            assert other.finish(second, b"B" * 20).status == 201


@pytest.mark.parametrize("path", ["/v2/a/manifests/t?x=/blobs/uploads/", "/v2/a/blobs/uploads/manifests/t"])
def test_the_rest_of_a_manifest_that_is_too_large_is_no_request(running: Server, path: str) -> None:
    evil = b"0\r\n\r\nGET /v2/ HTTP/1.1\r\nHost: x\r\nX-Request-Id: smuggled\r\n\r\n"
    content = bytearray(b"A" * (8 << 20))
    # Wherever reading stops, one of these is what would be taken for the next thing.
    for place in range(4 << 20, 8 << 20, 4096):
        content[place - 8 : place - 8 + len(evil)] = evil
    with connected(running) as raw:
        raw.send(f"PUT {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        time.sleep(0.05)
        text = b""
        raw.socket.settimeout(3)
        with suppress(OSError):
            raw.send(chunk(bytes(content)), END, b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Request-Id: real\r\n\r\n")
        with suppress(OSError):
            while (piece := raw.socket.recv(65536)) and b"real" not in text:
                text += piece
    assert text.startswith(b"HTTP/1.1 413 ")
    assert b"smuggled" not in text


LINES = b"PATCH /x HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (LINES + b"\r\n", 0),
        (LINES + b"Content-Length: 5\r\n\r\n", 5),
        (LINES + b"content-length:5 \r\n\r\nab", 3),
        (LINES + b"Content-Length: 5\r\n\r\nabcde", 0),
        (LINES + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"abc") + END, 0),
        (LINES + b"Transfer-Encoding: chunked\r\n\r\n" + END, 0),
        (LINES + b"Transfer-Encoding: chunked\r\n\r\n", None),
        (LINES + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"abc"), None),
        (LINES + b"Transfer-Encoding: chunked\r\n\r\n" + END + LINES, None),
        (LINES + b"Transfer-Encoding: gzip\r\n\r\n" + END, None),
        (LINES + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + END, None),
        (LINES + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n", None),
        (LINES + b"Content-Length: +5\r\n\r\n", None),
        (LINES + b"Content-Length: 5\nX: y\r\n\r\n", None),
        (LINES + b"Upgrade: x\r\n\r\n", None),
        (LINES, None),
    ],
)
def test_where_a_request_ends_is_told_or_said_to_be_unknown(data: bytes, expected: int | None) -> None:
    assert _bytes_to_come(data) == expected


def test_a_request_that_holds_another_is_not_taken_for_one() -> None:
    told = _bytes_to_come(LINES + b"Content-Length: 2\r\n\r\nabGET / HTTP/1.1\r\n\r\n")
    assert told is not None
    assert told < 0
