"""Work that must not run on the event loop: hashing, disks, databases.

Half of what a small request costs is going to a thread and coming back. So this is less than an executor of the
standard library: no locks of its own, one future instead of three, one way to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Job(Generic[T]):
    """Work for another thread, and what comes of it. Made and waited for on the event loop."""

    __slots__ = ("_ended", "_loop", "_work")

    def __init__(self, work: Callable[..., T]) -> None:
        """Prepare `work`; it is called with what the method `work` is given."""
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._ended: _Ended[T] = _Ended(loop=self._loop)

    def run(self, ended: Callable[[], None]) -> None:
        """Do the work here, call `ended`, and tell whoever waits."""
        try:
            result = self._work()
        except BaseException as error:
            ended()
            self.fail(error)
        else:
            ended()
            self.succeed(result)

    def work(self, *args: Any) -> T:
        """Do the work here; the outcome is told later, by `succeed` or `fail`."""
        return self._work(*args)

    def succeed(self, result: T) -> None:
        """Let `wait` return."""
        self._tell(self._ended.set_result, result)

    def fail(self, error: BaseException) -> None:
        """Let `wait` raise."""
        self._tell(self._ended.set_exception, error)

    async def wait(self) -> T:
        """Return what the work returned, or raise what it raised.

        A thread cannot be stopped. So if the waiting task is cancelled, this waits for the end of the job first and
        raises afterwards: who holds a descriptor may then close it, knowing that no thread uses it any more.
        """
        return await self._ended

    def _tell(self, how: Callable[[Any], None], what: Any) -> None:
        # The loop may be gone, with everybody who waited.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(how, what)


class _Ended(asyncio.Future[T]):
    """The end of a job, which no cancellation brings nearer."""

    def cancel(self, msg: Any | None = None) -> bool:  # noqa: ARG002
        """Refuse: the task that waits is then cancelled when the job has ended. [asyncio.Task.cancel]"""
        return False


_PROCESSORS: Final = os.sched_getaffinity(0)


def run_anywhere() -> None:
    """Let the calling thread run on any processor, though the one that started it keeps to one."""
    # They may have been taken from us since; then the kernel has chosen others.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, _PROCESSORS)


class Threads:
    """Up to `limit` threads, started when they are needed, which take jobs in turn."""

    def __init__(self, limit: int, name: str, begin: Callable[[], None] | None = None) -> None:
        """Allow so many threads.

        Args:
            limit: of threads.
            name: what a debugger shows.
            begin: called in each thread as it starts. Without it they run on any processor, also where the thread
                that started them keeps to one.
        """
        self._begin = begin or run_anywhere
        self._limit = limit
        self._name = name
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        #: An entry for each thread that has ended a job and was not counted on since; both are atomic.
        self._idle: list[None] = []
        self._is_closed = False

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `job` in a thread and wait until it ended, whatever happens meanwhile.

        Raises:
            RuntimeError: `close` was called, or there is no thread and none can be started.
        """
        if self._is_closed:
            raise RuntimeError(f"the {self._name} threads have ended")
        try:
            self._idle.pop()
        except IndexError:
            self._start()
        queued = Job(partial(job, *args, **kwargs))
        self._jobs.put(queued)
        return await queued.wait()

    async def close(self) -> None:
        """Do what is queued, and end."""
        self._is_closed = True
        await asyncio.to_thread(self._end)

    def _start(self) -> None:
        if len(self._threads) >= self._limit:
            return
        thread = Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # As many as the system allows; those that are there will do it.
            if not self._threads:
                raise
            return
        self._threads.append(thread)

    def _work(self) -> None:
        self._begin()
        while (job := self._jobs.get()) is not None:
            job.run(self._ended)
            # Whoever waited is told, and what it was given is not to be kept alive by us.
            del job

    def _ended(self) -> None:
        self._idle.append(None)

    def _end(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
