"""Whose facts these are: a name that a store can bear, so that it is not taken for another registry's."""

from __future__ import annotations

from sqlalchemy import Connection, select

from registry.metadata.tables import identity


def find(connection: Connection) -> str:
    """Return the name that this registry was given when its database was made."""
    name: str = connection.scalars(select(identity.c.id)).one()
    return name
