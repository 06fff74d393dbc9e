"""The facts that units of work keep, on every database in turn."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest
from sqlalchemy import Connection, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from registry.errors import (
    BlobUploadUnknown,
    ManifestBlobUnknown,
    NameUnknown,
    UploadConflict,
)
from registry.metadata import blobs, leftovers, manifests, repositories, sessions, tags
from registry.metadata.blobs import StoredBlob
from registry.metadata.engine import Database
from registry.metadata.leftovers import Leftover
from registry.metadata.manifests import PushedManifest
from registry.metadata.tables import blob, manifest, manifest_reference, now, repository, tag_event
from storage.base import Checkpoint
from storage.digest import Digest
from storage.names import RepositoryName, Tag
from storage.oci import parse_manifest
from tests.content import Image, make_image, make_index

NAME = RepositoryName("org/team/app")
OTHER = RepositoryName("other")


def add(connection: Connection, session_id: str) -> None:
    sessions.create(connection, session_id, NAME, Checkpoint(f"uploads/{session_id}", "sha256"))


async def put_blob(database: Database, data: bytes, name: RepositoryName = NAME, algorithm: str = "sha256") -> Digest:
    digest = Digest.of(data, algorithm)
    session_id = secrets.token_hex(8)
    await database.note(add, session_id)
    await database.note(sessions.claim, session_id, NAME, "writer")
    key = f"blobs/{digest.hex}.{session_id}"
    await database.write(blobs.finish_upload, session_id, "writer", name, digest, StoredBlob(key=key, size=len(data)))
    return digest


async def put_manifest(
    database: Database, data: bytes, *moved: str, name: RepositoryName = NAME, sparse: bool = False
) -> Digest:
    digest = Digest.of(data)
    pushed = PushedManifest(parse_manifest(data, ""), digest, data)
    await database.write(manifests.put, name, pushed, [Tag(tag) for tag in moved], "somebody", sparse=sparse)
    return digest


async def put_image(database: Database, *moved: str, **options: Any) -> Image:
    image = make_image(**options)
    for data in image.blobs:
        await put_blob(database, data)
    await put_manifest(database, image.manifest, *moved)
    return image


def drop_blob(connection: Connection, digest: Digest) -> int:
    return connection.execute(delete(blob).where(blob.c.digest == str(digest))).rowcount


def references(connection: Connection, column: str) -> int:
    pointing = select(func.count()).where(manifest_reference.c[column].is_not(None))
    return int(connection.scalar(pointing) or 0)


async def test_a_blob_that_a_manifest_points_to_cannot_be_deleted(database: Database) -> None:
    image = await put_image(database, "latest")
    for data in image.blobs:
        digest = Digest.of(data)
        # In no repository any more; the manifest alone keeps it.
        await database.write(blobs.remove, NAME, digest)
        with pytest.raises(IntegrityError):
            await database.write(drop_blob, digest)
    await database.write(manifests.remove, NAME, Digest.parse(image.digest), "")
    assert [await database.write(drop_blob, Digest.of(data)) for data in image.blobs] == [1, 1]


async def test_a_blob_that_a_repository_holds_cannot_be_deleted(database: Database) -> None:
    digest = await put_blob(database, b"content")
    with pytest.raises(IntegrityError):
        await database.write(drop_blob, digest)
    await database.write(blobs.remove, NAME, digest)
    assert await database.write(drop_blob, digest) == 1


async def test_a_manifest_lists_all_that_it_misses(database: Database) -> None:
    image = make_image(layers=3)
    await put_blob(database, image.layers[1])
    with pytest.raises(ManifestBlobUnknown) as raised:
        await put_manifest(database, image.manifest, "latest")
    missing = [str(Digest.of(data)) for data in (image.config, image.layers[0], image.layers[2])]
    assert [digest for digest, _ in raised.value.missing] == missing
    assert await database.read(manifests.find, NAME, Tag("latest")) is None


async def test_a_sparse_image_keeps_its_blobs_from_the_moment_they_arrive(database: Database) -> None:
    image = make_image()
    await put_manifest(database, image.manifest, sparse=True)
    assert await database.read(references, "blob_id") == 0
    for count, data in enumerate(image.blobs, 1):
        digest = await put_blob(database, data, name=OTHER)
        assert await database.read(references, "blob_id") == count
        await database.write(blobs.remove, OTHER, digest)
        with pytest.raises(IntegrityError):
            await database.write(drop_blob, digest)


async def test_a_sparse_index_finds_its_children_when_they_arrive(database: Database) -> None:
    images = [make_image(), make_image()]
    await put_manifest(database, make_index(*images), sparse=True)
    for count, image in enumerate(images, 1):
        await put_manifest(database, image.manifest, sparse=True)
        assert await database.read(references, "child_id") == count
    await database.write(manifests.remove, NAME, Digest.parse(images[0].digest), "")
    assert await database.read(references, "child_id") == 1


async def test_a_manifest_stays_as_long_as_one_repository_holds_it(database: Database) -> None:
    def count(connection: Connection) -> tuple[int, ...]:
        tables = (manifest, manifest_reference)
        return tuple(connection.scalar(select(func.count()).select_from(table)) or 0 for table in tables)

    image = await put_image(database, "latest")
    digest = Digest.parse(image.digest)
    for data in image.blobs:
        assert await database.write(blobs.mount, NAME, OTHER, Digest.of(data))
    await put_manifest(database, image.manifest, name=OTHER)
    await database.write(manifests.remove, NAME, digest, "")
    assert await database.read(count) == (1, 2)
    found = await database.read(manifests.find, OTHER, digest)
    assert found
    assert found.content == image.manifest
    await database.write(manifests.remove, OTHER, digest, "")
    assert await database.read(count) == (0, 0)


async def test_the_second_upload_of_the_same_bytes_serves_from_the_first(database: Database) -> None:
    digest = await put_blob(database, b"content")
    first = await database.read(blobs.find, NAME, digest)
    await put_blob(database, b"content", name=OTHER)
    assert await database.read(blobs.find, OTHER, digest) == first


async def test_a_mount_needs_the_blob_in_its_source(database: Database) -> None:
    digest = await put_blob(database, b"content")
    assert not await database.write(blobs.mount, OTHER, RepositoryName("third"), digest)
    assert await database.read(blobs.find, RepositoryName("third"), digest) is None
    assert await database.write(blobs.mount, NAME, OTHER, digest)
    assert sorted(await database.read(blobs.holders, digest)) == sorted([NAME, OTHER])


async def test_every_move_of_a_tag_is_in_its_history_for_ever(database: Database) -> None:
    first, second = await put_image(database, "latest"), await put_image(database)
    await put_manifest(database, first.manifest, "latest")  # points there already
    await put_manifest(database, second.manifest, "latest", "v2")
    await database.write(tags.delete_tag, NAME, Tag("latest"), "deleter")
    await database.write(manifests.remove, NAME, Digest.parse(second.digest), "deleter")

    def history(connection: Connection) -> list[Any]:
        columns = (tag_event.c.name, tag_event.c.digest, tag_event.c.by)
        return [tuple(row) for row in connection.execute(select(*columns).order_by(tag_event.c.id))]

    assert await database.read(history) == [
        ("latest", first.digest, "somebody"),
        ("latest", second.digest, "somebody"),
        ("v2", second.digest, "somebody"),
        ("latest", None, "deleter"),
        ("v2", None, "deleter"),
    ]


async def test_all_tags_of_a_push_move_or_none(database: Database) -> None:
    image = make_image()
    with pytest.raises(ManifestBlobUnknown):
        await put_manifest(database, image.manifest, "a", "b")
    with pytest.raises(NameUnknown):
        await database.read(tags.names, NAME, "", 10)
    for data in image.blobs:
        await put_blob(database, data)
    await put_manifest(database, image.manifest, "b", "a")
    assert await database.read(tags.names, NAME, "", 10) == ["a", "b"]


async def test_repositories_are_a_tree(database: Database) -> None:
    for name in ("org/team/app", "org/team/app/sub", "org/team-x", "org/team0", "single"):
        await database.write(repositories.ensure, RepositoryName(name))

    async def children(path: str) -> list[tuple[str, bool, bool]]:
        nodes = await database.read(repositories.children, path, [""], "", 100)
        return [(node.name, node.is_repository, node.has_children) for node in nodes]

    assert await children("") == [("org", False, True), ("single", True, False)]
    assert await children("org") == [
        ("org/team", False, True),
        ("org/team-x", True, False),
        ("org/team0", True, False),
    ]
    assert await children("org/team") == [("org/team/app", True, True)]
    assert await children("org/team/app") == [("org/team/app/sub", True, False)]
    assert await children("org/nobody") == []
    assert await database.read(repositories.find, RepositoryName("org/team")) is None


async def test_a_folder_becomes_a_repository_when_something_is_pushed_to_it(database: Database) -> None:
    await database.write(repositories.ensure, RepositoryName("org/app"))
    folder = await database.write(repositories.ensure, RepositoryName("org"))
    assert await database.read(repositories.find, RepositoryName("org")) == folder
    assert await database.write(repositories.ensure, RepositoryName("org")) == folder
    assert await database.read(repositories.names, [""], "", 10) == ["org", "org/app"]


async def test_below_a_path_lies_what_has_it_as_a_prefix_of_whole_components(database: Database) -> None:
    names = ["org/team", "org/team/app", "org/team/app/sub", "org/team-x", "org/team.y", "org/team0", "org/teams/app"]
    for name in names:
        await database.write(repositories.ensure, RepositoryName(name))

    def below(connection: Connection) -> list[str]:
        found = select(repository.c.name).where(repositories.below("org/team")).order_by(repository.c.name)
        return list(connection.scalars(found))

    assert await database.read(below) == names[:3]


async def test_lists_go_on_after_the_last_entry_of_a_page(database: Database) -> None:
    image = await put_image(database, *"abcde")
    pages = [await database.read(tags.names, NAME, last, 2) for last in ("", "b", "d", "e")]
    assert pages == [["a", "b"], ["c", "d"], ["e"], []]
    assert await database.read(tags.pointing_to, NAME, Digest.parse(image.digest)) == list("abcde")


async def test_a_session_has_one_writer(database: Database) -> None:
    await database.note(add, "a")
    await database.note(sessions.claim, "a", NAME, "first")
    with pytest.raises(UploadConflict):
        await database.note(sessions.claim, "a", NAME, "second")
    checkpoint = Checkpoint("uploads/a", "sha256", 7, b"state")
    with pytest.raises(BlobUploadUnknown):
        await database.note(sessions.advance, "a", "second", checkpoint, release=True)
    await database.note(sessions.advance, "a", "first", checkpoint, release=True)
    session, _ = await database.note(sessions.claim, "a", NAME, "second")
    assert session.checkpoint == checkpoint


async def test_a_claim_ends_with_its_lease_or_with_the_server(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await database.note(add, "a")
    await database.note(sessions.claim, "a", NAME, "first")
    with monkeypatch.context() as patch:
        later = now() + sessions.LEASE + 1
        patch.setattr("registry.metadata.sessions.now", lambda: later)
        await database.note(sessions.claim, "a", NAME, "second")
    await database.note(sessions.release_all)
    await database.note(sessions.claim, "a", NAME, "third")


@pytest.mark.parametrize("name", ["other", "org/team"])
async def test_a_session_belongs_to_its_repository(database: Database, name: str) -> None:
    await database.note(add, "a")
    for unit in (sessions.find, sessions.remove):
        with pytest.raises(BlobUploadUnknown):
            await database.note(unit, "a", RepositoryName(name))
    await database.note(sessions.remove, "a", NAME)
    with pytest.raises(BlobUploadUnknown):
        await database.note(sessions.remove, "a", NAME)
    assert await database.read(leftovers.due, 0) == [Leftover("a", None)]


async def test_who_lost_the_session_cannot_finish_with_it(database: Database) -> None:
    await database.note(add, "a")
    await database.note(sessions.claim, "a", NAME, "writer")
    await database.note(sessions.remove, "a", NAME)
    digest = Digest.of(b"content")
    with pytest.raises(BlobUploadUnknown):
        await database.write(blobs.finish_upload, "a", "writer", NAME, digest, StoredBlob("key", 7))
    assert not await database.read(blobs.known_keys, ["key"])


async def test_annotations_and_platforms_are_kept_as_json(database: Database) -> None:
    image = await put_image(database, annotations={"org.example": "ä\u2028"})

    def row(connection: Connection) -> Any:
        return connection.execute(select(manifest).where(manifest.c.digest == image.digest)).one()

    found = await database.read(row)
    assert json.loads(found.annotations) == {"org.example": "ä\u2028"}
    assert found.image_size == sum(map(len, image.blobs))
    assert found.content == image.manifest


async def test_a_key_is_never_used_twice(database: Database) -> None:
    await database.note(add, "a")
    with pytest.raises(IntegrityError):
        await database.note(sessions.create, "b", NAME, Checkpoint("uploads/a", "sha256"))

    def same_key(connection: Connection) -> None:
        for digest in ("x", "y"):
            connection.execute(insert(blob).values(digest=digest, size=1, key="k", created_at=0, touched_at=0))

    with pytest.raises(IntegrityError):
        await database.write(same_key)
