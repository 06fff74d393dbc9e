"""Manifests: their bytes, what they point to, and which repository holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from sqlalchemy import Connection, and_, bindparam, delete, exists, func, insert, select, update

from registry.errors import ManifestBlobUnknown, ManifestUnknown
from registry.metadata import repositories, tags
from registry.metadata.engine import hold_still
from registry.metadata.prepared import Prepared
from registry.metadata.tables import (
    blob,
    manifest,
    manifest_reference,
    now,
    repository,
    repository_blob,
    repository_manifest,
    tag,
)
from storage.digest import Digest
from storage.names import RepositoryName, Tag
from storage.oci import INDEXES, Link, Manifest, Relation

_INTEGER_LIMIT: Final = 2**63 - 1
#: What is listed of a manifest with each of its tags: so many platforms, each of so many characters.
_PLATFORMS_LIMIT: Final = 100
_PLATFORM_LENGTH: Final = 100


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


_columns: Final = (
    select(manifest.c.digest, repository_manifest.c.media_type, manifest.c.content)
    .join(repository_manifest, repository_manifest.c.manifest_id == manifest.c.id)
    .join(repository, repository.c.id == repository_manifest.c.repository_id)
    .where(repository.c.name == bindparam("name"))
)
_by_digest: Final = Prepared(_columns.where(manifest.c.digest == bindparam("digest")))
_by_tag: Final = Prepared(
    _columns.join(tag, and_(tag.c.repository_id == repository.c.id, tag.c.manifest_id == manifest.c.id)).where(
        tag.c.name == bindparam("tag")
    )
)


def find(connection: Connection, name: RepositoryName, reference: Tag | Digest) -> StoredManifest | None:
    """Return the manifest that a tag points to, or that has a digest, in this repository. One statement."""
    if isinstance(reference, Digest):
        row = _by_digest.first(connection, name=name, digest=str(reference))
    else:
        row = _by_tag.first(connection, name=name, tag=reference)
    return StoredManifest(Digest.parse(row[0]), row[1], row[2]) if row else None


def put(
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
    # Nothing is changed before it is known to be good: what must be undone costs all who commit together.
    found = _resolve(connection, repositories.find(connection, name), pushed.facts.links)
    missing = [link for link in pushed.facts.links if link.is_required and not found[link.digest].is_held]
    if missing and not sparse:
        wanted = {str(link.digest): link.descriptor.media_type for link in missing}
        raise ManifestBlobUnknown(list(wanted.items()))
    if any(entry.is_absent for entry in found.values()):
        # It may be coming just now: whoever brings it must see that it is awaited, or we that it is here.
        hold_still(connection, blob, manifest)
        found = _resolve(connection, repositories.find(connection, name), pushed.facts.links)
    repository_id = repositories.ensure(connection, name)
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
    #: Of a child that the repository holds: what others push elsewhere is nobody's business here.
    child_size: int | None = None
    is_held: bool = False

    @property
    def is_absent(self) -> bool:
        return self.blob_id is None and self.child_id is None


def _resolve(connection: Connection, repository_id: int | None, links: Sequence[Link]) -> dict[Digest, _Found]:
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
            entry.child_id, entry.child_size = row[1], row[2] if row[3] else None
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
    return link.descriptor.size if found.child_size is None else found.child_size


def _platforms(pushed: PushedManifest) -> list[str]:
    named = pushed.platforms
    if pushed.facts.media_type in INDEXES:
        named = [str(link.descriptor.platform) for link in pushed.facts.links if link.descriptor.platform]
        named = [name for name in named if name and not name.startswith("unknown/")]
    return [name for name in dict.fromkeys(named) if len(name) <= _PLATFORM_LENGTH][:_PLATFORMS_LIMIT]


def _hold(connection: Connection, repository_id: int, manifest_id: int, media_type: str, by: str) -> None:
    link = {"repository_id": repository_id, "manifest_id": manifest_id}
    values = {"media_type": media_type, "pushed_at": now(), "pushed_by": by}
    updated = connection.execute(update(repository_manifest).filter_by(**link).values(**values))
    if not updated.rowcount:
        connection.execute(insert(repository_manifest).values(**link, **values))


def remove(connection: Connection, name: RepositoryName, digest: Digest, by: str) -> None:
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
    # Whoever deletes it elsewhere at this moment waits here, or both would leave it to the other.
    connection.execute(select(manifest.c.id).where(manifest.c.id == row.manifest_id).with_for_update())
    others = select(func.count()).where(repository_manifest.c.manifest_id == row.manifest_id)
    if not connection.scalar(others):
        connection.execute(delete(manifest).where(manifest.c.id == row.manifest_id))
