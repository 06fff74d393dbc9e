"""The keys that tokens are signed by: one after another, each honoured as long as what it signed can be asked about."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, delete, insert, select

from registry.metadata.engine import hold_still
from registry.metadata.tables import now, signing_key


class Key(NamedTuple):
    """A key: its id, its private half as PEM, and when it was made, in microseconds since the epoch."""

    id: str
    private: str
    created_at: int


def everything(connection: Connection) -> list[Key]:
    """Return all keys, the newest first."""
    query = select(signing_key.c.id, signing_key.c.private, signing_key.c.created_at)
    return [Key(*row) for row in connection.execute(query.order_by(signing_key.c.created_at.desc()))]


def renew(connection: Connection, key_id: str, private: str, age: int, kept: int) -> list[Key]:
    """Add a key unless there is one that is younger than `age`; forget those that were replaced `kept` ago.

    Args:
        connection: to the database.
        key_id: of the new key.
        private: half of the new key, as PEM.
        age: microseconds after which a key signs no more.
        kept: microseconds that what it signed may be asked about after that.

    Returns:
        All keys, the newest first.
    """
    hold_still(connection, signing_key)
    at = now()
    newest = next(iter(everything(connection)), None)
    if newest is None or newest.created_at <= at - age:
        connection.execute(insert(signing_key).values(id=key_id, private=private, created_at=at))
    connection.execute(delete(signing_key).where(signing_key.c.created_at < at - age - kept))
    return everything(connection)
