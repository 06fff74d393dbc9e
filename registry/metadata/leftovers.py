"""Uploads that are over, and whose bytes the store is to forget.

Not at once: a process that was thought to be dead may still be writing. And not only once: this row goes when the bytes
are gone, whoever dies in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sqlalchemy import Connection, delete, insert, select, update

from registry.metadata.tables import leftover, now

#: Microseconds after which nobody writes to an upload any more, however late a request of his arrives.
GRACE: Final = 900_000_000


class Leftover(NamedTuple):
    """What an upload left; `kept` is the key of the part of it that became a blob."""

    upload: str
    kept: str | None


def add(connection: Connection, uploads: Sequence[str], kept: str | None = None) -> None:
    """Note that these uploads are over, and of one of them what became a blob. What is noted already stays."""
    if not uploads:
        return
    at = now()
    noted = set(connection.scalars(select(leftover.c.upload).where(leftover.c.upload.in_(uploads))))
    rows = [{"upload": upload, "kept": kept, "at": at} for upload in uploads if upload not in noted]
    if rows:
        connection.execute(insert(leftover), rows)


def find(connection: Connection, upload: str) -> Leftover | None:
    """Return what an upload that is over left, None if it left nothing or is not over."""
    row = connection.execute(select(leftover.c.upload, leftover.c.kept).where(leftover.c.upload == upload)).first()
    return Leftover(*row) if row else None


def due(connection: Connection, grace: int = GRACE, limit: int = 500) -> list[Leftover]:
    """Return those that ended more than `grace` microseconds ago, the oldest first."""
    query = (
        select(leftover.c.upload, leftover.c.kept)
        .where(leftover.c.at < now() - grace)
        .order_by(leftover.c.at)
        .limit(limit)
    )
    return [Leftover(*row) for row in connection.execute(query)]


def postpone(connection: Connection, uploads: Sequence[str]) -> None:
    """Let those that could not be deleted now wait for their turn after all others."""
    connection.execute(update(leftover).where(leftover.c.upload.in_(uploads)).values(at=now()))


def forget(connection: Connection, uploads: Sequence[str]) -> None:
    """Forget those of which the store has nothing any more."""
    connection.execute(delete(leftover).where(leftover.c.upload.in_(uploads)))
