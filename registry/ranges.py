"""`Range` and `Content-Range`. [RFC 9110, 14; distribution-spec: Pushing a blob in chunks]"""

from __future__ import annotations

import re
from typing import Final

from registry.errors import BlobUploadInvalid, RangeUnsatisfiable

_SPEC: Final = re.compile(r"(\d*)-(\d*)")
_CHUNK: Final = re.compile(r"(?:bytes[ =])?(\d{1,19})-(\d{1,19})(?:/(?:\*|\d{1,19}))?")
#: A request with more ranges than this is answered with the whole content: it can only be an attack.
_RANGES_LIMIT: Final = 16


def parse_ranges(header: str, size: int) -> list[tuple[int, int]] | None:
    """Return the (start, stop) pairs that a `Range` header asks for, of content of `size` bytes.

    None means to ignore the header and answer 200, as the RFC wants for units it does not know and for what it
    cannot read.

    Raises:
        RangeUnsatisfiable: none of the ranges touches the content.
    """
    unit, equals, specs = header.partition("=")
    if unit.strip().lower() != "bytes" or not equals:
        return None
    matches = [_SPEC.fullmatch(spec.strip()) for spec in specs.split(",") if spec.strip()]
    if not matches or len(matches) > _RANGES_LIMIT:
        return None
    ranges = []
    for match in matches:
        if match is None or match.groups() == ("", ""):
            return None
        first, last = match.groups()
        if max(len(first), len(last)) > 19 or (first and last and int(first) > int(last)):
            return None
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start < stop:
            ranges.append((start, stop))
    if not ranges:
        raise RangeUnsatisfiable(headers={"Content-Range": f"bytes */{size}"})
    return ranges


def parse_chunk(header: str, length: int | None) -> tuple[int, int]:
    """Return (start, stop) of a chunk from its `Content-Range`, which is `<first>-<last>` here.

    Args:
        header: the value of the header.
        length: of the body, where it was announced.

    Raises:
        BlobUploadInvalid: malformed, or of another length than the body.
    """
    match = _CHUNK.fullmatch(header.strip())
    if match is None:
        raise BlobUploadInvalid(f"Content-Range must be <first>-<last>, got {header[:80]!r}")
    first, last = int(match[1]), int(match[2])
    # An empty body has no last byte; clients write 0-0 or n-(n-1).
    if length == 0 and last - first in (0, -1):
        return first, first
    if last < first:
        raise BlobUploadInvalid(f"Content-Range ends before it begins: {header[:80]!r}")
    if length is not None and last - first + 1 != length:
        raise BlobUploadInvalid(
            f"Content-Range {first}-{last} is {last - first + 1} bytes, Content-Length says {length}"
        )
    return first, last + 1
