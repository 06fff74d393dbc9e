"""Addresses that the registry gives to clients.

They are paths without scheme, host or port: a client puts them against the address it used itself, so they are
right behind any reverse proxy without configuration or trust. The one thing a client cannot know is a path prefix
that a proxy takes away; such a proxy says so in `X-Forwarded-Prefix`.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlencode

from aiohttp import web

from storage.digest import Digest
from storage.names import RepositoryName

#: A path and nothing that a client could take for another host.
_PREFIX: Final = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")


def blob(request: web.Request, name: RepositoryName, digest: Digest) -> str:
    """Return where a blob is."""
    return f"{prefix(request)}/v2/{name}/blobs/{digest}"


def upload(request: web.Request, name: RepositoryName, session_id: str) -> str:
    """Return where an upload goes on."""
    return f"{prefix(request)}/v2/{name}/blobs/uploads/{session_id}"


def manifest(request: web.Request, name: RepositoryName, digest: Digest) -> str:
    """Return where a manifest is."""
    return f"{prefix(request)}/v2/{name}/manifests/{digest}"


def next_page(request: web.Request, **parameters: str | int) -> str:
    """Return a `Link` header for the same path with other parameters. [RFC 5988]"""
    return f'<{prefix(request)}{request.path}?{urlencode(parameters)}>; rel="next"'


def prefix(request: web.BaseRequest) -> str:
    """Return the part of the path that a proxy took away, empty where there is none."""
    sent = request.headers.get("X-Forwarded-Prefix", "").rstrip("/")
    return sent if _PREFIX.fullmatch(sent) else ""
