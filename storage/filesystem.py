"""Blobs as files.

    ROOT/uploads/<name>                            bytes on their way in
    ROOT/blobs/<algorithm>/<2 hex>/<hex>.<name>    a blob: its digest for people and for recovery, its
                                                   upload's name so that no key is ever used twice

Publishing a file is: data synced, renamed, directory synced. Hashing and writing a large piece is one job in one
thread; there is nothing to gain from a hop for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import aiofiles
import aiofiles.os

from storage.base import Checkpoint, StoredObject
from storage.digest import Digest, Hasher, hasher, restore
from storage.errors import ContentMissing, DigestMismatch, OutOfSpace, StorageError, UploadBusy, UploadLost
from storage.threads import Threads

_READ_SIZE: Final = 1 << 20
#: writev takes at most this many pieces. [POSIX: IOV_MAX]
_PIECES_LIMIT: Final = 1024
#: How far the data may run ahead of the disk before the kernel is asked to start writing it.
_WRITEBACK_SIZE: Final = 16 << 20
_SYNC_FILE_RANGE_WRITE: Final = 2
_BOOT_ID_SIZE: Final = 16

_KEY: Final = re.compile(r"uploads/[\w-]+|blobs/\w+/[0-9a-f]{2}/[0-9a-f]+\.[\w-]+")


class FilesystemStore:
    """A store in one directory. [storage/base.py has the contract]"""

    def __init__(self, root: Path, *, sync: bool = True, threads: int = 16) -> None:
        """Keep everything below `root`, created where absent.

        Args:
            root: a directory on a filesystem with rename and flock.
            sync: False answers before the bytes are on the disk: faster, and a power cut may lose them.
            threads: how many jobs may be at the disk at once.
        """
        self.root = root.absolute()
        self._sync = sync
        self._threads = Threads(threads, "disk")
        self._directories: set[Path] = set()
        (self.root / "uploads").mkdir(mode=0o750, parents=True, exist_ok=True)
        (self.root / "blobs").mkdir(mode=0o750, exist_ok=True)

    def begin(self, name: str, algorithm: str) -> Checkpoint:
        return Checkpoint(f"uploads/{name}", algorithm)

    async def resume(self, checkpoint: Checkpoint) -> _FileUpload:
        with _disk_errors():
            return await self._threads.run(_FileUpload, self, checkpoint)

    def open(self, key: str) -> _FileContent:
        return _FileContent(self._path(key))

    async def delete(self, key: str) -> None:
        with _disk_errors(), contextlib.suppress(FileNotFoundError):
            await aiofiles.os.unlink(self._path(key))

    async def objects(self) -> AsyncIterator[StoredObject]:
        for directory in await self._threads.run(self._list_directories):
            for found in await self._threads.run(self._list_files, directory):
                yield found

    async def probe(self) -> None:
        with _disk_errors():
            await self._threads.run(self._write_probe)

    async def close(self) -> None:
        await self._threads.close()

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a key of this store: {key!r}")
        return self.root / key

    def _list_directories(self) -> list[Path]:
        return [self.root / "uploads", *sorted((self.root / "blobs").glob("*/*"))]

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
                        found.append(StoredObject(key, status.st_size, modified))
        return found

    def _write_probe(self) -> None:
        path = self.root / "uploads" / f".probe.{os.getpid()}"
        try:
            path.write_bytes(b"hythe")
            (self.root / "blobs").stat()
        finally:
            path.unlink(missing_ok=True)

    def _publish(self, source: Path, key: str) -> None:
        """Give synced data its name, and sync the name before anyone hears of it."""
        target = self._path(key)
        self._make_directory(target.parent)
        source.rename(target)
        if self._sync:
            _sync_directory(target.parent)

    def _make_directory(self, directory: Path) -> None:
        if directory in self._directories:
            return
        if directory != self.root / "blobs":
            self._make_directory(directory.parent)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o750)
        # Also where it was there already: who made it may have died before syncing.
        if self._sync:
            _sync_directory(directory.parent)
        self._directories.add(directory)


class _FileUpload:
    """An upload as an open, locked file."""

    def __init__(self, store: FilesystemStore, checkpoint: Checkpoint) -> None:
        """Open, lock and bring back the state; blocks on the disk."""
        self._store = store
        self._path = store._path(checkpoint.key)
        self._key = checkpoint.key
        self._algorithm = checkpoint.algorithm
        self._offset = checkpoint.offset
        self._written_back = checkpoint.offset
        self._verified: Digest | None = None
        create = os.O_CREAT if checkpoint.offset == 0 else 0
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | create, 0o640)
        except FileNotFoundError:
            raise UploadLost("the bytes of this upload are gone") from None
        try:
            self._lock()
            self._hasher = self._restore(checkpoint)
        except BaseException:
            self._close()
            raise

    @property
    def offset(self) -> int:
        return self._offset

    async def write(self, pieces: Sequence[bytes | memoryview]) -> None:
        with _disk_errors():
            await self._store._threads.run(self._append, pieces)

    def checkpoint(self) -> Checkpoint:
        state = self._hasher.save()
        return Checkpoint(self._key, self._algorithm, self._offset, _boot_id() + state if state else b"")

    async def verify(self, digest: Digest) -> None:
        if digest.algorithm == self._algorithm:
            self._verify(digest)
        elif self._verified != digest:
            with _disk_errors():
                await self._store._threads.run(self._verify, digest)

    async def commit(self, digest: Digest) -> str:
        with _disk_errors():
            return await self._store._threads.run(self._commit, digest)

    async def suspend(self) -> None:
        await self._store._threads.run(self._close)

    async def abort(self) -> None:
        await self._store._threads.run(self._drop)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UploadBusy("another request is writing to this upload") from None
        # Between open and lock the former holder may have renamed the file: it is a published blob now.
        try:
            named = self._path.stat()
        except FileNotFoundError:
            raise UploadLost("this upload was just finished or cancelled") from None
        if not os.path.samestat(named, os.fstat(self._descriptor)):
            raise UploadLost("this upload was just finished or cancelled")

    def _restore(self, checkpoint: Checkpoint) -> Hasher:
        size = os.fstat(self._descriptor).st_size
        if size < checkpoint.offset:
            raise UploadLost(f"{checkpoint.offset} bytes were received, {size} are left")
        if size > checkpoint.offset:
            os.ftruncate(self._descriptor, checkpoint.offset)
        os.lseek(self._descriptor, checkpoint.offset, os.SEEK_SET)
        if checkpoint.offset == 0:
            return hasher(checkpoint.algorithm)
        # A saved state vouches for bytes that may not have been synced. It is good as long as the kernel that
        # took the bytes still runs; after a power cut only what can be read back counts.
        boot, state = checkpoint.state[:_BOOT_ID_SIZE], checkpoint.state[_BOOT_ID_SIZE:]
        restored = restore(checkpoint.algorithm, state) if boot == _boot_id() else None
        return restored or self._hash_again(checkpoint.algorithm)

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

    def _append(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Write, then hash, then count: what fails in between was never there."""
        try:
            for batch in _batches(pieces):
                _write_all(self._descriptor, batch)
        except BaseException:
            os.lseek(self._descriptor, self._offset, os.SEEK_SET)
            os.ftruncate(self._descriptor, self._offset)
            raise
        self._verified = None
        for piece in pieces:
            self._hasher.update(piece)
            self._offset += len(piece)
        if self._store._sync and self._offset - self._written_back >= _WRITEBACK_SIZE:
            _start_writeback(self._descriptor, self._written_back, self._offset - self._written_back)
            self._written_back = self._offset

    def _commit(self, digest: Digest) -> str:
        if self._verified != digest:
            self._verify(digest)
        self._sync()
        key = f"blobs/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}.{self._path.name}"
        self._store._publish(self._path, key)
        self._close()
        return key

    def _verify(self, digest: Digest) -> None:
        same = digest.algorithm == self._algorithm
        actual = (self._hasher if same else self._hash_again(digest.algorithm)).digest()
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
            self._drop()
            raise

    def _drop(self) -> None:
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class _FileContent:
    def __init__(self, path: Path) -> None:
        self.path: Path = path

    async def read(self, start: int, stop: int) -> AsyncIterator[bytes]:
        try:
            async with aiofiles.open(self.path, "rb", buffering=0) as file:
                await file.seek(start)
                while start < stop:
                    piece = await file.read(min(_READ_SIZE, stop - start))
                    if not piece:
                        raise ContentMissing(f"{self.path.name} is shorter than {stop} bytes")
                    start += len(piece)
                    yield piece
        except FileNotFoundError:
            raise ContentMissing(f"no file {self.path.name}") from None


def _batches(pieces: Sequence[bytes | memoryview]) -> Iterator[Sequence[bytes | memoryview]]:
    for start in range(0, len(pieces), _PIECES_LIMIT):
        yield pieces[start : start + _PIECES_LIMIT]


def _write_all(descriptor: int, pieces: Sequence[bytes | memoryview]) -> None:
    """Write every byte; writev may stop in the middle of a piece."""
    rest: list[bytes | memoryview] = list(pieces)
    while rest:
        written = os.writev(descriptor, rest)
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if rest and written:
            rest[0] = memoryview(rest[0])[written:]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutOfSpace(f"no space left for blobs: {error.strerror}") from error
        raise StorageError(f"the disk failed: {error}") from error


def _boot_id() -> bytes:
    """Return what names this run of the kernel."""
    global _boot
    if not _boot:
        try:
            text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
            _boot = bytes.fromhex(text.strip().replace("-", ""))
        except (OSError, ValueError):
            # Without one, trust no state from any other process.
            _boot = os.urandom(_BOOT_ID_SIZE)
    return _boot


_boot = b""


def _start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to begin writing a range, so that the sync at the end finds little left to do."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


#: Linux only, absent from `os`; only ever a hint here, so its result does not matter.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
