"""Upload sessions: who may write to one, and how it ends.

A request that sends bytes claims the session's row, appends under the upload's own key, and lets go of the row with the
new offset and digest-so-far. Bytes before row: a blob is durable in the store before its row is committed, and the row
before the client hears 201. Sessions of the last moment have no row: `fresh.py`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import structlog

from registry.contents import Contents
from registry.errors import BlobUploadUnknown, MetadataError, MetadataFull, RegistryError
from registry.fresh import FreshSession, FreshSessions
from registry.metadata import blobs, leftovers, sessions
from registry.metadata.audit import Event
from registry.metadata.blobs import StoredBlob
from registry.metadata.engine import Database
from registry.metadata.sessions import Session
from storage.base import Store, Upload
from storage.digest import Digest
from storage.errors import DigestMismatch, StorageError, UploadLost
from storage.names import RepositoryName

log = structlog.get_logger()

#: Seconds after which a claim is renewed before anything is written under it.
_RENEWAL: Final = sessions.LEASE / 3_000_000


@dataclass(slots=True)
class Claim:
    """A session that one request alone writes to, and its bytes.

    Attributes:
        session: as it stood when it was claimed.
        writer: the name of the request in the session's row.
        upload: the bytes.
        is_stored: the bytes that it shall end as were in the store already; False where that was not asked.
        renewed_at: when it was last sure to be ours, by the monotonic clock, in seconds.
    """

    session: Session
    writer: str
    upload: Upload
    is_stored: bool
    renewed_at: float = field(default_factory=time.monotonic)


class Sessions:
    """The upload sessions of all repositories."""

    def __init__(self, store: Store, database: Database, contents: Contents, fresh: FreshSessions) -> None:
        """Keep bytes in `store`, rows in `database`; blobs that come of them go to `contents`."""
        self._store = store
        self._database = database
        self._contents = contents
        self._fresh = fresh

    async def open(self, name: RepositoryName, algorithm: str, opened_by: int = 0) -> str:
        """Open a session for an account, by its id, and return the session's."""
        session_id = str(uuid.uuid4())
        await self._fresh.add(session_id, name, self._store.begin(session_id, algorithm), opened_by)
        return session_id

    async def opener(self, name: RepositoryName, session_id: str) -> int:
        """Return the id of the account that opened a session, or raise `BlobUploadUnknown`."""
        opener = self._fresh.opener(session_id, name)
        if opener is not None:
            return opener
        # It may be on its way from there to its row.
        await self._fresh.settle(session_id)
        return await self._database.look_up(sessions.opener, session_id, name)

    async def offset(self, name: RepositoryName, session_id: str) -> int:
        """Return how many bytes came, or raise `BlobUploadUnknown`."""
        offset = self._fresh.offset(session_id, name)
        if offset is not None:
            return offset
        # It may be on its way from there to its row.
        await self._fresh.settle(session_id)
        return (await self._database.look_up(sessions.find, session_id, name)).checkpoint.offset

    def keep(self, name: RepositoryName, session_id: str, content: bytes) -> bool:
        """Append small content at once, if these are the first bytes of a fresh session."""
        return self._fresh.keep(session_id, name, content)

    async def cancel(self, name: RepositoryName, session_id: str) -> None:
        """End a session and delete its bytes, or raise `BlobUploadUnknown`."""
        session = self._fresh.take(session_id, name)
        if session is None:
            await self._fresh.settle(session_id)
            await self._database.note(sessions.remove, session_id, name)
            await self._forget(session_id)
        else:
            await self._end_fresh(session)

    @asynccontextmanager
    async def claimed(
        self, name: RepositoryName, session_id: str, digest: Digest | None = None
    ) -> AsyncIterator[Claim]:
        """Hold a session, perhaps to end it as `digest`.

        If the block fails, what was received stays, unless no request can make anything of it.

        Raises:
            BlobUploadUnknown: there is no such session, or its bytes are gone.
            UploadConflict: another request holds it.
        """
        claim = await self._claim(name, session_id, digest)
        try:
            yield claim
        except DigestMismatch:
            # What arrived is not what was announced: no request can mend that.
            await claim.upload.abandon()
            await self._end(claim)
            raise
        except UploadLost as error:
            await claim.upload.abandon()
            await self._end(claim)
            raise BlobUploadUnknown(f"this upload cannot go on: {error}") from None
        except BlobUploadUnknown:
            # Somebody ended it, or took it over: then its bytes are not ours any more.
            await claim.upload.abandon()
            await self._forget_if_over(claim.session.id)
            raise
        except BaseException:
            # What went wrong first is what is told.
            with suppress(RegistryError, MetadataError, StorageError):
                await self._save(claim)
            raise

    async def hold(self, claim: Claim) -> None:
        """Make sure, before something is written, that the claim is still ours.

        The database is asked only where the claim may have ended: this process was stopped for a while.

        Raises:
            BlobUploadUnknown: somebody else has the upload, or ended it.
        """
        if time.monotonic() - claim.renewed_at > _RENEWAL:
            await self._renew(claim)

    async def note(self, claim: Claim) -> None:
        """Record how far an upload came, and keep it claimed."""
        checkpoint = claim.upload.checkpoint()
        await self._database.note(sessions.advance, claim.session.id, claim.writer, checkpoint, release=False)

    async def let_go(self, claim: Claim) -> None:
        """Record how far an upload came, and let others go on with it."""
        await self.hold(claim)
        try:
            # The bytes first: whoever claims the row next must find all of them, and nobody who holds them.
            await claim.upload.suspend()
        finally:
            checkpoint = claim.upload.checkpoint()
            await self._database.note(sessions.advance, claim.session.id, claim.writer, checkpoint, release=True)

    async def publish(self, claim: Claim, digest: Digest, event: Event | None = None) -> None:
        """End a session as the blob that it must be, and keep the event of it; raises `DigestMismatch`."""
        async with self._renewed(claim):
            await self._publish(claim, digest, event)

    async def _publish(self, claim: Claim, digest: Digest, event: Event | None) -> None:
        await claim.upload.verify(digest)
        session_id, writer, name = claim.session.id, claim.writer, claim.session.repository
        if claim.is_stored and await self._database.write(
            blobs.finish_with_existing, session_id, writer, name, digest, event
        ):
            await claim.upload.abandon()
            await self._forget(session_id)
            return
        key = await claim.upload.commit(digest)
        stored = StoredBlob(key, claim.upload.offset)
        is_tidy = claim.upload.is_tidy
        try:
            is_ours = await self._contents.finish_upload(
                session_id, writer, name, digest, stored, event, is_tidy=is_tidy
            )
        except (BlobUploadUnknown, MetadataFull):
            # Nothing was written.
            await claim.upload.undo()
            raise
        except BaseException:
            await self._undo(claim)
            raise
        if not is_ours:
            with _logged(key):
                await self._store.delete(key)

    async def publish_fresh(
        self, name: RepositoryName, session_id: str, last: bytes, digest: Digest, event: Event | None = None
    ) -> bool:
        """Append `last` to a fresh session and end it as a blob; False where it is not fresh any more.

        Raises:
            DigestMismatch: it is not these bytes, and it is ended.
            UploadConflict: another request is doing this.
        """
        session = self._fresh.take(session_id, name)
        if session is None:
            return False
        upload = self._store.resume(session.start)
        try:
            key = await upload.commit(digest, [piece for piece in (session.content, last) if piece])
        except DigestMismatch:
            await upload.abandon()
            await self._end_fresh(session)
            await self._forget(session_id)
            raise
        except BaseException:
            # What it was sent before is still here, and will be written again.
            try:
                await upload.abandon()
            finally:
                self._fresh.give_back(session)
            raise
        untidy = session_id if session.is_torn or not upload.is_tidy else ""
        try:
            is_ours = await self._contents.add_blob(name, digest, StoredBlob(key, upload.offset), event, untidy)
        except BaseException:
            await self._reconsider(session, key)
            raise
        self._fresh.forget(session)
        if not is_ours:
            with _logged(key):
                await self._store.delete(key)
        return True

    async def _claim(self, name: RepositoryName, session_id: str, digest: Digest | None) -> Claim:
        await self._fresh.settle(session_id)
        writer = str(uuid.uuid4())
        try:
            session, is_stored = await self._database.note(sessions.claim, session_id, name, writer, digest)
        except (MetadataError, asyncio.CancelledError):
            # It may be ours all the same, where only the answer got lost or came too late.
            with suppress(MetadataError):
                await self._database.note(sessions.release, session_id, writer)
            raise
        return Claim(session, writer, self._store.resume(session.checkpoint), is_stored)

    async def _save(self, claim: Claim) -> None:
        """Keep what a request that failed has received, if the session is still its own."""
        try:
            await self._renew(claim)
        except BaseException:
            await claim.upload.abandon()
            raise
        await self.let_go(claim)

    async def _end(self, claim: Claim) -> None:
        """End a session whose bytes are of no use, unless it is somebody else's, or over: a blob may have come of it.

        What went wrong is told, not that this does.
        """
        session = claim.session
        with suppress(BlobUploadUnknown), _logged(session.id):
            await self._database.note(sessions.remove, session.id, session.repository, claim.writer)
            await self._store.forget(session.id)

    async def _end_fresh(self, session: FreshSession) -> None:
        """End a session that has no row, and nothing in the store unless it is torn."""
        try:
            if session.is_torn:
                with _logged(session.id):
                    await self._database.note(leftovers.add, [session.id])
                await self._forget(session.id)
        finally:
            self._fresh.forget(session)

    async def _forget(self, session_id: str) -> None:
        """Delete the bytes of an upload that is over; a row says so, and brings them back to mind if this fails."""
        with _logged(session_id):
            await self._store.forget(session_id)

    async def _forget_if_over(self, session_id: str) -> None:
        """Delete what we wrote to an upload after somebody had ended it."""
        with _logged(session_id):
            leftover = await self._database.read(leftovers.find, session_id)
            if leftover is not None:
                await self._store.forget(*leftover)

    async def _renew(self, claim: Claim) -> None:
        began = time.monotonic()
        if not await self._database.note(sessions.renew, claim.session.id, claim.writer):
            raise BlobUploadUnknown
        claim.renewed_at = began

    @asynccontextmanager
    async def _renewed(self, claim: Claim) -> AsyncIterator[None]:
        """Keep a claim for as long as the block takes: to hash again what is large, or to join its parts."""

        async def renew_always() -> None:
            while True:
                await asyncio.sleep(_RENEWAL)
                # A claim that is lost is noticed by the last step.
                with suppress(MetadataError, BlobUploadUnknown):
                    await self._renew(claim)

        renewing = asyncio.create_task(renew_always())
        try:
            await self.hold(claim)
            yield
        finally:
            renewing.cancel()

    async def _undo(self, claim: Claim) -> None:
        """Take back what was published, if its row is not there and never will be: the session still is.

        Asking for it waits for a commit whose answer was lost. Where even that cannot be asked, the bytes stay.
        """
        with suppress(MetadataError):
            if await self._database.note(sessions.renew, claim.session.id, claim.writer):
                await claim.upload.undo()

    async def _reconsider(self, session: FreshSession, key: str) -> None:
        """Let a fresh session go on if what was published has no row. Where it has one, or nobody knows, it is over.

        It may have one all the same: a commit is not cancelled with its request. And it would be deleted with whatever
        this session leaves, should that come to another end.
        """
        is_over = True
        try:
            with _logged(key):
                if key not in await self._database.read(blobs.known_keys, [key]):
                    is_over = False
                    await self._store.delete(key)
        finally:
            if is_over:
                self._fresh.forget(session)
            else:
                self._fresh.give_back(session)


@contextmanager
def _logged(name: str) -> Iterator[None]:
    """Let what only clears away fail without a harm to the request: what it leaves is cleared away later."""
    try:
        yield
    except (MetadataError, StorageError) as error:
        log.warning("bytes that nobody needs are not deleted yet", name=name, error=str(error))
