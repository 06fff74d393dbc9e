"""`/v2/<name>/blobs/uploads/`: pushing blobs. [distribution-spec: end-4a, 4b, 5, 6, 11, 13, 14]

POST ──► session ──► PATCH … PATCH ──► PUT ?digest= ──► blob
└─ ?digest= with a body: all of it in one request
└─ ?mount=: nothing to send, or else a session
"""

from __future__ import annotations

import time
from contextlib import aclosing, suppress
from typing import Final

from aiohttp import hdrs, web

from registry import locations
from registry.access.audit import Auditor
from registry.access.challenges import resource
from registry.access.gate import Gate
from registry.access.rights import Right
from registry.calls import Call
from registry.errors import BlobUploadUnknown, ChunkOutOfOrder, DigestInvalid, MetadataError, RegistryError, SizeInvalid
from registry.metadata import blobs
from registry.metadata.audit import Event
from registry.metadata.engine import Database
from registry.ranges import parse_chunk
from registry.responses import BYTES_IN
from registry.sessions import Claim, Sessions
from registry.transfer import Appender, Receiver, whole_body
from storage.digest import CANONICAL, Digest, check_algorithm
from storage.errors import InvalidName, StorageError
from storage.names import RepositoryName, parse_repository

#: After so many bytes, or so many seconds, a long request notes how far it came: for clients that can resume.
_CHECKPOINT_SIZE: Final = 64 << 20
_CHECKPOINT_SECONDS: Final = 20.0


class Uploads:
    """Blobs on their way in."""

    def __init__(
        self, database: Database, sessions: Sessions, receiver: Receiver, gate: Gate, auditor: Auditor
    ) -> None:
        """Take bytes by `receiver` into `sessions`; `gate` is asked about the source of a mount."""
        self._database = database
        self._sessions = sessions
        self._receiver = receiver
        self._gate = gate
        self._auditor = auditor

    async def start(self, call: Call) -> web.StreamResponse:
        """POST: a mount [end-11], a whole blob [end-4b], or a new session [end-4a]."""
        mounted = call.parameter("mount")
        if mounted is not None and await self._mount(call, Digest.parse(mounted)):
            return _created(call, Digest.parse(mounted))
        wanted = call.parameter("digest")
        digest = Digest.parse(wanted) if wanted is not None else None
        algorithm = check_algorithm(call.parameter("digest-algorithm") or (digest and digest.algorithm) or CANONICAL)
        session_id = await self._sessions.open(call.repository, algorithm, call.identity.account)
        if digest is None:
            return _accepted(call, session_id, 0)
        try:
            return await self._finish(call, session_id, digest)
        except BaseException:
            # Nobody was told of this session, so nobody can go on with it.
            with suppress(RegistryError, MetadataError, StorageError):
                await self._sessions.cancel(call.repository, session_id)
            raise

    async def status(self, call: Call) -> web.StreamResponse:
        """GET: how far the upload is. [end-13]"""
        await self._check_opener(call)
        offset = await self._sessions.offset(call.repository, call.upload())
        return _accepted(call, call.upload(), offset, status=204)

    async def append(self, call: Call) -> web.StreamResponse:
        """PATCH: more bytes, in a chunk or a stream. [end-5]"""
        await self._check_opener(call)
        async with self._receiver.slot():
            whole = whole_body(call.request)
            if whole and self._keep(call, whole):
                return _accepted(call, call.upload(), len(whole))
            async with self._sessions.claimed(call.repository, call.upload()) as claim:
                await self._receive(call, claim, whole, last=True)
                await self._sessions.let_go(claim)
        return _accepted(call, claim.session.id, claim.upload.offset)

    async def finish(self, call: Call) -> web.StreamResponse:
        """PUT: perhaps the last bytes, and what all of them must be. [end-6]"""
        wanted = call.parameter("digest")
        if wanted is None:
            raise DigestInvalid("the closing PUT needs ?digest=<algorithm>:<hex>")
        await self._check_opener(call)
        return await self._finish(call, call.upload(), Digest.parse(wanted))

    async def cancel(self, call: Call) -> web.StreamResponse:
        """DELETE: forget the upload. [end-14]"""
        await self._check_opener(call)
        await self._sessions.cancel(call.repository, call.upload())
        return web.Response(status=204)

    async def _check_opener(self, call: Call) -> None:
        """Let a token whose time is over go on with what its account began; nothing else."""
        if not call.identity.is_ended:
            return
        with suppress(BlobUploadUnknown):
            opener = await self._sessions.opener(call.repository, call.upload())
            if opener and opener == call.identity.account:
                return
        self._gate.demand_valid(call.request, call.identity)

    async def _finish(self, call: Call, session_id: str, digest: Digest) -> web.StreamResponse:
        event = self._event(call, digest)
        async with self._receiver.slot():
            whole = whole_body(call.request)
            if whole is None or not await self._publish_fresh(call, session_id, whole, digest, event):
                async with self._sessions.claimed(call.repository, session_id, digest) as claim:
                    await self._receive(call, claim, whole, last=False)
                    await self._gate.demand_still(call.request, call.repository, Right.PUSH)
                    await self._sessions.publish(claim, digest, event)
        self._auditor.tell(event)
        return _created(call, digest)

    def _event(self, call: Call, digest: Digest, detail: str = "") -> Event | None:
        return self._auditor.event(
            call.request, call.identity, "blob.push", repository=call.repository, target=str(digest), detail=detail
        )

    def _keep(self, call: Call, content: bytes) -> bool:
        """Let a fresh session have its first bytes; False where they must go the long way."""
        if hdrs.CONTENT_RANGE in call.request.headers:
            return False
        is_kept = self._sessions.keep(call.repository, call.upload(), content)
        if is_kept:
            call.request[BYTES_IN] = len(content)
        return is_kept

    async def _publish_fresh(
        self, call: Call, session_id: str, last: bytes, digest: Digest, event: Event | None
    ) -> bool:
        """Make a blob of a fresh session at once; False where it must go the long way."""
        if hdrs.CONTENT_RANGE in call.request.headers:
            return False
        call.request[BYTES_IN] = len(last)
        return await self._sessions.publish_fresh(call.repository, session_id, last, digest, event)

    async def _mount(self, call: Call, digest: Digest) -> bool:
        """Take the blob over from `from`, or from any repository that the client may pull from."""
        named = call.parameter("from")
        for source in await self._sources(named, digest):
            if call.identity.may(source, Right.PULL):
                event = self._event(call, digest, f"mounted from {source}")
                if not await self._database.write(blobs.mount, source, call.repository, digest, event):
                    return False
                self._auditor.tell(event)
                return True
            if named is not None and call.identity.holds(source, Right.PULL):
                # Its token lacks the source only: clients get a wider one then, and send no bytes.
                wanted = [resource(call.repository, Right.PUSH), resource(source, Right.PULL)]
                raise self._gate.wider(call.request, wanted)
        return False

    async def _sources(self, named: str | None, digest: Digest) -> list[RepositoryName]:
        if named is None:
            return [RepositoryName(name) for name in await self._database.read(blobs.holders, digest)]
        try:
            return [parse_repository(named)]
        except InvalidName:
            # Nothing can be mounted from there; the client uploads, as for any mount that cannot be done.
            return []

    async def _receive(self, call: Call, claim: Claim, whole: bytes | None, *, last: bool) -> None:
        """Append the body, which is `whole` or must come yet; what came of it is kept even if it ends early.

        `last` says that this request has nothing more to do with the upload.
        """
        expected = _check_chunk(call, claim)
        if whole is None:
            received = await self._receive_stream(call, claim)
        else:
            received = call.request[BYTES_IN] = len(whole)
            if whole:
                await self._sessions.hold(claim)
                await claim.upload.write([whole], last=last)
        if expected is not None and received != expected:
            raise SizeInvalid(f"Content-Range announced {expected} bytes, {received} came")

    async def _receive_stream(self, call: Call, claim: Claim) -> int:
        appender = Appender(claim.upload)
        received, noted, noted_at = 0, 0, time.monotonic()
        try:
            # Closed at once: whoever is next reads where this one stopped.
            async with aclosing(self._receiver.pieces(call.request)) as coming:
                async for pieces in coming:
                    await self._sessions.hold(claim)
                    received += sum(map(len, pieces))
                    await appender.write(pieces)
                    due = received - noted >= _CHECKPOINT_SIZE
                    if due or time.monotonic() - noted_at >= _CHECKPOINT_SECONDS:
                        await appender.flush()
                        await self._sessions.note(claim)
                        noted, noted_at = received, time.monotonic()
        finally:
            call.request[BYTES_IN] = received
            await appender.flush()
        return received


def _check_chunk(call: Call, claim: Claim) -> int | None:
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
