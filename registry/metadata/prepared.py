"""Statements of the hot paths: written in SQLAlchemy's terms, compiled once, run by the driver itself.

For a look-up by key SQLAlchemy takes ten times as long as SQLite does. What is left out here is what these statements
do not need: types that must be converted, and rows with names.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Dialect, Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler


class Prepared:
    """A statement with named parameters."""

    def __init__(self, statement: Executable) -> None:
        """Prepare `statement`, whose values are all `bindparam`s, numbers, texts or bytes."""
        self._statement = statement
        self._compiled: tuple[str, tuple[str, ...], dict[str, Any]] | None = None

    def first(self, connection: Connection, **parameters: Any) -> Any:
        """Run it and return the first row as a tuple, or None."""
        rows = self._run(connection, parameters).fetchall()
        return rows[0] if rows else None

    def scalar(self, connection: Connection, **parameters: Any) -> Any:
        """Run it and return the first value of the first row, or None."""
        row = self.first(connection, **parameters)
        return row[0] if row else None

    def change(self, connection: Connection, **parameters: Any) -> int:
        """Run it and return how many rows it changed."""
        count: int = self._run(connection, parameters).rowcount
        return count

    def _run(self, connection: Connection, parameters: Mapping[str, Any]) -> Any:
        text, names, constants = self._compiled or self._compile(connection.dialect)
        given = {**constants, **parameters} if constants else parameters
        try:
            return driver(connection).execute(text, [given[name] for name in names])
        except sqlite3.Error as error:
            raise DBAPIError.instance(
                text, None, error, sqlite3.Error, hide_parameters=True, dialect=connection.dialect
            ) from error

    def _compile(self, dialect: Dialect) -> tuple[str, tuple[str, ...], dict[str, Any]]:
        compiled = self._statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        assert isinstance(compiled, SQLCompiler)
        constants = {name: value for name, value in compiled.params.items() if value is not None}
        self._compiled = compiled.string, tuple(compiled.positiontup or ()), constants
        return self._compiled


def driver(connection: Connection) -> Any:
    """Return the driver's own connection behind one of SQLAlchemy's."""
    return connection.connection.driver_connection
