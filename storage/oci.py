"""Manifests and descriptors: what the registry must understand of the content it keeps.

The bytes of a manifest are never written again from what was read here: its digest is over the pushed bytes.
[image-spec: descriptor.md, manifest.md, image-index.md; Docker image manifest V2, schema 2]
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from storage.digest import Digest
from storage.errors import InvalidDigest, InvalidManifest

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_EMPTY: Final = "application/vnd.oci.empty.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SCHEMA_1: Final = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)

IMAGES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEXES: Final = frozenset({OCI_INDEX, DOCKER_LIST})

#: Layers of these types need not be in the registry.
_FOREIGN: Final = (
    "application/vnd.oci.image.layer.nondistributable.",
    "application/vnd.docker.image.rootfs.foreign.",
)


class Platform(Struct):
    """The platform an image is for. Unknown fields are kept in the manifest's bytes, not here."""

    architecture: str = ""
    os: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(Struct, rename="camel"):
    """Points to content. [image-spec: descriptor.md]"""

    media_type: Annotated[str, Meta(min_length=1)]
    digest: str
    size: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    urls: list[str] | UnsetType = UNSET
    annotations: dict[str, str] | None | UnsetType = UNSET
    data: str | UnsetType = UNSET
    artifact_type: str | UnsetType = UNSET
    platform: Platform | None | UnsetType = UNSET

    @property
    def is_foreign(self) -> bool:
        """Whether the bytes live elsewhere and need not be in this registry."""
        return bool(self.urls) or self.media_type.startswith(_FOREIGN)


class _Document(Struct, rename="camel"):
    """Every field of every kind of manifest that the registry looks at."""

    schema_version: int | UnsetType = UNSET
    media_type: str | UnsetType = UNSET
    artifact_type: str | UnsetType = UNSET
    config: Descriptor | UnsetType = UNSET
    layers: list[Descriptor] | None | UnsetType = UNSET
    manifests: list[Descriptor] | None | UnsetType = UNSET
    subject: Descriptor | None | UnsetType = UNSET
    annotations: dict[str, str] | None | UnsetType = UNSET


class _Kind(Struct, rename="camel"):
    media_type: str | UnsetType = UNSET
    config: msgspec.Raw | UnsetType = UNSET
    layers: msgspec.Raw | UnsetType = UNSET
    manifests: msgspec.Raw | UnsetType = UNSET
    fs_layers: msgspec.Raw | UnsetType = UNSET


class Relation(StrEnum):
    """What a manifest wants with the content it points to."""

    CONFIG = "config"
    LAYER = "layer"
    CHILD = "child"


@dataclass(frozen=True, slots=True)
class Link:
    """One descriptor of a manifest, its digest parsed."""

    relation: Relation
    digest: Digest
    descriptor: Descriptor

    @property
    def is_required(self) -> bool:
        """Whether the content must be in the repository before the manifest."""
        return not self.descriptor.is_foreign


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the registry knows of a manifest after reading it."""

    media_type: str
    links: tuple[Link, ...]
    subject: Digest | None
    artifact_type: str
    annotations: dict[str, str]


#: [RFC 6838, 4.2]
_TYPE_LIMIT: Final = 255
_MEDIA_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")

#: What decoding raises: not JSON, not UTF-8, or nested to exhaust us.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_document: Final = msgspec.json.Decoder(_Document)
_kind: Final = msgspec.json.Decoder(_Kind)


def parse_manifest(content: bytes, content_type: str) -> Manifest:
    """Read a manifest.

    Args:
        content: its exact bytes.
        content_type: the Content-Type it was pushed with, without parameters; may be empty.

    Raises:
        InvalidManifest: not JSON, of the wrong shape, or another type than it says; the message says where.
    """
    try:
        kind = _kind.decode(content)
    except _UNREADABLE as error:
        raise InvalidManifest(f"the manifest is not a JSON object of the right shape: {error}") from None
    media_type = _media_type(kind, content_type)
    if media_type not in IMAGES and media_type not in INDEXES:
        return _opaque(content, media_type)
    try:
        document = _document.decode(content)
    except _UNREADABLE as error:
        raise InvalidManifest(f"the manifest has the wrong shape: {error}") from None
    return _checked(document, media_type)


def _media_type(kind: _Kind, content_type: str) -> str:
    inside = kind.media_type or ""
    if inside and content_type and inside != content_type:
        raise InvalidManifest(f"the manifest says mediaType {inside!r}, the request Content-Type {content_type!r}")
    media_type = content_type or inside
    if media_type and not _MEDIA_TYPE.fullmatch(media_type):
        raise InvalidManifest(f"{media_type[:200]!r} is not a media type")
    if media_type in DOCKER_SCHEMA_1 or kind.fs_layers is not UNSET:
        raise InvalidManifest(
            "Docker image manifest schema 1 is not supported: push again with a docker of 2016 or later"
        )
    if not media_type:
        media_type = OCI_INDEX if kind.manifests is not UNSET else OCI_MANIFEST
    if media_type in IMAGES and kind.manifests is not UNSET and kind.config is UNSET:
        raise InvalidManifest(f"an index pushed as an image ({media_type}): it has 'manifests' and no 'config'")
    if media_type in INDEXES and (kind.layers is not UNSET or kind.config is not UNSET):
        raise InvalidManifest(f"an image pushed as an index ({media_type}): it has 'config' or 'layers'")
    return media_type


def _checked(document: _Document, media_type: str) -> Manifest:
    if document.schema_version != 2:
        raise InvalidManifest("schemaVersion must be 2 - at `$.schemaVersion`")
    links: list[Link] = []
    if media_type in INDEXES:
        if document.manifests is UNSET:
            raise InvalidManifest("an index needs a list of manifests - at `$.manifests`")
        links += _links(Relation.CHILD, document.manifests or [], "manifests")
    else:
        if document.config is UNSET:
            raise InvalidManifest("an image manifest needs a config descriptor - at `$.config`")
        links.append(Link(Relation.CONFIG, _digest(document.config, "config"), document.config))
        if document.layers is UNSET:
            raise InvalidManifest("an image manifest needs a list of layers - at `$.layers`")
        links += _links(Relation.LAYER, document.layers or [], "layers")
    return _facts(document, media_type, tuple(links))


def _facts(document: _Document, media_type: str, links: tuple[Link, ...]) -> Manifest:
    artifact_type = document.artifact_type or ""
    if not artifact_type and document.config:
        # [distribution-spec: end-12a] the config's type stands in for a missing artifactType
        artifact_type = document.config.media_type
    if "\0" in artifact_type or len(artifact_type) > _TYPE_LIMIT:
        raise InvalidManifest("no media type, or too long a one - at `$.artifactType` or `$.config.mediaType`")
    return Manifest(
        media_type=media_type,
        links=links,
        subject=_digest(document.subject, "subject") if document.subject else None,
        artifact_type=artifact_type,
        annotations=document.annotations or {},
    )


def _opaque(content: bytes, media_type: str) -> Manifest:
    """A manifest of a type nobody has heard of: kept as it is, what can be understood of it is."""
    try:
        return _facts(_document.decode(content), media_type, ())
    except (*_UNREADABLE, InvalidManifest):
        return Manifest(media_type, (), None, "", {})


def read_platform(config: bytes) -> str:
    """Return the platform that an image's configuration names, empty where it names none or cannot be read."""
    try:
        return str(msgspec.json.decode(config, type=Platform))
    except _UNREADABLE:
        return ""


def _links(relation: Relation, descriptors: list[Descriptor], field: str) -> list[Link]:
    return [
        Link(relation, _digest(descriptor, f"{field}[{position}]"), descriptor)
        for position, descriptor in enumerate(descriptors)
    ]


def _digest(descriptor: Descriptor, where: str) -> Digest:
    try:
        digest = Digest.parse(descriptor.digest)
    except InvalidDigest as error:
        raise InvalidManifest(f"{error} - at `$.{where}.digest`") from None
    if descriptor.data:
        _check_data(descriptor, digest, where)
    return digest


def _check_data(descriptor: Descriptor, digest: Digest, where: str) -> None:
    """Inline data must be what the descriptor says, or clients that use it are led astray."""
    try:
        data = base64.b64decode(str(descriptor.data), validate=True)
    except ValueError:
        raise InvalidManifest(f"not base64 - at `$.{where}.data`") from None
    if len(data) != descriptor.size or Digest.of(data, digest.algorithm) != digest:
        raise InvalidManifest(f"inline data of another size or digest than the descriptor's - at `$.{where}.data`")
