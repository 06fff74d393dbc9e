"""What stands between a connection and aiohttp's protocol: two short cuts.

**In**, for large uploads: docker sends a layer as one PATCH in chunked encoding, a header for every 32 KiB. Parsed on
the event loop, each of those is copied three times and woken up for; it is most of what an upload costs. So the body of
such a request is held back until the handler says whether it wants it. If it does, a thread reads it from the socket
(`chunks.py`), past the HTTP parser. If it does not, aiohttp gets it like any other. aiohttp's parser waits at the
boundary of a chunk meanwhile and never knows. At the end it is given the last chunk (`0`), and where the body is given
up in the middle, a chunk header for what is left of the current one. [RFC 9112, 7.1]

**Out**, for what is asked again and again: a head that was answered before, byte for byte, gets what `answers.py`
remembers. Only on a connection on which nothing but whole heads without a body ever came, one at a time, each after the
answer to the last: so there can be no doubt where a request begins and whose turn it is. Anything else, once, and the
connection is aiohttp's for good.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from typing import Final, cast

import structlog
from aiohttp import web

from registry.answers import Answers, is_plain
from registry.chunks import ChunkedBody, Piece, is_whole
from registry.connections import Connections
from registry.errors import BadRequest, RequestTimeout, SizeInvalid
from registry.responses import json_response
from registry.secure import lend
from storage.threads import Threads

#: The head of a request that sends a blob, all of it in one piece, in chunked encoding and nothing else. Where it does
#: not fit after all, the next slash tells: a long line of such places must not take the square of its length.
_UPLOAD: Final = re.compile(rb"(?:PATCH|PUT|POST) [^ ?\r\n]*/blobs/uploads/[^ /\r\n]* HTTP/1\.1\r\n")
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.IGNORECASE)
_LENGTH: Final = re.compile(rb"\r\n(?:content-length|content-encoding|upgrade)[ \t]*:", re.IGNORECASE)
_HEAD_LIMIT: Final = 16 << 10
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
#: How many bytes may come though reading is paused, before a body is taken.
_HELD_LIMIT: Final = 1 << 20
_CONTENT_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*(?=\r\n)", re.IGNORECASE)
_CODING: Final = re.compile(rb"\r\n(?:transfer-encoding|upgrade)[ \t]*:", re.IGNORECASE)

_OUR_FAULT: Final = 500
#: Seconds, well below those after which a silent connection is ended.
_REFRESH: Final = 30.0

log = structlog.get_logger()


class Connection(asyncio.Protocol):
    """Stands between a transport and aiohttp's protocol."""

    def __init__(self, inner: asyncio.Protocol, answers: Answers, connections: Connections) -> None:
        """Pass everything on to `inner`, but for bodies that are taken and what `answers` knows."""
        self._inner = inner
        self._answers = answers
        self._connections = connections
        #: When the head began that is not whole yet, by the loop's clock; None while none is awaited.
        self.head_since: float | None = None
        self._transport: asyncio.Transport | None = None
        self._held: bytes | None = None
        self._is_taken = False
        self._to_skip = 0
        #: Whether it is known where the current request ends; how many bytes of it are to come; whether it is answered.
        self._is_clear = True
        self._to_come = 0
        self._is_answered = True
        #: Nothing but plain heads came so far.
        self._is_plain = True
        #: The last head that was passed on, and the epoch in which it came; when that was.
        self._asked: tuple[bytes, int] | None = None
        self._asked_at = 0.0
        self._is_full = False
        self._remote = ""

    @property
    def holds_body(self) -> bool:
        """Whether a body waits to be taken: that of the one request which is being answered."""
        return self._held is not None and not self._is_taken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._asked_at = self.head_since = asyncio.get_running_loop().time()
        peer = transport.get_extra_info("peername")
        self._remote = str(peer[0]) if peer else ""
        self._inner.connection_made(transport)
        if not self._connections.enter(self):
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._connections.leave(self)
        self._inner.connection_lost(exc)

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def begun(self) -> None:
        """Hear that the head of a request is whole, and somebody is at it."""
        self.head_since = None

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._is_full = True
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._is_full = False
        self._inner.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._is_plain and self._answer_again(data):
            return
        if self._is_answered and self.head_since is None:
            self.head_since = asyncio.get_running_loop().time()
        if self._held is not None:
            self._hold(data)
            return
        if self._to_skip:
            skipped = min(self._to_skip, len(data))
            self._to_skip -= skipped
            data = data[skipped:]
        is_next = self._is_clear and not self._to_come and self._is_answered
        end = _end_of_upload_head(data) if is_next else 0
        # A body that came with its head is small, and nothing is gained by another way.
        if end and not data.endswith(_LAST_CHUNK) and self._transport is not None:
            self._is_answered = False
            self._held = data[end:]
            self._transport.pause_reading()
            self._inner.data_received(data[:end])
            return
        self._follow(data, is_next=is_next)
        self._inner.data_received(data)

    def _hold(self, data: bytes) -> None:
        """Keep what comes before the body is taken, though reading is paused; that cannot be much."""
        assert self._held is not None
        self._held += data
        if (self._is_taken or len(self._held) > _HELD_LIMIT) and self._transport is not None:
            self._transport.abort()

    def _follow(self, data: bytes, *, is_next: bool) -> None:
        """Keep knowing where requests begin, or know that it is not known any more.

        Only where one begins, and no other is being answered, a body may be held back: bytes in the middle of another
        body may look like the head of an upload.
        """
        if is_next:
            self._is_answered = False
            to_come = _bytes_to_come(data)
        else:
            to_come = self._to_come - len(data) if self._to_come else None
        self._is_clear = self._is_clear and to_come is not None and to_come >= 0
        self._to_come = to_come if self._is_clear and to_come else 0

    def answered(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Hear that an answer is out, whole."""
        self._is_answered = True
        asked, self._asked = self._asked, None
        if asked and self._is_plain:
            self._answers.remember(*asked, request, response)

    def _answer_again(self, data: bytes) -> bool:
        now = asyncio.get_running_loop().time()
        if self._is_answered and not self._is_full and self._transport is not None:
            answer = self._answers.find(data, self._remote)
            # aiohttp ends a connection on which it hears nothing for long: now and then it gets one.
            if answer and now - self._asked_at < _REFRESH:
                self._transport.write(self._answers.give(answer, self._remote))
                self.head_since = None
                return True
        self._is_plain = self._is_answered and is_plain(data)
        if self._is_plain:
            self._asked, self._asked_at = (data, self._answers.epoch()), now
        return False

    def leave_body(self) -> None:
        """Let aiohttp have the body after all, if nobody took it."""
        if self._held is not None and not self._is_taken:
            self._is_clear = False
            self._give_back(b"", self._held)

    async def pieces(
        self, threads: Threads, size: Callable[[], int], stall: float
    ) -> AsyncGenerator[list[Piece], None]:
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
        if self._transport is None:
            raise SizeInvalid("the client is gone")
        body = ChunkedBody(self._held)
        self._held, self._is_taken = b"", True
        try:
            with lend(self._transport) as sock:
                while not body.is_finished:
                    piece = await threads.run(body.read, sock, size())
                    if piece:
                        yield [piece]
                    elif body.is_waiting:
                        await _readable(sock.fileno(), stall)
        finally:
            self._end(body)

    def _end(self, body: ChunkedBody) -> None:
        self._is_taken = False
        if body.is_finished:
            self._give_back(b"0\r\n\r\n", body.rest)
            return
        self._is_clear = False
        if body.remaining:
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


def _end_of_upload_head(data: bytes) -> int:
    """Return where the head of a chunked upload ends in `data`, which begins with it; 0 for anything else."""
    if not _UPLOAD.match(data):
        return 0
    end = data.find(b"\r\n\r\n", 0, _HEAD_LIMIT) + 4
    if end < 4 or not _CHUNKED.search(data, 0, end) or _LENGTH.search(data, 0, end):
        return 0
    return end


def _bytes_to_come(data: bytes) -> int | None:
    """Return how many bytes are missing of the request that begins `data`; None where that cannot be told for sure."""
    end = data.find(b"\r\n\r\n") + 4
    head = data[:end]
    if end < 4 or not head.count(b"\n") == head.count(b"\r") == head.count(b"\r\n"):
        return None
    lengths = _CONTENT_LENGTH.findall(head)
    if len(lengths) != head.lower().count(b"content-length"):
        return None
    if _CODING.search(head):
        is_told = not lengths and _CHUNKED.search(head) is not None and is_whole(data, end)
        return 0 if is_told else None
    if len(lengths) > 1:
        return None
    return end + int(lengths[0] if lengths else 0) - len(data)


class _Handler(web.RequestHandler):
    """aiohttp's protocol, which tells of its answers, and has others when a request cannot be read at all."""

    __slots__ = ()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer, and tell the connection."""
        result = await super().finish_response(request, resp, start_time)
        connection = self.transport.get_protocol() if self.transport else None
        if isinstance(connection, Connection):
            connection.answered(request, result[0])
        return result

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


def accept(http: Callable[[], asyncio.Protocol], answers: Answers, connections: Connections) -> Connection:
    """Return the protocol for a new one of `connections`, in front of the one that `http`, aiohttp's server, makes."""
    inner = http()
    # aiohttp has no way to be given another class, and this one differs in nothing but two methods.
    inner.__class__ = _Handler
    return Connection(inner, answers, connections)


async def _readable(descriptor: int, stall: float) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(descriptor, wake, ready)
    try:
        async with asyncio.timeout(stall):
            await ready
    except TimeoutError:
        raise RequestTimeout(headers={"Connection": "close"}) from None
    finally:
        loop.remove_reader(descriptor)


def wake(waiting: asyncio.Future[None]) -> None:
    """Let go whoever waits for a descriptor."""
    if not waiting.done():
        waiting.set_result(None)
