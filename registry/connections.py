"""How many connections there are, and which of them only keep a place: those that never end the head of a request.

aiohttp ends connections that are silent between requests. One that sends a byte of a head now and then is not silent.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final, Protocol

import structlog

#: Seconds between two looks.
_PAUSE: Final = 2.0

log = structlog.get_logger()


class Waiting(Protocol):
    """A connection, as far as it is looked after here."""

    @property
    def head_since(self) -> float | None:
        """When the head began that is still not whole, by the loop's clock; None while none is awaited."""

    def abort(self) -> None:
        """End it at once."""


class Connections:
    """The open connections of this process."""

    def __init__(self, limit: int, head_seconds: float) -> None:
        """Take up to `limit`; a head may take `head_seconds`."""
        self._limit = limit
        self._seconds = head_seconds
        self._open: set[Waiting] = set()
        self._watching: asyncio.Task[None] | None = None
        self._is_full = False

    def enter(self, connection: Waiting) -> bool:
        """Take a connection in; False where there are too many already."""
        if len(self._open) >= self._limit:
            if not self._is_full:
                log.warning("too many connections: new ones are not taken", limit=self._limit)
            self._is_full = True
            return False
        self._is_full = False
        self._open.add(connection)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return True

    def leave(self, connection: Waiting) -> None:
        """Forget a connection that is over."""
        self._open.discard(connection)

    async def close(self) -> None:
        """Look after them no longer."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(_PAUSE, self._seconds / 4))
            latest = asyncio.get_running_loop().time() - self._seconds
            for connection in [each for each in self._open if (each.head_since or latest + 1) <= latest]:
                connection.abort()
