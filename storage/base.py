"""The contract of a store, and the life of a blob in it.

    begin ──► resume ──► write … write ──► verify ──► commit ──► open … open ──► delete
                ▲          │                (synced, under its final key; the caller makes it visible by a row)
                └─────── suspend  (goes on in another request, another process, after a crash)
                           │
                           └──► abort

A store keeps bytes under keys. It knows no repositories and no rows, and nothing in it is visible until the
caller has recorded the key that `commit` returned. Every upload has a key of its own, chosen when it begins, and
no key is ever used twice: so two uploads of the same layer cannot harm each other, and deleting the bytes of one
can never hit another. Bytes before row when writing, row before bytes when deleting.

An upload belongs to one writer at a time, from its first step to `suspend`, `commit` or `abort`. Callers hold a claim
of their own; this is the fence behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.digest import Digest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where an upload stands, in a form that a row can keep.

    Attributes:
        key: the store's name for the upload.
        algorithm: of the digest that is being computed.
        offset: bytes received and hashed.
        state: opaque to all but the driver; empty when the bytes must be read again to go on.
    """

    key: str
    algorithm: str
    offset: int = 0
    state: bytes = b""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Something that lies in the store. `modified` is in seconds since the epoch."""

    key: str
    size: int
    modified: float


class Upload(Protocol):
    """Bytes on their way in.

    Nothing is touched before the first step that needs it. That step, whichever it is, may raise also:
        UploadBusy: another writer has it.
        UploadLost: fewer bytes are there than the checkpoint counts.
    """

    @property
    def offset(self) -> int:
        """Bytes received so far."""

    async def write(self, pieces: Sequence[bytes | memoryview], *, last: bool = False) -> None:
        """Append and hash `pieces`: all of them, or none is counted.

        With `last` the upload is let go of in the same step, as by `suspend`.

        Raises:
            OutOfSpace: no room; the upload stands where it stood and can go on.
        """

    def checkpoint(self) -> Checkpoint:
        """Return where the upload stands."""

    async def verify(self, digest: Digest) -> None:
        """Raise `DigestMismatch` unless these are the bytes of `digest`, in whichever algorithm."""

    async def commit(self, digest: Digest, last: Sequence[bytes | memoryview] = ()) -> str:
        """Append `last`, verify, make durable, and return the final key. The upload is over.

        Raises:
            DigestMismatch: these are not the bytes of `digest`.
            OutOfSpace: nothing was published; `suspend` or `abort` the upload.
        """

    async def suspend(self) -> None:
        """Let go of the upload; its bytes stay for `resume`. Does nothing after `commit` or `abort`."""

    async def abort(self) -> None:
        """Drop the upload and its bytes."""


class Content(Protocol):
    """Bytes under a key, ready to be read."""

    @property
    def path(self) -> str | None:
        """The local file that holds them, where there is one: it can be sent without passing through us."""

    def read(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to but not including `stop`, in large pieces.

        Raises:
            ContentMissing: there is nothing under this key.
        """


class Store(Protocol):
    """Where bytes are kept."""

    def begin(self, name: str, algorithm: str) -> Checkpoint:
        """Return the start of an upload called `name` (unique for ever). Touches nothing yet."""

    def resume(self, checkpoint: Checkpoint) -> Upload:
        """Go on with an upload; bytes after the checkpoint are dropped. Touches nothing yet."""

    def open(self, key: str) -> Content:
        """Return the content under `key`. Looks only when it is read."""

    async def delete(self, key: str) -> None:
        """Delete what lies under `key`, an upload or a blob; nothing there is fine."""

    def objects(self) -> AsyncIterator[StoredObject]:
        """Yield all that lies in the store, uploads too, in no order. For recovery, not for requests."""

    async def probe(self) -> None:
        """Prove that bytes can be written, and raise what stands against it."""

    async def close(self) -> None:
        """Let go of threads and descriptors."""
