"""Blobs and manifests, and which repository holds which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from sqlalchemy import Connection, and_, bindparam, delete, exists, func, insert, select, update

from registry.errors import BlobUnknown, BlobUploadUnknown, ManifestBlobUnknown, ManifestUnknown
from registry.metadata import repositories, tags
from registry.metadata.tables import (
    blob,
    manifest,
    manifest_reference,
    now,
    repository,
    repository_blob,
    repository_manifest,
    tag,
    upload_session,
)
from storage.digest import Digest
from storage.names import RepositoryName, Tag
from storage.oci import INDEXES, Link, Manifest, Relation

_INTEGER_LIMIT: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Where the bytes of a blob lie, and how many."""

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest as a repository holds it."""

    digest: Digest
    media_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class PushedManifest:
    """A manifest as it was pushed.

    Attributes:
        facts: what was read from it.
        digest: over `content`, in the algorithm the client chose.
        content: its exact bytes.
        platforms: what the image's configuration says it is for; an index says it itself.
    """

    facts: Manifest
    digest: Digest
    content: bytes
    platforms: Sequence[str] = ()


# Statements of the hot path are built once: building one costs four times as much as running it.
_find_blob: Final = (
    select(blob.c.key, blob.c.size)
    .join(repository_blob, repository_blob.c.blob_id == blob.c.id)
    .join(repository, repository.c.id == repository_blob.c.repository_id)
    .where(repository.c.name == bindparam("name"), blob.c.digest == bindparam("digest"))
)
_exists_anywhere: Final = select(blob.c.id).where(blob.c.digest == bindparam("digest"))
_touch: Final = update(blob).where(blob.c.id == bindparam("blob_id")).values(touched_at=bindparam("at"))
_is_linked: Final = select(repository_blob.c.blob_id).where(
    repository_blob.c.repository_id == bindparam("repository_id"), repository_blob.c.blob_id == bindparam("blob_id")
)
_insert_link: Final = insert(repository_blob)
_insert_blob: Final = insert(blob)
_fill_references: Final = (
    update(manifest_reference)
    .where(manifest_reference.c.digest == bindparam("wanted"), manifest_reference.c.blob_id.is_(None))
    .values(blob_id=bindparam("found"))
)
_delete_session: Final = delete(upload_session).where(
    upload_session.c.id == bindparam("session_id"), upload_session.c.writer == bindparam("by")
)
_manifest: Final = (
    select(manifest.c.digest, repository_manifest.c.media_type, manifest.c.content)
    .join(repository_manifest, repository_manifest.c.manifest_id == manifest.c.id)
    .join(repository, repository.c.id == repository_manifest.c.repository_id)
    .where(repository.c.name == bindparam("name"))
)
_manifest_by_digest: Final = _manifest.where(manifest.c.digest == bindparam("digest"))
_manifest_by_tag: Final = _manifest.join(
    tag, and_(tag.c.repository_id == repository.c.id, tag.c.manifest_id == manifest.c.id)
).where(tag.c.name == bindparam("tag"))


# --- blobs -----------------------------------------------------------------------------------------------


def find_blob(connection: Connection, name: RepositoryName, digest: Digest) -> StoredBlob | None:
    """Return a blob that the repository holds."""
    row = connection.execute(_find_blob, {"name": name, "digest": str(digest)}).first()
    return StoredBlob(*row) if row else None


def exists_anywhere(connection: Connection, digest: Digest) -> bool:
    """Return whether any repository's blob has these bytes already."""
    return connection.scalar(_exists_anywhere, {"digest": str(digest)}) is not None


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


def mount_blob(connection: Connection, source: RepositoryName, target: RepositoryName, digest: Digest) -> bool:
    """Make a blob of `source` visible in `target` too; False where `source` does not hold it."""
    return find_blob(connection, source, digest) is not None and _link_existing(connection, target, digest)


def _link_existing(connection: Connection, name: RepositoryName, digest: Digest) -> bool:
    at = now()
    blob_id = connection.scalar(_exists_anywhere, {"digest": str(digest)})
    if blob_id is None:
        return False
    connection.execute(_touch, {"blob_id": blob_id, "at": at})
    _link(connection, repositories.ensure(connection, name), int(blob_id), at)
    return True


def _link(connection: Connection, repository_id: int, blob_id: int, at: int) -> None:
    link = {"repository_id": repository_id, "blob_id": blob_id}
    if connection.scalar(_is_linked, link) is None:
        connection.execute(_insert_link, {**link, "created_at": at})


def finish_with_existing(
    connection: Connection, session_id: str, writer: str, name: RepositoryName, digest: Digest
) -> bool:
    """End an upload whose bytes are in the store already; False where they are not, and nothing changed."""
    if not _link_existing(connection, name, digest):
        return False
    _end_session(connection, session_id, writer)
    return True


def finish_upload(
    connection: Connection,
    session_id: str,
    writer: str,
    name: RepositoryName,
    digest: Digest,
    stored: StoredBlob,
) -> bool:
    """End an upload whose bytes now lie under `stored.key`.

    Returns:
        False where another upload of the same bytes was first: its copy serves, and ours is to be deleted.

    Raises:
        BlobUploadUnknown: the session was cancelled meanwhile; ours is to be deleted.
    """
    _end_session(connection, session_id, writer)
    if _link_existing(connection, name, digest):
        return False
    at = now()
    row = {"digest": str(digest), "size": stored.size, "key": stored.key, "created_at": at, "touched_at": at}
    result = connection.execute(_insert_blob, row)
    assert result.inserted_primary_key is not None
    blob_id = int(result.inserted_primary_key[0])
    _link(connection, repositories.ensure(connection, name), blob_id, at)
    # Sparse manifests may have waited for these bytes; from now on they keep them.
    connection.execute(_fill_references, {"wanted": str(digest), "found": blob_id})
    return True


def _end_session(connection: Connection, session_id: str, writer: str) -> None:
    ended = connection.execute(_delete_session, {"session_id": session_id, "by": writer})
    if not ended.rowcount:
        raise BlobUploadUnknown


def delete_blob(connection: Connection, name: RepositoryName, digest: Digest) -> None:
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


def known_keys(connection: Connection, keys: list[str]) -> set[str]:
    """Return which of `keys` a blob row names."""
    return set(connection.scalars(select(blob.c.key).where(blob.c.key.in_(keys))))


# --- manifests -------------------------------------------------------------------------------------------


def find_manifest(connection: Connection, name: RepositoryName, reference: Tag | Digest) -> StoredManifest | None:
    """Return the manifest that a tag points to, or that has a digest, in this repository. One statement."""
    if isinstance(reference, Digest):
        row = connection.execute(_manifest_by_digest, {"name": name, "digest": str(reference)}).first()
    else:
        row = connection.execute(_manifest_by_tag, {"name": name, "tag": reference}).first()
    return StoredManifest(Digest.parse(row.digest), row.media_type, row.content) if row else None


def put_manifest(
    connection: Connection,
    name: RepositoryName,
    pushed: PushedManifest,
    moved: Sequence[Tag],
    by: str,
    *,
    sparse: bool,
) -> None:
    """Keep a manifest, with all of its tags or none.

    Args:
        connection: of the unit of work.
        name: the repository, made where absent.
        pushed: the manifest.
        moved: tags that shall point to it.
        by: who pushes.
        sparse: whether it may point to content that the repository does not hold.

    Raises:
        ManifestBlobUnknown: it points to content that is not in the repository, and not `sparse`.
    """
    repository_id = repositories.ensure(connection, name)
    found = _resolve(connection, repository_id, pushed.facts.links)
    missing = [link for link in pushed.facts.links if link.is_required and not found[link.digest].is_held]
    if missing and not sparse:
        wanted = {str(link.digest): link.descriptor.media_type for link in missing}
        raise ManifestBlobUnknown(list(wanted.items()))
    manifest_id = connection.scalar(select(manifest.c.id).where(manifest.c.digest == str(pushed.digest)))
    if manifest_id is None:
        manifest_id = _insert_manifest(connection, pushed, found)
    elif pushed.facts.links:
        _insert_references(connection, manifest_id, pushed.facts.links, found)
    _hold(connection, repository_id, manifest_id, pushed.facts.media_type, by)
    for name_of_tag in moved:
        tags.move(connection, repository_id, name_of_tag, manifest_id, pushed.digest, by)


@dataclass(slots=True)
class _Found:
    """What the database has under a digest that a manifest points to."""

    blob_id: int | None = None
    child_id: int | None = None
    child_size: int = 0
    is_held: bool = False


def _resolve(connection: Connection, repository_id: int, links: Sequence[Link]) -> dict[Digest, _Found]:
    found = {link.digest: _Found() for link in links}
    digests = [str(digest) for digest in found]
    children = [str(link.digest) for link in links if link.relation is Relation.CHILD]
    held_blob = exists().where(repository_blob.c.repository_id == repository_id, repository_blob.c.blob_id == blob.c.id)
    held_child = exists().where(
        repository_manifest.c.repository_id == repository_id,
        repository_manifest.c.manifest_id == manifest.c.id,
    )
    for chunk in _chunks(digests):
        for row in connection.execute(select(blob.c.digest, blob.c.id, held_blob).where(blob.c.digest.in_(chunk))):
            entry = found[Digest.parse(row[0])]
            entry.blob_id, entry.is_held = row[1], bool(row[2])
    for chunk in _chunks(children):
        query = select(manifest.c.digest, manifest.c.id, manifest.c.image_size, held_child)
        for row in connection.execute(query.where(manifest.c.digest.in_(chunk))):
            entry = found[Digest.parse(row[0])]
            entry.child_id, entry.child_size = row[1], row[2]
            # Build caches are indexes of blobs: either will do.
            entry.is_held = entry.is_held or bool(row[3])
    return found


def _chunks(digests: list[str], size: int = 500) -> list[list[str]]:
    return [digests[start : start + size] for start in range(0, len(digests), size)]


def _insert_manifest(connection: Connection, pushed: PushedManifest, found: dict[Digest, _Found]) -> int:
    facts = pushed.facts
    result = connection.execute(
        insert(manifest).values(
            digest=str(pushed.digest),
            size=len(pushed.content),
            content=pushed.content,
            subject=str(facts.subject) if facts.subject else None,
            artifact_type=facts.artifact_type,
            annotations=msgspec.json.encode(facts.annotations).decode(),
            # What a client writes into descriptors may add up to more than a database counts.
            image_size=min(_INTEGER_LIMIT, sum(_size(link, found[link.digest]) for link in facts.links)),
            platforms=msgspec.json.encode(_platforms(pushed)).decode(),
            created_at=now(),
        )
    )
    assert result.inserted_primary_key is not None
    manifest_id = int(result.inserted_primary_key[0])
    _insert_references(connection, manifest_id, facts.links, found)
    waiting = and_(
        manifest_reference.c.digest == str(pushed.digest),
        manifest_reference.c.child_id.is_(None),
        manifest_reference.c.relation == str(Relation.CHILD),
    )
    connection.execute(update(manifest_reference).where(waiting).values(child_id=manifest_id))
    return manifest_id


def _insert_references(
    connection: Connection, manifest_id: int, links: Sequence[Link], found: dict[Digest, _Found]
) -> None:
    """Record what a manifest points to, once; the same bytes may have come before under a type we do not know."""
    if not links or connection.scalar(select(func.count()).where(manifest_reference.c.manifest_id == manifest_id)):
        return
    rows = [
        {
            "manifest_id": manifest_id,
            "position": position,
            "relation": str(link.relation),
            "digest": str(link.digest),
            "size": link.descriptor.size,
            "blob_id": found[link.digest].blob_id,
            "child_id": found[link.digest].child_id,
        }
        for position, link in enumerate(links)
    ]
    connection.execute(insert(manifest_reference), rows)


def _size(link: Link, found: _Found) -> int:
    return found.child_size if link.relation is Relation.CHILD and found.child_id else link.descriptor.size


def _platforms(pushed: PushedManifest) -> list[str]:
    if pushed.facts.media_type not in INDEXES:
        return list(pushed.platforms)
    named = [str(link.descriptor.platform) for link in pushed.facts.links if link.descriptor.platform]
    return list(dict.fromkeys(name for name in named if name and not name.startswith("unknown/")))


def _hold(connection: Connection, repository_id: int, manifest_id: int, media_type: str, by: str) -> None:
    link = {"repository_id": repository_id, "manifest_id": manifest_id}
    values = {"media_type": media_type, "pushed_at": now(), "pushed_by": by}
    updated = connection.execute(update(repository_manifest).filter_by(**link).values(**values))
    if not updated.rowcount:
        connection.execute(insert(repository_manifest).values(**link, **values))


def delete_manifest(connection: Connection, name: RepositoryName, digest: Digest, by: str) -> None:
    """Delete a manifest from a repository, with all tags that point to it. Raises `ManifestUnknown`."""
    row = connection.execute(
        select(repository_manifest.c.repository_id, repository_manifest.c.manifest_id)
        .join(repository, repository.c.id == repository_manifest.c.repository_id)
        .join(manifest, manifest.c.id == repository_manifest.c.manifest_id)
        .where(repository.c.name == name, manifest.c.digest == str(digest))
    ).first()
    if row is None:
        raise ManifestUnknown
    for pointing in connection.scalars(select(tag.c.name).filter_by(**row._mapping)).all():
        tags.remove(connection, row.repository_id, pointing, by)
    connection.execute(delete(repository_manifest).filter_by(**row._mapping))
    others = select(func.count()).where(repository_manifest.c.manifest_id == row.manifest_id)
    if not connection.scalar(others):
        connection.execute(delete(manifest).where(manifest.c.id == row.manifest_id))
