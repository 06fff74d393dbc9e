"""Upload sessions: what the registry knows of bytes on their way in.

A session is written to by one request at a time, whichever process serves it: the request claims the row, and
lets go of it with the new offset. A claim that nobody renewed for `LEASE` belongs to a process that died, or will find
that it was thought to be dead; the session is torn then: the store may hold more than its row knows, and may be given
more. So what such an upload, or one that never became a blob, leaves in the store is a row of its own, until it can be
forgotten (`leftovers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, func, insert, or_, select, update

from registry.errors import BlobUploadUnknown, UploadConflict
from registry.metadata import leftovers
from registry.metadata.prepared import Prepared
from registry.metadata.tables import blob, now, upload_session
from storage.base import Checkpoint
from storage.digest import Digest
from storage.names import RepositoryName

#: Microseconds. Renewed at every checkpoint; longer than a client may keep silent.
LEASE: Final = 150_000_000


_create: Final = Prepared(
    insert(upload_session).values(
        id=bindparam("session_id"),
        repository=bindparam("repository"),
        key=bindparam("key"),
        algorithm=bindparam("algorithm"),
        offset=bindparam("offset"),
        state=bindparam("state"),
        is_torn=bindparam("torn"),
        opened_by=bindparam("opener"),
        claimed_at=0,
        created_at=bindparam("at"),
        updated_at=bindparam("at"),
    )
)
_columns: Final = (
    upload_session.c.id,
    upload_session.c.repository,
    upload_session.c.key,
    upload_session.c.algorithm,
    upload_session.c.offset,
    upload_session.c.state,
    upload_session.c.is_torn,
)
_is_named: Final = and_(
    upload_session.c.id == bindparam("session_id"), upload_session.c.repository == bindparam("name")
)
_is_free: Final = or_(upload_session.c.writer.is_(None), upload_session.c.claimed_at < bindparam("expired"))
_find: Final = Prepared(select(*_columns).where(_is_named))
_opener: Final = Prepared(select(upload_session.c.opened_by).where(_is_named))
_claim: Final = Prepared(
    update(upload_session)
    .where(_is_named, _is_free)
    .values(
        writer=bindparam("by"),
        claimed_at=bindparam("at"),
        is_torn=or_(upload_session.c.is_torn, upload_session.c.writer.is_not(None)),
    )
    .returning(*_columns, select(blob.c.id).where(blob.c.digest == bindparam("digest")).exists())
)
_advance: Final = Prepared(
    update(upload_session)
    .where(upload_session.c.id == bindparam("session_id"), upload_session.c.writer == bindparam("by"))
    .values(
        offset=bindparam("to"),
        state=bindparam("new_state"),
        writer=bindparam("next_writer"),
        claimed_at=bindparam("at"),
        updated_at=bindparam("at"),
    )
)


@dataclass(frozen=True, slots=True)
class Session:
    """An upload session and where it stands.

    Attributes:
        id: its name, and that of its upload in the store.
        repository: where it ends.
        checkpoint: where it stands.
        is_torn: the store may hold more of it than the checkpoint knows.
    """

    id: str
    repository: RepositoryName
    checkpoint: Checkpoint
    is_torn: bool = False


def create(
    connection: Connection,
    session_id: str,
    repository: RepositoryName,
    start: Checkpoint,
    *,
    is_torn: bool = False,
    opened_by: int = 0,
) -> None:
    """Open a session; `is_torn` says that the store may hold more of it than `start` knows."""
    _create.change(
        connection,
        session_id=session_id,
        repository=repository,
        key=start.key,
        algorithm=start.algorithm,
        offset=start.offset,
        state=start.state,
        torn=is_torn,
        opener=opened_by,
        at=now(),
    )


def find(connection: Connection, session_id: str, repository: RepositoryName) -> Session:
    """Return an open session, or raise `BlobUploadUnknown`."""
    row = _find.first(connection, session_id=session_id, name=repository)
    if row is None:
        raise BlobUploadUnknown
    return _session(row)


def opener(connection: Connection, session_id: str, repository: RepositoryName) -> int:
    """Return the id of the account that opened a session, 0 for nobody's. Raises `BlobUploadUnknown`."""
    found = _opener.scalar(connection, session_id=session_id, name=repository)
    if found is None:
        raise BlobUploadUnknown
    return int(found)


def claim(
    connection: Connection, session_id: str, repository: RepositoryName, writer: str, digest: Digest | None = None
) -> tuple[Session, bool]:
    """Make `writer` the only one who may write.

    Returns:
        The session, and whether the bytes of `digest`, which it shall end as, are in the store already.

    Raises:
        BlobUploadUnknown: there is no such session.
        UploadConflict: another writer holds it.
    """
    at = now()
    row = _claim.first(
        connection,
        session_id=session_id,
        name=repository,
        by=writer,
        at=at,
        expired=at - LEASE,
        digest=str(digest) if digest else "",
    )
    if row is None:
        find(connection, session_id, repository)
        raise UploadConflict
    *columns, is_stored = row
    return _session(columns), bool(is_stored)


def _session(row: Sequence[Any]) -> Session:
    session_id, repository, *checkpoint, is_torn = row
    return Session(session_id, RepositoryName(repository), Checkpoint(*checkpoint), bool(is_torn))


def advance(connection: Connection, session_id: str, writer: str, checkpoint: Checkpoint, *, release: bool) -> None:
    """Record how far `writer` came; with `release`, let go of the session.

    Raises:
        BlobUploadUnknown: it was cancelled meanwhile, or the claim went to somebody else.
    """
    advanced = _advance.change(
        connection,
        session_id=session_id,
        by=writer,
        to=checkpoint.offset,
        new_state=checkpoint.state,
        next_writer=None if release else writer,
        at=now(),
    )
    if not advanced:
        raise BlobUploadUnknown


def renew(connection: Connection, session_id: str, writer: str) -> bool:
    """Make a claim begin anew; False where `writer` has it no more."""
    renewed = update(upload_session).where(*_held(session_id, writer)).values(claimed_at=now())
    return bool(connection.execute(renewed).rowcount)


def release(connection: Connection, session_id: str, writer: str) -> None:
    """Let go of a claim under which nothing was written; none there is fine."""
    connection.execute(update(upload_session).where(*_held(session_id, writer)).values(writer=None))


def _held(session_id: str, writer: str) -> tuple[ColumnElement[bool], ...]:
    return upload_session.c.id == session_id, upload_session.c.writer == writer


def remove(connection: Connection, session_id: str, repository: RepositoryName, writer: str | None = None) -> None:
    """End a session whose bytes nobody needs: anybody's, or that which `writer` holds.

    Raises:
        BlobUploadUnknown: there is none.
    """
    ended = delete(upload_session).where(upload_session.c.id == session_id, upload_session.c.repository == repository)
    if writer is not None:
        ended = ended.where(upload_session.c.writer == writer)
    if not connection.execute(ended).rowcount:
        raise BlobUploadUnknown
    leftovers.add(connection, [session_id])


def sweep(connection: Connection, idle: int, limit: int = 500) -> list[str]:
    """End sessions in which nothing happened for `idle` microseconds; return their ids."""
    at = now()
    is_idle = and_(
        upload_session.c.updated_at < at - idle,
        or_(upload_session.c.writer.is_(None), upload_session.c.claimed_at < at - LEASE),
    )
    old = select(upload_session.c.id).where(is_idle).limit(limit)
    # Asked twice: somebody may go on with one in between.
    ended = delete(upload_session).where(upload_session.c.id.in_(old), is_idle).returning(upload_session.c.id)
    ids = list(connection.scalars(ended))
    leftovers.add(connection, ids)
    return ids


def release_all(connection: Connection) -> None:
    """Forget every claim: for the start of the only server, when all who held one are dead."""
    held = upload_session.c.writer.is_not(None)
    connection.execute(update(upload_session).where(held).values(writer=None, is_torn=True))


def count(connection: Connection) -> int:
    """Return the number of open sessions."""
    return connection.scalar(select(func.count()).select_from(upload_session)) or 0


def known(connection: Connection, ids: list[str]) -> set[str]:
    """Return which of `ids` belong to an open session."""
    return set(connection.scalars(select(upload_session.c.id).where(upload_session.c.id.in_(ids))))


def probe(connection: Connection) -> None:
    """Prove that the database can be written to; changes nothing."""
    connection.execute(delete(upload_session).where(upload_session.c.id == ""))
