"""Look-ups answered from memory, as long as nothing was written.

What a repository holds under a reference may change with any write. So entries are good for one epoch: a number
that changes whenever somebody wrote. In a single process that is a counter beside the writer; with several it is what
the database itself tells at once, where it can, and nothing is kept where it cannot. A value is read under an epoch and
kept only if that epoch still holds, so an answer from here is never older than the last write that was acknowledged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

#: What an entry takes beside its content: key, value, links. Roughly, in bytes.
ENTRY_SIZE: Final = 600


class Cache:
    """The least recently used go first when `limit` bytes are full."""

    def __init__(self, limit: int, epoch: Callable[[], int]) -> None:
        """Keep up to `limit` bytes.

        Args:
            limit: in bytes; 0 keeps nothing.
            epoch: returns the current epoch; called for each look-up, so it must be cheap and must not block.
        """
        self.epoch = epoch
        self._limit = limit
        self._seen = epoch()
        self._entries: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._used = 0

    def get(self, key: Hashable) -> object | None:
        """Return what is known under `key` now."""
        epoch = self.epoch()
        if epoch != self._seen:
            self._forget(epoch)
            return None
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: object, epoch: int, size: int) -> None:
        """Keep what was read after `epoch` was looked at, and takes `size` bytes."""
        if epoch != self.epoch():
            return
        if epoch != self._seen:
            self._forget(epoch)
        if key in self._entries:
            return
        self._entries[key] = value, size
        self._used += size
        while self._used > self._limit:
            _, (_, dropped) = self._entries.popitem(last=False)
            self._used -= dropped

    def _forget(self, epoch: int) -> None:
        self._seen = epoch
        self._entries.clear()
        self._used = 0


class WriteCounter:
    """The epoch of a process that is alone with its database."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self) -> int:
        return self.value
