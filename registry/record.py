"""What is kept of every request that was answered: its name, its numbers, its line in the log."""

from __future__ import annotations

import itertools
import secrets
from typing import Final
from urllib.parse import urlencode

from aiohttp import web

from registry.logs import Access, Lines
from registry.metrics import Metrics

#: Parameters of the protocol and the API; of any other the value might be a password.
_HARMLESS: Final = frozenset(
    [
        "artifactType",
        "digest",
        "digest-algorithm",
        "from",
        "last",
        "mount",
        "n",
        "path",
        "reference",
        "repository",
        "tag",
    ]
)


class Recorder:
    """Counts and logs."""

    def __init__(self, metrics: Metrics, lines: Lines | None) -> None:
        """Count into `metrics`; log to `lines`, if any."""
        self._metrics = metrics
        self._lines = lines
        self._run = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def next_id(self) -> str:
        """Return an id for a request that brought none."""
        return f"{self._run}-{next(self._numbers):06x}"

    def record(self, route: str, entry: Access) -> None:
        """Take in a request to an endpoint."""
        self._metrics.count(route, entry.method, entry.status, entry.duration, entry.bytes_in, entry.bytes_out)
        if self._lines:
            self._lines.add(entry)


def logged_path(request: web.BaseRequest) -> str:
    """Return the path with those parameters that cannot be secrets."""
    if not request.query_string:
        return request.path
    shown = [(name, value) for name, value in request.query.items() if name in _HARMLESS]
    return f"{request.path}?{urlencode(shown, safe='/:')}" if shown else request.path
