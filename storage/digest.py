"""Digests, and hashers whose state outlives a process.

`hashlib` cannot save what it has hashed so far. libcrypto can: `SHA256_CTX` and `SHA512_CTX` are plain
memory. We call it through the library that Python itself has loaded, prove at import that it agrees with
`hashlib` before and after a save, and do without saving where it does not. A hasher that cannot be restored
costs one more reading of the bytes, never correctness.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol, Self

from storage.errors import InvalidDigest

#: Registered algorithms and the length of their hex form. [image-spec: descriptor.md, digests]
HEX_LENGTH: Final = {"sha256": 64, "sha512": 128}
CANONICAL: Final = "sha256"

_HEX: Final = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Digest:
    """The name of some bytes: an algorithm and what it makes of them, in lower-case hex."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @classmethod
    @lru_cache(maxsize=16384)
    def parse(cls, text: str) -> Self:
        """Read `algorithm:hex`.

        Raises:
            InvalidDigest: malformed, or of an algorithm that is not sha256 or sha512.
        """
        algorithm, colon, hexadecimal = text.partition(":")
        if not colon:
            raise InvalidDigest(f"{text[:200]!r} is not a digest: it must look like sha256:<64 hex digits>")
        check_algorithm(algorithm)
        if len(hexadecimal) != HEX_LENGTH[algorithm] or not _HEX.fullmatch(hexadecimal):
            raise InvalidDigest(
                f"{text[:200]!r} is not a digest: {algorithm} takes {HEX_LENGTH[algorithm]} lower-case hex digits"
            )
        return cls(algorithm, hexadecimal)

    @classmethod
    def of(cls, content: bytes, algorithm: str = CANONICAL) -> Self:
        """Return the digest of `content`."""
        return cls(algorithm, hashlib.new(algorithm, content, usedforsecurity=False).hexdigest())


def check_algorithm(algorithm: str) -> str:
    """Return `algorithm`, or raise `InvalidDigest` for one we do not know."""
    if algorithm not in HEX_LENGTH:
        raise InvalidDigest(f"unknown digest algorithm {algorithm[:80]!r}: sha256 and sha512 are supported")
    return algorithm


class Hasher(Protocol):
    """Hashes bytes as they come. One thread at a time."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in more bytes. Lets go of the interpreter's lock while it works."""

    def digest(self) -> Digest:
        """Return the digest of what came so far; more may follow."""

    def save(self) -> bytes:
        """Return a state for `restore`, or `b""` where this build of Python has none to give."""


class _LibcryptoHasher:
    """SHA-2 by libcrypto's low-level calls, whose whole state is one block of memory."""

    # sizeof(SHA256_CTX) and sizeof(SHA512_CTX); unchanged since OpenSSL 1.0. With room to spare.
    _SIZE: Final = {"sha256": 112, "sha512": 216}

    def __init__(self, library: ctypes.CDLL, algorithm: str, state: bytes = b"") -> None:
        self._algorithm = algorithm
        self._size = self._SIZE[algorithm]
        prefix = algorithm.upper()
        self._update: Callable[..., int] = getattr(library, f"{prefix}_Update")
        self._final: Callable[..., int] = getattr(library, f"{prefix}_Final")
        self._context = ctypes.create_string_buffer(self._size)
        if state:
            if len(state) != self._size:
                raise ValueError("a saved hash state of another size")
            self._context.raw = state
        else:
            getattr(library, f"{prefix}_Init")(self._context)

    def update(self, data: bytes | memoryview, /) -> None:
        if isinstance(data, memoryview):
            if not data:
                return
            # ctypes finds the address of what can be written to only, which our own buffers are.
            first = ctypes.c_char.from_buffer(data)
            self._update(self._context, ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(data)))
        else:
            self._update(self._context, data, ctypes.c_size_t(len(data)))

    def digest(self) -> Digest:
        scratch = ctypes.create_string_buffer(self._context.raw, self._size)
        result = ctypes.create_string_buffer(HEX_LENGTH[self._algorithm] // 2)
        self._final(result, scratch)
        return Digest(self._algorithm, result.raw.hex())

    def save(self) -> bytes:
        return self._context.raw


class _HashlibHasher:
    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm, usedforsecurity=False)

    def update(self, data: bytes | memoryview, /) -> None:
        self._hash.update(data)

    def digest(self) -> Digest:
        return Digest(self._algorithm, self._hash.hexdigest())

    def save(self) -> bytes:
        return b""


def hasher(algorithm: str) -> Hasher:
    """Return a fresh hasher for a known `algorithm`."""
    return _LibcryptoHasher(_LIBCRYPTO, algorithm) if _LIBCRYPTO else _HashlibHasher(algorithm)


def restore(algorithm: str, state: bytes) -> Hasher | None:
    """Return a hasher that goes on from a saved `state`, or None: hash the bytes again."""
    if not state or not _LIBCRYPTO:
        return None
    try:
        return _LibcryptoHasher(_LIBCRYPTO, algorithm, state)
    except ValueError:
        return None


def _load_libcrypto() -> ctypes.CDLL | None:
    """Find the libcrypto of this Python, and trust it only after it agreed with hashlib."""
    try:
        import _hashlib

        library = ctypes.CDLL(_hashlib.__file__)
        return library if all(_agrees(library, algorithm) for algorithm in HEX_LENGTH) else None
    except (ImportError, OSError, AttributeError):
        return None


def _agrees(library: ctypes.CDLL, algorithm: str) -> bool:
    """Hash, save in the middle of a block, restore, go on: the same as hashlib?"""
    text = b"landing-place" * 29
    first = _LibcryptoHasher(library, algorithm)
    first.update(text)
    second = _LibcryptoHasher(library, algorithm, first.save())
    second.update(text)
    return first.digest() == Digest.of(text, algorithm) and second.digest() == Digest.of(text * 2, algorithm)


_LIBCRYPTO: Final = _load_libcrypto()
