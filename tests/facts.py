"""What a database holds, asked from outside."""

from __future__ import annotations

from typing import Any

from sqlalchemy import NullPool, create_engine, text

from registry.metadata.engine import parse_url


def query(url: str, sql: str) -> list[tuple[Any, ...]]:
    """Return the rows of a statement, seen by a connection of its own."""
    engine = create_engine(parse_url(url), poolclass=NullPool)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(sql))]
