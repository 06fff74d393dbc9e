"""An upload to an object store: parts and loose objects there, pieces in memory, parts on their way between them.

What is larger than one part is an upload in parts, growing ones, of which a few are on their way at once. What a
request brought that makes no part yet, a part being at least 5 MiB but the last, is put as a *loose* object; a later
part takes it in. Every object has a token of its own, and completing checks the tags of the parts: so a writer that was
thought to be dead can write beside what another has published, never over it or into it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Final

import msgspec

from storage.base import Checkpoint
from storage.bucket import Bucket
from storage.digest import Digest, Hasher, hasher, restore
from storage.errors import ContentMissing, DigestMismatch, StorageError, StoreUnavailable, UploadBusy, UploadLost
from storage.threads import Threads

#: Bytes are kept in pieces of this size, between two of which a part ends: where, does not depend on how they come.
_PIECE_SIZE: Final = 1 << 20
#: [S3: Multipart upload limits] what a part that is not the last one must have.
_LEAST_PART: Final = 5 << 20
#: After so many parts they double in size, and again: 10,000 of them, at first of 16 MiB, hold more than 500 GiB.
_GROWTH: Final = 1000
_DOUBLINGS: Final = 2
#: Parts of one upload that may be on their way at once.
_FLYING: Final = 3


class State(msgspec.Struct, array_like=True):
    """What is in the store of an upload, for its checkpoint.

    Attributes:
        hashed: the digest so far, as a hasher saves it; empty where it could not be saved.
        target: the key of the upload in parts, empty before the first part.
        upload_id: its id.
        parts: tag and size of each of its parts.
        part_size: by which they are cut, whoever goes on with them: where a lost writer sent more parts than were
            noted, they are sent again with the same ends, and none is left over, which not every server forgives.
        loose: key and size of the objects that hold what came after them.
        has_strays: the store may hold more of this upload that will never be needed.
    """

    hashed: bytes = b""
    target: str = ""
    upload_id: str = ""
    parts: list[tuple[str, int]] = msgspec.field(default_factory=list)
    part_size: int = 0
    loose: list[tuple[str, int]] = msgspec.field(default_factory=list)
    has_strays: bool = False

    @property
    def size(self) -> int:
        return sum(size for _, size in self.parts) + self.loose_size

    @property
    def loose_size(self) -> int:
        return sum(size for _, size in self.loose)


@dataclass(slots=True)
class _Piece:
    """Bytes up to the next multiple of `_PIECE_SIZE`, if they have come, and the digest of all up to their end."""

    content: bytearray
    hashed: bytes = b""


@dataclass(slots=True)
class _Part:
    """Pieces on their way to the store. `taken` are the loose objects that it takes in, at its front."""

    pieces: list[_Piece]
    sending: asyncio.Task[str]
    taken: list[tuple[str, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return _size(self.pieces)


class Memory:
    """Bytes of all uploads that are not in the store yet, bounded together.

    Where there is no room, the upload that holds most puts it into the store, be it a part or not. So slow clients
    cannot keep fast ones waiting, and nobody waits for himself.
    """

    def __init__(self, limit: int) -> None:
        """Allow so many bytes."""
        self._limit = limit
        self._used = 0
        self._uploads: set[S3Upload] = set()
        self._changed = asyncio.Event()

    def join(self, upload: S3Upload) -> None:
        """Let `upload` hold bytes, and be asked to put them away."""
        self._uploads.add(upload)

    def leave(self, upload: S3Upload) -> None:
        """Take it that `upload` holds nothing any more."""
        self._uploads.discard(upload)
        self.change()

    async def take(self, upload: S3Upload, size: int) -> None:
        """Wait until there is room for `size` more bytes of `upload`, whose lock is held.

        Raises:
            StorageError: what this upload holds cannot be stored. That of another one is told to its own writer.
        """
        while self._used and self._used + size > self._limit:
            idle = [each for each in self._uploads if each is upload or each.is_idle]
            landed = next((each for each in idle if each.has_landed), None)
            largest = max(self._uploads, key=lambda each: each.buffered)
            if landed is not None:
                await (landed.settle() if landed is upload else landed.oblige(landed.settle))
            elif largest in idle and largest.buffered:
                await (largest.put_away() if largest is upload else largest.oblige(largest.put_away))
            else:
                # Bytes are on their way already, or their writer, who waits here too, will see to them.
                self._changed.clear()
                await self._changed.wait()
        self._used += size
        self.change()

    def give(self, size: int) -> None:
        """Let others have `size` bytes."""
        self._used -= size
        self.change()

    def change(self) -> None:
        """Let those who wait look again: something landed, or somebody else holds most."""
        self._changed.set()


@dataclass(frozen=True, slots=True)
class Shared:
    """What the uploads of a process have in common.

    Attributes:
        bucket: where they go.
        part_size: of the first parts, in bytes.
        memory: for what is not there yet.
        threads: which hash.
        fetching: held by those that read loose objects back, which takes memory that is not counted.
        held: the names of those that somebody writes to.
    """

    bucket: Bucket
    part_size: int
    memory: Memory
    threads: Threads
    fetching: asyncio.Semaphore
    held: set[str] = field(default_factory=set)


class S3Upload:
    """An upload. [storage/base.py has the contract]"""

    def __init__(self, shared: Shared, checkpoint: Checkpoint) -> None:
        self._shared = shared
        self._bucket = shared.bucket
        self._start = checkpoint
        self._name = checkpoint.key.removeprefix("uploads/")
        self._offset = checkpoint.offset
        #: What is in the store, up to the first byte that is not.
        self._stored = State()
        self._hasher: Hasher | None = None
        self._verified: Digest | None = None
        self._pieces: list[_Piece] = []
        self._flying: list[_Part] = []
        self._finished = ""
        self._is_doubtful = False
        self._is_begun = self._is_over = False
        self._failure: StorageError | None = None
        #: Held by whoever changes any of this: the request, or one that needs memory.
        self._lock = asyncio.Lock()
        self._users = 0

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def is_tidy(self) -> bool:
        return not self._stored.has_strays

    @property
    def buffered(self) -> int:
        """Bytes in memory that are not on their way."""
        return _size(self._pieces)

    async def write(self, pieces: Sequence[bytes | memoryview], *, last: bool = False) -> None:
        async with self._held():
            await self._take_in(pieces)
            while self._is_part_due():
                await self._launch(self._cut())
            if last:
                await self.put_away(ends=True)
                await self._let_go()

    def checkpoint(self) -> Checkpoint:
        if not self._is_begun:
            return self._start
        state = msgspec.msgpack.encode(self._stored)
        return Checkpoint(self._start.key, self._start.algorithm, self._stored.size, state)

    async def verify(self, digest: Digest) -> None:
        async with self._held():
            await self._verify(digest)

    async def commit(self, digest: Digest, last: Sequence[bytes | memoryview] = ()) -> str:
        async with self._held():
            if last:
                await self._take_in(last)
            await self._verify(digest)
            key = await self._finish()
            if self._is_doubtful:
                await self._check(key, digest)
            await self._let_go()
        return key

    async def undo(self) -> None:
        """Nothing is taken back, but the next to finish this upload knows that there is more of it.

        The checkpoint may name the same object, and may have been handed to somebody else.
        """
        self._stored.has_strays = True

    async def suspend(self) -> None:
        async with self._alone():
            if self._failure:
                raise self._failure
            if self._is_begun and not self._is_over:
                try:
                    await self.put_away(ends=True)
                finally:
                    await self._let_go()

    async def abandon(self) -> None:
        async with self._alone():
            if self._is_begun and not self._is_over:
                await self._let_go()

    async def put_away(self, *, ends: bool = False) -> None:
        """Put all that is in memory into the store; `ends` says that perhaps nothing more will come.

        Whoever calls this holds the lock.
        """
        if self.buffered:
            loose_size = self._stored.loose_size
            is_part = self._stored.parts or self._flying or loose_size or not ends
            least = grown(_LEAST_PART, self._number)
            if is_part and self.buffered + loose_size >= least:
                await self._launch(len(self._pieces))
            else:
                await self._land(to=0)
                await self._put_loose()
        await self._land(to=0)

    @property
    def has_landed(self) -> bool:
        """Whether a part has arrived whose bytes are still held."""
        return bool(self._flying) and self._flying[0].sending.done()

    async def settle(self) -> None:
        """Let go of what has arrived. Whoever calls this holds the lock."""
        await self._land(to=_FLYING)

    async def oblige(self, step: Callable[[], Awaitable[None]]) -> None:
        """Do a step for another upload, which needs the room. If it fails, it is over with this one, not with that."""
        async with self._alone():
            if self._is_over:
                return
            try:
                await step()
            except StorageError as error:
                self._failure = error
                await self._let_go()

    @property
    def is_idle(self) -> bool:
        """Whether nobody does anything with it, or waits to."""
        return not self._users

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        self._users += 1
        try:
            async with self._lock:
                yield
        finally:
            self._users -= 1

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        async with self._alone():
            if self._is_over:
                raise self._failure or UploadLost("this upload was let go of")
            if not self._is_begun:
                self._begin()
            yield

    def _begin(self) -> None:
        if self._name in self._shared.held:
            raise UploadBusy("another request is writing to this upload")
        if self._offset:
            self._stored = self._read_state()
            self._hasher = restore(self._start.algorithm, self._stored.hashed)
        else:
            self._hasher = hasher(self._start.algorithm)
            # Nothing arrived, but something was tried.
            with contextlib.suppress(UploadLost):
                self._stored = self._read_state()
        self._shared.held.add(self._name)
        self._shared.memory.join(self)
        self._is_begun = True

    def _read_state(self) -> State:
        try:
            state = msgspec.msgpack.decode(self._start.state, type=State)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise UploadLost("this upload was begun in another store") from None
        if state.size != self._offset:
            raise UploadLost(f"{self._offset} bytes were received, {state.size} are left")
        return state

    async def _let_go(self) -> None:
        """Forget all that is in memory. Whoever calls this holds the lock."""
        self._is_over = True
        try:
            await self._take_back()
        finally:
            self._shared.memory.give(self.buffered)
            self._pieces = []
            self._shared.memory.leave(self)
            self._shared.held.discard(self._name)

    # -- from the client to memory

    async def _take_in(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Hash and keep: all of the pieces, or none."""
        size = sum(map(len, pieces))
        if not size:
            return
        if self._finished:
            raise StorageError("this upload was finished to be read, and cannot go on")
        await self._shared.memory.take(self, size)
        before = self.buffered
        try:
            await self._shared.threads.run(_keep, pieces, self._pieces, self._offset, self._hasher)
        finally:
            # A thread is not cancelled with its request: what it hashed is there.
            kept = self.buffered - before
            self._offset += kept
            self._verified = None
            self._shared.memory.give(size - kept)

    def _is_part_due(self) -> bool:
        return self.buffered + self._stored.loose_size >= self._part_size + _LEAST_PART

    @property
    def _number(self) -> int:
        """Of the next part, from 0 on."""
        return len(self._stored.parts) + len(self._flying)

    @property
    def _part_size(self) -> int:
        return grown(self._stored.part_size or self._shared.part_size, self._number)

    def _cut(self) -> int:
        """Return how many pieces make the next part; what stays could be the last one, and any other one too."""
        wanted = self._part_size - self._stored.loose_size
        size = count = 0
        while size < wanted or not count:
            size += len(self._pieces[count].content)
            count += 1
        return count

    # -- from memory to the store

    async def _launch(self, count: int) -> None:
        """Send the first pieces, and what is loose before them, as the next part; waits for another if there are many.

        The pieces are in the buffer or on their way, whatever fails and whenever the request is cancelled.
        """
        # Where something is loose nothing is on its way, and what takes it in is alone there.
        async with self._shared.fetching if self._stored.loose else nullcontext():
            await self._begin_parts()
            before = await self._fetch_loose()
            taken = self._stored.loose
            number = self._number + 1
            pieces, self._pieces = self._pieces[:count], self._pieces[count:]
            contents: list[bytes | bytearray] = [*before, *(piece.content for piece in pieces)]
            sending = asyncio.create_task(
                self._bucket.put_part(self._stored.target, self._stored.upload_id, number, contents)
            )
            sending.add_done_callback(self._see)
            self._flying.append(_Part(pieces, sending, taken))
            self._shared.memory.change()
            await self._land(to=0 if taken else _FLYING - 1)

    def _see(self, sending: asyncio.Task[str]) -> None:
        """Take note of how a part ended, also if nobody will ask."""
        if not sending.cancelled():
            sending.exception()
        self._shared.memory.change()

    async def _begin_parts(self) -> None:
        if not self._stored.upload_id:
            self._stored.target = _new_key(self._name)
            self._stored.part_size = self._shared.part_size
            with self._perhaps_stray():
                self._stored.upload_id = await self._bucket.create(self._stored.target)

    async def _land(self, *, to: int) -> None:
        """Wait until no more than `to` parts are on their way."""
        while self._flying and (len(self._flying) > to or self._flying[0].sending.done()):
            part = self._flying[0]
            try:
                tag = await asyncio.shield(part.sending)
            except BaseException:
                await self._take_back()
                raise
            self._flying.pop(0)
            self._stored.parts.append((tag, part.size + sum(size for _, size in part.taken)))
            if part.taken:
                self._stored.loose = []
                self._stored.has_strays = True
            if part.pieces:
                self._stored.hashed = part.pieces[-1].hashed
            self._shared.memory.give(part.size)

    async def _take_back(self) -> None:
        """Make pieces of all parts that are on their way; they will be sent again, with the same numbers."""
        flying, self._flying = self._flying, []
        self._pieces = [piece for part in flying for piece in part.pieces] + self._pieces
        for part in flying:
            part.sending.cancel()
        await asyncio.gather(*(part.sending for part in flying), return_exceptions=True)

    async def _put_loose(self) -> None:
        """Put what is in memory as an object of its own. Nothing is on its way."""
        key = await self._put([piece.content for piece in self._pieces])
        self._stored.loose.append((key, self.buffered))
        self._stored.hashed = self._pieces[-1].hashed
        self._shared.memory.give(self.buffered)
        self._pieces = []

    async def _put(self, contents: Sequence[bytes | bytearray]) -> str:
        key = _new_key(self._name)
        with self._perhaps_stray():
            await self._bucket.put(key, contents)
        return key

    @contextlib.contextmanager
    def _perhaps_stray(self) -> Iterator[None]:
        """Remember what may have happened all the same, if it fails."""
        try:
            yield
        except BaseException:
            self._stored.has_strays = True
            raise

    async def _fetch_loose(self) -> list[bytes]:
        """Return what lies in loose objects: less than two parts, as they are put."""
        fetched = []
        for key, size in self._stored.loose:
            try:
                fetched += [piece async for piece in self._bucket.read(key, 0, size)]
            except ContentMissing:
                raise UploadLost("bytes of this upload are gone") from None
        return fetched

    # -- to the end

    async def _verify(self, digest: Digest) -> None:
        if self._verified == digest:
            return
        if self._hasher is not None and digest.algorithm == self._start.algorithm:
            actual = self._hasher.digest()
        else:
            actual = await self._hash_again(digest.algorithm)
        if actual != digest:
            raise DigestMismatch(digest, actual)
        self._verified = digest

    async def _hash_again(self, algorithm: str) -> Digest:
        """Hash what is in the store, and then what is in memory; parts can be read only when they are complete."""
        again = hasher(algorithm)
        is_in_parts = self._stored.parts or self._flying
        for key, size in [(await self._finish(), self._offset)] if is_in_parts else self._stored.loose:
            await self._hash_stored(again, key, size)
        for piece in self._pieces:
            await self._shared.threads.run(again.update, memoryview(piece.content))
        return again.digest()

    async def _hash_stored(self, hashing: Hasher, key: str, size: int) -> None:
        try:
            async for piece in self._bucket.read(key, 0, size):
                await self._shared.threads.run(hashing.update, piece)
        except ContentMissing:
            raise UploadLost("bytes of this upload are gone") from None

    async def _finish(self) -> str:
        """Make one object of all there is and return its key."""
        if not self._finished:
            size = self._stored.size + sum(part.size for part in self._flying) + self.buffered
            if size != self._offset:
                raise UploadLost(f"{self._offset} bytes were received, {size} are left")
            if self._stored.parts or self._flying:
                self._finished = await self._finish_parts()
            else:
                self._finished = await self._finish_object()
        return self._finished

    async def _finish_object(self) -> str:
        loose = self._stored.loose
        if self._stored.upload_id:
            self._stored.has_strays = True
        if len(loose) == 1 and not self._pieces:
            return loose[0][0]
        async with self._shared.fetching if loose else nullcontext():
            before = await self._fetch_loose()
            if loose:
                self._stored.has_strays = True
            return await self._put([*before, *(piece.content for piece in self._pieces)])

    async def _finish_parts(self) -> str:
        if self._pieces or self._stored.loose:
            await self._land(to=0)
            await self._launch(len(self._pieces))
        await self._land(to=0)
        stored = self._stored
        try:
            await self._bucket.complete(stored.target, stored.upload_id, [tag for tag, _ in stored.parts])
        except (UploadLost, StoreUnavailable):
            # It may have been completed all the same, or before, by a request whose answer or whose sender got lost.
            with contextlib.suppress(ContentMissing):
                self._is_doubtful = await self._bucket.size(stored.target) == stored.size
            if not self._is_doubtful:
                raise
        return stored.target

    async def _check(self, key: str, digest: Digest) -> None:
        """Read what somebody made of the parts: of these, or of others that a lost writer sent."""
        again = hasher(digest.algorithm)
        await self._hash_stored(again, key, self._offset)
        if again.digest() != digest:
            raise UploadLost("another request has made something else of this upload")


def _keep(come: Sequence[bytes | memoryview], kept: list[_Piece], offset: int, hashing: Hasher | None) -> None:
    """Hash what has come, and copy it to what is kept; buffers that bytes arrive in are used again."""
    for content in come:
        rest: bytes | memoryview = content
        while rest:
            if not kept or offset % _PIECE_SIZE == 0:
                kept.append(_Piece(bytearray()))
            last = kept[-1]
            now, rest = rest[: _PIECE_SIZE - offset % _PIECE_SIZE], rest[_PIECE_SIZE - offset % _PIECE_SIZE :]
            last.content += now
            offset += len(now)
            if hashing:
                hashing.update(now)
                last.hashed = hashing.save()


def _size(pieces: Sequence[_Piece]) -> int:
    return sum(len(piece.content) for piece in pieces)


def grown(size: int, number: int) -> int:
    """Return how large part `number`, from 0 on, is, where the first ones have `size` bytes."""
    return size << min(_DOUBLINGS, number // _GROWTH)


def prefix(name: str) -> str:
    """Return how the keys of all objects of an upload begin."""
    return f"blobs/{name[:2]}/{name}."


def _new_key(name: str) -> str:
    return prefix(name) + secrets.token_hex(4)
