"""Images to push: small, made on the spot, each its own."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient

from storage.digest import Digest
from storage.oci import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST

#: A client of a registry in this process, over a real socket.
Client = TestClient[web.Request, web.Application]

LAYER = "application/vnd.oci.image.layer.v1.tar"


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    """Return the digest of `content` as text."""
    return str(Digest.of(content, algorithm))


def descriptor(content: bytes, media_type: str, algorithm: str = "sha256", **more: Any) -> dict[str, Any]:
    """Return a descriptor of `content`."""
    return {"mediaType": media_type, "digest": digest_of(content, algorithm), "size": len(content), **more}


@dataclass
class Image:
    """An image: its configuration, its layers, its manifest's bytes."""

    config: bytes
    layers: list[bytes]
    manifest: bytes
    media_type: str = OCI_MANIFEST

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    @property
    def blobs(self) -> list[bytes]:
        return [self.config, *self.layers]


def make_image(layers: int = 1, architecture: str = "amd64", algorithm: str = "sha256", **more: Any) -> Image:
    """Return an image of random layers; `more` goes into the manifest."""
    contents = [secrets.token_bytes(200) for _ in range(layers)]
    config = json.dumps({"architecture": architecture, "os": "linux", "nonce": secrets.token_hex(8)}).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(config, OCI_CONFIG, algorithm),
        "layers": [descriptor(layer, LAYER, algorithm) for layer in contents],
        **more,
    }
    return Image(config, contents, json.dumps(manifest).encode())


def make_index(*images: Image, **more: Any) -> bytes:
    """Return the bytes of an index of images."""
    manifests = [descriptor(image.manifest, image.media_type) for image in images]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests, **more}).encode()


@dataclass
class Pusher:
    """Pushes to one repository through a test client, and expects it to work."""

    client: Client
    repository: str = "org/team/app"
    pushed: list[str] = field(default_factory=list)

    async def blob(self, content: bytes, algorithm: str = "sha256") -> str:
        """Push a blob in one request; return its digest."""
        digest = digest_of(content, algorithm)
        path = f"/v2/{self.repository}/blobs/uploads/?{urlencode({'digest': digest})}"
        async with self.client.post(path, data=content) as response:
            assert response.status == 201, await response.text()
        return digest

    async def manifest(
        self, content: bytes, reference: str = "", media_type: str = OCI_MANIFEST, **query: str
    ) -> ClientResponse:
        """Push a manifest; return the answer, read and checked."""
        path = f"/v2/{self.repository}/manifests/{reference or digest_of(content)}"
        headers = {"Content-Type": media_type}
        async with self.client.put(path, data=content, headers=headers, params=query) as response:
            assert response.status == 201, await response.text()
            return response

    async def image(self, tag: str = "", **options: Any) -> Image:
        """Push a new image under a tag, or by digest only."""
        image = make_image(**options)
        for blob in image.blobs:
            await self.blob(blob)
        await self.manifest(image.manifest, tag)
        return image


async def error_codes(response: ClientResponse) -> list[str]:
    """Return the codes of an error body, whose shape is checked."""
    assert response.content_type == "application/json"
    body = await response.json()
    assert body["errors"], body
    for error in body["errors"]:
        assert isinstance(error["message"], str)
        assert error["message"]
    return [error["code"] for error in body["errors"]]
