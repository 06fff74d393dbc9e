"""Images made without a network: busybox in a tar, and OCI layouts on disk."""

from __future__ import annotations

import gzip
import io
import json
import secrets
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.digest import Digest
from storage.oci import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from tests.content import Image, descriptor, digest_of

GZIPPED_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def tar_of(**files: bytes) -> bytes:
    """Return a tar of files at the root, always the same for the same files."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


def random_layer(size: int = 1000) -> bytes:
    """Return the tar of a file of random bytes."""
    return tar_of(content=secrets.token_bytes(size))


def system_tar(size: int) -> bytes:
    """Return the tar of a small system: busybox where it is installed, and `size` random bytes."""
    target = io.BytesIO(tar_of(content=secrets.token_bytes(size)))
    with tarfile.open(fileobj=target, mode="a") as tar:
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(directory)
        if busybox := shutil.which("busybox"):
            tar.add(Path(busybox).resolve(), "bin/sh")
    return target.getvalue()


def docker_archive(name: str, layers: Sequence[bytes], architecture: str) -> bytes:
    """Return what `docker load` takes: an image of these tars."""
    files = {f"{number}.tar": layer for number, layer in enumerate(layers)}
    listed = [{"Config": "config.json", "RepoTags": [name], "Layers": list(files)}]
    return tar_of(
        **{"config.json": _config(layers, architecture), "manifest.json": json.dumps(listed).encode()}, **files
    )


def packed_image(layers: Sequence[bytes], architecture: str = "amd64", algorithm: str = "sha256") -> Image:
    """Return an image of these tars, compressed."""
    packed = [gzip.compress(layer, compresslevel=1, mtime=0) for layer in layers]
    config = _config(layers, architecture)
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(config, OCI_CONFIG, algorithm),
        "layers": [descriptor(blob, GZIPPED_LAYER, algorithm) for blob in packed],
    }
    return Image(config, packed, json.dumps(manifest).encode())


@dataclass(frozen=True)
class Layout:
    """A directory in the OCI image layout, with one image or index under the tag `latest`."""

    path: Path
    #: Of what the tag names.
    digest: str

    @property
    def reference(self) -> str:
        """As skopeo names it."""
        return f"oci:{self.path}:latest"

    @property
    def blobs(self) -> dict[str, bytes]:
        """Return what lies in it, by digest."""
        found = (self.path / "blobs").glob("*/*")
        return {f"{blob.parent.name}:{blob.name}": blob.read_bytes() for blob in found}


def write_layout(path: Path, *images: Image) -> Layout:
    """Write a layout of one image, or of an index of several."""
    for blob in [blob for image in images for blob in (*image.blobs, image.manifest)]:
        _write_blob(path, blob)
    described = [descriptor(image.manifest, image.media_type, platform=_platform(image)) for image in images]
    top = described[0]
    if len(images) > 1:
        index = _index(described)
        _write_blob(path, index)
        top = descriptor(index, OCI_INDEX)
    named = {**top, "annotations": {"org.opencontainers.image.ref.name": "latest"}}
    (path / "index.json").write_bytes(_index([named]))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return Layout(path, top["digest"])


def _config(layers: Sequence[bytes], architecture: str) -> bytes:
    root = {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]}
    config = {"architecture": architecture, "os": "linux", "config": {"Cmd": ["/bin/sh"]}, "rootfs": root}
    return json.dumps(config).encode()


def _platform(image: Image) -> dict[str, str]:
    return {"architecture": json.loads(image.config)["architecture"], "os": "linux"}


def _index(manifests: list[dict[str, Any]]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()


def _write_blob(path: Path, blob: bytes) -> None:
    digest = Digest.of(blob)
    target = path / "blobs" / digest.algorithm / digest.hex
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(blob)
