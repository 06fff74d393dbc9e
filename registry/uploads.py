"""`/v2/<name>/blobs/uploads/`: pushing blobs. [distribution-spec: end-4a, 4b, 5, 6, 11, 13, 14]

    POST ──► session (row) ──► PATCH … PATCH ──► PUT ?digest= ──► blob
       └─ ?digest= with a body: all of it in one request
       └─ ?mount=: nothing to send, or else a session

A request that sends bytes claims the session's row, appends under the upload's own key, and lets go of the row
with the new offset and digest-so-far. Bytes before row: a blob is durable in the store before its row is
committed, and the row before the client hears 201.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from aiohttp import hdrs, web

from registry import locations
from registry.access import Access, Right
from registry.calls import Call
from registry.contents import Contents
from registry.errors import BlobUploadUnknown, ChunkOutOfOrder, DigestInvalid, SizeInvalid
from registry.fresh import FreshSessions
from registry.metadata import blobs, sessions
from registry.metadata.blobs import StoredBlob
from registry.metadata.engine import Database
from registry.metadata.sessions import Session
from registry.ranges import parse_chunk
from registry.responses import BYTES_IN
from registry.transfer import Appender, Receiver, whole_body
from storage.base import Store, Upload
from storage.digest import CANONICAL, Digest, check_algorithm
from storage.errors import DigestMismatch, InvalidName, UploadLost
from storage.names import RepositoryName, parse_repository

#: After so many bytes, or so many seconds, a long request notes how far it came: for clients that can resume.
_CHECKPOINT_SIZE: Final = 64 << 20
_CHECKPOINT_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class _Claim:
    """A session that this request alone writes to, and its bytes.

    Attributes:
        session: as it stood when it was claimed.
        writer: the name of this request in the session's row.
        upload: the bytes.
        is_stored: the bytes that it shall end as were in the store already; False where that was not asked.
    """

    session: Session
    writer: str
    upload: Upload
    is_stored: bool


class Uploads:
    """Blobs on their way in."""

    def __init__(
        self,
        store: Store,
        database: Database,
        contents: Contents,
        fresh: FreshSessions,
        receiver: Receiver,
        access: Access,
    ) -> None:
        """Take bytes by `receiver` into `store`; `access` is asked about the source of a mount."""
        self._store = store
        self._database = database
        self._contents = contents
        self._fresh = fresh
        self._receiver = receiver
        self._access = access

    async def start(self, call: Call) -> web.StreamResponse:
        """POST: a mount [end-11], a whole blob [end-4b], or a new session [end-4a]."""
        mounted = call.parameter("mount")
        if mounted is not None and await self._mount(call, Digest.parse(mounted)):
            return _created(call, Digest.parse(mounted))
        wanted = call.parameter("digest")
        digest = Digest.parse(wanted) if wanted is not None else None
        algorithm = check_algorithm(call.parameter("digest-algorithm") or (digest and digest.algorithm) or CANONICAL)
        session_id = str(uuid.uuid4())
        await self._fresh.add(session_id, call.repository, self._store.begin(session_id, algorithm))
        if digest is not None:
            return await self._finish(call, session_id, digest)
        return _accepted(call, session_id, 0)

    async def status(self, call: Call) -> web.StreamResponse:
        """GET: how far the upload is. [end-13]"""
        offset = self._fresh.offset(call.argument, call.repository)
        if offset is None:
            session = await self._database.look_up(sessions.find, call.argument, call.repository)
            offset = session.checkpoint.offset
        return _accepted(call, call.argument, offset, status=204)

    async def append(self, call: Call) -> web.StreamResponse:
        """PATCH: more bytes, in a chunk or a stream. [end-5]"""
        async with self._receiver.slot():
            whole = whole_body(call.request)
            if whole and self._keep(call, whole):
                return _accepted(call, call.argument, len(whole))
            async with self._claimed(call, call.argument) as claim:
                await self._receive(call, claim, whole, last=True)
                await self._let_go(claim)
        return _accepted(call, claim.session.id, claim.upload.offset)

    async def finish(self, call: Call) -> web.StreamResponse:
        """PUT: perhaps the last bytes, and what all of them must be. [end-6]"""
        wanted = call.parameter("digest")
        if wanted is None:
            raise DigestInvalid("the closing PUT needs ?digest=<algorithm>:<hex>")
        return await self._finish(call, call.argument, Digest.parse(wanted))

    async def cancel(self, call: Call) -> web.StreamResponse:
        """DELETE: forget the upload. [end-14]"""
        if not self._fresh.cancel(call.argument, call.repository):
            await self._fresh.settle(call.argument)
            key = await self._database.note(sessions.remove, call.argument, call.repository)
            await self._store.delete(key)
        return web.Response(status=204)

    async def _finish(self, call: Call, session_id: str, digest: Digest) -> web.StreamResponse:
        async with self._receiver.slot():
            whole = whole_body(call.request)
            if whole is None or not await self._finish_at_once(call, session_id, digest, whole):
                async with self._claimed(call, session_id, digest) as claim:
                    await self._receive(call, claim, whole, last=False)
                    await self._publish(call.repository, claim, digest)
        return _created(call, digest)

    def _keep(self, call: Call, content: bytes) -> bool:
        """Keep small first bytes of a fresh session; anything else goes the long way."""
        is_kept = hdrs.CONTENT_RANGE not in call.request.headers and self._fresh.keep(
            call.argument, call.repository, content
        )
        if is_kept:
            call.request[BYTES_IN] = len(content)
        return is_kept

    async def _finish_at_once(self, call: Call, session_id: str, digest: Digest, last: bytes) -> bool:
        """Make a blob of a fresh session; False where it is not one, or must go the long way."""
        if hdrs.CONTENT_RANGE in call.request.headers:
            return False
        session = self._fresh.take(session_id, call.repository)
        if session is None:
            return False
        call.request[BYTES_IN] = len(last)
        upload = self._store.resume(session.start)
        try:
            key = await upload.commit(digest, [piece for piece in (session.content, last) if piece])
            await self._add(key, self._contents.add_blob(call.repository, digest, StoredBlob(key, upload.offset)))
        except DigestMismatch:
            await upload.abort()
            self._fresh.forget(session)
            raise
        except BaseException:
            # What it was sent before is still here, and will be written again.
            await upload.suspend()
            self._fresh.give_back(session)
            raise
        self._fresh.forget(session)
        return True

    async def _mount(self, call: Call, digest: Digest) -> bool:
        """Take the blob over from `from`, or from any repository that the client may pull from."""
        for source in await self._sources(call.parameter("from"), digest):
            if self._access.may(call.identity, source, Right.PULL):
                return await self._database.write(blobs.mount, source, call.repository, digest)
        return False

    async def _sources(self, named: str | None, digest: Digest) -> list[RepositoryName]:
        if named is None:
            return [RepositoryName(name) for name in await self._database.read(blobs.holders, digest)]
        try:
            return [parse_repository(named)]
        except InvalidName:
            # Nothing can be mounted from there; the client uploads, as for any mount that cannot be done.
            return []

    @asynccontextmanager
    async def _claimed(self, call: Call, session_id: str, digest: Digest | None = None) -> AsyncIterator[_Claim]:
        """Hold the session, perhaps to end it as `digest`; whatever happens, what was received stays or ends."""
        claim = await self._claim(call, session_id, digest)
        try:
            yield claim
        except DigestMismatch:
            # What arrived is not what was announced: no request can mend that.
            await claim.upload.abort()
            await self._end(claim.session)
            raise
        except UploadLost as error:
            await self._end(claim.session)
            raise BlobUploadUnknown(f"this upload cannot go on: {error}") from None
        except BlobUploadUnknown:
            await claim.upload.suspend()
            await self._drop(claim.session.checkpoint.key)
            raise
        except BaseException:
            await self._let_go(claim)
            raise

    async def _claim(self, call: Call, session_id: str, digest: Digest | None) -> _Claim:
        await self._fresh.settle(session_id)
        writer = str(uuid.uuid4())
        session, is_stored = await self._database.note(sessions.claim, session_id, call.repository, writer, digest)
        return _Claim(session, writer, self._store.resume(session.checkpoint), is_stored)

    async def _end(self, session: Session) -> None:
        with suppress(BlobUploadUnknown):
            await self._database.note(sessions.remove, session.id, session.repository)

    async def _let_go(self, claim: _Claim) -> None:
        # The file first: whoever claims the row next must not find it locked.
        checkpoint = claim.upload.checkpoint()
        await claim.upload.suspend()
        await self._database.note(sessions.advance, claim.session.id, claim.writer, checkpoint, release=True)

    async def _receive(self, call: Call, claim: _Claim, whole: bytes | None, *, last: bool) -> None:
        """Append the body, which is `whole` or must come yet; what came of it is kept even if it ends early.

        `last` says that this request has nothing more to do with the upload.
        """
        expected = _check_chunk(call, claim)
        if whole is None:
            received = await self._receive_stream(call, claim)
        else:
            received = call.request[BYTES_IN] = len(whole)
            if whole:
                await claim.upload.write([whole], last=last)
        if expected is not None and received != expected:
            raise SizeInvalid(f"Content-Range announced {expected} bytes, {received} came")

    async def _receive_stream(self, call: Call, claim: _Claim) -> int:
        appender = Appender(claim.upload)
        received, noted, noted_at = 0, 0, time.monotonic()
        try:
            async for pieces in self._receiver.pieces(call.request):
                received += sum(map(len, pieces))
                await appender.write(pieces)
                due = received - noted >= _CHECKPOINT_SIZE
                if due or time.monotonic() - noted_at >= _CHECKPOINT_SECONDS:
                    await appender.flush()
                    await self._note(claim)
                    noted, noted_at = received, time.monotonic()
        finally:
            call.request[BYTES_IN] = received
            await appender.flush()
        return received

    async def _note(self, claim: _Claim) -> None:
        checkpoint = claim.upload.checkpoint()
        await self._database.note(sessions.advance, claim.session.id, claim.writer, checkpoint, release=False)

    async def _publish(self, name: RepositoryName, claim: _Claim, digest: Digest) -> None:
        await claim.upload.verify(digest)
        session_id, writer = claim.session.id, claim.writer
        if claim.is_stored and await self._database.write(blobs.finish_with_existing, session_id, writer, name, digest):
            await claim.upload.abort()
            return
        key = await claim.upload.commit(digest)
        stored = StoredBlob(key, claim.upload.offset)
        await self._add(key, self._contents.finish_upload(session_id, writer, name, digest, stored))

    async def _add(self, key: str, adding: Awaitable[bool]) -> None:
        """Wait for the row of published bytes; if it is not to be, they are dropped."""
        is_ours = False
        try:
            is_ours = await adding
        finally:
            if not is_ours:
                await self._drop(key)

    async def _drop(self, key: str) -> None:
        """Delete bytes that nobody needs, unless a row came to name them all the same."""
        known = await self._database.read(blobs.known_keys, [key])
        if key not in known | await self._database.read(sessions.known_keys, [key]):
            await self._store.delete(key)


def _check_chunk(call: Call, claim: _Claim) -> int | None:
    """Return how many bytes the chunk announces, None for a stream; raises `ChunkOutOfOrder`."""
    header = call.request.headers.get(hdrs.CONTENT_RANGE)
    if header is None:
        return None
    start, stop = parse_chunk(header, call.request.content_length)
    offset = claim.session.checkpoint.offset
    if start != offset:
        raise ChunkOutOfOrder(
            f"the chunk begins at {start}, the upload stands at {offset}",
            headers=_progress(call, claim.session.id, offset),
        )
    return stop - start


def _progress(call: Call, session_id: str, offset: int) -> dict[str, str]:
    return {
        hdrs.LOCATION: locations.upload(call.request, call.repository, session_id),
        # A range has no way to say "nothing yet"; clients know 0-0 from the first registries on.
        hdrs.RANGE: f"0-{max(0, offset - 1)}",
        "Docker-Upload-UUID": session_id,
    }


def _accepted(call: Call, session_id: str, offset: int, status: int = 202) -> web.Response:
    return web.Response(status=status, headers=_progress(call, session_id, offset))


def _created(call: Call, digest: Digest) -> web.Response:
    return web.Response(
        status=201,
        headers={
            hdrs.LOCATION: locations.blob(call.request, call.repository, digest),
            "Docker-Content-Digest": str(digest),
        },
    )
