"""What answers have in common: JSON, the headers of all, and what a request learns about itself on its way to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from aiohttp import web

from registry.access.rights import Identity

#: Which endpoint it was for, for metrics.
ROUTE: Final = web.RequestKey("route", str)
#: What it is called in the log and in errors.
REQUEST_ID: Final = web.RequestKey("request_id", str)
#: Bytes of its body that were taken in.
BYTES_IN: Final = web.RequestKey("bytes_in", int)
#: Whether its body was invited. [RFC 9110, 10.1.1]
INVITED: Final = web.RequestKey("invited", bool)

#: Who sent it, once that is known.
WHO: Final = web.RequestKey("who", Identity)
#: Under which version of the policy it was let in.
POLICY: Final = web.RequestKey("policy", int)
#: It was counted against a limit, as the next one in the same words must be.
COUNTED: Final = web.RequestKey("counted", bool)
#: Its answer depends on nothing but its head and the epoch of the cache.
REPEATABLE: Final = web.RequestKey("repeatable", bool)


def is_known(request: web.Request, etag: str) -> bool:
    """Return whether the client has the content with this strong `etag` already. [RFC 9110, 13.1.2]"""
    sent = request.headers.get("If-None-Match")
    if sent is None:
        return False
    return sent.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in sent.split(","))


def json_response(
    content: Any,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    content_type: str = "application/json",
) -> web.Response:
    """Return `content` as JSON. Without a charset in the type: clients compare it to the letter."""
    return web.Response(
        body=msgspec.json.encode(content),
        status=status,
        headers={"Content-Type": content_type, **(headers or {})},
    )


def sign(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Put the headers on that every answer has, before it begins."""
    if request.path.startswith("/v2/"):
        response.headers["Docker-Distribution-API-Version"] = "registry/2.0"
    response.headers["X-Request-Id"] = request[REQUEST_ID]
