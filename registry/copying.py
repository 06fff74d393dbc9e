"""From one store to another, while the registry serves: blobs keep their keys, so no row changes.

What is in the target already is not copied again, so a run that was cut goes on where it stood, and a last one, when
nobody pushes any more, is short. Every blob is hashed on its way and is there whole, or not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from registry.errors import ConfigurationError
from registry.metadata import blobs, identity
from registry.metadata.blobs import Placed
from registry.metadata.engine import Database
from storage.base import Store
from storage.errors import ContentMissing, DigestMismatch

#: Blobs on their way at once.
_CONCURRENT: Final = 4
_PAGE: Final = 500


@dataclass
class Copied:
    """What came of a run. Sizes in bytes.

    Attributes:
        blobs: how many the registry has.
        size: theirs.
        new: how many were copied by this run; the others were there.
        new_size: theirs.
        bad: why some could not be, by digest.
    """

    blobs: int = 0
    size: int = 0
    new: int = 0
    new_size: int = 0
    bad: dict[str, str] = field(default_factory=dict)


async def copy_store(
    database: Database, source: Store, target: Store, progress: Callable[[Copied, int], None]
) -> Copied:
    """Copy all blobs that `database` knows from `source` to `target`.

    `progress` is called after each with what was done, and the bytes of all that the registry has.

    Raises:
        ConfigurationError: the target belongs to another registry.
        StoreUnavailable, OutOfSpace: one of the two does not answer, or is full; the next run goes on.
    """
    ours = await database.read(identity.find)
    if await target.owner(ours) != ours:
        raise ConfigurationError("the target belongs to another registry: two cannot share a store")
    total = await database.read(blobs.total_size)
    copied, last = Copied(), 0
    while page := await database.read(blobs.placed, last, _PAGE):
        last = page[-1].id
        waiting = iter(page)

        async def work() -> None:
            for blob in waiting:  # noqa: B023 - all workers share it, and end before the next page
                await _copy(database, source, target, blob, copied)
                progress(copied, total)

        async with asyncio.TaskGroup() as workers:
            for _ in range(_CONCURRENT):
                workers.create_task(work())
    return copied


async def _copy(database: Database, source: Store, target: Store, blob: Placed, copied: Copied) -> None:
    copied.blobs += 1
    copied.size += blob.size
    if await target.size(blob.key) == blob.size:
        return
    try:
        await target.bring(blob.key, blob.digest, source.open(blob.key).read(0, blob.size))
    except (ContentMissing, DigestMismatch) as error:
        # Deleted meanwhile is fine.
        if blob.key in await database.read(blobs.known_keys, [blob.key]):
            copied.bad[str(blob.digest)] = str(error)
    else:
        copied.new += 1
        copied.new_size += blob.size
