"""Statements of the hot paths: written in SQLAlchemy's terms, compiled once, run by the driver itself.

For a look-up by key SQLAlchemy takes ten times as long as SQLite does. What is left out here is what these statements
do not need: types that must be converted, and rows with names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Dialect, Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A statement in one driver's words.

    Attributes:
        text: as the driver takes it.
        order: of its values, where the driver takes them by place; else None.
        constants: values that stand in the statement.
    """

    text: str
    order: Sequence[str] | None
    constants: Mapping[str, Any]


class Prepared:
    """A statement with named parameters."""

    def __init__(self, statement: Executable) -> None:
        """Prepare `statement`, whose values are all `bindparam`s, numbers, texts or bytes."""
        self._statement: Final = statement
        self._compiled: dict[str, _Compiled] = {}

    def first(self, connection: Connection, **parameters: Any) -> Any:
        """Run it and return the first row as a tuple, or None."""
        rows = self.all(connection, **parameters)
        return rows[0] if rows else None

    def scalar(self, connection: Connection, **parameters: Any) -> Any:
        """Run it and return the first value of the first row, or None."""
        row = self.first(connection, **parameters)
        return row[0] if row else None

    def all(self, connection: Connection, **parameters: Any) -> list[Any]:
        """Run it and return all rows as tuples."""
        found: list[Any] = self._run(connection, parameters).fetchall()
        return found

    def change(self, connection: Connection, **parameters: Any) -> int:
        """Run it and return how many rows it changed."""
        count: int = self._run(connection, parameters).rowcount
        return count

    def _run(self, connection: Connection, parameters: Mapping[str, Any]) -> Any:
        dialect = connection.dialect
        compiled = self._compiled.get(dialect.name) or self._compile(dialect)
        given = {**compiled.constants, **parameters} if compiled.constants else parameters
        values = given if compiled.order is None else [given[name] for name in compiled.order]
        kind = dialect.loaded_dbapi.Error
        try:
            return driver(connection).execute(compiled.text, values)
        except kind as error:
            raise DBAPIError.instance(
                compiled.text, None, error, kind, hide_parameters=True, dialect=dialect
            ) from error

    def _compile(self, dialect: Dialect) -> _Compiled:
        compiled = self._statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        assert isinstance(compiled, SQLCompiler)
        constants = {name: value for name, value in compiled.params.items() if value is not None}
        made = _Compiled(compiled.string, compiled.positiontup if compiled.positional else None, constants)
        self._compiled[dialect.name] = made
        return made


def driver(connection: Connection) -> Any:
    """Return the driver's own connection behind one of SQLAlchemy's."""
    return connection.connection.driver_connection
