"""Bytes between socket and store: in large pieces, in few hops, and never more of them in memory than allowed."""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, closing
from typing import Final

from aiohttp import StreamReader, hdrs, web
from multidict import CIMultiDict

from registry.chunks import Piece
from registry.errors import RequestTimeout, SizeInvalid, TooManyRequests
from registry.responses import INVITED, sign
from registry.secure import PlainSocket, SecureSocket, lend
from registry.wire import Connection, wake
from storage.base import Content, Upload
from storage.errors import ContentMissing
from storage.threads import Threads

#: Bytes handed to the store in one job, as long as the buffers allow it.
_PIECE_SIZE: Final = 2 << 20
#: Threads that read from sockets, that open files, and that send them; slow clients keep none of them.
_READERS: Final = 8
_OPENERS: Final = 4
_SENDERS: Final = 16
_PIECE_MINIMUM: Final = 64 << 10
#: Content up to this size is read and sent like any other response; above it the kernel sends the file.
_INLINE_SIZE: Final = 64 << 10
_SENDFILE_SIZE: Final = 8 << 20
#: How long a thread waits for a socket before it goes back to the pool, in milliseconds.
_PATIENCE: Final = 50


class Receiver:
    """Takes request bodies in, within one budget of memory for all of them."""

    def __init__(self, concurrent: int, buffer_bytes: int, stall_seconds: float) -> None:
        """Allow `concurrent` bodies at once, `buffer_bytes` for all, and silence of `stall_seconds`."""
        self._limit = concurrent
        self._budget = buffer_bytes
        self._stall = stall_seconds
        self._active = 0
        self._threads = Threads(_READERS, "receive")

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Be one of the bodies, or raise `TooManyRequests`."""
        if self._active >= self._limit:
            raise TooManyRequests("too many uploads at once: try again later", headers={"Retry-After": "5"})
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    async def close(self) -> None:
        """End the threads."""
        await self._threads.close()

    def pieces(self, request: web.Request) -> AsyncGenerator[list[Piece], None]:
        """Yield the body in lists of pieces, each list as large as the budget allows now.

        A body that ends early yields what came and raises afterwards. A list is good until the next but one is
        asked for.

        Raises:
            SizeInvalid: the body ended before its announced end.
            RequestTimeout: no bytes came for too long.
        """
        _invite(request)
        connection = _connection(request)
        if connection is not None and connection.holds_body:
            return connection.pieces(self._threads, self._piece_size, self._stall)
        return self._parsed_pieces(request)

    async def _parsed_pieces(self, request: web.Request) -> AsyncGenerator[list[Piece], None]:
        """Yield the body that aiohttp has parsed."""
        gathered: list[Piece] = []
        size = 0
        failure: Exception | None = None
        while failure is None:
            try:
                piece = await self._next(request.content)
            except RequestTimeout as error:
                failure = error
            except (web.RequestPayloadError, ConnectionError, asyncio.IncompleteReadError) as error:
                failure = SizeInvalid(f"the body ended early: {error}")
                # What arrived before is hidden behind the exception; it counts all the same.
                request.content.set_exception(None)  # type: ignore[arg-type]
                gathered.append(request.content.read_nowait())
            else:
                if not piece:
                    break
                gathered.append(piece)
                size += len(piece)
                if size >= self._piece_size():
                    yield gathered
                    gathered, size = [], 0
        if any(gathered):
            yield gathered
        if failure is not None:
            raise failure

    async def _next(self, content: StreamReader) -> bytes:
        try:
            async with asyncio.timeout(self._stall):
                return await content.readany()
        except TimeoutError:
            raise RequestTimeout(headers={hdrs.CONNECTION: "close"}) from None

    def _piece_size(self) -> int:
        """Two buffers for each body: one fills while the other is hashed and written."""
        return max(_PIECE_MINIMUM, min(_PIECE_SIZE, self._budget // (2 * max(1, self._active))))


class Appender:
    """Feeds an upload while the next piece arrives: at most one write is under way."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._writing: asyncio.Task[None] | None = None

    async def write(self, pieces: list[Piece]) -> None:
        """Begin to write `pieces` once the former ones are written; raises what befell those."""
        await self.flush()
        self._writing = asyncio.create_task(self._upload.write(pieces))

    async def flush(self) -> None:
        """Wait until all is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing


def _invite(request: web.Request) -> None:
    """Invite the body only now, when nothing stands against it. [RFC 9110, 10.1.1]"""
    if is_waiting(request) and request.transport is not None:
        request[INVITED] = True
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _connection(request: web.Request) -> Connection | None:
    protocol = request.transport.get_protocol() if request.transport else None
    return protocol if isinstance(protocol, Connection) else None


def begin(request: web.Request) -> None:
    """Let the connection know that its request has begun to be handled."""
    connection = _connection(request)
    if connection is not None:
        connection.begun()


def leave_body(request: web.Request) -> None:
    """Let the HTTP parser have a body that nobody took, so that the connection can go on after it."""
    connection = _connection(request)
    if connection is not None:
        connection.leave_body()


def is_waiting(request: web.Request) -> bool:
    """Return whether the client holds its body back until it is invited."""
    return request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and INVITED not in request


def whole_body(request: web.Request) -> bytes | None:
    """Return the body if all of it is here, which is so for small ones only; None if it must be received.

    Nothing was invited then, and nothing can go wrong with it any more.
    """
    content = request.content
    if not content.is_eof() or content.exception() is not None or is_waiting(request):
        return None
    return content.read_nowait()


async def read_limited(request: web.Request, receiver: Receiver, limit: int) -> bytes | None:
    """Return a whole body of at most `limit` bytes, or None for a longer one."""
    if (request.content_length or 0) > limit:
        return None
    body = bytearray()
    # Closed at once: whoever is next reads where this one stopped.
    async with aclosing(receiver.pieces(request)) as coming:
        async for pieces in coming:
            for piece in pieces:
                body += piece
            if len(body) > limit:
                return None
    return bytes(body)


class Sender:
    """Sends content: a thread moves a file to a socket, or has the kernel do it; anything else passes through us.

    The event loop's own sendfile is not used: uvloop has none, and a thread that stays with a fast client spares
    a wake-up of the loop for each filled socket buffer.
    """

    def __init__(self, stall_seconds: float, *, begin: Callable[[], None] | None = None) -> None:
        """Drop clients that take nothing for `stall_seconds`.

        `begin` is called in each of the threads that open files and read small ones, as it starts.
        """
        self._openers = Threads(_OPENERS, "open", begin)
        self._threads = Threads(_SENDERS, "send")
        self._stall = stall_seconds

    async def send(
        self,
        request: web.Request,
        content: Content,
        start: int,
        stop: int,
        status: int,
        headers: CIMultiDict[str],
    ) -> web.StreamResponse:
        """Answer `request` with the bytes from `start` up to but not including `stop`."""
        if content.path is None:
            return await self._stream(request, content, start, stop, _begun(request, status, headers))
        opened = await self._openers.run(_open, content.path, start, stop - start)
        if isinstance(opened, bytes):
            return web.Response(body=opened, status=status, headers=headers)
        response = _begun(request, status, headers)
        try:
            response.content_length = stop - start
            await response.prepare(request)
            if request.transport is None:
                raise ConnectionResetError("the client is gone")
            await self._send_file(request.transport, opened, start, stop)
            await response.write_eof()
        finally:
            os.close(opened)
        return response

    async def close(self) -> None:
        """End the threads."""
        await self._openers.close()
        await self._threads.close()

    async def _stream(
        self, request: web.Request, content: Content, start: int, stop: int, response: web.StreamResponse
    ) -> web.StreamResponse:
        response.content_length = stop - start
        async with aclosing(content.read(start, stop)) as pieces:
            # The first piece before the head: what cannot be read can still be said.
            piece = await anext(pieces, b"")
            await response.prepare(request)
            with closing(_StallWatch(request.transport, self._stall)) as watch:
                watch.given += len(piece)
                await response.write(piece)
                async for piece in pieces:
                    watch.given += len(piece)
                    await response.write(piece)
                await response.write_eof()
        return response

    async def _send_file(self, transport: asyncio.Transport, file: int, start: int, stop: int) -> None:
        with lend(transport) as target:
            while transport.get_write_buffer_size():
                await self._writable(target.fileno())
            while start < stop:
                sent = await self._threads.run(_send_some, target, file, start, stop)
                start += sent
                if start < stop:
                    await self._writable(target.fileno())

    async def _writable(self, target: int) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(target, wake, ready)
        try:
            async with asyncio.timeout(self._stall):
                await ready
        except TimeoutError:
            raise ConnectionResetError("the client took nothing for too long") from None
        finally:
            loop.remove_writer(target)


class _StallWatch:
    """Ends a connection whose client takes nothing for too long, without a timer for each piece.

    Attributes:
        given: bytes of the answer that were handed to the connection.
    """

    def __init__(self, transport: asyncio.Transport | None, seconds: float) -> None:
        self.given = 0
        self._transport = transport
        self._seconds = seconds
        self._taken, self._since = 0, time.monotonic()
        self._look()

    def close(self) -> None:
        """Watch no longer."""
        self._next.cancel()

    def _look(self) -> None:
        waiting = self._transport.get_write_buffer_size() if self._transport else 0
        if not waiting or self.given - waiting != self._taken:
            self._taken, self._since = self.given - waiting, time.monotonic()
        elif self._transport and time.monotonic() - self._since >= self._seconds:
            self._transport.abort()
        self._next = asyncio.get_running_loop().call_later(self._seconds / 4, self._look)


def _begun(request: web.Request, status: int, headers: CIMultiDict[str]) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers=headers)
    sign(request, response)
    return response


def _open(path: str, start: int, size: int) -> int | bytes:
    """Return small content itself, and a descriptor for large content: one hop for either."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ContentMissing(f"no file {path}") from None
    if size > _INLINE_SIZE:
        return file
    try:
        content = os.pread(file, size, start)
    finally:
        os.close(file)
    if len(content) < size:
        raise ContentMissing(f"{path} is shorter than its row says")
    return content


def _send_some(target: PlainSocket | SecureSocket, file: int, start: int, stop: int) -> int:
    """Send until all is sent or the socket stays full for a moment; return the bytes sent."""
    position = start
    poll = select.poll()
    poll.register(target, select.POLLOUT)
    while position < stop:
        try:
            sent = target.send_from(file, position, min(_SENDFILE_SIZE, stop - position))
        except BlockingIOError:
            if not poll.poll(_PATIENCE):
                break
            continue
        if not sent:
            raise ContentMissing("the file ended before its row says")
        position += sent
    return position - start
