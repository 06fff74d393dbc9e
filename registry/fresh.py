"""Upload sessions of the last moment, which have no row yet.

Most uploads are small and over within milliseconds. For those a row that is written, claimed, moved on and deleted
costs more than all the rest. So where one process serves alone, a new session and the first few kilobytes that it is
sent are kept here for a moment. Whoever wants more of a session than that settles it first: its bytes go to the store,
its row to the database, and it is a session like any other. A process that is killed forgets the sessions of this
moment, nothing that was acknowledged with 201.

    add ──► keep ──► take ──► forget       begun and finished within the moment
     └────────┴─────────────► settle       anything else, or the moment is over
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

import structlog

from registry.errors import BlobUploadUnknown, UploadConflict
from registry.metadata import sessions
from registry.metadata.engine import Database
from storage.base import Checkpoint, Store
from storage.names import RepositoryName

#: Seconds after which a session is settled.
_MOMENT: Final = 0.1
#: Seconds before another try with one that could not be settled.
_PATIENCE: Final = 5.0
#: Bytes of one upload that are kept.
_KEPT_SIZE: Final = 32 << 10
#: Sessions that are kept; more are settled as they begin. With the bytes of each that bounds the memory.
_LIMIT: Final = 512

log = structlog.get_logger()


@dataclass(slots=True)
class FreshSession:
    """A session without a row.

    Attributes:
        id: its name in addresses.
        repository: where it ends.
        start: of its bytes in the store, where nothing is yet.
        born: by the monotonic clock, in seconds.
        opened_by: id of an account, 0 for nobody's.
        content: what it was sent so far.
        is_taken: a request is finishing it.
        is_torn: a step of it failed, so the store may hold something of it.
        settling: the task that does so, once begun.
    """

    id: str
    repository: RepositoryName
    start: Checkpoint
    born: float
    opened_by: int = 0
    content: bytes = b""
    is_taken: bool = False
    is_torn: bool = False
    settling: asyncio.Task[None] | None = None


class FreshSessions:
    """The sessions of the last moment."""

    def __init__(self, store: Store, database: Database, *, enabled: bool) -> None:
        """Settle sessions into `store` and `database`; keep none where not `enabled`: others might ask for them."""
        self._store = store
        self._database = database
        self._limit = _LIMIT if enabled else 0
        self._sessions: dict[str, FreshSession] = {}
        self._settler: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    async def add(self, session_id: str, repository: RepositoryName, start: Checkpoint, opened_by: int = 0) -> None:
        """Open a session; where too many are kept, with its row, so that raises `MetadataError`."""
        if len(self._sessions) >= self._limit:
            await self._database.note(sessions.create, session_id, repository, start, opened_by=opened_by)
            return
        self._sessions[session_id] = FreshSession(session_id, repository, start, time.monotonic(), opened_by)
        if self._settler is None or self._settler.done():
            self._settler = asyncio.create_task(self._settle_old())

    def opener(self, session_id: str, repository: RepositoryName) -> int | None:
        """Return who opened a session; None for one that is not here."""
        session = self._sessions.get(session_id)
        return session.opened_by if session and session.repository == repository else None

    def offset(self, session_id: str, repository: RepositoryName) -> int | None:
        """Return how many bytes came; None for a session that is not here."""
        session = self._sessions.get(session_id)
        return len(session.content) if session and session.repository == repository else None

    def keep(self, session_id: str, repository: RepositoryName, content: bytes) -> bool:
        """Keep the first bytes; False where they are too many, not the first, or the session is not here.

        Raises:
            BlobUploadUnknown: it belongs to another repository.
            UploadConflict: a request is finishing it.
        """
        session = self._find(session_id, repository)
        if session is None or session.content or len(content) > _KEPT_SIZE:
            return False
        session.content = content
        return True

    def take(self, session_id: str, repository: RepositoryName) -> FreshSession | None:
        """Return a session that nobody else gets until it was given back; None where it is not here.

        Raises as `keep` does.
        """
        session = self._find(session_id, repository)
        if session:
            session.is_taken = True
        return session

    def give_back(self, session: FreshSession) -> None:
        """Let others have a session again, a step of which failed."""
        session.is_torn = True
        session.is_taken = False

    def forget(self, session: FreshSession) -> None:
        """End a session that was taken."""
        del self._sessions[session.id]

    async def settle(self, session_id: str) -> None:
        """Make a session, if it is here, one like any other.

        Raises:
            UploadConflict: a request is finishing it.
            OutOfSpace, StorageError, MetadataError: it stays here; it will be tried again.
        """
        session = self._sessions.get(session_id)
        if session is None:
            return
        if session.is_taken:
            raise UploadConflict
        if session.settling is None:
            session.settling = asyncio.create_task(self._settle(session))
        # Others may wait for it too, whatever becomes of this request.
        await asyncio.shield(session.settling)

    async def close(self) -> None:
        """Settle all that are left; those that cannot be are lost, and it is logged."""
        self._limit = 0
        if self._settler:
            self._settler.cancel()
            await asyncio.wait({self._settler})
        await self._settle_all(list(self._sessions.values()))

    def _find(self, session_id: str, repository: RepositoryName) -> FreshSession | None:
        session = self._sessions.get(session_id)
        if session is None or session.settling:
            return None
        if session.repository != repository:
            raise BlobUploadUnknown
        if session.is_taken:
            raise UploadConflict
        return session

    async def _settle(self, session: FreshSession) -> None:
        try:
            checkpoint = session.start
            if session.content:
                upload = self._store.resume(checkpoint)
                try:
                    await upload.write([session.content], last=True)
                finally:
                    await upload.suspend()
                checkpoint = upload.checkpoint()
            await self._database.note(
                sessions.create,
                session.id,
                session.repository,
                checkpoint,
                is_torn=session.is_torn,
                opened_by=session.opened_by,
            )
            del self._sessions[session.id]
        except BaseException:
            session.is_torn = True
            raise
        finally:
            session.settling = None

    async def _settle_old(self) -> None:
        """Settle what is older than a moment, as long as there is anything."""
        while self._sessions:
            await asyncio.sleep(_MOMENT / 2)
            now = time.monotonic()
            await self._settle_all([each for each in self._sessions.values() if now - each.born >= _MOMENT])

    async def _settle_all(self, those: list[FreshSession]) -> None:
        await asyncio.gather(*map(self._try_to_settle, those))

    async def _try_to_settle(self, session: FreshSession) -> None:
        try:
            await self.settle(session.id)
        except UploadConflict:
            # A request is ending it.
            return
        except Exception as error:
            # Whatever it was, the next one is not to suffer from it.
            session.born = time.monotonic() + _PATIENCE
            log.warning("an upload session cannot be kept yet", error=repr(error))
