"""Tags, where they point, and where they pointed."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from registry.errors import ManifestUnknown, NameUnknown
from registry.metadata import repositories
from registry.metadata.tables import manifest, now, repository, repository_manifest, tag, tag_event
from storage.digest import Digest
from storage.names import RepositoryName, Tag


@dataclass(frozen=True, slots=True)
class TagDetail:
    """A tag and what it points to. Sizes in bytes, times in microseconds since the epoch."""

    name: str
    digest: str
    media_type: str
    image_size: int
    platforms: str
    updated_at: int
    updated_by: str


def move(connection: Connection, repository_id: int, name: Tag, manifest_id: int, digest: Digest, by: str) -> None:
    """Point a tag to a manifest of its repository. Pointing it where it points already is no event."""
    at = now()
    here = {"repository_id": repository_id, "name": name}
    current = connection.scalar(select(tag.c.manifest_id).filter_by(**here))
    if current == manifest_id:
        return
    values = {"manifest_id": manifest_id, "updated_at": at, "updated_by": by}
    # It may go between two looks.
    if current is None or not connection.execute(update(tag).filter_by(**here).values(**values)).rowcount:
        connection.execute(insert(tag).values(**here, **values))
    connection.execute(insert(tag_event).values(**here, digest=str(digest), at=at, by=by))


def remove(connection: Connection, repository_id: int, name: str, by: str) -> bool:
    """Delete a tag, keep its history; False where there is none."""
    here = {"repository_id": repository_id, "name": name}
    if not connection.execute(delete(tag).filter_by(**here)).rowcount:
        return False
    connection.execute(insert(tag_event).values(**here, digest=None, at=now(), by=by))
    return True


def delete_tag(connection: Connection, name: RepositoryName, tag_name: Tag, by: str) -> None:
    """Delete a tag; what it pointed to stays. Raises `ManifestUnknown`."""
    repository_id = connection.scalar(select(repository.c.id).where(repository.c.name == name))
    if repository_id is None or not remove(connection, repository_id, tag_name, by):
        raise ManifestUnknown(f"{name} has no tag {tag_name}")


def names(connection: Connection, name: RepositoryName, last: str, limit: int) -> list[str]:
    """Return up to `limit` tags after `last`, in ASCII order; raises `NameUnknown`."""
    repository_id = _repository(connection, name)
    query = (
        select(tag.c.name)
        .where(tag.c.repository_id == repository_id, tag.c.name > last)
        .order_by(tag.c.name)
        .limit(limit)
    )
    return list(connection.scalars(query))


def details(connection: Connection, name: RepositoryName, last: str, limit: int) -> list[TagDetail]:
    """Return up to `limit` tags after `last` with what they point to; raises `NameUnknown`."""
    repository_id = _repository(connection, name)
    holds = (repository_manifest.c.repository_id == tag.c.repository_id) & (
        repository_manifest.c.manifest_id == tag.c.manifest_id
    )
    query = (
        select(
            tag.c.name,
            manifest.c.digest,
            repository_manifest.c.media_type,
            manifest.c.image_size,
            manifest.c.platforms,
            tag.c.updated_at,
            tag.c.updated_by,
        )
        .join(repository_manifest, holds)
        .join(manifest, manifest.c.id == tag.c.manifest_id)
        .where(tag.c.repository_id == repository_id, tag.c.name > last)
        .order_by(tag.c.name)
        .limit(limit)
    )
    return [TagDetail(*row) for row in connection.execute(query)]


def pointing_to(connection: Connection, name: RepositoryName, digest: Digest) -> list[str]:
    """Return the tags of a repository that point to a manifest, in ASCII order."""
    query = (
        select(tag.c.name)
        .join(repository, repository.c.id == tag.c.repository_id)
        .join(manifest, manifest.c.id == tag.c.manifest_id)
        .where(repository.c.name == name, manifest.c.digest == str(digest))
        .order_by(tag.c.name)
    )
    return list(connection.scalars(query))


def _repository(connection: Connection, name: RepositoryName) -> int:
    repository_id = repositories.find(connection, name)
    if repository_id is None:
        raise NameUnknown(f"there is no repository {name}")
    return repository_id
