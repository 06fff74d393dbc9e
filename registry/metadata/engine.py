"""Units of work: synchronous functions that take a connection, each run in a thread as one transaction.

    await database.read(find_tag, repository, tag)
    await database.write(put_manifest, repository, manifest)

A unit may be run again, where it failed half-way or met another one, so it must do nothing but ask and change the
database. It is answered only after the commit that holds it. Two databases keep this promise, `sqlite.py` with one
writer and `postgres.py` with many; the units are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy import URL, Connection, Table, make_url
from sqlalchemy.exc import ArgumentError

from registry.errors import ConfigurationError

P = ParamSpec("P")
T = TypeVar("T")
Unit = Callable[Concatenate[Connection, P], T]


class Watch(Protocol):
    """A number that is another one whenever any other connection has committed."""

    def __call__(self) -> int:
        """Return the number now, without waiting for anything."""

    def close(self) -> None:
        """Stop watching."""


class Database(Protocol):
    """Where the facts are, and how to ask for them."""

    async def read(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit that only reads, on one snapshot.

        Raises:
            MetadataUnavailable: the database did not answer.
        """

    async def look_up(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit that is one prepared statement, which is a snapshot by itself.

        Raises:
            MetadataUnavailable: the database did not answer.
        """

    async def write(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit, commit, and return its result once the commit is on the disk.

        Raises:
            MetadataFull: no room on the disk; nothing was written.
            MetadataUnavailable: the database did not answer; doing it again is safe.
        """

    async def note(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit whose loss in a power cut does no harm: committed, seen by all, perhaps not synced by itself."""

    def watch(self) -> Watch | None:
        """Return what tells at once that others have written; None where nothing can."""

    def watch_rights(self) -> Watch | None:
        """Return what tells the version of `policy` at once; None where it must be asked for."""

    async def close(self) -> None:
        """Finish what is queued and let go of all connections."""


def parse_url(url: str) -> URL:
    """Read the address of a database: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/NAME`.

    Raises:
        ConfigurationError: it is something else. The message never shows the address: a password may be in it.
    """
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError):
        backend = ""
    if (backend == "sqlite" and parsed.database) or backend == "postgresql":
        # Whatever driver is named: one is ours.
        return parsed.set(drivername="sqlite" if backend == "sqlite" else "postgresql+psycopg")
    raise ConfigurationError(
        "database.url must look like sqlite:///path/to/hythe.db or postgresql://user:password@host/name"
    )


def is_shared(url: str) -> bool:
    """Return whether servers on several hosts may use this database at once."""
    return parse_url(url).get_backend_name() == "postgresql"


def open_database(
    url: str, *, sync: bool = True, connections: int = 8, begin: Callable[[], None] | None = None
) -> Database:
    """Open a database that has been brought up to date. [registry.metadata.schema]

    Args:
        url: where it is.
        sync: False answers before a commit is on the disk.
        connections: how many, where the database is a server.
        begin: called in each of its threads as it starts.
    """
    parsed = parse_url(url)
    # Each is imported only where it is used: a driver takes its time and memory.
    if parsed.get_backend_name() == "sqlite":
        from registry.metadata.sqlite import SqliteDatabase

        return SqliteDatabase(parsed, sync=sync, begin=begin)
    from registry.metadata.postgres import PostgresDatabase

    return PostgresDatabase(parsed, sync=sync, connections=connections, begin=begin)


def hold_still(connection: Connection, *tables: Table) -> None:
    """Keep others from adding to `tables` until the end of the transaction; a single writer does so anyway."""
    if connection.dialect.name == "postgresql":
        names = ", ".join(table.name for table in tables)
        connection.exec_driver_sql(f"LOCK TABLE {names} IN SHARE ROW EXCLUSIVE MODE")
