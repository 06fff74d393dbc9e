"""Blobs: which bytes are in the store, and which repository holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from sqlalchemy import Connection, and_, bindparam, delete, func, insert, select, update

from registry.errors import BlobUnknown, BlobUploadUnknown
from registry.metadata import audit, leftovers, repositories
from registry.metadata.audit import Event
from registry.metadata.prepared import Prepared
from registry.metadata.tables import blob, manifest_reference, now, repository, repository_blob, upload_session
from storage.digest import Digest
from storage.names import RepositoryName


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Where the bytes of a blob lie, and how many."""

    key: str
    size: int


class Placed(NamedTuple):
    """A blob, and where its bytes are."""

    id: int
    digest: Digest
    key: str
    size: int


class _Known(NamedTuple):
    """What there is before a blob is added."""

    blob_id: int | None
    repository_id: int | None


_find: Final = Prepared(
    select(blob.c.key, blob.c.size)
    .join(repository_blob, repository_blob.c.blob_id == blob.c.id)
    .join(repository, repository.c.id == repository_blob.c.repository_id)
    .where(repository.c.name == bindparam("name"), blob.c.digest == bindparam("digest"))
)
_with_digest: Final = select(blob.c.id).where(blob.c.digest == bindparam("digest"))
_id: Final = Prepared(_with_digest)
_insert: Final = Prepared(
    insert(blob)
    .values(
        digest=bindparam("digest"),
        size=bindparam("size"),
        key=bindparam("key"),
        created_at=bindparam("at"),
        touched_at=bindparam("at"),
    )
    .returning(blob.c.id)
)
_touch: Final = Prepared(update(blob).where(blob.c.id == bindparam("blob_id")).values(touched_at=bindparam("at")))
_is_linked: Final = Prepared(
    select(repository_blob.c.blob_id).where(
        repository_blob.c.repository_id == bindparam("repository_id"), repository_blob.c.blob_id == bindparam("blob_id")
    )
)
_link: Final = Prepared(
    insert(repository_blob).values(
        repository_id=bindparam("repository_id"), blob_id=bindparam("blob_id"), created_at=bindparam("at")
    )
)
_waiting: Final = and_(manifest_reference.c.digest == bindparam("digest"), manifest_reference.c.blob_id.is_(None))
#: All that is to be known before a blob is added, in one statement.
_known: Final = Prepared(select(_with_digest.scalar_subquery(), repositories.ID.scalar_subquery()))
_fill_references: Final = Prepared(update(manifest_reference).where(_waiting).values(blob_id=bindparam("found")))
_delete_session: Final = Prepared(
    delete(upload_session)
    .where(upload_session.c.id == bindparam("session_id"), upload_session.c.writer == bindparam("by"))
    .returning(upload_session.c.is_torn)
)


def find(connection: Connection, name: RepositoryName, digest: Digest) -> StoredBlob | None:
    """Return a blob that the repository holds."""
    row = _find.first(connection, name=name, digest=str(digest))
    return StoredBlob(*row) if row else None


def holders(connection: Connection, digest: Digest, limit: int = 100) -> list[str]:
    """Return names of repositories that hold the blob."""
    return list(
        connection.scalars(
            select(repository.c.name)
            .join(repository_blob, repository_blob.c.repository_id == repository.c.id)
            .join(blob, blob.c.id == repository_blob.c.blob_id)
            .where(blob.c.digest == str(digest))
            .limit(limit)
        )
    )


def mount(
    connection: Connection,
    source: RepositoryName,
    target: RepositoryName,
    digest: Digest,
    event: Event | None = None,
) -> bool:
    """Make a blob of `source` visible in `target` too, and keep the event; False where `source` does not hold it."""
    if find(connection, source, digest) is None or not _link_existing(connection, target, digest):
        return False
    audit.add(connection, event)
    return True


def _link_existing(connection: Connection, name: RepositoryName, digest: Digest) -> bool:
    at = now()
    blob_id = _id.scalar(connection, digest=str(digest))
    if blob_id is None:
        return False
    _touch.change(connection, blob_id=blob_id, at=at)
    repository_id = repositories.ensure(connection, name)
    if _is_linked.scalar(connection, repository_id=repository_id, blob_id=blob_id) is None:
        _link.change(connection, repository_id=repository_id, blob_id=blob_id, at=at)
    return True


def finish_with_existing(
    connection: Connection,
    session_id: str,
    writer: str,
    name: RepositoryName,
    digest: Digest,
    event: Event | None = None,
) -> bool:
    """End an upload whose bytes are in the store already; False where they are not, and nothing changed.

    Raises:
        BlobUploadUnknown: the session was cancelled meanwhile.
    """
    if not _link_existing(connection, name, digest):
        return False
    _end_session(connection, session_id, writer)
    leftovers.add(connection, [session_id])
    audit.add(connection, event)
    return True


def finish_upload(
    connection: Connection,
    session_id: str,
    writer: str,
    name: RepositoryName,
    digest: Digest,
    stored: StoredBlob,
    *,
    is_tidy: bool = True,
) -> bool:
    """End an upload whose bytes now lie under `stored.key`, and `add` them.

    `is_tidy` says that the store holds nothing else of this upload.

    Raises:
        BlobUploadUnknown: the session was cancelled meanwhile; ours is to be deleted.
    """
    is_torn = _end_session(connection, session_id, writer)
    is_ours = add(connection, name, digest, stored)
    if is_torn or not is_tidy or not is_ours:
        leftovers.add(connection, [session_id], _key(connection, digest))
    return is_ours


def add(connection: Connection, name: RepositoryName, digest: Digest, stored: StoredBlob) -> bool:
    """Make bytes that lie in the store a blob of a repository.

    Returns:
        False where another upload of the same bytes was first: its copy serves, and ours is to be deleted.
    """
    known = _Known(*_known.first(connection, name=name, digest=str(digest)))
    if known.blob_id is not None:
        return not _link_existing(connection, name, digest)
    at = now()
    blob_id = _insert.scalar(connection, digest=str(digest), size=stored.size, key=stored.key, at=at)
    repository_id = known.repository_id or repositories.ensure(connection, name)
    _link.change(connection, repository_id=repository_id, blob_id=blob_id, at=at)
    # Sparse manifests may have waited for these bytes; from now on they keep them.
    _fill_references.change(connection, digest=str(digest), found=blob_id)
    return True


def add_of(connection: Connection, upload: str, name: RepositoryName, digest: Digest, stored: StoredBlob) -> bool:
    """`add` the bytes of an upload without a session, of which the store holds more."""
    is_ours = add(connection, name, digest, stored)
    leftovers.add(connection, [upload], _key(connection, digest))
    return is_ours


def _key(connection: Connection, digest: Digest) -> str | None:
    """Return where the bytes of a blob lie: it may be of this upload, or of another."""
    return connection.scalar(select(blob.c.key).where(blob.c.digest == str(digest)))


def _end_session(connection: Connection, session_id: str, writer: str) -> bool:
    """End a session that `writer` holds; return whether it was torn."""
    row = _delete_session.first(connection, session_id=session_id, by=writer)
    if row is None:
        raise BlobUploadUnknown
    return bool(row[0])


def remove(connection: Connection, name: RepositoryName, digest: Digest) -> None:
    """Make a blob invisible in a repository; others keep it. Raises `BlobUnknown`."""
    link = (
        select(repository_blob.c.repository_id, repository_blob.c.blob_id)
        .join(repository, repository.c.id == repository_blob.c.repository_id)
        .join(blob, blob.c.id == repository_blob.c.blob_id)
        .where(repository.c.name == name, blob.c.digest == str(digest))
    )
    row = connection.execute(link).first()
    if row is None:
        raise BlobUnknown
    connection.execute(delete(repository_blob).filter_by(**row._mapping))


def placed(connection: Connection, last: int, limit: int) -> list[Placed]:
    """Return up to `limit` blobs with ids above `last`, in their order."""
    query = select(blob.c.id, blob.c.digest, blob.c.key, blob.c.size).where(blob.c.id > last)
    rows = connection.execute(query.order_by(blob.c.id).limit(limit))
    return [Placed(row.id, Digest.parse(row.digest), row.key, row.size) for row in rows]


def total_size(connection: Connection) -> int:
    """Return the bytes of all blobs."""
    return int(connection.scalar(select(func.sum(blob.c.size))) or 0)


def known_keys(connection: Connection, keys: list[str]) -> set[str]:
    """Return which of `keys` a blob row names."""
    return set(connection.scalars(select(blob.c.key).where(blob.c.key.in_(keys))))
