"""The facts in one SQLite file.

SQLite has one writer. So writes stand in a queue before one thread, and what stands there together is committed
together: sixteen uploads that finish at once cost one sync of the disk. Where a unit fails half-way, all are undone and
each is run again by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError

from registry.errors import MetadataFull, MetadataUnavailable
from registry.metadata import policy
from registry.metadata.engine import Unit, parse_url
from registry.metadata.prepared import driver
from storage.threads import Job, Threads

P = ParamSpec("P")
T = TypeVar("T")

_BATCH_LIMIT: Final = 64
_READERS: Final = 4
_BUSY_SECONDS: Final = 15


#: No version is below it, nor is the sum of one and a count of writes.
_UNKNOWN: Final = -(1 << 62)

#: The general kind, none of its special ones: the file is damaged, or no database.
_DAMAGED: Final = (DatabaseError, sqlite3.DatabaseError)


@dataclass(slots=True)
class _Write:
    job: Job[Any]
    durable: bool


#: What a unit returned, or what it raised.
_Outcome = tuple[Any, Exception | None]


class _MustBeUndone(Exception):
    """A unit failed after it had changed something."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class SqliteDatabase:
    """A SQLite file in WAL mode: one writer thread, some reader threads. [registry.metadata.engine.Database]"""

    def __init__(self, url: URL, *, sync: bool = True, begin: Callable[[], None] | None = None) -> None:
        """Open the file that `url` names. [registry.metadata.engine.open_database]"""
        assert url.database
        self._path = Path(url.database)
        self._writer = _engine(self._path, "IMMEDIATE")
        self._reader = _engine(self._path, "DEFERRED")
        self._threads = Threads(_READERS, "sql-reader", begin)
        self._begin = begin
        self._local = threading.local()
        self._sync = sync
        self._synchronous = "FULL"
        self._writing: Connection | None = None
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="sql-writer", daemon=True)
        self._thread.start()

    async def read(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._threads.run(self._read, lambda connection: unit(connection, *args, **kwargs))

    async def look_up(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._threads.run(self._look_up, lambda connection: unit(connection, *args, **kwargs))

    async def write(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._enqueue(lambda connection: unit(connection, *args, **kwargs), durable=True)

    async def note(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._enqueue(lambda connection: unit(connection, *args, **kwargs), durable=False)

    def watch(self) -> DataVersion:
        return DataVersion(self._path)

    def watch_rights(self) -> RightsVersion:
        return RightsVersion(self._path)

    async def close(self) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        await self._threads.close()
        if self._writing is not None:
            self._writing.close()
        self._reader.dispose()
        self._writer.dispose()

    async def _enqueue(self, work: Callable[[Connection], T], *, durable: bool) -> T:
        if not self._thread.is_alive():
            raise MetadataUnavailable("the database is closed")
        job = Job(work)
        self._queue.put(_Write(job, durable and self._sync))
        return await job.wait()

    def _read(self, work: Callable[[Connection], T]) -> T:
        with _sql_errors():
            connection = self._reading()
            with connection.begin():
                return work(connection)

    def _look_up(self, work: Callable[[Connection], T]) -> T:
        with _sql_errors():
            connection = self._reading()
            found = work(connection)
            assert not connection.in_transaction(), "not a prepared statement"
            return found

    def _reading(self) -> Connection:
        """Return this thread's connection."""
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._reader.connect()
        return connection

    def _write_all(self) -> None:
        if self._begin:
            self._begin()
        while (batch := self._next_batch())[-1] is not None:
            self._write_batch([write for write in batch if write])
        self._write_batch([write for write in batch if write])

    def _next_batch(self) -> list[_Write | None]:
        batch = [self._queue.get()]
        while batch[-1] is not None and len(batch) < _BATCH_LIMIT:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _write_batch(self, writes: list[_Write]) -> None:
        """Commit units together, or where one of them must be undone, each by itself."""
        try:
            outcomes = self._commit(writes)
        except _MustBeUndone as error:
            if len(writes) == 1:
                writes[0].job.fail(error.cause)
            else:
                for write in writes:
                    self._write_batch([write])
        except BaseException as error:
            for write in writes:
                write.job.fail(error)
        else:
            for write, (result, failure) in zip(writes, outcomes, strict=True):
                if failure is None:
                    write.job.succeed(result)
                else:
                    write.job.fail(failure)

    def _commit(self, writes: list[_Write]) -> list[_Outcome]:
        with _sql_errors():
            connection = self._writing = self._writing or self._writer.connect()
            self._set_synchronous(connection, "FULL" if any(write.durable for write in writes) else "NORMAL")
            with connection.begin():
                return [_outcome(connection, write) for write in writes]

    def _set_synchronous(self, connection: Connection, level: str) -> None:
        """[SQLite: PRAGMA synchronous] FULL syncs the log at each commit, with all that stands before it."""
        if level != self._synchronous:
            driver(connection).execute(f"PRAGMA synchronous={level}")
            self._synchronous = level


def _outcome(connection: Connection, write: _Write) -> _Outcome:
    """Run one unit of a batch. It may fail alone as long as it has changed nothing."""
    changes = driver(connection).total_changes
    try:
        return write.job.work(connection), None
    except Exception as error:
        if _is_down(error):
            # For all of them.
            raise
        if driver(connection).total_changes != changes:
            raise _MustBeUndone(error) from error
        return None, error


def sqlite_path(url: str) -> Path | None:
    """Return the file of a SQLite database; None for a database that is not a file. Raises as `parse_url` does."""
    parsed = parse_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


class DataVersion:
    """What tells that another connection wrote to the file. [registry.metadata.engine.Watch]

    [SQLite: PRAGMA data_version] changes when any other connection commits, this process's writer included. It
    reads shared memory only: about two microseconds.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._failures = 0
        # The first read opens the log; after it nothing here touches the disk.
        self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def __call__(self) -> int:
        try:
            row: tuple[int] = self._connection.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error:
            # What cannot be known to be good is not used: no two looks are in one epoch.
            self._failures += 1
            return _UNKNOWN - self._failures
        return row[0]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class RightsVersion(DataVersion):
    """What tells that somebody's rights may have changed, whoever wrote it. [registry.metadata.policy]

    The row is read only where anything was written at all, and then it is in memory: some ten microseconds.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._looked_at: int | None = None
        self._version = 0

    def __call__(self) -> int:
        data = super().__call__()
        if data == self._looked_at:
            return self._version
        try:
            (version,) = self._connection.execute(policy.VERSION).fetchone()
        except sqlite3.Error:
            self._failures += 1
            return _UNKNOWN - self._failures
        self._version = version
        self._looked_at = data
        return self._version


def _engine(path: Path, begin: str) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False},
        pool_size=_READERS,
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: object) -> None:
        # We begin transactions ourselves: sqlite3 would begin them late and as readers.
        connection.isolation_level = None
        prepare(connection)

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        driver(connection).execute(f"BEGIN {begin}")

    return engine


def prepare(connection: sqlite3.Connection) -> None:
    """Set a new SQLite connection up as every part of Hythe wants it. That there is a log: `schema.py`."""
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA cache_size=-8192")


def _is_down(error: Exception) -> bool:
    """Return whether the database itself failed, and not what was asked of it."""
    return isinstance(error, OperationalError | sqlite3.OperationalError) or type(error) in _DAMAGED


@contextlib.contextmanager
def _sql_errors() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        text = str(error.orig if isinstance(error, DBAPIError) else error)
        if "disk is full" in text or "disk I/O error" in text:
            raise MetadataFull(f"no space left for the database: {text}") from error
        if _is_down(error):
            raise MetadataUnavailable(f"the database does not answer: {text}") from error
        raise
