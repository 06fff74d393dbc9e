"""A relay before a server that holds or breaks one connection in the middle, as a bad network does."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

_PIECE = 64 << 10


class Relay:
    """Passes everything on; the first stream that comes to a number of bytes is held there, and cut or let go on
    when told to.

    A stream is one direction of one connection. After it, nothing is held any more.
    """

    def __init__(self, port: int, hold_after: int) -> None:
        """Pass on to `port` on loopback, up to `hold_after` bytes of one stream."""
        self._port = port
        self._hold_after = hold_after
        self._holds = asyncio.Event()
        self._is_decided = asyncio.Event()
        self._is_cut = False
        self._connections: set[asyncio.Task[None]] = set()
        self._transports: set[asyncio.WriteTransport] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        self.cut()
        for transport in self._transports:
            transport.abort()
        await asyncio.gather(*self._connections)
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        """`HOST:PORT`, as it stands before an image's name."""
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def holds(self, seconds: float) -> None:
        """Wait until a stream is held."""
        async with asyncio.timeout(seconds):
            await self._holds.wait()

    def cut(self) -> None:
        """Break the connection that is held, or will be."""
        self._is_cut = True
        self._is_decided.set()

    def go_on(self) -> None:
        """Hold the connection no longer."""
        self._is_decided.set()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        both = {writer.transport, there_writer.transport}
        self._transports |= both
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._pass(reader, there_writer))
                directions.create_task(self._pass(there_reader, writer))
        except* OSError:
            pass
        finally:
            for transport in both:
                transport.abort()
            self._transports -= both
            self._connections.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while piece := await reader.read(_PIECE):
            passed += len(piece)
            if passed > self._hold_after and not self._holds.is_set():
                self._holds.set()
                await self._is_decided.wait()
                if self._is_cut:
                    raise ConnectionResetError("cut")
            writer.write(piece)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
