"""Work that must not run on the event loop: hashing, disks, databases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def run(threads: Executor, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `job` in one of `threads` and wait until it ended.

    A thread cannot be stopped. So if the waiting task is cancelled, this waits for the job first and raises
    afterwards: who holds a descriptor may then close it, knowing that no thread is writing to it any more.
    """
    return await settle(threads.submit(job, *args, **kwargs))


async def settle(job: Future[T]) -> T:
    """Wait for `job` to end, whatever happens meanwhile, then return its result or raise."""
    future = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # retrieved, or asyncio would log it as forgotten
        raise
