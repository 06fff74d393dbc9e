"""Which manifests have another as their subject."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from registry.metadata.tables import manifest, repository, repository_manifest
from storage.digest import Digest
from storage.names import RepositoryName


@dataclass(frozen=True, slots=True)
class Referrer:
    """A manifest that has a subject."""

    digest: str
    media_type: str
    size: int
    artifact_type: str


def find(connection: Connection, name: RepositoryName, subject: Digest) -> list[Referrer]:
    """Return the manifests of a repository that have `subject` as their subject, by digest."""
    query = (
        select(
            manifest.c.digest,
            repository_manifest.c.media_type,
            manifest.c.size,
            manifest.c.artifact_type,
        )
        .join(repository_manifest, repository_manifest.c.manifest_id == manifest.c.id)
        .join(repository, repository.c.id == repository_manifest.c.repository_id)
        .where(repository.c.name == name, manifest.c.subject == str(subject))
        .order_by(manifest.c.digest)
    )
    return [Referrer(*row) for row in connection.execute(query)]


def annotations_of(connection: Connection, digests: list[str]) -> dict[str, str]:
    """Return the annotations of manifests, each a JSON object."""
    query = select(manifest.c.digest, manifest.c.annotations).where(manifest.c.digest.in_(digests))
    return {row.digest: row.annotations for row in connection.execute(query)}


def present(connection: Connection, name: RepositoryName, digests: list[str]) -> set[str]:
    """Return which of `digests` are manifests of a repository."""
    query = (
        select(manifest.c.digest)
        .join(repository_manifest, repository_manifest.c.manifest_id == manifest.c.id)
        .join(repository, repository.c.id == repository_manifest.c.repository_id)
        .where(repository.c.name == name, manifest.c.digest.in_(digests))
    )
    return set(connection.scalars(query))
