"""A store in memory, for tests."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from storage.base import Checkpoint, StoredObject
from storage.digest import Digest
from storage.errors import ContentMissing, DigestMismatch, OutOfSpace, UploadBusy, UploadLost


class MemoryStore:
    """A store in a dictionary. [storage/base.py has the contract]"""

    def __init__(self, capacity: int = 1 << 30) -> None:
        """Hold at most `capacity` bytes; set it lower to see a full disk."""
        self.capacity = capacity
        self.requests: Counter[str] = Counter()
        self._bytes: dict[str, bytes] = {}
        self._modified: dict[str, float] = {}
        self._held: set[str] = set()
        self._owner = ""

    def begin(self, name: str, algorithm: str) -> Checkpoint:
        return Checkpoint(f"uploads/{name}", algorithm)

    def resume(self, checkpoint: Checkpoint) -> _MemoryUpload:
        return _MemoryUpload(self, checkpoint)

    def open(self, key: str) -> _MemoryContent:
        return _MemoryContent(self._bytes, key)

    async def size(self, key: str) -> int | None:
        content = self._bytes.get(key)
        return None if content is None else len(content)

    async def bring(self, key: str, digest: Digest, pieces: AsyncIterator[bytes]) -> None:
        content = b"".join([piece async for piece in pieces])
        if (actual := Digest.of(content, digest.algorithm)) != digest:
            raise DigestMismatch(digest, actual)
        self._put(key, content)

    async def delete(self, key: str) -> None:
        self._bytes.pop(key, None)

    async def forget(self, name: str, kept: str | None = None) -> None:
        for key in [key for key in self._bytes if _upload_of(key) == name and key != kept]:
            del self._bytes[key]

    async def objects(self) -> AsyncIterator[StoredObject]:
        for key, content in list(self._bytes.items()):
            upload = key.removeprefix("uploads/") if key.startswith("uploads/") else ""
            yield StoredObject(key, upload, len(content), self._modified[key])

    async def probe(self) -> None:
        if sum(map(len, self._bytes.values())) >= self.capacity:
            raise OutOfSpace("no space left for blobs")

    async def owner(self, name: str) -> str:
        self._owner = self._owner or name
        return self._owner

    async def close(self) -> None:
        self._bytes.clear()

    def _put(self, key: str, content: bytes) -> None:
        others = sum(len(value) for name, value in self._bytes.items() if name != key)
        if others + len(content) > self.capacity:
            raise OutOfSpace("no space left for blobs")
        self._bytes[key] = content
        self._modified[key] = time.time()


class _MemoryUpload:
    def __init__(self, store: MemoryStore, checkpoint: Checkpoint) -> None:
        self._store = store
        self._start = checkpoint
        self._is_open = False
        self._published = ""

    @property
    def offset(self) -> int:
        return len(self._content) if self._is_open else self._start.offset

    @property
    def is_tidy(self) -> bool:
        return True

    async def undo(self) -> None:
        await self._store.delete(self._published)

    async def write(self, pieces: Sequence[bytes | memoryview], *, last: bool = False) -> None:
        self._open()
        self._store._put(self._start.key, self._content + b"".join(pieces))
        if last:
            await self.suspend()

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self._start.key, self._start.algorithm, self.offset)

    async def verify(self, digest: Digest) -> None:
        self._open()
        actual = Digest.of(self._content, digest.algorithm)
        if actual != digest:
            raise DigestMismatch(digest, actual)

    async def commit(self, digest: Digest, last: Sequence[bytes | memoryview] = ()) -> str:
        await self.write(last)
        await self.verify(digest)
        await self.abandon()
        content = self._store._bytes.pop(self._start.key)
        key = f"blobs/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}.{self._start.key.removeprefix('uploads/')}"
        self._store._put(key, content)
        self._published = key
        return key

    async def suspend(self) -> None:
        if self._is_open:
            self._start = self.checkpoint()
            self._is_open = False
            self._store._held.discard(self._start.key)

    async def abandon(self) -> None:
        await self.suspend()

    @property
    def _content(self) -> bytes:
        return self._store._bytes.get(self._start.key, b"")

    def _open(self) -> None:
        if self._is_open:
            return
        key, offset = self._start.key, self._start.offset
        if key in self._store._held:
            raise UploadBusy("another request is writing to this upload")
        present = self._store._bytes.get(key, None if offset else b"")
        if present is None or len(present) < offset:
            raise UploadLost("the bytes of this upload are gone")
        self._store._put(key, present[:offset])
        self._store._held.add(key)
        self._is_open = True


class _MemoryContent:
    def __init__(self, stored: dict[str, bytes], key: str) -> None:
        self.path: str | None = None
        self._stored = stored
        self._key = key

    async def address(self) -> None:
        """There is none."""

    async def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        content = self._stored.get(self._key)
        if content is None or len(content) < stop:
            raise ContentMissing(f"nothing of {stop} bytes under {self._key}")
        yield content[start:stop]


def _upload_of(key: str) -> str:
    return key.removeprefix("uploads/").rpartition(".")[2]
