"""What runs beside requests: uploads that nobody goes on with are dropped, and what a crash left is cleared away.

In the normal course every byte in the store has a row: a session's or a blob's. Only a process that died between
publishing a file and committing its row leaves one without. So only after such a death the store is looked
through, in the background, and only what is older than this process can be a leftover.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import structlog

from registry.errors import MetadataError
from registry.metadata import blobs, sessions
from registry.metadata.engine import Database
from storage.base import Store, StoredObject
from storage.errors import StorageError

_CHUNK: Final = 500

log = structlog.get_logger()


class Sweeper:
    """Drops what nobody needs."""

    def __init__(self, store: Store, database: Database, idle_seconds: int, sweep_seconds: int) -> None:
        """Drop uploads idle for `idle_seconds`; look every `sweep_seconds`."""
        self._store = store
        self._database = database
        self._idle = idle_seconds
        self._pause = sweep_seconds
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()

    async def start(self, *, first: bool, recover: float | None) -> None:
        """Begin, in the process that does it for all; look for leftovers from before `recover`, if a time."""
        if not first:
            return
        if recover is not None:
            self._tasks.append(asyncio.create_task(self._recover(recover)))
        self._tasks.append(asyncio.create_task(self._sweep_always()))

    async def stop(self) -> None:
        """End, when what was begun is done: bytes whose row is gone would be forgotten."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def sweep(self) -> int:
        """Drop idle uploads once; return how many."""
        dropped = 0
        while not self._stopping.is_set() and (
            keys := await self._database.write(sessions.sweep, self._idle * 1_000_000)
        ):
            dropped += await self._delete(keys)
        return dropped

    async def clear(self, before: float) -> int:
        """Delete stored objects without a row that were there `before` (seconds since the epoch)."""
        cleared = 0
        chunk: list[StoredObject] = []
        async for found in self._store.objects():
            if found.modified < before:
                chunk.append(found)
            if self._stopping.is_set():
                return cleared
            if len(chunk) == _CHUNK:
                cleared += await self._clear(chunk)
                chunk = []
        return cleared + await self._clear(chunk)

    async def _clear(self, chunk: list[StoredObject]) -> int:
        keys = [found.key for found in chunk]
        known = await self._database.read(blobs.known_keys, keys)
        known |= await self._database.read(sessions.known_keys, keys)
        return await self._delete([key for key in keys if key not in known])

    async def _delete(self, keys: list[str]) -> int:
        deleted = 0
        for key in keys:
            try:
                await self._store.delete(key)
                deleted += 1
            except StorageError as error:
                log.error("leftover cannot be deleted", key=key, error=str(error))
        return deleted

    async def _recover(self, before: float) -> None:
        try:
            cleared = await self.clear(before)
            log.info("recovered after a crash", leftovers_deleted=cleared)
        except (StorageError, MetadataError, OSError) as error:
            log.error("recovery failed, it will be tried at the next start", error=str(error))

    async def _sweep_always(self) -> None:
        while not self._stopping.is_set():
            try:
                if dropped := await self.sweep():
                    log.info("idle uploads dropped", uploads=dropped)
            except (StorageError, MetadataError, OSError) as error:
                log.error("sweep failed", error=str(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._pause)
