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
#: What it says from the next start on, until what the dead one left is cleared away; as long as the other.
_UNCLEAR: Final = b"unclear\n"


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


class Trace:
    """What the last server on these directories left of itself, and this one will."""

    def __init__(self, descriptors: list[int]) -> None:
        """Read it from the lock files, and mark that a server runs."""
        self._descriptors = descriptors
        states = [os.pread(descriptor, len(_RUNNING), 0) for descriptor in descriptors]
        #: One died, and what it left was not cleared away since.
        self.is_unclear = any(states)
        self._mark(_UNCLEAR if self.is_unclear else _RUNNING)

    def settle(self) -> None:
        """Take note that nothing of those who died is left. May be called in a process that was forked."""
        self._mark(_RUNNING)

    def doubt(self) -> None:
        """Take note that a process of this server died, and may have left something."""
        self._mark(_UNCLEAR)

    def end(self) -> None:
        """Take note that this server ended well."""
        for descriptor in self._descriptors:
            if os.pread(descriptor, len(_RUNNING), 0) == _RUNNING:
                os.ftruncate(descriptor, 0)

    def _mark(self, state: bytes) -> None:
        # On a full disk this fails, and a crash would go unnoticed; pulls are worth more.
        with contextlib.suppress(OSError):
            for descriptor in self._descriptors:
                os.pwrite(descriptor, state, 0)


@contextlib.contextmanager
def serving(paths: list[Path]) -> Iterator[Trace]:
    """Hold the locks as a server does, which leaves a trace if it dies. Raises as `held` does."""
    with held(paths) as descriptors:
        trace = Trace(descriptors)
        try:
            yield trace
        except ConfigurationError:
            # Nothing was served.
            trace.end()
            raise
        trace.end()


@contextlib.contextmanager
def held(paths: list[Path]) -> Iterator[list[int]]:
    """Hold the locks; yield their descriptors.

    The kernel lets go of them when the last process that holds them is gone, however it died.

    Raises:
        ConfigurationError: another server has one of them, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_locked(path)) for path in paths]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
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
        yield descriptor
    finally:
        os.close(descriptor)
