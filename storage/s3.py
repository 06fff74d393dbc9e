"""Blobs as objects of a bucket that speaks S3.

    PREFIX blobs/<2 characters>/<name>.<token>    bytes of the upload <name>: a blob, if a row says so
    PREFIX registry, PREFIX probe                 whose store this is; proof that it can be written to

An object store has no rename, so bytes go straight to where they stay. What fits one part is one object, put when its
request ends or its digest is known: one request. `parts.py` has the life of an upload, `bucket.py` the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from storage.base import Checkpoint, StoredObject
from storage.bucket import Bucket
from storage.digest import Digest, Hasher, hasher
from storage.errors import ContentMissing, DigestMismatch, StorageError
from storage.parts import Memory, S3Upload, Shared, grown, prefix
from storage.threads import Threads

_HASHERS: Final = 8
#: Uploads that may read loose objects back at once: it takes memory that is not counted.
_FETCHING: Final = 2

#: A key of ours, or of a blob that came from a filesystem.
_KEY: Final = re.compile(
    r"blobs/[\w-]+/(?P<upload>[\w-]+)\.[\w-]+|blobs/\w+/[0-9a-f]{2}/[0-9a-f]+\.(?P<brought>[\w-]+)"
)


class S3Store:
    """A store in a bucket. [storage/base.py has the contract, config.example.toml the settings]"""

    def __init__(
        self,
        *,
        bucket: str,
        prefix: str = "",
        region: str = "us-east-1",
        endpoint: str = "",
        public_endpoint: str = "",
        redirect: bool = False,
        addressing: str = "auto",
        access_key: str = "",
        secret_key: str = "",
        session_token: str = "",
        ca_file: str = "",
        part_bytes: int = 16 << 20,
        buffer_bytes: int = 96 << 20,
        timeout_seconds: float = 30,
    ) -> None:
        """Keep everything in `bucket`, which must exist."""
        self.bucket = Bucket(
            bucket,
            prefix,
            region=region,
            endpoint=endpoint,
            public_endpoint=public_endpoint,
            addressing=addressing,
            access_key=access_key,
            secret_key=secret_key,
            session_token=session_token,
            ca_file=ca_file,
            timeout_seconds=timeout_seconds,
        )
        self.requests = self.bucket.requests
        self._redirect = redirect
        self._threads = Threads(_HASHERS, "hash")
        self._shared = Shared(
            self.bucket, part_bytes, Memory(buffer_bytes), self._threads, asyncio.Semaphore(_FETCHING)
        )

    def begin(self, name: str, algorithm: str) -> Checkpoint:
        return Checkpoint(f"uploads/{name}", algorithm)

    def resume(self, checkpoint: Checkpoint) -> S3Upload:
        return S3Upload(self._shared, checkpoint)

    def open(self, key: str) -> _S3Content:
        return _S3Content(self.bucket, key, redirect=self._redirect)

    async def size(self, key: str) -> int | None:
        with contextlib.suppress(ContentMissing):
            return await self.bucket.size(key)
        return None

    async def bring(self, key: str, digest: Digest, pieces: AsyncIterator[bytes]) -> None:
        brought = _Brought(self._shared, key, hasher(digest.algorithm))
        try:
            async for piece in pieces:
                await brought.add(piece)
            await brought.end(digest)
        except BaseException:
            await brought.drop()
            raise

    async def delete(self, key: str) -> None:
        if not key.startswith("uploads/"):
            await self.bucket.delete(key)
            return
        # The parts alone: what became of the others is an object, under its own key.
        async for found in self.bucket.unfinished("blobs/"):
            if f"uploads/{_upload_of(found.key)}" == key:
                await self.bucket.abort(found.key, found.upload_id)

    async def forget(self, name: str, kept: str | None = None) -> None:
        async for found in self.bucket.unfinished(prefix(name)):
            await self.bucket.abort(found.key, found.upload_id)
        async for found in self.bucket.list(prefix(name)):
            if found.key != kept:
                await self.bucket.delete(found.key)

    async def objects(self) -> AsyncIterator[StoredObject]:
        async for found in self.bucket.unfinished("blobs/"):
            if upload := _upload_of(found.key):
                yield StoredObject(f"uploads/{upload}", upload, found.size, found.modified)
        async for found in self.bucket.list("blobs/"):
            if upload := _upload_of(found.key):
                yield StoredObject(found.key, upload, found.size, found.modified)

    async def probe(self) -> None:
        await self.bucket.put("probe", [b"hythe"])

    async def owner(self, name: str) -> str:
        try:
            return await self._read_owner()
        except ContentMissing:
            await self.bucket.put("registry", [name.encode()])
            return await self._read_owner()

    async def close(self) -> None:
        await self.bucket.close()
        await self._threads.close()

    async def _read_owner(self) -> str:
        size = await self.bucket.size("registry")
        return b"".join([piece async for piece in self.bucket.read("registry", 0, size)]).decode("ascii", "replace")


class _Brought:
    """Bytes that get a key which they have elsewhere: one request for what fits a part, else one part after another."""

    def __init__(self, shared: Shared, key: str, hashing: Hasher) -> None:
        self._shared = shared
        self._bucket = shared.bucket
        self._key = key
        self._hasher = hashing
        self._held: list[bytes] = []
        self._size = 0
        self._upload_id = ""
        self._tags: list[str] = []

    async def add(self, piece: bytes) -> None:
        await self._shared.threads.run(self._hasher.update, piece)
        self._held.append(piece)
        self._size += len(piece)
        if self._size >= grown(self._shared.part_size, len(self._tags)):
            await self._send()

    async def end(self, digest: Digest) -> None:
        if (actual := self._hasher.digest()) != digest:
            raise DigestMismatch(digest, actual)
        if not self._upload_id:
            await self._bucket.put(self._key, self._held)
            return
        if self._held:
            await self._send()
        await self._bucket.complete(self._key, self._upload_id, self._tags)

    async def drop(self) -> None:
        if self._upload_id:
            # It may have been completed; then the next run finds it.
            with contextlib.suppress(StorageError):
                await self._bucket.abort(self._key, self._upload_id)

    async def _send(self) -> None:
        if not self._upload_id:
            # What one before us began, and did not live to end.
            async for found in self._bucket.unfinished(self._key):
                await self._bucket.abort(found.key, found.upload_id)
            self._upload_id = await self._bucket.create(self._key)
        number = len(self._tags) + 1
        self._tags.append(await self._bucket.put_part(self._key, self._upload_id, number, self._held))
        self._held, self._size = [], 0


class _S3Content:
    def __init__(self, bucket: Bucket, key: str, *, redirect: bool) -> None:
        self.path: str | None = None
        self._bucket = bucket
        self._key = key
        self._redirect = redirect

    async def address(self) -> str | None:
        return await self._bucket.address(self._key) if self._redirect else None

    def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        return self._bucket.read(self._key, start, stop)


def _upload_of(key: str) -> str:
    """Return the name of the upload that brought what lies under `key`, empty for a key that is not ours."""
    found = _KEY.fullmatch(key)
    return (found["upload"] or found["brought"]) if found else ""
