"""Blobs as files.

    ROOT/uploads/<name>                            bytes on their way in
    ROOT/blobs/<algorithm>/<2 hex>/<hex>.<name>    a blob: its digest for people and for recovery, its
                                                   upload's name so that no key is ever used twice
    ROOT/registry                                  whose store this is
    ROOT/blobs/<2 hex>/<name>.<token>              a blob that came from an object store, under its key there

Publishing a file is: data synced, renamed, directory synced. Hashing and writing a large piece is one job in one
thread; there is nothing to gain from a hop for each.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final

import aiofiles
import aiofiles.os

from storage.base import Checkpoint, StoredObject
from storage.digest import Digest, Hasher, hasher, restore
from storage.errors import ContentMissing, DigestMismatch, UploadBusy, UploadLost
from storage.files import BOOT_ID_SIZE, boot_id, disk_errors, start_writeback, sync_directory, write_all
from storage.threads import Threads

_READ_SIZE: Final = 1 << 20
#: Content up to this size is a small job: what it takes is system calls, not hashing and copying.
_SMALL_SIZE: Final = 64 << 10
#: How far the data may run ahead of the disk before the kernel is asked to start writing it.
_WRITEBACK_SIZE: Final = 16 << 20

_KEY: Final = re.compile(r"uploads/[\w-]+|blobs/(\w+/)?[0-9a-f]{2}/[\w-]+\.[\w-]+")


class FilesystemStore:
    """A store in one directory. [storage/base.py has the contract]"""

    def __init__(
        self, root: Path, *, sync: bool = True, threads: int = 16, begin: Callable[[], None] | None = None
    ) -> None:
        """Keep everything below `root`, created where absent.

        Args:
            root: a directory on a filesystem with rename and flock.
            sync: False answers before the bytes are on the disk: faster, and a power cut may lose them.
            threads: how many large jobs may be at the disk at once, and how many small ones.
            begin: called in each thread for small jobs as it starts.
        """
        self.root = root.absolute()
        self._sync = sync
        self._threads = Threads(threads, "disk")
        self._small = Threads(threads, "disk-small", begin)
        self._directories: set[str] = set()
        self.requests: Counter[str] = Counter()
        (self.root / "uploads").mkdir(mode=0o750, parents=True, exist_ok=True)
        (self.root / "blobs").mkdir(mode=0o750, exist_ok=True)

    def begin(self, name: str, algorithm: str) -> Checkpoint:
        return Checkpoint(f"uploads/{name}", algorithm)

    def resume(self, checkpoint: Checkpoint) -> _FileUpload:
        return _FileUpload(self, checkpoint)

    def open(self, key: str) -> _FileContent:
        return _FileContent(self._path(key))

    async def size(self, key: str) -> int | None:
        with disk_errors(), contextlib.suppress(FileNotFoundError):
            return (await aiofiles.os.stat(self._path(key))).st_size
        return None

    async def bring(self, key: str, digest: Digest, pieces: AsyncIterator[bytes]) -> None:
        target, temporary = self._path(key), f"{self.root}/uploads/brought-{secrets.token_hex(8)}"
        try:
            with disk_errors():
                await self._write_brought(temporary, digest, pieces)
                await self._threads.run(self._put_in_place, temporary, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                await aiofiles.os.unlink(temporary)

    async def delete(self, key: str) -> None:
        with disk_errors(), contextlib.suppress(FileNotFoundError):
            await aiofiles.os.unlink(self._path(key))

    async def forget(self, name: str, kept: str | None = None) -> None:  # noqa: ARG002
        # A published file has another name, and what was published in vain is found after a crash.
        await self.delete(f"uploads/{name}")

    async def objects(self) -> AsyncIterator[StoredObject]:
        for directory in await self._threads.run(self._list_directories):
            for found in await self._threads.run(self._list_files, directory):
                yield found

    async def probe(self) -> None:
        with disk_errors():
            await self._threads.run(self._write_probe)

    async def owner(self, name: str) -> str:
        with disk_errors():
            return await self._threads.run(self._owner, name)

    async def close(self) -> None:
        await self._small.close()
        await self._threads.close()

    def _path(self, key: str) -> str:
        # Plain text: pathlib takes longer to join two parts than the kernel to open the file.
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a key of this store: {key!r}")
        return f"{self.root}/{key}"

    def _list_directories(self) -> list[Path]:
        blobs = self.root / "blobs"
        return [self.root / "uploads", *(each for each in sorted(blobs.glob("**")) if each != blobs)]

    def _list_files(self, directory: Path) -> list[StoredObject]:
        found = []
        with os.scandir(directory) as entries:
            for entry in entries:
                # A file may be published or dropped while we look.
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    # The later of the two: a rename moves ctime only, and it is renamed files we must not take.
                    modified = max(status.st_mtime, status.st_ctime)
                    key = str(Path(entry.path).relative_to(self.root))
                    if _KEY.fullmatch(key):
                        upload = entry.name if key.startswith("uploads/") else ""
                        found.append(StoredObject(key, upload, status.st_size, modified))
        return found

    def _write_probe(self) -> None:
        path = self.root / "uploads" / f".probe.{os.getpid()}"
        try:
            path.write_bytes(b"hythe")
            (self.root / "blobs").stat()
        finally:
            path.unlink(missing_ok=True)

    def _owner(self, name: str) -> str:
        path = self.root / "registry"
        with contextlib.suppress(FileExistsError), path.open("x", encoding="ascii") as file:
            file.write(f"{name}\n")
        return path.read_text(encoding="ascii").strip() or name

    async def _write_brought(self, path: str, digest: Digest, pieces: AsyncIterator[bytes]) -> None:
        hashing = hasher(digest.algorithm)
        async with aiofiles.open(path, "xb", buffering=0) as file:
            async for piece in pieces:
                await file.write(piece)
                await self._threads.run(hashing.update, piece)
            if self._sync:
                await self._threads.run(os.fdatasync, file.fileno())
        if (actual := hashing.digest()) != digest:
            raise DigestMismatch(digest, actual)

    def _put_in_place(self, source: str, target: str) -> None:
        directory = Path(target).parent
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        os.rename(source, target)
        if self._sync:
            for each in (directory, directory.parent, directory.parent.parent):
                sync_directory(each)

    def _publish(self, source: str, key: str) -> None:
        """Give synced data its name, and sync the name before anyone hears of it."""
        target = self._path(key)
        directory = os.path.dirname(target)
        algorithm = os.path.dirname(directory)
        if algorithm not in self._directories:
            self._make_directories(Path(algorithm))
        os.rename(source, target)
        if self._sync:
            sync_directory(directory)

    def _make_directories(self, algorithm: Path) -> None:
        """Make all directories of an algorithm: one by one, each would want a sync."""
        for directory in (algorithm, *(algorithm / f"{number:02x}" for number in range(256))):
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o750)
        # Also where they were there already: who made them may have died before syncing.
        if self._sync:
            sync_directory(algorithm)
            sync_directory(algorithm.parent)
        self._directories.add(str(algorithm))


class _FileUpload:
    """An upload as a locked file, open from the first step that needs it."""

    def __init__(self, store: FilesystemStore, checkpoint: Checkpoint) -> None:
        self._store = store
        self._path = store._path(checkpoint.key)
        self._start = checkpoint
        self._offset = checkpoint.offset
        self._written_back = checkpoint.offset
        self._hasher = _restore(checkpoint)
        self._verified: Digest | None = None
        self._published = ""
        self._descriptor = -1

    @property
    def offset(self) -> int:
        return self._offset

    async def write(self, pieces: Sequence[bytes | memoryview], *, last: bool = False) -> None:
        with disk_errors():
            await self._store._threads.run(self._write, pieces, last)

    def checkpoint(self) -> Checkpoint:
        if self._hasher is None:
            return self._start
        state = self._hasher.save()
        return Checkpoint(self._start.key, self._start.algorithm, self._offset, boot_id() + state if state else b"")

    async def verify(self, digest: Digest) -> None:
        if self._hasher is not None and digest.algorithm == self._start.algorithm:
            self._verify(digest)
        elif self._verified != digest:
            with disk_errors():
                await self._store._threads.run(self._verify, digest)

    async def commit(self, digest: Digest, last: Sequence[bytes | memoryview] = ()) -> str:
        with disk_errors():
            is_small = self._offset + sum(map(len, last)) <= _SMALL_SIZE
            threads = self._store._small if is_small else self._store._threads
            return await threads.run(self._commit, digest, last)

    @property
    def is_tidy(self) -> bool:
        return True

    async def undo(self) -> None:
        await self._store.delete(self._published)

    async def suspend(self) -> None:
        if self._descriptor >= 0:
            await self._store._threads.run(self._close)

    async def abandon(self) -> None:
        await self.suspend()

    def _open(self) -> None:
        """Open and lock the file, and bring it to where the upload stands."""
        if self._descriptor >= 0:
            return
        if not (self._offset == 0 and self._create()):
            self._open_present()

    def _create(self) -> bool:
        """Open and lock a new file; False where there is one."""
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o640)
        except FileExistsError:
            return False
        self._lock()
        return True

    def _open_present(self) -> None:
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UploadLost("the bytes of this upload are gone") from None
        self._lock()
        try:
            size = self._size()
            if size < self._offset:
                raise UploadLost(f"{self._offset} bytes were received, {size} are left")
            if size > self._offset:
                os.ftruncate(self._descriptor, self._offset)
            if self._hasher is None:
                self._hasher = self._hash_again(self._start.algorithm)
        except BaseException:
            self._close()
            raise

    def _lock(self) -> None:
        """Keep everybody else away."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._close()
            if isinstance(error, BlockingIOError):
                raise UploadBusy("another request is writing to this upload") from None
            raise

    def _size(self) -> int:
        """Return the size of the file, if it is this upload's still.

        Between opening and locking the former holder may have renamed it: then it is a published blob now.
        """
        opened = os.fstat(self._descriptor)
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            raise UploadLost("this upload was just finished or cancelled") from None
        if not os.path.samestat(named, opened):
            raise UploadLost("this upload was just finished or cancelled")
        return opened.st_size

    def _hash_again(self, algorithm: str) -> Hasher:
        result = hasher(algorithm)
        position = 0
        while position < self._offset:
            piece = os.pread(self._descriptor, min(_READ_SIZE, self._offset - position), position)
            if not piece:
                raise UploadLost("the file became shorter while it was read")
            result.update(piece)
            position += len(piece)
        return result

    def _write(self, pieces: Sequence[bytes | memoryview], last: bool) -> None:
        self._open()
        self._append(pieces)
        if last:
            self._close()

    def _append(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Write, then hash, then count: what fails in between was never there."""
        assert self._hasher is not None
        try:
            end = write_all(self._descriptor, pieces, self._offset)
        except BaseException:
            os.ftruncate(self._descriptor, self._offset)
            raise
        self._verified = None
        for piece in pieces:
            self._hasher.update(piece)
        self._offset = end
        if self._store._sync and self._offset - self._written_back >= _WRITEBACK_SIZE:
            start_writeback(self._descriptor, self._written_back, self._offset - self._written_back)
            self._written_back = self._offset

    def _commit(self, digest: Digest, last: Sequence[bytes | memoryview]) -> str:
        self._open()
        if last:
            self._append(last)
        if self._verified != digest:
            self._verify(digest)
        self._sync()
        key = f"blobs/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}.{os.path.basename(self._path)}"
        self._store._publish(self._path, key)
        self._published = key
        self._close()
        return key

    def _verify(self, digest: Digest) -> None:
        if self._hasher is not None and digest.algorithm == self._start.algorithm:
            actual = self._hasher.digest()
        else:
            self._open()
            actual = self._hash_again(digest.algorithm).digest()
        if actual != digest:
            raise DigestMismatch(digest, actual)
        self._verified = digest

    def _sync(self) -> None:
        """Make the data durable, or forget the upload.

        After a failed fsync the kernel counts the lost pages as clean, and the next one succeeds: there is no
        second try with these bytes.
        """
        if not self._store._sync:
            return
        try:
            os.fdatasync(self._descriptor)
        except OSError:
            Path(self._path).unlink(missing_ok=True)
            self._close()
            raise

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class _FileContent:
    def __init__(self, path: str) -> None:
        self.path: str = path

    async def address(self) -> None:
        """There is none: we send files ourselves."""

    async def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        try:
            async with aiofiles.open(self.path, "rb", buffering=0) as file:
                await file.seek(start)
                while start < stop:
                    piece = await file.read(min(_READ_SIZE, stop - start))
                    if not piece:
                        raise ContentMissing(f"{self.path} is shorter than {stop} bytes")
                    start += len(piece)
                    yield piece
        except FileNotFoundError:
            raise ContentMissing(f"no file {self.path}") from None


def _restore(checkpoint: Checkpoint) -> Hasher | None:
    """Return a hasher that goes on from a checkpoint, None where the bytes must be read again.

    A saved state vouches for bytes that may not have been synced. It is good as long as the kernel that took the
    bytes still runs; after a power cut only what can be read back counts.
    """
    if checkpoint.offset == 0:
        return hasher(checkpoint.algorithm)
    boot, state = checkpoint.state[:BOOT_ID_SIZE], checkpoint.state[BOOT_ID_SIZE:]
    return restore(checkpoint.algorithm, state) if boot == boot_id() else None
