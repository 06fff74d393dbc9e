"""One processor for threads that take turns anyway.

The event loop and the threads that do small jobs for it (a look-up, a row, a file of a few kilobytes) hardly ever run
at the same time: the interpreter's lock is held by one of them. Where they stand on two processors, each turn is a
wake-up from one to the other, and costs more than most turns do: on one, small pushes take a third less. So they keep
to one, and go to another when somebody else needs theirs. Threads that work without the lock (hashing, large files,
large transfers) run wherever there is room.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_STAT: Final = Path("/proc/stat")
#: [proc_stat(5)] fields of a processor's line that are not work: idle, iowait.
_IDLE: Final = slice(3, 5)
#: Part of a processor that others may use before we look for a better one.
_CROWDED: Final = 0.25
#: How much less used another one must be.
_WORTH_IT: Final = 0.15


@dataclass(slots=True)
class _Thread:
    """One that keeps to the processor: its number, its clock, and what that showed last. Seconds."""

    number: int
    clock: int
    used: float = 0.0

    def spent(self) -> float:
        """Return the processor time since the last look."""
        before = self.used
        # One that has ended uses no more.
        with contextlib.suppress(OSError):
            self.used = time.clock_gettime(self.clock)
        return self.used - before


@dataclass(slots=True)
class Affinity:
    """Keeps threads together.

    Attributes:
        index: which processor to begin with, of those that may be used: another one for each worker.
        enabled: False leaves all to the kernel.
        stat: where the kernel tells what the processors do.
    """

    index: int = 0
    enabled: bool = True
    stat: Path = _STAT
    processor: int | None = None
    _allowed: list[int] = field(default_factory=list)
    _threads: list[_Thread] = field(default_factory=list)
    _seen: dict[int, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Choose a processor, where there is a choice."""
        self._allowed = sorted(os.sched_getaffinity(0)) if self.enabled else []
        if len(self._allowed) < 2:
            return
        self._seen = self._read()
        if self._seen:
            self.processor = self._allowed[self.index % len(self._allowed)]

    def join(self) -> None:
        """Let the calling thread keep to the processor from now on."""
        if self.processor is not None:
            thread = _Thread(threading.get_native_id(), time.pthread_getcpuclockid(threading.get_ident()))
            thread.spent()
            self._threads.append(thread)
            _keep(thread.number, self.processor)

    def look(self) -> None:
        """Go elsewhere if others need the processor. To be called now and then; blocks on a small file."""
        if self.processor is None:
            return
        ours = sum(thread.spent() for thread in self._threads)
        before, self._seen = self._seen, self._read()
        spent = {cpu: _spent(before[cpu], now) for cpu, now in self._seen.items() if cpu in before}
        shares = {cpu: work / whole for cpu, (work, whole) in spent.items() if whole}
        # A processor that is not listed was taken away, and the kernel has moved us already.
        work, whole = spent.get(self.processor, (1.0, 1.0))
        others = (work - ours) / whole if whole else 0.0
        if others < _CROWDED or not shares:
            return
        best = min(shares, key=lambda cpu: shares[cpu])
        if shares[best] + _WORTH_IT < others:
            self.processor = best
            for thread in self._threads:
                _keep(thread.number, best)

    def _read(self) -> dict[int, tuple[float, float]]:
        """Return for each processor that we may use the seconds it worked, and those it was there.

        Nothing where that cannot be told: then nobody moves.
        """
        tick = os.sysconf("SC_CLK_TCK")
        found: dict[int, tuple[float, float]] = {}
        try:
            text = self.stat.read_text(encoding="ascii")
        except OSError:
            return found
        for line in text.splitlines():
            name, *fields = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._allowed:
                # The last two are in the first two as well.
                times = [int(field) / tick for field in fields[:8]]
                found[int(name[3:])] = sum(times) - sum(times[_IDLE]), sum(times)
        return found


def _spent(before: tuple[float, float], now: tuple[float, float]) -> tuple[float, float]:
    return now[0] - before[0], now[1] - before[1]


def _keep(thread: int, processor: int) -> None:
    # The thread may be gone, or the processor taken from us: then the kernel knows better.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(thread, {processor})
