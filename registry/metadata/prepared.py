"""Statements of the hot paths: written in SQLAlchemy's terms, compiled once, run by the driver itself.

For a look-up by key SQLAlchemy takes ten times as long as SQLite does. What is left out here is what these statements
do not need: types that must be converted, and rows with names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from sqlalchemy import Connection, Dialect, Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler

_Arrange = Callable[[Mapping[str, Any]], Any]


class Prepared:
    """A statement with named parameters, for whichever database a connection leads to."""

    def __init__(self, statement: Executable) -> None:
        """Prepare `statement`, whose values are all `bindparam`s, numbers, texts or bytes."""
        self._statement = statement
        self._compiled: dict[str, tuple[str, _Arrange]] = {}

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
        dialect = connection.dialect
        text, arrange = self._compiled.get(dialect.name) or self._compile(dialect)
        try:
            return driver(connection).execute(text, arrange(parameters))
        except dialect.loaded_dbapi.Error as error:
            base = dialect.loaded_dbapi.Error
            raise DBAPIError.instance(text, None, error, base, hide_parameters=True, dialect=dialect) from error

    def _compile(self, dialect: Dialect) -> tuple[str, _Arrange]:
        compiled = self._statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        assert isinstance(compiled, SQLCompiler)
        constants = {name: value for name, value in compiled.params.items() if value is not None}
        names: Final = compiled.positiontup

        def by_name(given: Mapping[str, Any]) -> Mapping[str, Any]:
            return {**constants, **given} if constants else given

        def by_position(given: Mapping[str, Any]) -> Any:
            values = by_name(given)
            return [values[name] for name in names or ()]

        result = self._compiled[dialect.name] = (compiled.string, by_position if compiled.positional else by_name)
        return result


def driver(connection: Connection) -> Any:
    """Return the driver's own connection behind one of SQLAlchemy's."""
    return connection.connection.driver_connection
