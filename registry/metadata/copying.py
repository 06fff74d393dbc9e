"""From one database to another: every row of every table, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sqlalchemy import Connection, Engine, Integer, NullPool, Table, create_engine, delete, func, insert, select
from sqlalchemy.exc import DBAPIError

from registry.errors import ConfigurationError
from registry.metadata.engine import parse_url
from registry.metadata.tables import identity, metadata, policy

_CHUNK: Final = 1000
#: Tables that have a row from the first.
_SEEDED: Final = (identity, policy)


def copy_database(source: str, target: str, progress: Callable[[str, int, int], None]) -> dict[str, int]:
    """Copy all facts, and the identity of the registry, into a database that is empty but for its tables.

    Args:
        source: the URL of a database that nobody writes to meanwhile.
        target: the URL of another one; both are at this version's schema.
        progress: called with the name of a table, how many of its rows were copied, and how many there are.

    Returns:
        How many rows each table has.

    Raises:
        ConfigurationError: the target has content, or one of the two does not answer; nothing was copied.
    """
    try:
        with _opened(source).connect() as connection, _opened(target).begin() as write:
            read = _on_one_snapshot(connection)
            _check_empty(write)
            for table in _SEEDED:
                write.execute(delete(table))
            return {table.name: _copy(read, write, table, progress) for table in metadata.sorted_tables}
    except DBAPIError as error:
        raise ConfigurationError(f"the database does not answer: {str(error.orig).strip()}") from None


def _opened(url: str) -> Engine:
    return create_engine(parse_url(url), poolclass=NullPool, hide_parameters=True)


def _on_one_snapshot(connection: Connection) -> Connection:
    """Let a connection see the database as it is now, to its end; nobody writes to a file that is locked."""
    is_server = connection.dialect.name == "postgresql"
    return connection.execution_options(isolation_level="REPEATABLE READ") if is_server else connection


def _check_empty(connection: Connection) -> None:
    for table in metadata.sorted_tables:
        if table not in _SEEDED and connection.scalar(select(func.count()).select_from(table)):
            raise ConfigurationError(
                f"the target has content already (in its table {table.name}): copy into a new, empty database"
            )


def _copy(read: Connection, write: Connection, table: Table, progress: Callable[[str, int, int], None]) -> int:
    total = read.scalar(select(func.count()).select_from(table)) or 0
    copied = 0
    # In the order of their keys: a row that refers to another of its table comes after it.
    rows = read.execution_options(yield_per=_CHUNK).execute(select(table).order_by(*table.primary_key.columns))
    for chunk in rows.mappings().partitions():
        write.execute(insert(table), [dict(row) for row in chunk])
        copied += len(chunk)
        progress(table.name, copied, total)
    _count_on(write, table)
    return copied


def _count_on(connection: Connection, table: Table) -> None:
    """Let PostgreSQL number new rows after those that were copied; SQLite does so by itself."""
    column = table.autoincrement_column
    if column is None or not isinstance(column.type, Integer) or connection.dialect.name != "postgresql":
        return
    highest = select(func.coalesce(func.max(column), 0)).scalar_subquery()
    connection.execute(select(func.setval(func.pg_get_serial_sequence(table.name, column.name), highest + 1, False)))
