"""A proxy between Hythe and an S3 server, which makes the server seem as bad as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Self
from urllib.parse import urlsplit

from tests.services.messages import PIECE, Head, Kind, Seen


@dataclass
class _Fault:
    """What happens to requests of a kind, and how often still."""

    kind: Kind
    act: Literal["none", "fail", "hang", "cut_request", "cut_response", "lose_answer", "slow"]
    times: float = math.inf
    after: float = math.inf
    status: int = 0
    code: str = ""
    read_body: bool = True
    seconds: float = 0
    bytes_per_second: float = math.inf


class _Cut(Exception):
    """The connection shall end here."""


class FaultyProxy:
    """Passes HTTP/1.1 on as it came, `Host` included, to the server at `upstream`; runs in a thread while entered.

    A fault meets the next so many requests of its kind; of two, the one that was asked for first goes first.
    """

    def __init__(self, upstream: str) -> None:
        where = urlsplit(upstream)
        self._upstream = where.hostname, where.port
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: What arrived, in the order in which it did.
        self.requests: list[Seen] = []

    def __enter__(self) -> Self:
        started: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), name="faults")
        self._thread.start()
        self._port = started.result(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """Where it listens, as a URL."""
        return f"http://127.0.0.1:{self._port}"

    def fail(
        self, kind: Kind, times: int = 1, status: int = 503, code: str = "SlowDown", *, read_body: bool = True
    ) -> None:
        """Answer with an error of S3, without the server; and without reading the request's body, where said."""
        self._add(_Fault(kind, "fail", times, status=status, code=code, read_body=read_body))

    def hang(self, kind: Kind, times: int = 1, seconds: float = math.inf) -> None:
        """Answer nothing for so long, then close the connection."""
        self._add(_Fault(kind, "hang", times, seconds=min(seconds, 1e6)))

    def cut_request(self, kind: Kind, after: int, times: int = 1) -> None:
        """Close the connections, to the server too, when so many bytes of the request's body were passed on."""
        self._add(_Fault(kind, "cut_request", times, after))

    def cut_response(self, kind: Kind, after: int, times: int = 1) -> None:
        """Close the connection after the answer's head and so many bytes of its body."""
        self._add(_Fault(kind, "cut_response", times, after))

    def lose_answer(self, kind: Kind, times: int = 1) -> None:
        """Let the server do it, and close the connection instead of saying so."""
        self._add(_Fault(kind, "lose_answer", times))

    def slow(self, kind: Kind, bytes_per_second: float) -> None:
        """Pass on bodies, of requests and of answers, no faster than that, until it is cleared."""
        self._add(_Fault(kind, "slow", bytes_per_second=bytes_per_second))

    def clear(self) -> None:
        """Let everything pass that comes from now on."""
        with self._lock:
            self._faults.clear()

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _take(self, kind: Kind) -> _Fault:
        with self._lock:
            for fault in self._faults:
                if fault.kind == kind and fault.times > 0:
                    fault.times -= 1
                    return fault
        return _Fault(kind, "none")

    async def _run(self, started: Future[int]) -> None:
        self._loop, self._closed = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        started.set_result(server.sockets[0].getsockname()[1])
        await self._closed.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)
        await server.wait_closed()
        # Transports let go of their sockets one turn after they were closed.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            async with self._closing(writer):
                while await self._exchange(await Head.read(reader), reader, writer):
                    pass
        except (_Cut, OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)

    @contextlib.asynccontextmanager
    async def _closing(self, writer: asyncio.StreamWriter) -> AsyncIterator[None]:
        """Close a connection at the end; what was written to it still goes out."""
        self._writers.add(writer)
        try:
            yield
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._writers.discard(writer)

    async def _exchange(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Treat one request; return whether another may follow on its connection."""
        seen = Seen.of(*head.line[:2])
        self.requests.append(seen)
        fault = self._take(seen.kind)
        if fault.act == "hang":
            # Read first: a client that gives up could not be rid of what it still has to send.
            await _take_body(head, reader, writer)
            await asyncio.sleep(fault.seconds)
            raise _Cut
        if fault.act == "fail":
            return await _refuse(fault, head, reader, writer)
        # One for each request: that the server closed it meanwhile is then no fault of its own.
        there_reader, there_writer = await asyncio.open_connection(*self._upstream)
        async with self._closing(there_writer):
            there_writer.write(head.raw)
            sending = asyncio.create_task(_send(head, reader, there_writer, fault))
            try:
                return await _answer(fault, head, there_reader, writer, sending)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)


async def _send(head: Head, reader: asyncio.StreamReader, there: asyncio.StreamWriter, fault: _Fault) -> None:
    try:
        await _pass_on(head.body(reader), there, fault, cut=fault.act == "cut_request")
    except (_Cut, OSError, EOFError):
        # Who waits for the answer learns it by that.
        there.close()


async def _pass_on(body: AsyncIterator[bytes], writer: asyncio.StreamWriter, fault: _Fault, *, cut: bool) -> None:
    """Write a body as it comes, or as the fault has it; where nobody takes it any more, it is read all the same."""
    left = fault.after if cut else math.inf
    if left <= 0:
        raise _Cut
    step = int(max(1, min(PIECE, fault.bytes_per_second / 20)))
    async for piece in body:
        for start in range(0, len(piece), step):
            part = piece[start : start + step][: int(min(left, step))]
            writer.write(part)
            with contextlib.suppress(OSError):
                await writer.drain()
            left -= len(part)
            if left <= 0:
                raise _Cut
            if fault.act == "slow":
                await asyncio.sleep(len(part) / fault.bytes_per_second)


async def _answer(
    fault: _Fault,
    request: Head,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    sending: asyncio.Task[None],
) -> bool:
    """Pass on what the server answers; return whether the connection may be used again."""
    waits = request.expects
    while (head := await Head.read(reader)).line[1].startswith("1"):
        writer.write(head.raw)
        waits = False
    body = head.body_of_answer(request.line[0], reader)
    if fault.act == "lose_answer":
        async for _ in body:
            pass
        raise _Cut
    writer.write(head.raw)
    await _pass_on(body, writer, fault, cut=fault.act == "cut_response")
    if waits:
        # Refused before its body was asked for: nobody knows whether that comes now.
        return False
    await sending
    return not (request.closes or head.closes or head.is_endless(request.line[0]))


async def _take_body(head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read the body of a request, to throw it away."""
    if head.expects:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    async for _ in head.body(reader):
        pass


async def _refuse(fault: _Fault, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Answer in the server's stead."""
    if fault.read_body:
        await _take_body(head, reader, writer)
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{fault.code}</Code><Message>so said</Message></Error>"
    fields = f"Content-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    fields += "" if fault.read_body else "Connection: close\r\n"
    writer.write(f"HTTP/1.1 {fault.status} Refused\r\n{fields}\r\n{'' if head.line[0] == 'HEAD' else body}".encode())
    if fault.read_body:
        return not head.closes
    # Closed at once, the connection would be reset by what still arrives, and the answer be lost with it.
    writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2):
            while await reader.read(PIECE):
                pass
    return False
