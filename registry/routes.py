"""The paths below `/v2/`, understood from the right.

A repository name may contain any of the words that the protocol uses (`blobs`, `manifests`, `tags`, `uploads`), at
any depth. Only the end of a path tells what it is, so that is where reading begins; what is left of it is the name,
and whether it is a good one is for `names.py` to say.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple


class Endpoint(Enum):
    """The families of endpoints."""

    BASE = auto()
    TOKEN = auto()
    CATALOG = auto()
    DISCOVER = auto()
    TAGS = auto()
    MANIFEST = auto()
    BLOB = auto()
    UPLOADS = auto()
    UPLOAD = auto()
    REFERRERS = auto()


class Route(NamedTuple):
    """A path, taken apart: endpoint, repository name, and the last part."""

    endpoint: Endpoint
    name: str
    argument: str


_FAMILIES = {
    "manifests": Endpoint.MANIFEST,
    "blobs": Endpoint.BLOB,
    "referrers": Endpoint.REFERRERS,
}


def match(path: str) -> Route | None:
    """Return what a path below `/v2/` (without it) asks for, or None for nothing we know."""
    route = _with_name(path)
    if route is not None:
        return route if route.name else None
    return _without_name(path)


def _with_name(path: str) -> Route | None:
    head, _, last = path.rpartition("/")
    name, _, family = head.rpartition("/")
    if family in _FAMILIES and name and last and not (family == "blobs" and last == "uploads"):
        return Route(_FAMILIES[family], name, last)
    if path.endswith(("/blobs/uploads", "/blobs/uploads/")):
        return Route(Endpoint.UPLOADS, path.rstrip("/").removesuffix("/blobs/uploads"), "")
    if head.endswith("/blobs/uploads"):
        return Route(Endpoint.UPLOAD, head.removesuffix("/blobs/uploads"), last)
    if path.endswith("/tags/list"):
        return Route(Endpoint.TAGS, path.removesuffix("/tags/list"), "")
    if path.endswith("/_oci/ext/discover"):
        return Route(Endpoint.DISCOVER, path.removesuffix("/_oci/ext/discover"), "")
    return None


def _without_name(path: str) -> Route | None:
    if not path:
        return Route(Endpoint.BASE, "", "")
    if path == "token":
        return Route(Endpoint.TOKEN, "", "")
    if path == "_catalog":
        return Route(Endpoint.CATALOG, "", "")
    if path == "_oci/ext/discover":
        return Route(Endpoint.DISCOVER, "", "")
    return None
