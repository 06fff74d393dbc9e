"""What is pushed and pulled."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import create_engine, insert

from benchmarks.load import in_http_chunks
from registry.metadata.tables import manifest, now, repository, repository_manifest, tag, tag_event
from storage.digest import Digest

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ACCEPT: Final = f"Accept: {MANIFEST_TYPE}"
_CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
_BLOCK: Final = 64 << 20
_REPOSITORIES: Final = 100
_TAGS_OF_A_MANIFEST: Final = 10


@dataclass(frozen=True)
class LargeBlob:
    """A block of random bytes, repeated; as a file, and framed for the wire."""

    digest: Digest
    size: int
    file: Path
    _block: bytes
    _framed: bytes

    def plain(self) -> Iterator[memoryview]:
        """Yield the bytes, in pieces of 1 MiB."""
        view = memoryview(self._block)
        for _ in range(self.size // _BLOCK):
            yield from (view[start : start + (1 << 20)] for start in range(0, _BLOCK, 1 << 20))

    def framed(self) -> Iterator[bytes]:
        """Yield the body as HTTP chunks."""
        return (self._framed for _ in range(self.size // _BLOCK))


def large_blob(size: int, file: Path) -> LargeBlob:
    """Make a blob of `size` bytes, a multiple of 64 MiB."""
    block = os.urandom(_BLOCK)
    hasher = hashlib.sha256()
    with file.open("wb") as output:
        for _ in range(size // _BLOCK):
            output.write(block)
            hasher.update(block)
    return LargeBlob(Digest("sha256", hasher.hexdigest()), size, file, block, in_http_chunks(block))


def small_contents(number: int) -> list[bytes]:
    """Return contents of 2 to 8 KiB, the same in each run."""
    source = random.Random(1)
    return [source.randbytes(source.randint(2 << 10, 8 << 10)) for _ in range(number)]


def _descriptor(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(content)), "size": len(content)}


def image_manifest(config: bytes, layers: list[bytes], size: int = 0) -> bytes:
    """Return an image's manifest, filled up to `size` bytes."""
    content: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _descriptor(_CONFIG_TYPE, config),
        "layers": [_descriptor(_LAYER_TYPE, layer) for layer in layers],
        "annotations": {"filling": ""},
    }
    content["annotations"]["filling"] = "x" * max(0, size - len(json.dumps(content)))
    return json.dumps(content).encode()


@dataclass(frozen=True)
class SmallImage:
    """An image of one layer, whose manifest has 2 KB."""

    blobs: tuple[bytes, bytes]
    manifest: bytes


def small_image() -> SmallImage:
    """Make one, the same in each run."""
    config, layer = small_contents(2)
    return SmallImage((config, layer), image_manifest(config, [layer], 2048))


def image_layout(directory: Path, layers: int) -> None:
    """Write an image of layers of 1 MiB as an OCI layout. [image-spec: image-layout.md]"""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    contents = [os.urandom(1 << 20) for _ in range(layers)]
    compressed = [gzip.compress(content, 0) for content in contents]
    diff_ids = [str(Digest.of(content)) for content in contents]
    rootfs = {"type": "layers", "diff_ids": diff_ids}
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode()
    described = image_manifest(config, compressed)
    for content in (config, described, *compressed):
        (blobs / Digest.of(content).hex).write_bytes(content)
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    index = {"schemaVersion": 2, "manifests": [_descriptor(MANIFEST_TYPE, described)]}
    (directory / "index.json").write_text(json.dumps(index))


def fill_with_tags(database: Path, number: int) -> None:
    """Put tags with all they need into a database of Hythe that nobody uses now."""
    at = now()
    manifests = [
        (number_of_manifest, f"sha256:{number_of_manifest:064x}", 1 + number_of_manifest % _REPOSITORIES)
        for number_of_manifest in range(1, 1 + number // _TAGS_OF_A_MANIFEST)
    ]
    content = b"x" * 2048
    engine = create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        connection.execute(
            insert(repository),
            [
                {"id": 1 + index, "name": f"repository-{index}", "has_content": True, "created_at": at}
                for index in range(_REPOSITORIES)
            ],
        )
        connection.execute(
            insert(manifest),
            [
                {
                    "id": id_,
                    "digest": digest,
                    "size": len(content),
                    "content": content,
                    "artifact_type": "",
                    "annotations": "{}",
                    "image_size": 0,
                    "platforms": "[]",
                    "created_at": at,
                }
                for id_, digest, _ in manifests
            ],
        )
        held = {"media_type": MANIFEST_TYPE, "pushed_at": at, "pushed_by": ""}
        connection.execute(
            insert(repository_manifest),
            [{"manifest_id": id_, "repository_id": holder, **held} for id_, _, holder in manifests],
        )
        tags = [
            (f"{id_}.{index}", id_, digest, holder)
            for id_, digest, holder in manifests
            for index in range(_TAGS_OF_A_MANIFEST)
        ]
        moved = {"updated_at": at, "updated_by": ""}
        connection.execute(
            insert(tag),
            [{"name": name, "manifest_id": id_, "repository_id": holder, **moved} for name, id_, _, holder in tags],
        )
        connection.execute(
            insert(tag_event),
            [
                {"name": name, "digest": digest, "repository_id": holder, "at": at, "by": ""}
                for name, _, digest, holder in tags
            ],
        )
    engine.dispose()
