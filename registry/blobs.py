"""`/v2/<name>/blobs/<digest>`: pull and delete. [distribution-spec: end-2, end-10]"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator

from aiohttp import hdrs, web
from multidict import CIMultiDict

from registry.access.audit import Auditor
from registry.calls import Call
from registry.contents import Contents
from registry.ranges import parse_ranges
from registry.responses import REPEATABLE, is_known
from registry.transfer import Sender
from storage.base import Content, Store
from storage.digest import Digest

_Headers = CIMultiDict[str]


class Blobs:
    """Blobs that are there."""

    def __init__(self, store: Store, contents: Contents, sender: Sender, auditor: Auditor) -> None:
        """Serve what `contents` knows of, from `store`, by `sender`."""
        self._auditor = auditor
        self._store = store
        self._contents = contents
        self._sender = sender

    async def get(self, call: Call) -> web.StreamResponse:
        """GET: the bytes, whole or in ranges."""
        digest = call.digest()
        stored = await self._contents.blob(call.repository, digest)
        headers = _headers(digest)
        if is_known(call.request, headers[hdrs.ETAG]):
            return web.Response(status=304, headers=headers)
        ranges = _ranges(call.request, stored.size, headers[hdrs.ETAG])
        content = self._store.open(stored.key)
        # An object store sends one range, not several; and of nothing there is nothing to fetch.
        if stored.size and (ranges is None or len(ranges) == 1) and (address := await content.address()):
            return _elsewhere(address, digest)
        call.request[REPEATABLE] = True
        if ranges is None:
            return await self._sender.send(call.request, content, 0, stored.size, 200, headers)
        if len(ranges) > 1:
            several = _Multipart(content, ranges, stored.size)
            headers[hdrs.CONTENT_TYPE] = several.content_type
            return await self._sender.send(call.request, several, 0, several.size, 206, headers)
        start, stop = ranges[0]
        headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{stop - 1}/{stored.size}"
        return await self._sender.send(call.request, content, start, stop, 206, headers)

    async def head(self, call: Call) -> web.StreamResponse:
        """HEAD: the headers of a GET; a `Range` has no meaning here. [RFC 9110, 14.2]"""
        digest = call.digest()
        stored = await self._contents.blob(call.repository, digest)
        call.request[REPEATABLE] = True
        headers = _headers(digest)
        if is_known(call.request, headers[hdrs.ETAG]):
            return web.Response(status=304, headers=headers)
        headers[hdrs.CONTENT_LENGTH] = str(stored.size)
        return web.Response(headers=headers)

    async def delete(self, call: Call) -> web.StreamResponse:
        """DELETE: gone from this repository; others keep it."""
        event = self._auditor.event(
            call.request, call.identity, "blob.delete", repository=call.repository, target=str(call.digest())
        )
        await self._contents.delete_blob(call.repository, call.digest(), event)
        self._auditor.tell(event)
        return web.Response(status=202)


def _headers(digest: Digest) -> _Headers:
    return CIMultiDict(
        {
            hdrs.CONTENT_TYPE: "application/octet-stream",
            "Docker-Content-Digest": str(digest),
            hdrs.ETAG: f'"{digest}"',
            hdrs.ACCEPT_RANGES: "bytes",
            hdrs.CACHE_CONTROL: "max-age=31536000, immutable",
        }
    )


def _elsewhere(address: str, digest: Digest) -> web.Response:
    headers = {hdrs.LOCATION: address, "Docker-Content-Digest": str(digest), hdrs.CACHE_CONTROL: "no-store"}
    return web.Response(status=307, headers=headers)


def _ranges(request: web.Request, size: int, etag: str) -> list[tuple[int, int]] | None:
    header = request.headers.get(hdrs.RANGE)
    condition = request.headers.get(hdrs.IF_RANGE)
    # [RFC 9110, 13.1.5] anything but our own strong tag means "then send me all of it".
    if header is None or (condition is not None and condition.strip() != etag):
        return None
    return parse_ranges(header, size)


class _Multipart(Content):
    """Several ranges as one body. [RFC 9110, 14.6]"""

    def __init__(self, content: Content, ranges: list[tuple[int, int]], total: int) -> None:
        self._content = content
        boundary = secrets.token_hex(16)
        self.content_type = f"multipart/byteranges; boundary={boundary}"
        self._parts = [(_part(boundary, start, stop, total), start, stop) for start, stop in ranges]
        self._end = f"\r\n--{boundary}--\r\n".encode()
        self.size = sum(len(head) + stop - start for head, start, stop in self._parts) + len(self._end)

    @property
    def path(self) -> str | None:
        return None

    async def address(self) -> str | None:
        return None

    async def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        assert (start, stop) == (0, self.size), "a body of ranges is sent whole"
        for head, first, last in self._parts:
            yield head
            async for piece in self._content.read(first, last):
                yield piece
        yield self._end


def _part(boundary: str, start: int, stop: int, total: int) -> bytes:
    return (
        f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Range: bytes {start}-{stop - 1}/{total}\r\n\r\n"
    ).encode()
