"""The load: clients that cost little beside the servers they load.

Requests are bytes made beforehand, sockets are driven without a protocol library, and what is pulled is thrown away
in the kernel; over TLS, as soon as it is decrypted.
"""

from __future__ import annotations

import re
import select
import socket
import ssl
from collections.abc import Generator, Iterable, Iterator
from typing import Final, NamedTuple

from benchmarks.servers import BenchmarkError, Server
from storage.digest import Digest

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LOCATION: Final = re.compile(rb"\r\nlocation: *(?:https?://[^/]+)?([^\r]+)", re.IGNORECASE)
#: What Go's io.Copy reads at once, and so writes as one HTTP chunk.
_HTTP_CHUNK: Final = 32 << 10
_BUFFER: Final = 256 << 10
_THROWN_AWAY_AT_ONCE: Final = 4 << 20


class Response(NamedTuple):
    """An answer's head; the body is only counted."""

    status: int
    head: bytes
    length: int

    def expect(self, status: int) -> Response:
        """Return itself, or fail where the status is another one."""
        if self.status != status:
            raise BenchmarkError(f"expected {status}, got:\n{self.head.decode(errors='replace')}")
        return self

    @property
    def location(self) -> bytes:
        """The path and query of its `Location`."""
        match = _LOCATION.search(self.head)
        if match is None:
            raise BenchmarkError(f"no Location in:\n{self.head.decode(errors='replace')}")
        return match[1]


def _parse(received: bytes | bytearray) -> tuple[Response, int] | None:
    """Return an answer and how long its head is, None while the head is not complete."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end])
    length = _LENGTH.search(head)
    return Response(int(head[9:12]), head, int(length[1]) if length else 0), end + 4


def request(method: str, path: str | bytes, *headers: str, body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    target = path if isinstance(path, bytes) else path.encode()
    lines = "".join(f"{header}\r\n" for header in headers).encode()
    return b"%s %s HTTP/1.1\r\nHost: registry\r\n%s\r\n%s" % (method.encode(), target, lines, body)


def _with_digest(location: bytes, digest: Digest) -> bytes:
    return location + (b"&" if b"?" in location else b"?") + b"digest=%s" % str(digest).encode()


def in_http_chunks(content: bytes) -> bytes:
    """Return content as chunks of a body, without the last, empty one. [RFC 9112, 7.1]"""
    pieces = (content[start : start + _HTTP_CHUNK] for start in range(0, len(content), _HTTP_CHUNK))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


# --- one client ---------------------------------------------------------------------------------------------


class Client:
    """One connection; each request waits for its answer."""

    def __init__(self, server: Server) -> None:
        self._sock = server.connect()
        # [tcp(7)] MSG_TRUNC: the bytes are counted and not copied. What is encrypted cannot be thrown away unseen.
        self._how = 0 if isinstance(self._sock, ssl.SSLSocket) else socket.MSG_TRUNC

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def exchange(self, *pieces: bytes) -> Response:
        """Send a request, throw the body of its answer away."""
        for piece in pieces:
            self._sock.sendall(piece)
        response, rest = self._head()
        rest = 0 if pieces[0].startswith(b"HEAD") else response.length - rest
        sink = bytearray(_THROWN_AWAY_AT_ONCE)
        while rest:
            received = self._sock.recv_into(sink, min(rest, len(sink)), self._how)
            if not received:
                raise BenchmarkError(f"the answer ended {rest} bytes early")
            rest -= received
        return response

    def _head(self) -> tuple[Response, int]:
        received = b""
        while (parsed := _parse(received)) is None:
            piece = self._sock.recv(_BUFFER)
            if not piece:
                raise BenchmarkError("no answer")
            received += piece
        response, size = parsed
        return response, len(received) - size

    def push_blob(self, repository: str, digest: Digest, framed: Iterable[bytes]) -> None:
        """Push as docker does: POST, one streamed PATCH, an empty PUT; `framed` is the body in HTTP chunks."""
        started = self.exchange(request("POST", f"/v2/{repository}/blobs/uploads/", "Content-Length: 0"))
        location = started.expect(202).location
        patch = request("PATCH", location, *_STREAMED)
        location = self.exchange(patch, *framed, b"0\r\n\r\n").expect(202).location
        self.exchange(request("PUT", _with_digest(location, digest), "Content-Length: 0")).expect(201)

    def push_manifest(self, repository: str, reference: str, media_type: str, content: bytes) -> None:
        """Push a manifest."""
        headers = f"Content-Type: {media_type}", f"Content-Length: {len(content)}"
        path = f"/v2/{repository}/manifests/{reference}"
        self.exchange(request("PUT", path, *headers, body=content)).expect(201)

    def pull(self, path: str) -> int:
        """GET something and return how many bytes it had."""
        return self.exchange(request("GET", path)).expect(200).length


_STREAMED: Final = "Content-Type: application/octet-stream", "Transfer-Encoding: chunked"


# --- many small blobs ---------------------------------------------------------------------------------------


#: A client's whole life: it yields requests and is sent their answers.
_Script = Generator[bytes, Response, None]


class SmallBlob(NamedTuple):
    """A blob and its requests, as far as they can be made beforehand."""

    digest: Digest
    head: bytes
    get: bytes
    body: bytes

    @classmethod
    def of(cls, repository: str, content: bytes) -> SmallBlob:
        """Make it from its bytes."""
        digest = Digest.of(content)
        path = f"/v2/{repository}/blobs/{digest}"
        return cls(digest, request("HEAD", path), request("GET", path), in_http_chunks(content) + b"0\r\n\r\n")


def push_all(server: Server, repository: str, blobs: list[SmallBlob], clients: int) -> None:
    """Push blobs by several clients, each as docker does: HEAD, POST, PATCH, PUT."""
    post = request("POST", f"/v2/{repository}/blobs/uploads/", "Content-Length: 0")

    def script(todo: Iterator[SmallBlob]) -> _Script:
        for blob in todo:
            (yield blob.head).expect(404)
            location = (yield post).expect(202).location
            location = (yield request("PATCH", location, *_STREAMED, body=blob.body)).expect(202).location
            (yield request("PUT", _with_digest(location, blob.digest), "Content-Length: 0")).expect(201)

    todo = iter(blobs)
    _drive(server, [script(todo) for _ in range(clients)])


def pull_all(server: Server, blobs: list[SmallBlob], clients: int) -> None:
    """Pull blobs by several clients."""
    ask_all(server, [blob.get for blob in blobs], clients)


def ask_all(server: Server, requests: list[bytes], clients: int) -> None:
    """Send requests by several clients, each of them once."""

    def script(todo: Iterator[bytes]) -> _Script:
        for each in todo:
            (yield each).expect(200)

    todo = iter(requests)
    _drive(server, [script(todo) for _ in range(clients)])


class _Connection:
    def __init__(self, server: Server, script: _Script) -> None:
        self.sock = server.connect()
        self._script = script
        self._received = bytearray()
        self._has_body = True

    def begin(self) -> bool:
        """Send the first request; False where there is none."""
        return self._send(next(self._script, None))

    def take(self) -> bool:
        """Take in what came and send the next request when the answer is complete; False after the last."""
        received = self.sock.recv(_BUFFER)
        if not received:
            raise BenchmarkError("the server closed a connection")
        self._received += received
        parsed = _parse(self._received)
        if parsed is None:
            return True
        response, size = parsed
        if len(self._received) < size + (response.length if self._has_body else 0):
            return True
        self._received.clear()
        try:
            return self._send(self._script.send(response))
        except StopIteration:
            return False

    def _send(self, request: bytes | None) -> bool:
        if request is None:
            return False
        self._has_body = not request.startswith(b"HEAD")
        # Requests are smaller than a socket's buffer, and it is empty: this never waits.
        self.sock.sendall(request)
        return True


def _drive(server: Server, scripts: list[_Script]) -> None:
    """Run the clients' scripts to their ends, each on a connection of its own, all in this thread."""
    connections = [_Connection(server, script) for script in scripts]
    by_number = {connection.sock.fileno(): connection for connection in connections}
    with select.epoll() as poll:
        for number, connection in list(by_number.items()):
            poll.register(number, select.EPOLLIN)
            if not connection.begin():
                del by_number[number]
        while by_number:
            for number, _ in poll.poll():
                if not by_number[number].take():
                    poll.unregister(number)
                    del by_number[number]
    for connection in connections:
        connection.sock.close()
