"""The lock on a data directory: one server at a time, and a trace of the one that died."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from registry.errors import ConfigurationError

_MOUNTS: Final = Path("/proc/self/mountinfo")
_NETWORK_FILESYSTEMS: Final = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "afs", "ncpfs"]
)
#: What the lock file says while a server runs; it stays there only if the server died.
_RUNNING: Final = b"running\n"


def check_local(database: Path, mounts: Path = _MOUNTS) -> None:
    """Refuse a SQLite file that other hosts may have open too: its log lies in this host's memory.

    Args:
        database: the file.
        mounts: what is mounted where. [proc_pid_mountinfo(5)]

    Raises:
        ConfigurationError: it lies on a network filesystem. [SQLite: Write-Ahead Logging, 1]
    """
    kind = _filesystem(database.resolve().parent, mounts)
    if kind in _NETWORK_FILESYSTEMS:
        raise ConfigurationError(
            f"database.url: {database} is on a network filesystem ({kind}), where SQLite is not safe: put it on "
            "a local disk, or use PostgreSQL, which any number of hosts may share"
        )


def _filesystem(directory: Path, mounts: Path) -> str:
    """Return the kind of filesystem that a directory, perhaps still to be made, is on."""
    best, kind = -1, ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        mounted, _, described = line.partition(" - ")
        # Blanks in a path are written in octal.
        point = mounted.split(" ")[4].replace("\\040", " ")
        if directory.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), described.split(" ")[0]
    return kind


@contextlib.contextmanager
def exclusive(paths: list[Path]) -> Iterator[bool]:
    """Hold the locks; yield whether the last holder died without letting go.

    The kernel lets go of them when the last process that holds them is gone, however it died.

    Raises:
        ConfigurationError: another server has one of them, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        died = [stack.enter_context(_locked(path)) for path in paths]
        yield any(died)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another server uses the data in {path.parent}: stop it, or give this one its own with --data"
            ) from None
        died = os.pread(descriptor, len(_RUNNING), 0) == _RUNNING
        # On a full disk this fails, and a crash would go unnoticed; pulls are worth more.
        with contextlib.suppress(OSError):
            os.pwrite(descriptor, _RUNNING, 0)
        try:
            yield died
        except ConfigurationError:
            # Nothing was served: what the last run left, if anything, is still to be looked for.
            if died:
                raise
            os.ftruncate(descriptor, 0)
            raise
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
