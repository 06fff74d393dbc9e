"""Threads that take turns keep to one processor; all others, and everybody in need, go where there is room."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.affinity import Affinity
from storage.threads import Threads
from tests.content import digest_of
from tests.services.processes import hythe_server, run, wait_until

ALL = os.sched_getaffinity(0)
needs_two = pytest.mark.skipif(len(ALL) < 2, reason="there is one processor only: nothing to choose")


class Processors:
    """A /proc/stat in which processors work as much as they are told to."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._busy = dict.fromkeys(ALL, 0.0)
        self._whole = 0.0
        self.spend({})

    def spend(self, shares: dict[int, float], seconds: float = 10.0) -> None:
        """Let some time pass in which processors work for these parts of it."""
        self._whole += seconds
        for cpu, share in shares.items():
            self._busy[cpu] += share * seconds
        tick = os.sysconf("SC_CLK_TCK")
        lines = [
            f"cpu{cpu} {int(busy * tick)} 0 0 {int((self._whole - busy) * tick)} 0 0 0 0 0 0"
            for cpu, busy in self._busy.items()
        ]
        self.file.write_text("\n".join(["cpu 1 1 1 1 1 1 1 1 1 1", *lines, "intr 5 5 5", "ctxt 7", ""]))


@pytest.fixture
def processors(tmp_path: Path) -> Iterator[Processors]:
    yield Processors(tmp_path / "stat")
    os.sched_setaffinity(0, ALL)


def in_thread(affinity: Affinity, then: threading.Event) -> int:
    """Let a thread join and wait; return its number."""
    joined: list[int] = []

    def work() -> None:
        affinity.join()
        joined.append(threading.get_native_id())
        then.wait(30)

    threading.Thread(target=work, daemon=True).start()
    wait_until(lambda: joined, "a thread to join")
    return joined[0]


@needs_two
def test_threads_that_joined_move_together_when_others_need_their_processor(processors: Processors) -> None:
    first, second = sorted(ALL)[:2]
    affinity = Affinity(stat=processors.file)
    may_end = threading.Event()
    threads = [in_thread(affinity, may_end) for _ in range(2)]
    assert [os.sched_getaffinity(thread) for thread in threads] == [{first}] * 2
    processors.spend({first: 0.9, second: 0.1})
    affinity.look()
    assert [os.sched_getaffinity(thread) for thread in threads] == [{second}] * 2
    # Back again, and no sooner than it is worth it.
    processors.spend({first: 0.5, second: 0.6})
    affinity.look()
    assert affinity.processor == second
    processors.spend({first: 0.1, second: 0.6})
    affinity.look()
    assert [os.sched_getaffinity(thread) for thread in threads] == [{first}] * 2
    may_end.set()


@needs_two
def test_a_little_work_of_others_moves_nobody(processors: Processors) -> None:
    affinity = Affinity(stat=processors.file)
    processors.spend({min(ALL): 0.2})
    affinity.look()
    assert affinity.processor == min(ALL)


@needs_two
def test_their_own_work_is_not_taken_for_that_of_others(processors: Processors) -> None:
    first = min(ALL)
    affinity = Affinity(stat=processors.file)
    affinity.join()
    began = time.thread_time()
    while time.thread_time() - began < 0.3:
        pass
    processors.spend({first: 0.9}, seconds=0.33)
    affinity.look()
    assert affinity.processor == first


@needs_two
def test_a_processor_that_was_taken_away_is_left(processors: Processors) -> None:
    affinity = Affinity(stat=processors.file)
    lines = processors.file.read_text().splitlines()
    processors.file.write_text("\n".join(line for line in lines if not line.startswith(f"cpu{min(ALL)} ")))
    affinity.look()
    processors.spend(dict.fromkeys(ALL, 0.01))
    lines = processors.file.read_text().splitlines()
    processors.file.write_text("\n".join(line for line in lines if not line.startswith(f"cpu{min(ALL)} ")))
    affinity.look()
    assert affinity.processor in ALL - {min(ALL)}


def test_where_nothing_can_be_told_nobody_is_kept(tmp_path: Path) -> None:
    affinity = Affinity(stat=tmp_path / "absent")
    affinity.join()
    affinity.look()
    assert os.sched_getaffinity(0) == ALL


@needs_two
def test_when_nothing_can_be_told_any_more_nobody_moves(processors: Processors) -> None:
    affinity = Affinity(stat=processors.file)
    processors.file.unlink()
    affinity.look()
    affinity.look()
    assert affinity.processor == min(ALL)


@needs_two
def test_each_worker_begins_with_another_processor(processors: Processors) -> None:
    begun = [Affinity(index, stat=processors.file).processor for index in range(len(ALL) + 1)]
    assert begun[:-1] == sorted(ALL)
    assert begun[-1] == begun[0]


def test_switched_off_it_leaves_all_to_the_kernel(processors: Processors) -> None:
    affinity = Affinity(enabled=False, stat=processors.file)
    affinity.join()
    affinity.look()
    assert os.sched_getaffinity(0) == ALL


def test_with_one_processor_there_is_nothing_to_do(processors: Processors) -> None:
    os.sched_setaffinity(0, {min(ALL)})
    affinity = Affinity(stat=processors.file)
    affinity.join()
    affinity.look()
    assert affinity.processor is None


@needs_two
async def test_threads_for_large_work_run_anywhere_though_the_one_that_starts_them_does_not(
    processors: Processors,
) -> None:
    affinity = Affinity(stat=processors.file)
    affinity.join()
    assert len(os.sched_getaffinity(0)) == 1
    large, small = Threads(1, "large"), Threads(1, "small", affinity.join)
    assert await large.run(os.sched_getaffinity, 0) == ALL
    assert await small.run(os.sched_getaffinity, 0) == {affinity.processor}
    await large.close()
    await small.close()


def masks(pid: int) -> list[set[int]]:
    """Return where each thread of a process may run."""
    return [os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()]


@needs_two
@pytest.mark.parametrize("enabled", [True, False])
def test_a_server_keeps_its_loop_to_one_processor_and_its_large_work_to_none(tmp_path: Path, enabled: bool) -> None:
    large = tmp_path / "large"
    large.write_bytes(secrets.token_bytes(3 << 20))
    digest = digest_of(large.read_bytes())
    environment = {"HYTHE_SERVER__AFFINITY": str(enabled).lower()}
    with hythe_server(tmp_path, environment=environment) as server:
        url = f"{server.url}/v2/org/app/blobs/uploads/?digest={digest}"
        run("curl", "-sSf", "--data-binary", f"@{large}", url)
        assert (os.sched_getaffinity(server.pid) != ALL) == enabled
        assert ALL in masks(server.pid)
        assert all(len(mask) == 1 or mask == ALL for mask in masks(server.pid))


@needs_two
def test_each_worker_keeps_to_a_processor(tmp_path: Path) -> None:
    with hythe_server(tmp_path, "--workers", "2") as server:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()

        def kept() -> list[set[int]]:
            return [os.sched_getaffinity(int(child)) for child in children]

        wait_until(lambda: sorted(map(len, kept())) == [1, 1], "both workers to serve")
