"""What runs beside requests: uploads that nobody goes on with are dropped, and what a crash left is cleared away.

In the normal course every byte in the store has a row: a session's, a blob's or a leftover's. Only a process that died
between publishing a file and committing its row leaves one without. So only after such a death the store is looked
through, in the background, and only what is older than this process can be such a one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import structlog

from registry.metadata import access_tokens, audit, blobs, leftovers, sessions
from registry.metadata.engine import Database
from registry.metadata.leftovers import Leftover
from registry.metadata.tables import DAY, now
from storage.base import Store, StoredObject
from storage.errors import StorageError

_CHUNK: Final = 500

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Doubt:
    """What a run that did not end well may have left.

    Attributes:
        before: it is older than this, in seconds since the epoch.
        pause: seconds to wait first: where the store's clock is another one, what is of this run and looks older has
            its row by then.
        settle: called when nothing of it is left.
    """

    before: float
    pause: float = 0
    settle: Callable[[], None] = lambda: None


class Sweeper:
    """Drops what nobody needs."""

    def __init__(
        self, store: Store, database: Database, idle_seconds: int, sweep_seconds: int, *, audit_days: int = 0
    ) -> None:
        """Drop uploads idle for `idle_seconds`; look every `sweep_seconds`; keep the audit, 0 days is for ever."""
        self._audit_days = audit_days
        self._store = store
        self._database = database
        self._idle = idle_seconds
        self._pause = sweep_seconds
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        #: Leftovers of a crash that could not be deleted.
        self._stuck = 0

    async def start(self, *, first: bool, doubt: Doubt | None) -> None:
        """Begin, in the process that does it for all; look for what the last run left, where it may have."""
        if not first:
            return
        if doubt is not None:
            self._tasks.append(asyncio.create_task(self._recover(doubt)))
        self._tasks.append(asyncio.create_task(self._sweep_always()))

    async def stop(self) -> None:
        """End, when the step under way is done; the rest is noted, and is done by the next run."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def sweep(self) -> int:
        """Drop idle uploads once; return how many."""
        dropped = 0
        while not self._stopping.is_set() and (
            ids := await self._database.write(sessions.sweep, self._idle * 1_000_000)
        ):
            dropped += len(await self._forget([Leftover(upload, None) for upload in ids]))
        return dropped

    async def tidy(self) -> None:
        """Let the store forget what uploads left that ended a while ago, once more or for the first time."""
        while not self._stopping.is_set() and (found := await self._database.read(leftovers.due)):
            gone = await self._forget(found)
            await self._database.write(leftovers.forget, gone)
            if len(gone) < len(found):
                stuck = {left.upload for left in found}.difference(gone)
                await self._database.write(leftovers.postpone, sorted(stuck))

    async def forget(self) -> None:
        """Delete the audit of long ago, and refresh tokens that nobody can use any more."""
        await self._database.write(access_tokens.forget_ended, access_tokens.REFRESH)
        if self._audit_days:
            before = now() - self._audit_days * DAY
            while not self._stopping.is_set() and (await self._database.write(audit.forget, before)) > 0:
                pass

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
        open_ones = await self._database.read(sessions.known, [found.upload for found in chunk])
        known = await self._database.read(blobs.known_keys, [found.key for found in chunk])
        unknown = [found.key for found in chunk if found.key not in known and found.upload not in open_ones]
        cleared = 0
        for key in unknown:
            with _logged(key):
                await self._store.delete(key)
                cleared += 1
        self._stuck += len(unknown) - cleared
        return cleared

    async def _forget(self, those: list[Leftover]) -> list[str]:
        """Let the store forget what these uploads left, and return those of which nothing is there any more."""
        gone = []
        for upload, kept in those:
            if self._stopping.is_set():
                break
            with _logged(upload):
                await self._store.forget(upload, kept)
                gone.append(upload)
        return gone

    async def _recover(self, doubt: Doubt) -> None:
        await self._wait(doubt.pause)
        try:
            cleared = await self.clear(doubt.before)
        except Exception as error:
            log.error("recovery failed, it will be tried at the next start", error=repr(error))
            return
        if self._stuck:
            log.error("recovery is not complete, it will be tried at the next start", left=self._stuck)
        elif not self._stopping.is_set():
            doubt.settle()
            log.info("recovered after a crash", leftovers_deleted=cleared)

    async def _sweep_always(self) -> None:
        while not self._stopping.is_set():
            for step in (self._sweep, self.tidy, self.forget):
                try:
                    await step()
                except Exception as error:
                    # Whatever it was, the other one is not to suffer from it, and the next time may be better.
                    log.error("sweep failed", error=repr(error))
            await self._wait(self._pause)

    async def _sweep(self) -> None:
        if dropped := await self.sweep():
            log.info("idle uploads dropped", uploads=dropped)

    async def _wait(self, seconds: float) -> None:
        """Wait so long, or until all is to end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)


@contextlib.contextmanager
def _logged(name: str) -> Iterator[None]:
    """Let one thing that cannot be deleted not keep the others."""
    try:
        yield
    except (StorageError, OSError) as error:
        log.error("leftover cannot be deleted", name=name, error=str(error))
