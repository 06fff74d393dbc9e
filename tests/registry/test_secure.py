"""TLS: what the loop does with a connection and what a thread does are one stream, however it goes on or ends."""

from __future__ import annotations

import random
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import needs
from tests.content import digest_of
from tests.registry.wires import END, HOST, Raw, Server, chunk, connected, head, served
from tests.services.processes import wait_until

#: Larger than all buffers between a server and a client together.
SIZE = 20_000_000
#: What the kernel takes for a client that does not read.
SMALL = 16 << 10


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("secure"), with_tls=True) as server:
        yield server


def push(raw: Raw, content: bytes) -> str:
    """Push a blob and return its path."""
    location = raw.start_upload()
    raw.send(head(location))
    for start in range(0, len(content), 32 << 10):
        raw.send(chunk(content[start : start + (32 << 10)]))
    raw.send(END)
    assert raw.answer().status == 202
    assert raw.finish(location, content).status == 201
    return f"/v2/org/app/blobs/{digest_of(content)}"


def get(path: str, *more: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *more, "", ""]).encode()


def body(raw: Raw) -> bytes:
    return raw.answer().body  # type: ignore[attr-defined, no-any-return]


def content_of(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_large_blob_comes_back_whole_by_each_version_of_tls(running: Server, version: ssl.TLSVersion) -> None:
    assert running.trust
    trust = ssl.create_default_context()
    trust.load_verify_locations(cadata=b"".join(running.trust.get_ca_certs(binary_form=True)))
    trust.minimum_version = trust.maximum_version = version
    content = content_of(version)
    with connected(replace(running, trust=trust)) as raw:
        path = push(raw, content)
        raw.send(get(path))
        assert body(raw) == content
        raw.send(get(path, "Range: bytes=1000001-9000000"))
        assert body(raw) == content[1_000_001:9_000_001]
        assert raw.ask("GET /v2/").status == 200


def test_many_blobs_at_once_are_not_mixed_up(running: Server) -> None:
    def there_and_back(seed: int) -> bool:
        content = content_of(seed, 3_000_000 + seed)
        with connected(running) as raw:
            raw.send(get(push(raw, content)))
            return body(raw) == content

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(there_and_back, range(24)))


def test_a_client_that_waits_before_it_reads_gets_all_of_it(running: Server) -> None:
    content = content_of(1)
    with connected(running) as other, connected(running, receive_buffer=SMALL) as raw:
        raw.send(get(push(other, content)))
        assert raw.answers.peek(1)
        assert other.ask("GET /v2/").status == 200
        assert body(raw) == content


def test_what_is_asked_for_during_a_download_is_answered_after_it(running: Server) -> None:
    content = content_of(2)
    with connected(running) as other, connected(running, receive_buffer=SMALL) as raw:
        raw.send(get(push(other, content)))
        assert raw.answers.peek(1)
        raw.send(get("/v2/", "X-Request-Id: behind"))
        assert body(raw) == content
        assert raw.answer().getheader("X-Request-Id") == "behind"


def test_a_client_that_takes_nothing_is_dropped(tmp_path: Path) -> None:
    with (
        served(tmp_path, with_tls=True, environment={"HYTHE_UPLOADS__STALL_SECONDS": "1"}) as server,
        connected(server) as other,
        connected(server, receive_buffer=SMALL) as raw,
    ):
        raw.send(get(push(other, content_of(3))))
        wait_until(lambda: "answer cut short" in server.program.output.read_text(), "the end of its patience")
        received = 0
        with suppress(OSError):
            while piece := raw.socket.recv(65536):
                received += len(piece)
        assert received < SIZE
        assert other.ask("GET /v2/").status == 200


def test_the_end_of_a_connection_is_said(running: Server) -> None:
    with connected(running) as raw:
        raw.send(get("/v2/", "Connection: close"))
        assert raw.answer().status == 200
        # An end that is not said would raise.
        assert raw.socket.recv(1) == b""


def test_a_client_that_says_its_end_in_the_middle_of_an_upload_leaves_what_it_sent(running: Server) -> None:
    with connected(running) as raw:
        location = raw.start_upload()
        raw.send(head(location))
        raw.send(chunk(b"x" * 100_000))
        # The server's answer to half an upload is not waited for.
        with suppress(OSError):
            raw.socket.unwrap()  # type: ignore[attr-defined]
        wait_until(lambda: progress(running, location) == "0-99999", "what was sent to be counted")


def progress(server: Server, location: str) -> str | None:
    with connected(server) as raw:
        return raw.ask(f"GET {location}").getheader("Range")


def test_what_is_no_tls_ends_an_upload_and_what_came_before_is_kept(running: Server) -> None:
    with connected(running) as raw:
        location = raw.start_upload()
        raw.send(head(location))
        raw.send(chunk(b"x" * 100_000))
        socket.socket.sendall(raw.socket, b"no record of TLS begins like this")
        with suppress(OSError):
            while raw.socket.recv(1000):
                pass
    wait_until(lambda: progress(running, location) == "0-99999", "what was sent to be counted")


@pytest.mark.parametrize("words", [b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff", b"\0" * 1000])
def test_who_does_not_speak_tls_is_left_and_others_are_served(running: Server, words: bytes) -> None:
    with socket.create_connection((HOST, running.port), timeout=20) as connection:
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while piece := connection.recv(1000):
                assert b"HTTP" not in piece
    with connected(running) as raw:
        assert raw.ask("GET /v2/").status == 200


def test_a_handshake_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    with (
        served(tmp_path, with_tls=True, environment={"HYTHE_SERVER__HEAD_SECONDS": "1"}) as server,
        # Well before the time that there is without that setting.
        socket.create_connection((HOST, server.port), timeout=10) as connection,
        suppress(ConnectionResetError),
    ):
        assert connection.recv(1) == b""


@pytest.mark.parametrize("with_tls", [False, True])
def test_more_connections_than_there_are_places_for_are_not_taken(tmp_path: Path, with_tls: bool) -> None:
    environment = {"HYTHE_SERVER__CONNECTIONS": "2", "HYTHE_LOG__FORMAT": "text"}
    with served(tmp_path, with_tls=with_tls, environment=environment) as server, ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection((HOST, server.port), timeout=10))

        # Neither says a word, nor shakes hands.
        silent = [connect(), connect()]
        with suppress(ConnectionResetError):
            assert connect().recv(1) == b""
        silent.pop().close()

        def is_served() -> bool:
            with suppress(OSError), connected(server) as raw:
                return raw.ask("GET /v2/").status == 200
            return False

        wait_until(is_served, "a place")
        assert "too many connections" in (tmp_path / "hythe.log").read_text()


@needs("openssl")
def test_keys_may_change_in_the_middle_of_an_upload(running: Server, tmp_path: Path) -> None:
    with connected(running) as raw:
        location = raw.start_upload()
    output = tmp_path / "output"
    with output.open("wb") as file:
        command = ["openssl", "s_client", "-connect", f"{HOST}:{running.port}"]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file)
    assert client.stdin

    def say(words: bytes, answer: bytes) -> None:
        assert client.stdin
        before = output.read_bytes().count(answer)
        client.stdin.write(words)
        client.stdin.flush()
        wait_until(lambda: output.read_bytes().count(answer) > before, answer.decode())

    try:
        say(head(location, "Expect: 100-continue"), b"100 Continue")
        # [openssl-s_client(1)] A line of one letter is a command: new keys, for both sides.
        say(b"K\n", b"KEYUPDATE")
        say(chunk(b"abc") + END, b"Range: 0-2")
        say(b"K\n", b"KEYUPDATE")
        say(get("/v2/"), b"200 OK")
    finally:
        client.kill()
        client.communicate()


@pytest.mark.parametrize("reads", [True, False])
def test_a_server_that_is_told_to_stop_finishes_downloads_within_its_time(tmp_path: Path, reads: bool) -> None:
    content = content_of(4)
    patience = {"HYTHE_SERVER__DRAIN_SECONDS": "20" if reads else "1"}
    with served(tmp_path, with_tls=True, environment=patience) as server, connected(server) as other:
        path = push(other, content)
        with connected(server, receive_buffer=SMALL) as raw:
            raw.send(get(path))
            assert raw.answers.peek(1)
            assert server.program.process
            server.program.process.send_signal(signal.SIGTERM)
            assert body(raw) == content if reads else True
            assert server.program.process.wait(30) == 0
