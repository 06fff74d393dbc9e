"""JSON answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web


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
