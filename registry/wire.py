"""The short way in for large uploads: from the socket to the store without passing through the HTTP parser.

docker sends a layer as one PATCH in chunked encoding, a header for every 32 KiB. Parsed on the event loop, each of
those is copied three times and woken up for; it is most of what an upload costs. So a connection's protocol here
stands in front of aiohttp's and lets everything pass, but for the body of such a request: that one is held back
until the handler says whether it wants it. If it does, a thread reads from the socket into two large buffers and
finds the chunks in them; no byte is copied before it is hashed and written. If it does not, aiohttp gets the body
like any other.

aiohttp's parser waits at the boundary of a chunk meanwhile and never knows. At the end it is given the last chunk
(`0`), and where the body is given up in the middle, a chunk header for what is left of the current one.
[RFC 9112, 7.1]
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
from collections.abc import AsyncIterator, Callable
from typing import Final, cast

import structlog
from aiohttp import web

from registry.errors import BadRequest, RegistryError, RequestTimeout, SizeInvalid
from registry.responses import json_response
from storage.threads import Threads

#: The head of a request that sends a blob, all of it in one piece, in chunked encoding and nothing else.
_UPLOAD: Final = re.compile(rb"(?:PATCH|PUT|POST) [^ \r\n]*/blobs/uploads/[^ \r\n]* HTTP/1\.1\r\n")
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.IGNORECASE)
_LENGTH: Final = re.compile(rb"\r\n(?:content-length|content-encoding|upgrade)[ \t]*:", re.IGNORECASE)
_HEAD_LIMIT: Final = 16 << 10
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
#: A line that gives a chunk's size; extensions are allowed and mean nothing.
_SIZE_LINE: Final = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?")
_LINE_LIMIT: Final = 1024
#: How long a thread waits for more, in milliseconds, and how often before it goes back to the pool.
_PAUSE: Final = 5
_PATIENCE: Final = 10

_OUR_FAULT: Final = 500

log = structlog.get_logger()

Piece = bytes | memoryview


class Connection(asyncio.Protocol):
    """Stands between a transport and aiohttp's protocol."""

    def __init__(self, inner: asyncio.Protocol) -> None:
        """Pass everything on to `inner`, but for bodies that are taken."""
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._held: bytes | None = None
        self._to_skip = 0

    @property
    def holds_body(self) -> bool:
        """Whether a body waits to be taken."""
        return self._held is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._inner.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._held is not None:
            self._held += data
            return
        if self._to_skip:
            skipped = min(self._to_skip, len(data))
            self._to_skip -= skipped
            data = data[skipped:]
        end = _end_of_upload_head(data)
        # A body that came with its head is small, and nothing is gained by another way.
        if end and not data.endswith(_LAST_CHUNK) and self._transport is not None:
            self._held = data[end:]
            self._transport.pause_reading()
            data = data[:end]
        self._inner.data_received(data)

    def leave_body(self) -> None:
        """Let aiohttp have the body after all."""
        if self._held is not None:
            self._give_back(b"", self._held)

    async def pieces(self, threads: Threads, size: Callable[[], int], stall: float) -> AsyncIterator[list[Piece]]:
        """Take the body, and yield it in lists of pieces.

        A list is good until the next but one is asked for: there are two buffers.

        Args:
            threads: where to wait for the client.
            size: returns how large a buffer may be now, in bytes.
            stall: seconds that a client may send nothing.

        Raises:
            BadRequest: the chunks cannot be read.
            SizeInvalid: the client went away before the end.
            RequestTimeout: no bytes came for too long.
        """
        assert self._held is not None
        body = _ChunkedBody(self._held)
        with self._duplicate() as sock:
            try:
                while not body.is_finished:
                    piece = await threads.run(body.read, sock, size())
                    if piece:
                        yield [piece]
                    elif body.is_waiting:
                        await _readable(sock, stall)
            finally:
                self._end(body)

    def _duplicate(self) -> socket.socket:
        """Return a socket of our own: the loop may close its one at any moment."""
        if self._transport is None:
            raise SizeInvalid("the client is gone")
        return socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno()))

    def _end(self, body: _ChunkedBody) -> None:
        if body.is_finished:
            self._give_back(b"0\r\n\r\n", body.rest)
        elif body.remaining:
            self._give_back(b"%x\r\n" % body.remaining, body.rest)
        else:
            self._to_skip = body.to_skip
            self._give_back(b"", body.rest)

    def _give_back(self, prefix: bytes, rest: bytes) -> None:
        self._held = None
        if self._transport is None:
            return
        if prefix:
            self._inner.data_received(prefix)
        if rest:
            self.data_received(rest)
        if self._held is None and not self._transport.is_closing():
            self._transport.resume_reading()


class _ChunkedBody:
    """Reads chunks from a socket. One thread at a time."""

    def __init__(self, start: bytes) -> None:
        self.is_finished = False
        #: Bytes of the current chunk that have not come yet.
        self.remaining = 0
        #: Bytes of the line end after a chunk that have not come yet.
        self.to_skip = 0
        #: Received and not understood yet, or not ours.
        self.rest = start
        self._is_trailer = False
        self._failure: RegistryError | None = None
        #: How far the current buffer was understood, and where the content found in it ends.
        self._position = self._content = 0
        self._buffers = [bytearray(), bytearray()]

    @property
    def is_waiting(self) -> bool:
        """Whether there is nothing to do until more comes."""
        return not self.is_finished and self._failure is None

    def read(self, sock: socket.socket, size: int) -> memoryview:
        """Return what comes: a buffer full, or less when the client pauses.

        The kernel is asked to wake us for much at once; a client that sends 32 KiB at a time would wake us for each.
        """
        if self._failure is not None:
            raise self._failure
        buffer = self._next_buffer(max(size, 2 * len(self.rest)))
        buffer[: len(self.rest)] = self.rest
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(buffer) // 4)
        try:
            return self._fill(sock, memoryview(buffer), len(self.rest))
        finally:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _fill(self, sock: socket.socket, view: memoryview, filled: int) -> memoryview:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        patience = _PATIENCE
        self._position = self._content = 0
        try:
            self._parse(view, filled)
            while not self.is_finished and filled < len(view) and patience:
                received = _receive(sock, view[filled:])
                if received is None:
                    # The end of a body may be less than what the kernel waits for: look now and then.
                    patience -= not poll.poll(_PAUSE)
                    continue
                filled += received
                self._parse(view, filled)
        except RegistryError as error:
            # What came before is good; the next call says what is wrong.
            self._failure = error
        self.rest = bytes(view[self._position : filled])
        return view[: self._content]

    def _next_buffer(self, size: int) -> bytearray:
        self._buffers.reverse()
        if len(self._buffers[0]) != size:
            self._buffers[0] = bytearray(size)
        return self._buffers[0]

    def _parse(self, view: memoryview, end: int) -> None:
        """Find the chunks in what was received up to `end`, and move what they hold together at the front."""
        while self._position < end and not self.is_finished:
            if self.remaining:
                taken = self._take_content(view, end)
            elif self.to_skip:
                taken = 1
                if view[self._position] != b"\r\n"[2 - self.to_skip]:
                    raise BadRequest("a chunk is longer than its header says")
                self.to_skip -= 1
            else:
                line = bytes(view[self._position : min(end, self._position + _LINE_LIMIT)])
                taken = line.find(b"\r\n") + 2
                if taken < 2:
                    if len(line) == _LINE_LIMIT:
                        raise BadRequest("a chunk header is too long")
                    return
                self._take_line(line[: taken - 2])
            self._position += taken

    def _take_content(self, view: memoryview, end: int) -> int:
        taken = min(self.remaining, end - self._position)
        view[self._content : self._content + taken] = view[self._position : self._position + taken]
        self._content += taken
        self.remaining -= taken
        self.to_skip = 0 if self.remaining else 2
        return taken

    def _take_line(self, line: bytes) -> None:
        if self._is_trailer:
            self.is_finished = not line
            return
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise BadRequest("a chunk header is not a size")
        self.remaining = int(match[1], 16)
        self._is_trailer = not self.remaining


def _end_of_upload_head(data: bytes) -> int:
    """Return where the head of a chunked upload ends in `data`, which begins with it; 0 for anything else."""
    if not _UPLOAD.match(data):
        return 0
    end = data.find(b"\r\n\r\n", 0, _HEAD_LIMIT) + 4
    if end < 4 or not _CHUNKED.search(data, 0, end) or _LENGTH.search(data, 0, end):
        return 0
    return end


def _receive(sock: socket.socket, into: memoryview) -> int | None:
    """Return how many bytes came, None where there are none yet."""
    try:
        received = sock.recv_into(into)
    except BlockingIOError:
        return None
    except OSError as error:
        raise SizeInvalid(f"the connection broke: {error.strerror}") from None
    if not received:
        raise SizeInvalid("the body ended early")
    return received


class _Handler(web.RequestHandler):
    """aiohttp's protocol, but for what it answers when a request cannot be read at all."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        """Say so as any other error is said, and log nothing: it is the client's doing."""
        error = BadRequest("the head of the request cannot be read, or is too long")
        if status >= _OUR_FAULT:
            log.error("a request could not be handled", exc_info=exc)
        response = json_response({"errors": error.entries()}, status=status)
        response.force_close()
        return response


def accept(http: Callable[[], asyncio.Protocol]) -> Connection:
    """Return the protocol for a new connection, in front of the one that `http`, aiohttp's server, makes."""
    inner = http()
    # aiohttp has no way to be given another class, and this one differs in nothing but a method.
    inner.__class__ = _Handler
    return Connection(inner)


async def _readable(sock: socket.socket, stall: float) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock.fileno(), wake, ready)
    try:
        async with asyncio.timeout(stall):
            await ready
    except TimeoutError:
        raise RequestTimeout(headers={"Connection": "close"}) from None
    finally:
        loop.remove_reader(sock.fileno())


def wake(waiting: asyncio.Future[None]) -> None:
    """Let go whoever waits for a descriptor."""
    if not waiting.done():
        waiting.set_result(None)
