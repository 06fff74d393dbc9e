"""A connection that says exactly what it is told to, in plain or over TLS."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.content import digest_of
from tests.services.certificates import Authority
from tests.services.processes import Program, hythe_server, is_open, wait_until

HOST = "127.0.0.1"
REPOSITORY = "/v2/org/app/blobs/uploads/"


class Answers(io.BufferedReader):
    """What comes back, for one answer after the other: an answer that is read must not end it."""

    def close(self) -> None:
        pass

    def makefile(self, _mode: str) -> Answers:
        return self


@dataclass(frozen=True)
class Server:
    """A server, and whom to trust to be it; None where it speaks plainly."""

    port: int
    trust: ssl.SSLContext | None
    program: Program


@contextmanager
def served(
    directory: Path, *, with_tls: bool = False, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server with its data in `directory`, while the block lasts."""
    variables = dict(environment or {})
    trust = None
    if with_tls:
        authority = Authority(directory / "authority")
        pair = authority.sign(directory, HOST)
        variables |= {"HYTHE_TLS__CERTIFICATE": str(pair.certificate), "HYTHE_TLS__KEY": str(pair.key)}
        trust = ssl.create_default_context(cafile=str(authority.certificate))
    with hythe_server(directory, environment=variables, start=False) as server:
        Program.start(server)
        wait_until(lambda: is_open(server.port), "the server")
        yield Server(server.port, trust, server)


class Raw:
    """A connection that says exactly what it is told to."""

    def __init__(self, server: Server, *, receive_buffer: int = 0) -> None:
        """Connect; `receive_buffer` makes what the kernel takes for us before we do smaller."""
        self.socket = socket.socket()
        self.socket.settimeout(20)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((HOST, server.port))
        if server.trust is not None:
            self.socket = server.trust.wrap_socket(self.socket, server_hostname=HOST, suppress_ragged_eofs=False)
        self.answers = Answers(socket.SocketIO(self.socket, "r"))

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.socket.sendall(part)

    def answer(self) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(self.answers)  # type: ignore[arg-type]
        response.begin()
        response.body = response.read()  # type: ignore[attr-defined]
        return response

    def ask(self, head: str, *more: str) -> http.client.HTTPResponse:
        self.send("\r\n".join([f"{head} HTTP/1.1", "Host: x", *more, "", ""]).encode())
        return self.answer()

    def start_upload(self) -> str:
        location = self.ask(f"POST {REPOSITORY}", "Content-Length: 0").getheader("Location")
        assert location
        return location

    def finish(self, location: str, content: bytes) -> http.client.HTTPResponse:
        return self.ask(f"PUT {location}?digest={digest_of(content)}", "Content-Length: 0")


@contextmanager
def connected(server: Server, *, receive_buffer: int = 0) -> Iterator[Raw]:
    raw = Raw(server, receive_buffer=receive_buffer)
    try:
        yield raw
    finally:
        raw.socket.close()


def head(location: str, *more: str) -> bytes:
    lines = [f"PATCH {location} HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", *more, "", ""]
    return "\r\n".join(lines).encode()


def chunk(content: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(content), extension, content)


END = b"0\r\n\r\n"
