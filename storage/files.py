"""What a file needs beyond Python's own calls: whole writes, names that survive a power cut, errors with a meaning."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from storage.errors import OutOfSpace, StorageError

#: pwritev takes at most this many pieces. [POSIX: IOV_MAX]
_PIECES_LIMIT: Final = 1024
_SYNC_FILE_RANGE_WRITE: Final = 2
#: Bytes of what names a run of the kernel.
BOOT_ID_SIZE: Final = 16

#: Linux only, absent from `os`; only ever a hint here, so its result does not matter.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


def write_all(descriptor: int, pieces: Sequence[bytes | memoryview], position: int) -> int:
    """Write every byte from `position` on, and return where they end.

    One call may take only some of the pieces, and stop in the middle of one.
    """
    rest: list[bytes | memoryview] = list(pieces)
    while rest:
        written = os.pwritev(descriptor, rest[:_PIECES_LIMIT], position)
        position += written
        done = 0
        while done < len(rest) and written >= len(rest[done]):
            written -= len(rest[done])
            done += 1
        del rest[:done]
        if rest and written:
            rest[0] = memoryview(rest[0])[written:]
    return position


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to begin writing a range, so that the sync at the end finds little left to do."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


def sync_directory(directory: str | Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what the disk says into `OutOfSpace` or another `StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutOfSpace(f"no space left for blobs: {error.strerror}") from error
        raise StorageError(f"the disk failed: {error}") from error


@cache
def boot_id() -> bytes:
    """Return what names this run of the kernel."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return bytes.fromhex(text.strip().replace("-", ""))
    except (OSError, ValueError):
        # Without one, trust no state from any other process.
        return os.urandom(BOOT_ID_SIZE)
