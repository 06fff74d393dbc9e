"""The registry as a whole: what runs beside requests fails alone, and the end ends everything."""

from __future__ import annotations

import asyncio
import threading

import pytest

from registry.affinity import Affinity
from registry.app import Process
from tests.conftest import Start
from tests.content import Pusher


class Broken(Affinity):
    """Cannot look at the processors."""

    looks = 0

    def look(self) -> None:
        self.looks += 1
        raise OSError("no descriptors left")


@pytest.fixture
def process() -> Process:
    return Process(affinity=Broken(enabled=False))


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


async def test_what_fails_beside_requests_is_tried_again_and_the_end_ends_everything(
    start: Start, process: Process
) -> None:
    client = await start()
    await Pusher(client).image("latest")
    for _ in range(100):
        await asyncio.sleep(0.05)
        if isinstance(process.affinity, Broken) and process.affinity.looks > 1:
            break
    else:
        pytest.fail("it was not tried again")
    assert threads("sql-writer")
    await client.close()
    kinds = ("sql-", "disk", "open", "receive", "log-lines", "passwords")
    assert not [thread for kind in kinds for thread in threads(kind)]
