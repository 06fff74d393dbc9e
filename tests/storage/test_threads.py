"""Work in threads: who waits for it learns its end, also when nobody wants it any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from storage.threads import Threads


@pytest.fixture
async def one() -> AsyncIterator[Threads]:
    threads = Threads(1, "test")
    yield threads
    await threads.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]


async def test_the_result_comes_back(one: Threads) -> None:
    assert await one.run(int, "7", base=8) == 7


async def test_an_exception_comes_back(one: Threads) -> None:
    with pytest.raises(ValueError):
        await one.run(int, "x")
    assert await one.run(int, "8") == 8


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_task_waits_for_the_end_of_its_job(one: Threads, fails: bool) -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        began.set()
        may_end.wait(30)
        ended.set()
        if fails:
            raise OSError

    task = asyncio.create_task(one.run(job))
    await asyncio.to_thread(began.wait, 30)
    task.cancel()
    await asyncio.wait({task}, timeout=0.05)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_timeout_waits_for_the_end_of_the_job_too(one: Threads) -> None:
    may_end = threading.Event()
    asyncio.get_running_loop().call_later(0.1, may_end.set)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await one.run(may_end.wait, 30)
    assert may_end.is_set()


async def test_a_job_that_had_not_begun_when_it_was_cancelled_still_ends_first(one: Threads) -> None:
    may_end = threading.Event()
    done: list[int] = []
    first = asyncio.create_task(one.run(may_end.wait, 30))
    second = asyncio.create_task(one.run(done.append, 1))
    await asyncio.sleep(0)
    second.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert await first
    assert done == [1]


async def test_threads_are_started_as_they_are_needed_and_no_more_than_allowed() -> None:
    threads = Threads(3, "test")

    def running() -> int:
        return sum(thread.name.startswith("test-") for thread in threading.enumerate())

    assert running() == 0
    for _ in range(5):
        await threads.run(int)
    assert running() <= 2
    meeting = threading.Barrier(3)
    await asyncio.gather(*(threads.run(meeting.wait, 30) for _ in range(3)))
    await asyncio.gather(*(threads.run(int) for _ in range(50)))
    assert running() == 3
    await threads.close()
    assert running() == 0


async def test_closing_does_what_is_queued_first() -> None:
    threads = Threads(2, "test")
    done: list[int] = []
    jobs = [asyncio.create_task(threads.run(done.append, number)) for number in range(20)]
    await asyncio.sleep(0)
    await threads.close()
    await asyncio.gather(*jobs)
    assert sorted(done) == list(range(20))
