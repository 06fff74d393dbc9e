"""HTTP/1.1 messages to S3 as they are on the wire: a head, what it wants, and where the body ends that follows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Self

PIECE = 64 << 10

Kind = Literal[
    "PutObject",
    "GetObject",
    "HeadObject",
    "DeleteObject",
    "ListObjects",
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
    "ListMultipartUploads",
    "other",
]
#: By method, by whether an object is named, and by what the query asks for.
_KINDS: dict[tuple[str, bool, frozenset[str]], Kind] = {
    ("PUT", True, frozenset()): "PutObject",
    ("GET", True, frozenset()): "GetObject",
    ("HEAD", True, frozenset()): "HeadObject",
    ("DELETE", True, frozenset()): "DeleteObject",
    ("GET", False, frozenset()): "ListObjects",
    ("POST", True, frozenset({"uploads"})): "CreateMultipartUpload",
    ("PUT", True, frozenset({"uploadId", "partNumber"})): "UploadPart",
    ("POST", True, frozenset({"uploadId"})): "CompleteMultipartUpload",
    ("DELETE", True, frozenset({"uploadId"})): "AbortMultipartUpload",
    ("GET", False, frozenset({"uploads"})): "ListMultipartUploads",
}
#: So do keys of a query begin that say who asks, or for how much of it.
_HOW: tuple[str, ...] = (
    "x-",
    "response-",
    "list-type",
    "prefix",
    "delimiter",
    "max-",
    "encoding-",
    "continuation-",
    "start-",
    "marker",
)
_HOW += ("key-marker", "upload-id-marker", "fetch-owner")


@dataclass(frozen=True)
class Seen:
    """A request whose head arrived."""

    method: str
    path: str
    query: tuple[str, ...]
    kind: Kind

    @classmethod
    def of(cls, method: str, target: str) -> Self:
        """Tell what a request wants from its first line."""
        path, _, query = target.partition("?")
        keys = tuple(part.partition("=")[0] for part in query.split("&") if part)
        asked = frozenset(key for key in keys if not key.lower().startswith(_HOW))
        names_object = bool(path.strip("/").partition("/")[2])
        return cls(method, path, keys, _KINDS.get((method, names_object, asked), "other"))


@dataclass(frozen=True)
class Head:
    """The head of a request or an answer; `line` has three words: of a request, its method and target come first."""

    raw: bytes
    line: list[str]
    fields: dict[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Self:
        """Read one; EOFError where the connection ends instead."""
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").rstrip().split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return cls(raw, first.split(" ", 2), {name.lower(): value.strip() for name, _, value in pairs})

    @property
    def closes(self) -> bool:
        """Whether the connection ends after it."""
        return "close" in self.fields.get("connection", "").lower()

    @property
    def expects(self) -> bool:
        """Whether its sender waits to be asked for the body."""
        return "expect" in self.fields

    def is_empty(self, method: str) -> bool:
        """Whether the answer to a method has no body, whatever its head says."""
        return method == "HEAD" or self.line[1] in ("204", "304")

    def is_endless(self, method: str) -> bool:
        """Whether the body of the answer to a method ends with the connection."""
        is_measured = "content-length" in self.fields or "transfer-encoding" in self.fields
        return not (is_measured or self.is_empty(method))

    def body(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        """Read the body of a request in pieces, with the marks between its chunks, as it came."""
        if "transfer-encoding" in self.fields:
            return _chunks(reader)
        return _exactly(reader, int(self.fields.get("content-length", "0")))

    def body_of_answer(self, method: str, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        """Read the body of the answer to a method."""
        if self.is_empty(method):
            return _exactly(reader, 0)
        return _rest(reader) if self.is_endless(method) else self.body(reader)


async def _exactly(reader: asyncio.StreamReader, length: int) -> AsyncIterator[bytes]:
    while length:
        piece = await reader.read(min(length, PIECE))
        if not piece:
            raise EOFError
        length -= len(piece)
        yield piece


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(PIECE):
        yield piece


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    size = -1
    while size:
        mark = await reader.readuntil(b"\r\n")
        yield mark
        size = int(mark.partition(b";")[0], 16)
        async for piece in _exactly(reader, size):
            yield piece
        # After the last chunk there may be fields; in any case, an empty line.
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            yield line
        yield line
