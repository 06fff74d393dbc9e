"""The facts in PostgreSQL, for any number of servers.

Every thread keeps a connection, and a unit is one transaction on it, READ COMMITTED. Where two units meet, one of them
waits for the other's row, or is refused by a key or a foreign key and run again: then it sees what the other did.
A connection that is lost before the commit was sent has changed nothing, so the unit is run again on a new one, for
as long as a restart of the database may take. Lost during the commit, nobody knows: that is said, and the client
does it again.
"""

from __future__ import annotations

import random
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

import psycopg
from sqlalchemy import URL, Connection, NullPool, create_engine
from sqlalchemy.exc import DBAPIError

from registry.errors import MetadataFull, MetadataUnavailable
from registry.metadata.engine import Unit
from registry.metadata.prepared import driver
from storage.threads import Threads

P = ParamSpec("P")
T = TypeVar("T")

#: Seconds that a unit waits for a database that is away, and between two tries at most.
_PATIENCE: Final = 8.0
_LONGEST_PAUSE: Final = 0.5
#: How often a unit that met others is run again, and the seconds before the first time.
_MEETINGS: Final = 10
_PAUSE: Final = 0.01
#: [libpq: Parameter Key Words] A network that swallows packets must not hold a thread for ever.
_DEFAULTS: Final = {"connect_timeout": "5", "tcp_user_timeout": "15000", "keepalives_idle": "30"}

_WRITING: Final = b"BEGIN"
_READING: Final = b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"

#: Another unit was faster; run again, this one sees what it did. Where it still cannot be, it was never to be.
_MET: Final = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.ForeignKeyViolation,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
)
_FULL: Final = (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory)
#: The server is going, or is not the one that takes writes any more: another connection may lead to a better one.
_AWAY: Final = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)


class _OutcomeUnknown(Exception):
    """The connection was lost while a commit was on its way."""


class PostgresDatabase:
    """A PostgreSQL database: threads, each with a connection. [registry.metadata.engine.Database]"""

    def __init__(
        self, url: URL, *, sync: bool = True, connections: int = 8, begin: Callable[[], None] | None = None
    ) -> None:
        """Use the database that `url` names. [registry.metadata.engine.open_database]"""
        self._engine = create_engine(
            connectable(url),
            # Transactions are begun and ended by hand; a statement outside of one is committed by itself.
            isolation_level="AUTOCOMMIT",
            poolclass=NullPool,
            hide_parameters=True,
            connect_args={} if sync else {"options": "-c synchronous_commit=off"},
        )
        self._threads = Threads(connections, "sql", begin)
        self._local = threading.local()
        self._open: set[Connection] = set()

    async def read(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(lambda connection: _transact(connection, _READING, unit, args, kwargs))

    async def look_up(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(lambda connection: unit(connection, *args, **kwargs))

    async def write(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(lambda connection: _transact(connection, _WRITING, unit, args, kwargs))

    async def note(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.write(unit, *args, **kwargs)

    def watch(self) -> None:
        """There is nothing that tells at once."""

    def watch_rights(self) -> None:
        """Nor for this."""

    async def close(self) -> None:
        await self._threads.close()
        for connection in self._open:
            connection.close()
        self._engine.dispose()

    async def _run(self, work: Callable[[Connection], T]) -> T:
        # Whoever waits for a thread is waiting for the database.
        return await self._threads.run(self._run_here, work, time.monotonic() + _PATIENCE)

    def _run_here(self, work: Callable[[Connection], T], end: float) -> T:
        """Run `work` until it is done, or there is no sense in another try."""
        pause, meetings = _PAUSE, 0
        if time.monotonic() > end:
            raise MetadataUnavailable("all connections to the database are busy")
        while True:
            try:
                return self._try(work)
            except DBAPIError as error:
                meetings += isinstance(error.orig, _MET)
                if not _may_pass(error) or meetings > _MEETINGS or time.monotonic() > end:
                    raise _meaning(error) from error
            # Not all at once: who met once meets again otherwise.
            time.sleep(pause * random.random())  # noqa: S311
            pause = min(_LONGEST_PAUSE if not meetings else 2 * _PAUSE, pause * 2)

    def _try(self, work: Callable[[Connection], T]) -> T:
        connection = self._connection()
        try:
            return work(connection)
        except _OutcomeUnknown as error:
            raise MetadataUnavailable(f"the database was lost during a commit: {error.__cause__}") from error
        except DBAPIError as error:
            if isinstance(error.orig, psycopg.errors.ReadOnlySqlTransaction):
                driver(connection).close()
            raise
        finally:
            if _is_lost(connection):
                self._drop(connection)

    def _connection(self) -> Connection:
        """Return this thread's connection, a new one where the old one is lost."""
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            if not _is_stale(connection):
                return connection
            self._drop(connection)
        connection = self._local.connection = self._engine.connect()
        self._open.add(connection)
        return connection

    def _drop(self, connection: Connection) -> None:
        self._local.connection = None
        self._open.discard(connection)
        connection.invalidate()
        connection.close()


def connectable(url: URL) -> URL:
    """Return `url` with what every connection of ours has, unless it says otherwise."""
    return url.update_query_dict({key: value for key, value in _DEFAULTS.items() if key not in url.query})


def _transact(connection: Connection, begin: bytes, unit: Callable[..., T], args: Any, kwargs: Any) -> T:
    raw = driver(connection)
    _execute(raw, connection, begin)
    with connection.begin() as transaction:
        result = unit(connection, *args, **kwargs)
        try:
            transaction.commit()
        except DBAPIError as error:
            if _is_lost(connection):
                raise _OutcomeUnknown from error
            raise
    return result


def _execute(raw: Any, connection: Connection, statement: bytes) -> None:
    try:
        raw.execute(statement)
    except psycopg.Error as error:
        raise DBAPIError.instance(statement.decode(), None, error, psycopg.Error, dialect=connection.dialect) from error


def _is_lost(connection: Connection) -> bool:
    return connection.invalidated or driver(connection).closed


def _is_stale(connection: Connection) -> bool:
    """Return whether the server has said something while nobody asked, which is always that it is going.

    So a connection that died of a restart is told before anything is sent by it, without asking the server.
    """
    if _is_lost(connection):
        return True
    poll = select.poll()
    poll.register(driver(connection).fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _may_pass(error: DBAPIError) -> bool:
    """Return whether another try may mend it: others were met, or the database is away."""
    return isinstance(error.orig, (*_MET, *_AWAY)) and not isinstance(error.orig, _FULL)


def _meaning(error: DBAPIError) -> Exception:
    """Return what to raise for an error that another try does not mend."""
    if isinstance(error.orig, _FULL):
        return MetadataFull(f"no room for the database: {error.orig}")
    if isinstance(error.orig, _AWAY):
        return MetadataUnavailable(f"the database does not answer: {error.orig}")
    return error
