"""Work in threads: who waits for it learns its end, also when nobody wants it any more."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.threads import run


async def test_the_result_comes_back() -> None:
    with ThreadPoolExecutor(1) as threads:
        assert await run(threads, int, "7", base=8) == 7


async def test_an_exception_comes_back() -> None:
    with ThreadPoolExecutor(1) as threads, pytest.raises(ValueError):
        await run(threads, int, "x")


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_task_waits_for_the_end_of_its_job(fails: bool) -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        began.set()
        may_end.wait(30)
        ended.set()
        if fails:
            raise OSError

    with ThreadPoolExecutor(1) as threads:
        task = asyncio.create_task(run(threads, job))
        await asyncio.to_thread(began.wait, 30)
        task.cancel()
        await asyncio.wait({task}, timeout=0.05)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()


async def test_a_job_that_had_not_begun_when_it_was_cancelled_still_ends_first() -> None:
    may_end = threading.Event()
    done: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        first = asyncio.create_task(run(threads, may_end.wait, 30))
        second = asyncio.create_task(run(threads, done.append, 1))
        await asyncio.sleep(0)
        second.cancel()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert await first
    assert done == [1]
