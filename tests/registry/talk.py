"""Two ways to talk to a registry: by a proper client, and byte by byte for what no proper client does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multidict import CIMultiDict

from registry.affinity import Affinity
from registry.app import open_store
from registry.config import Settings
from storage.base import Store, StoredObject
from storage.errors import ContentMissing
from tests.content import Client

_PATIENCE = 20.0


@dataclass(frozen=True)
class Answer:
    """An answer that was read to its end."""

    status: int
    headers: CIMultiDict[str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def codes(self) -> list[str]:
        """The codes of an error body, whose shape is checked."""
        assert self.headers["Content-Type"] == "application/json"
        errors = self.json["errors"]
        assert errors
        assert all(isinstance(error["message"], str) and error["message"] for error in errors)
        return [error["code"] for error in errors]

    def __str__(self) -> str:
        return f"{self.status} {self.body[:1000]!r}"


async def ask(client: Client, method: str, path: str, **options: Any) -> Answer:
    """Send a request and return the answer."""
    async with client.request(method, path, allow_redirects=False, **options) as response:
        return Answer(response.status, CIMultiDict(response.headers), await response.read())


async def begin(client: Client, repository: str = "org/team/app", query: str = "") -> str:
    """Open an upload and return its Location."""
    response = await ask(client, "POST", f"/v2/{repository}/blobs/uploads/{query}")
    assert response.status == 202, response
    return response.headers["Location"]


async def in_pieces(content: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    """Yield `content` such that aiohttp sends it chunked, with no Content-Length."""
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def stored(settings: Settings) -> list[bytes]:
    """Return all that lies in the store of a registry, seen from outside."""
    store = open_store(settings, Affinity(enabled=False))
    try:
        contents = []
        async for found in store.objects():
            # It may go while we look.
            with contextlib.suppress(ContentMissing):
                contents.append(await _content(store, found))
        return contents
    finally:
        await store.close()


async def _content(store: Store, found: StoredObject) -> bytes:
    return b"".join([piece async for piece in store.open(found.key).read(0, found.size)])


def files_below(directory: Path) -> list[Path]:
    """Return the files in a tree."""
    return [path for path in directory.rglob("*") if path.is_file()]


class Wire:
    """One connection, on which anything can be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def request(self, method: str, path: str, headers: Sequence[str] = (), body: bytes = b"") -> None:
        """Send a head, and perhaps the beginning of a body."""
        lines = [f"{method} {path} HTTP/1.1", "Host: registry.test", *headers, "", ""]
        await self.send("\r\n".join(lines).encode() + body)

    async def answer(self, *, has_body: bool = True) -> Answer:
        """Read one answer."""
        async with asyncio.timeout(_PATIENCE):
            head = await self._reader.readuntil(b"\r\n\r\n")
            status_line, *lines = head.decode().rstrip().split("\r\n")
            status = int(status_line.split()[1])
            headers = CIMultiDict([(name, value) for name, _, value in (line.partition(": ") for line in lines)])
            length = int(headers.get("Content-Length", "0")) if has_body and status >= 200 else 0
            return Answer(status, headers, await self._reader.readexactly(length))

    async def hang_up(self) -> None:
        """Close the connection in the middle of whatever is under way."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    def end_of_requests(self) -> None:
        """Close our direction only."""
        self._writer.write_eof()

    async def some(self, size: int) -> bytes:
        """Read up to so many bytes, none at the end."""
        async with asyncio.timeout(_PATIENCE):
            return await self._reader.read(size)

    async def rest(self) -> bytes:
        """Read until the other side closes."""
        async with asyncio.timeout(_PATIENCE):
            with suppress(ConnectionError):
                return await self._reader.read()
        return b""


@asynccontextmanager
async def wire(client: Client) -> AsyncIterator[Wire]:
    """Connect to the registry behind a client."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    connection = Wire(reader, writer)
    try:
        yield connection
    finally:
        await connection.hang_up()
