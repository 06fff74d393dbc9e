"""What there is: `/v2/`, `_catalog`, `tags/list`, `_oci/ext/discover`. [distribution-spec: end-1, end-8a, end-8b]"""

from __future__ import annotations

from typing import Final

from aiohttp import web

from registry import locations
from registry.calls import Call
from registry.errors import BadRequest
from registry.metadata import repositories, tags
from registry.metadata.engine import Database
from registry.responses import json_response

#: Entries in one answer, whatever the client asks for: memory stays bounded, `Link` leads on.
PAGE_LIMIT: Final = 10_000


class Listings:
    """Names of repositories and tags, in pages."""

    def __init__(self, database: Database) -> None:
        """List what is in `database`."""
        self._database = database

    async def check(self, call: Call) -> web.StreamResponse:  # noqa: ARG002
        """GET `/v2/`: yes, this is a registry. [end-1]"""
        return json_response({})

    async def discover(self, call: Call) -> web.StreamResponse:  # noqa: ARG002
        """GET `_oci/ext/discover`: no extensions beside the specification."""
        return json_response({"extensions": []})

    async def catalog(self, call: Call) -> web.StreamResponse:
        """GET `_catalog`: names of repositories that the caller may pull from."""
        limit, last = page(call.request)
        names = await self._database.read(repositories.names, call.identity.readable(), last, limit + 1)
        return json_response({"repositories": names[:limit]}, headers=_link(call, names, limit))

    async def tags(self, call: Call) -> web.StreamResponse:
        """GET `tags/list`: in ASCII order. [end-8a, end-8b]"""
        limit, last = page(call.request)
        names = await self._database.read(tags.names, call.repository, last, limit + 1)
        return json_response({"name": call.repository, "tags": names[:limit]}, headers=_link(call, names, limit))


def page(request: web.Request) -> tuple[int, str]:
    """Return how many entries are asked for, and after which. Raises `BadRequest`."""
    text = request.query.get("n", str(PAGE_LIMIT))
    if not (text.isascii() and text.isdecimal()):
        raise BadRequest(f"n must be a number of entries, got {text[:40]!r}")
    return min(int(text.lstrip("0")[:9] or "0"), PAGE_LIMIT), _last(request)


def _link(call: Call, names: list[str], limit: int) -> dict[str, str]:
    # [end-8b] an empty page leads nowhere
    if len(names) <= limit or limit == 0:
        return {}
    return {"Link": locations.next_page(call.request, n=limit, last=names[limit - 1])}


def _last(request: web.Request) -> str:
    # No name holds a NUL, so names after one are those after what stands before it; PostgreSQL takes none.
    return request.query.get("last", "").partition("\0")[0]
