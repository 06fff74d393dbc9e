"""What repositories hold: from memory where that is coherent, else one statement.

Only what is there is remembered, found or just added, so a push of something new makes nothing stale. What can make
something stale, a tag that moves and every deletion, goes through here too and begins a new epoch before it is
acknowledged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from registry.cache import ENTRY_SIZE, Cache, WriteCounter
from registry.errors import BlobUnknown, ManifestUnknown
from registry.metadata import blobs, manifests, tags
from registry.metadata.audit import Event, actor_of, audited
from registry.metadata.blobs import StoredBlob
from registry.metadata.engine import Database, Watch
from registry.metadata.manifests import PushedManifest, StoredManifest
from storage.digest import Digest
from storage.names import Reference, RepositoryName, Tag


class Contents:
    """Blobs and manifests of all repositories.

    Attributes:
        cache: what is remembered; others may remember there what depends on nothing else.
    """

    def __init__(self, database: Database, cache_bytes: int, *, alone: bool, rights: Watch | None = None) -> None:
        """Look into `database`.

        Args:
            database: where the facts are.
            cache_bytes: memory for what is remembered.
            alone: whether no other process writes to the database, but for rights.
            rights: tells at once that somebody's rights changed; whole answers depend on them. [answers.py]
        """
        self._database = database
        self._rights = rights
        self._writes = WriteCounter()
        self._watch = None if alone else database.watch()
        is_coherent = alone or self._watch is not None
        self.cache = Cache(cache_bytes if is_coherent else 0, self._watch or self._epoch)

    async def blob(self, name: RepositoryName, digest: Digest) -> StoredBlob:
        """Return a blob of a repository, or raise `BlobUnknown`."""
        key = ("blob", name, digest)
        if isinstance(known := self.cache.get(key), StoredBlob):
            return known
        epoch = self.cache.epoch()
        found = await self._database.look_up(blobs.find, name, digest)
        if found is None:
            raise BlobUnknown(f"{name} does not hold the blob {digest}")
        self.cache.put(key, found, epoch, ENTRY_SIZE)
        return found

    async def add_blob(
        self, name: RepositoryName, digest: Digest, stored: StoredBlob, event: Event | None = None, untidy: str = ""
    ) -> bool:
        """Add a blob, and keep the event of it; False where one with the same bytes was there before.

        `untidy` is its upload, if the store holds more of that. [registry.metadata.blobs.add]
        """
        if untidy:
            adding = self._database.write(audited, event, blobs.add_of, untidy, name, digest, stored)
        else:
            adding = self._database.write(audited, event, blobs.add, name, digest, stored)
        return await self._added(name, digest, stored, adding)

    async def finish_upload(
        self,
        session_id: str,
        writer: str,
        name: RepositoryName,
        digest: Digest,
        stored: StoredBlob,
        event: Event | None = None,
        *,
        is_tidy: bool,
    ) -> bool:
        """End an upload and add its blob, likewise; raises `BlobUploadUnknown`."""
        finishing = self._database.write(
            audited, event, blobs.finish_upload, session_id, writer, name, digest, stored, is_tidy=is_tidy
        )
        return await self._added(name, digest, stored, finishing)

    async def manifest(self, name: RepositoryName, reference: Reference) -> StoredManifest:
        """Return a manifest of a repository, or raise `ManifestUnknown`."""
        key = (name, reference)
        if isinstance(known := self.cache.get(key), StoredManifest):
            return known
        epoch = self.cache.epoch()
        found = await self._database.look_up(manifests.find, name, reference)
        if found is None:
            raise ManifestUnknown(f"{name} has no manifest {reference}")
        self.cache.put(key, found, epoch, ENTRY_SIZE + len(found.content))
        return found

    async def put_manifest(
        self, name: RepositoryName, pushed: PushedManifest, moved: Sequence[Tag], event: Event | None, *, sparse: bool
    ) -> None:
        """Keep a manifest and move tags to it; raises `ManifestBlobUnknown`."""
        async with self._change():
            await self._database.write(
                audited, event, manifests.put, name, pushed, moved, actor_of(event), sparse=sparse
            )

    async def delete_manifest(self, name: RepositoryName, digest: Digest, event: Event | None) -> None:
        """Delete a manifest and the tags that point to it; raises `ManifestUnknown`."""
        async with self._change():
            await self._database.write(audited, event, manifests.remove, name, digest, actor_of(event))

    async def delete_tag(self, name: RepositoryName, tag: Tag, event: Event | None) -> None:
        """Delete a tag; raises `ManifestUnknown`."""
        async with self._change():
            await self._database.write(audited, event, tags.delete_tag, name, tag, actor_of(event))

    async def delete_blob(self, name: RepositoryName, digest: Digest, event: Event | None) -> None:
        """Delete a blob from a repository; raises `BlobUnknown`."""
        async with self._change():
            await self._database.write(audited, event, blobs.remove, name, digest)

    def _epoch(self) -> int:
        """Both only grow, so their sum is another one whenever one of them is."""
        return self._writes() + (self._rights() if self._rights else 0)

    def close(self) -> None:
        """Let go of the watch on the database."""
        if self._watch:
            self._watch.close()

    async def _added(
        self, name: RepositoryName, digest: Digest, stored: StoredBlob, adding: Coroutine[Any, Any, bool]
    ) -> bool:
        """Let a blob be added, and remember it if that is what happened. Nothing begins before the epoch was read."""
        epoch = self.cache.epoch()
        is_ours = await adding
        if is_ours:
            self.cache.put(("blob", name, digest), stored, epoch, ENTRY_SIZE)
        return is_ours

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        # Also when the write was cancelled or failed: it may have been committed.
        try:
            yield
        finally:
            self._writes.value += 1
