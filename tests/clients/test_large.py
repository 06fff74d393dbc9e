"""A layer of 4 GiB in and out: the server's memory does not grow with it."""

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.plain import PlainClient, with_query
from tests.services.processes import HytheServer

BLOCK = secrets.token_bytes(1 << 20)
BLOCKS = 4 << 10
SIZE = BLOCKS * len(BLOCK)
MEMORY_LIMIT = 150 << 20
UPLOADS = "/v2/org/team/app/blobs/uploads/"

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux")


def memory(server: HytheServer, field: str) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def peak_above(server: HytheServer, idle: int, work: Callable[[], None]) -> int:
    # 5 resets the peak to what is used now. [proc(5), clear_refs]
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    work()
    return memory(server, "VmHWM") - idle


def blocks(hasher: "hashlib._Hash") -> Iterator[bytes]:
    for _ in range(BLOCKS):
        hasher.update(BLOCK)
        yield BLOCK


def test_a_layer_of_4_gib_goes_in_and_out_in_little_memory(server: HytheServer) -> None:
    if shutil.disk_usage(server.data).free < SIZE + (1 << 30):
        pytest.skip("needs 5 GiB of free disk")
    sent, received = hashlib.sha256(), hashlib.sha256()

    def push() -> None:
        with PlainClient(server.url) as client:
            begun = client.ask("POST", f"{server.url}{UPLOADS}")
            streamed = client.ask("PATCH", begun.location, blocks(sent))
            assert (streamed.status, streamed.headers["Range"]) == (202, f"0-{SIZE - 1}")
            closed = client.ask("PUT", with_query(streamed.location, f"digest=sha256:{sent.hexdigest()}"))
            assert closed.status == 201, closed.body

    def pull() -> None:
        with PlainClient(server.url) as client:
            for piece in client.stream(f"{server.url}/v2/org/team/app/blobs/sha256:{sent.hexdigest()}"):
                received.update(piece)

    idle = memory(server, "VmRSS")
    pushing = peak_above(server, idle, push)
    pulling = peak_above(server, idle, pull)
    assert received.digest() == sent.digest()
    assert max(pushing, pulling) < MEMORY_LIMIT, f"{pushing >> 20} MiB in, {pulling >> 20} MiB out"
