"""Clients at once, and clients that are cut off."""

import asyncio
import hashlib
import secrets
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients.plain import PlainClient, with_query
from tests.clients.traffic import Traffic
from tests.conftest import needs
from tests.content import digest_of
from tests.services.containers import ContainerTools
from tests.services.images import Layout, packed_image, random_layer, write_layout
from tests.services.processes import HytheServer
from tests.services.relay import Relay

pytestmark = pytest.mark.clients

CLIENTS = 10
REPOSITORIES = {"one repository": "org/app", "one each": "org/app{}"}


def stored(server: HytheServer) -> list[str]:
    """Return the digests of what lies in the store, one for each file."""
    return sorted(path.name.partition(".")[0] for path in (server.data / "blobs").glob("*/*/*"))


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output.decode(errors="replace")


@needs("skopeo")
@pytest.mark.parametrize("repository", REPOSITORIES.values(), ids=REPOSITORIES)
def test_ten_images_pushed_at_once_come_back_whole(
    tools: ContainerTools, server: HytheServer, scratch: Path, repository: str
) -> None:
    shared = random_layer(4_000_000)
    numbers = range(CLIENTS)
    layouts = [
        write_layout(scratch / f"in{number}", packed_image([shared, random_layer(500_000)])) for number in numbers
    ]
    names = [f"docker://{server.address}/{repository.format(number)}:{number}" for number in numbers]
    finish(
        [
            tools.begin_skopeo("copy", "--dest-tls-verify=false", "--preserve-digests", layout.reference, name)
            for layout, name in zip(layouts, names, strict=True)
        ]
    )
    finish(
        [
            tools.begin_skopeo("copy", "--src-tls-verify=false", name, f"oci:{scratch / f'out{number}'}:latest")
            for number, name in enumerate(names)
        ]
    )
    for number, layout in enumerate(layouts):
        assert Layout(scratch / f"out{number}", layout.digest).blobs == layout.blobs
    # Each content once: a layer of each image, the one they share, and the configurations, which differ too.
    assert len(stored(server)) == len(set(stored(server))) == CLIENTS + 1 + CLIENTS
    assert not list((server.data / "uploads").iterdir())


@pytest.mark.parametrize("repository", REPOSITORIES.values(), ids=REPOSITORIES)
def test_one_layer_finished_by_ten_clients_at_the_same_moment_is_stored_once(
    server: HytheServer, repository: str
) -> None:
    content = secrets.token_bytes(2_000_000)
    digest = digest_of(content)
    together = threading.Barrier(CLIENTS)

    def push(number: int) -> int:
        with PlainClient(server.url) as client:
            begun = client.ask("POST", f"{server.url}/v2/{repository.format(number)}/blobs/uploads/")
            streamed = client.ask("PATCH", begun.location, iter([content]))
            together.wait(60)
            return client.ask("PUT", with_query(streamed.location, f"digest={digest}")).status

    def pull(number: int) -> str:
        with PlainClient(server.url) as client:
            return digest_of(client.ask("GET", f"{server.url}/v2/{repository.format(number)}/blobs/{digest}").body)

    with ThreadPoolExecutor(CLIENTS) as clients:
        assert list(clients.map(push, range(CLIENTS))) == [201] * CLIENTS
        assert list(clients.map(pull, range(CLIENTS))) == [digest] * CLIENTS
    assert stored(server) == [digest.partition(":")[2]]
    assert not list((server.data / "uploads").iterdir())


@needs("skopeo")
async def test_a_push_whose_client_was_killed_succeeds_when_repeated(
    tools: ContainerTools, server: HytheServer, scratch: Path, traffic: Traffic
) -> None:
    layout = write_layout(scratch / "in", packed_image([random_layer(6_000_000)]))
    async with Relay(server.port, hold_after=3_000_000) as relay:
        command = ("copy", "--dest-tls-verify=false", layout.reference, f"docker://{relay.address}/org/app:1")
        push = tools.begin_skopeo(*command)
        try:
            await relay.holds(60)
        finally:
            push.kill()
            push.communicate()
        relay.cut()
        assert traffic.new()["manifest", "PUT", 201] == 0
        await asyncio.to_thread(tools.skopeo, *command)
    out = f"oci:{scratch / 'out'}:latest"
    tools.skopeo("copy", "--src-tls-verify=false", f"docker://{server.address}/org/app:1", out)
    assert Layout(scratch / "out", layout.digest).blobs == layout.blobs


async def test_a_pull_that_was_cut_off_goes_on_where_it_stopped(server: HytheServer) -> None:
    content = secrets.token_bytes(8_000_000)
    digest = digest_of(content)
    path = "/v2/org/app/blobs/"
    with PlainClient(server.url) as client:
        assert client.ask("POST", f"{server.url}{path}uploads/?digest={digest}", content).status == 201
    async with Relay(server.port, hold_after=3_000_000) as relay:
        relay.cut()
        url = f"http://{relay.address}{path}{digest}"
        begun = await asyncio.to_thread(take, url)
        assert 0 < len(begun) < len(content)
        rest = await asyncio.to_thread(take, url, Range=f"bytes={len(begun)}-", If_Range=f'"{digest}"')
    assert hashlib.sha256(begun + rest).hexdigest() == digest.partition(":")[2]


def take(url: str, **headers: str) -> bytes:
    """Get as much as comes."""
    got = bytearray()
    with PlainClient(url) as client:
        try:
            for piece in client.stream(url, **headers):
                got += piece
        except ConnectionResetError:
            pass
    return bytes(got)
