"""Who did what, and what was refused to whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from sqlalchemy import Connection, bindparam, delete, insert, select

from registry.metadata import repositories
from registry.metadata.prepared import Prepared
from registry.metadata.tables import audit_event, now

P = ParamSpec("P")
T = TypeVar("T")

DONE: Final = "done"
REFUSED: Final = "refused"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was done, or was not to be done.

    Attributes:
        actor: name of an account; empty for nobody's.
        credential: what it came with, such as `password` or `token 12`.
        address: of the client.
        action: such as `manifest.push`.
        outcome: DONE or REFUSED.
        repository: empty where it was about none.
        target: a tag, a digest, the name of an account.
        detail: more of it, for people.
        request_id: as in the log.
        at: microseconds since the epoch.
    """

    actor: str
    credential: str
    address: str
    action: str
    outcome: str = DONE
    repository: str = ""
    target: str = ""
    detail: str = ""
    request_id: str = ""
    at: int = field(default_factory=now)


_FIELDS: Final = tuple(Event.__dataclass_fields__)
_insert: Final = Prepared(insert(audit_event).values({name: bindparam(f"new_{name}") for name in _FIELDS}))


def add(connection: Connection, event: Event | None) -> None:
    """Keep an event, if there is one."""
    if event is not None:
        _insert.change(connection, **{f"new_{name}": getattr(event, name) for name in _FIELDS})


def add_all(connection: Connection, events: list[Event]) -> None:
    """Keep events."""
    for event in events:
        add(connection, event)


def audited(
    connection: Connection,
    event: Event | None,
    unit: Callable[Concatenate[Connection, P], T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Run a unit of work, and keep the event of it in the same transaction: both are there, or none."""
    result = unit(connection, *args, **kwargs)
    add(connection, event)
    return result


def find(
    connection: Connection, *, since: int, user: str | None, repository: str | None, before: int | None, limit: int
) -> list[tuple[int, Event]]:
    """Return events with their ids, the newest first.

    Args:
        connection: to the database.
        since: microseconds since the epoch.
        user: only those of an account.
        repository: only those of a repository and all below it.
        before: only those with a smaller id.
        limit: how many at most.
    """
    query: Any = select(audit_event.c.id, *(audit_event.c[name] for name in _FIELDS)).where(audit_event.c.at >= since)
    if user is not None:
        query = query.where(audit_event.c.actor == user)
    if repository is not None:
        name = audit_event.c.repository
        query = query.where((name == repository) | repositories.beneath(name, repository))
    if before is not None:
        query = query.where(audit_event.c.id < before)
    rows = connection.execute(query.order_by(audit_event.c.id.desc()).limit(limit))
    return [(row[0], Event(*row[1:])) for row in rows]


def forget(connection: Connection, before: int, limit: int = 10_000) -> int:
    """Delete up to `limit` events that are older than `before`, in microseconds; return how many."""
    old = select(audit_event.c.id).where(audit_event.c.at < before).limit(limit)
    return connection.execute(delete(audit_event).where(audit_event.c.id.in_(old))).rowcount


def actor_of(event: Event | None) -> str:
    """Return who did something, empty for nobody's account."""
    return event.actor if event else ""
