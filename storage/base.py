"""The contract of a store, and the life of a blob in it.

    begin ──► resume ──► write … write ──► verify ──► commit ──► open … open ──► delete
                ▲          │                (durable, under its final key; the caller makes it visible by a row)
                └─────── suspend  (goes on in another request, another process, on another host, after a crash)
                           │
                           └──► abandon ──► forget

A store keeps bytes under keys. It knows no repositories and no rows, and nothing in it is visible until the
caller has recorded the key that `commit` returned. Every upload has a key of its own, chosen when it begins, and
no key is ever used twice: so two uploads of the same layer cannot harm each other, and deleting the bytes of one
can never hit another. Bytes before row when writing, row before bytes when deleting.

An upload belongs to one writer at a time, from its first step to `suspend`, `commit` or `abandon`. Callers hold a
claim of their own; what a driver has is a fence behind it. A writer that was thought to be dead, and is not, can spoil
nothing that another has published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
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
    """Something that lies in the store.

    Attributes:
        key: where.
        upload: the name of the upload that may need it to go on; empty for what can only be a blob.
        size: in bytes.
        modified: in seconds since the epoch.
    """

    key: str
    upload: str
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

    @property
    def is_tidy(self) -> bool:
        """Whether the store, after `commit`, holds nothing of this upload but what that returned."""

    async def write(self, pieces: Sequence[bytes | memoryview], *, last: bool = False) -> None:
        """Append and hash `pieces`: all of them, or none is counted.

        With `last` the upload is let go of in the same step, as by `suspend`.

        Raises:
            OutOfSpace: no room; the upload stands where it stood and can go on.
            StoreUnavailable: the store does not answer; likewise.
        """

    def checkpoint(self) -> Checkpoint:
        """Return from where another writer could go on now; after `suspend`, where the upload stands."""

    async def verify(self, digest: Digest) -> None:
        """Raise `DigestMismatch` unless these are the bytes of `digest`, in whichever algorithm."""

    async def commit(self, digest: Digest, last: Sequence[bytes | memoryview] = ()) -> str:
        """Append `last`, verify, make durable, and return the final key. The upload is over.

        Raises:
            DigestMismatch: these are not the bytes of `digest`.
            OutOfSpace, StoreUnavailable: nothing was published; `suspend` or `abandon` the upload.
        """

    async def undo(self) -> None:
        """Take back a commit whose key no row will name.

        Where the upload can be committed once more from its checkpoint, what was published stays, for that or for
        `forget`.
        """

    async def suspend(self) -> None:
        """Let go of the upload; its bytes stay for `resume`. Does nothing after `commit` or `abandon`.

        If it fails, `checkpoint` tells how much stays.
        """

    async def abandon(self) -> None:
        """Let go of the upload without a thought for what came since its checkpoint. Never fails.

        For a writer that has lost it to another, and for uploads that are over; `forget` deletes their bytes.
        """


class Content(Protocol):
    """Bytes under a key, ready to be read."""

    @property
    def path(self) -> str | None:
        """The local file that holds them, where there is one: it can be sent without passing through us."""

    async def address(self) -> str | None:
        """Return a URL under which anybody may fetch them for a while, where clients are to be sent there."""

    def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` up to but not including `stop`, in large pieces.

        Raises:
            ContentMissing: there is nothing under this key.
        """


class Store(Protocol):
    """Where bytes are kept.

    Attributes:
        requests: made to a server so far, by their kind; none where there is no server.
    """

    requests: Counter[str]

    def begin(self, name: str, algorithm: str) -> Checkpoint:
        """Return the start of an upload called `name` (unique for ever). Touches nothing yet."""

    def resume(self, checkpoint: Checkpoint) -> Upload:
        """Go on with an upload; bytes after the checkpoint are dropped. Touches nothing yet."""

    def open(self, key: str) -> Content:
        """Return the content under `key`. Looks only when it is read."""

    async def size(self, key: str) -> int | None:
        """Return how many bytes lie under `key`, None for nothing."""

    async def bring(self, key: str, digest: Digest, pieces: AsyncIterator[bytes]) -> None:
        """Put bytes under a key that they have in another store; durable when this returns.

        Raises:
            DigestMismatch: they are not the bytes of `digest`; nothing lies under `key`.
        """

    async def delete(self, key: str) -> None:
        """Delete what lies under `key`; nothing there is fine."""

    async def forget(self, name: str, kept: str | None = None) -> None:
        """Delete all that the upload called `name` left, but for what lies under the key `kept`."""

    def objects(self) -> AsyncIterator[StoredObject]:
        """Yield all that lies in the store, of uploads too, in no order. For recovery, not for requests."""

    async def probe(self) -> None:
        """Prove that bytes can be written, and raise what stands against it."""

    async def owner(self, name: str) -> str:
        """Return the name of the registry whose store this is: `name`, if it was nobody's before."""

    async def close(self) -> None:
        """Let go of threads and descriptors."""
