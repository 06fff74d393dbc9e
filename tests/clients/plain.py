"""A client that knows nothing but HTTP: it goes where it is told to by `Location` and `Link`."""

from __future__ import annotations

import http.client
import json
import re
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

_PIECE = 1 << 20


@dataclass(frozen=True)
class Answer:
    """What came back, read to its end."""

    url: str
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def location(self) -> str:
        """Where to go next, whole."""
        return urljoin(self.url, str(self.headers["Location"]))

    @property
    def next_page(self) -> str | None:
        """The page after this one."""
        link = re.fullmatch(r'<([^>]+)>; rel="next"', self.headers.get("Link", ""))
        return urljoin(self.url, link[1]) if link else None


class PlainClient:
    """One connection to where `url` is, for one request after another; over TLS if `trust` says whom to believe.

    It comes from `source`, an address of this machine, if that is given.
    """

    def __init__(self, url: str, trust: ssl.SSLContext | None = None, source: str = "") -> None:
        self._host = urlsplit(url).netloc
        here = (source, 0) if source else None
        if trust is None:
            self._connection = http.client.HTTPConnection(self._host, timeout=120, source_address=here)
        else:
            self._connection = http.client.HTTPSConnection(self._host, timeout=120, context=trust, source_address=here)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def ask(self, method: str, url: str, body: bytes | Iterable[bytes] | None = None, /, **headers: str) -> Answer:
        """Send a request; a body that is not bytes is sent in chunks of unknown number."""
        response = self._send(method, url, body, headers)
        return Answer(url, response.status, response.headers, response.read())

    def stream(self, url: str, **headers: str) -> Iterator[memoryview]:
        """Get content, piece by piece; a piece is good until the next one is asked for."""
        response = self._send("GET", url, None, headers)
        assert response.status in (200, 206), response.read()
        buffer = memoryview(bytearray(_PIECE))
        while received := response.readinto(buffer):
            yield buffer[:received]

    def _send(
        self, method: str, url: str, body: bytes | Iterable[bytes] | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        target = urlsplit(url)
        assert target.netloc == self._host, f"{url} leads away from {self._host}"
        path = f"{target.path}?{target.query}" if target.query else target.path
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, body, named, encode_chunked=True)
        return self._connection.getresponse()


def with_query(url: str, query: str) -> str:
    """Add to a URL that may have a query of its own."""
    return f"{url}{'&' if urlsplit(url).query else '?'}{query}"
