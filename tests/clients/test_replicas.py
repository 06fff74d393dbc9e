"""A campaign: docker and skopeo push and pull through nginx while replicas are killed and started again."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count, takewhile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from registry.config import Settings
from tests.conftest import environment_of, needs, needs_root
from tests.facts import query
from tests.services.containers import ContainerTools
from tests.services.docker import DockerDaemon
from tests.services.images import Layout, packed_image, random_layer, write_layout
from tests.services.network import network
from tests.services.nginx import Nginx, nginx
from tests.services.processes import HytheServer, hythe_server

PROGRAMS = ("dockerd", "docker", "skopeo", "nginx", "ip", "systemd-socket-activate")

pytestmark = [needs(*PROGRAMS), needs_root, pytest.mark.clients]

#: `make replicas` has 50.
IMAGES = int(os.environ.get("HYTHE_REPLICA_IMAGES", "10"))
#: Pushes go on until so many replicas were killed under them.
KILLS = 3
TRIES = 20


@pytest.fixture
def replicas(scratch: Path, settings: Settings) -> Iterator[list[HytheServer]]:
    """Three servers, each on a host of its own, which have nothing in common but the database and the bucket."""
    with ExitStack() as stack:
        net = stack.enter_context(network(scratch))
        environment = environment_of(settings)
        environment |= {"HYTHE_SERVER__ALLOW_OPEN": "true", "HYTHE_SERVER__BEHIND_PROXY": "true"}
        for key in ("HYTHE_DATABASE__URL", "HYTHE_STORAGE__S3__ENDPOINT"):
            where = urlsplit(environment[key])
            assert where.port
            environment[key] = environment[key].replace(f"127.0.0.1:{where.port}", net.forward(where.port))
        made = []
        for number in range(3):
            (scratch / str(number)).mkdir()
            server = hythe_server(scratch / str(number), environment=environment, host=net.add_host())
            made.append(stack.enter_context(server))
        yield made


@pytest.fixture
def front(scratch: Path, replicas: list[HytheServer]) -> Iterator[Nginx]:
    with nginx(scratch / "nginx", *replicas) as proxy:
        yield proxy


class Killer(threading.Thread):
    """Kills a replica now and then, and starts it again a moment later."""

    def __init__(self, replicas: list[HytheServer], seed: int) -> None:
        super().__init__(name="killer")
        self._replicas = replicas
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self.kills = 0

    def run(self) -> None:
        while not self._stopping.wait(self._random.uniform(0.2, 1.5)):
            victim = self._random.choice(self._replicas)
            victim.kill()
            self.kills += 1
            time.sleep(self._random.uniform(0, 0.5))
            victim.start()

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def until_it_works(work: Callable[[], object]) -> None:
    """Do what a person does whose push failed because a server died: push again."""
    for number in range(TRIES):
        try:
            work()
        except AssertionError:
            if number == TRIES - 1:
                raise
            time.sleep(0.3)
        else:
            return


def test_what_was_acknowledged_is_whole_whichever_replica_died(
    scratch: Path,
    tools: ContainerTools,
    docker: DockerDaemon,
    replicas: list[HytheServer],
    front: Nginx,
    settings: Settings,
) -> None:
    layouts: list[Layout] = []
    images: dict[str, str] = {}
    killer = Killer(replicas, seed=7)

    def numbers(least: int) -> Iterator[int]:
        return takewhile(lambda number: number < least or killer.kills < KILLS, count())

    def push_by_skopeo() -> None:
        for number in numbers(IMAGES // 2):
            layers = [random_layer(size) for size in (1000, 300_000, 7_000_000)]
            layout = write_layout(scratch / f"in-{number}", packed_image(layers))
            name = f"docker://{front.address}/skopeo/app:{number}"
            until_it_works(
                lambda: tools.skopeo("copy", "--dest-tls-verify=false", "--preserve-digests", layout.reference, name)  # noqa: B023
            )
            layouts.append(layout)

    def push_by_docker() -> None:
        for number in numbers(IMAGES - IMAGES // 2):
            name = f"{front.address}/docker/app:{number}"
            images[name] = docker.make_image(name, size=2_000_000, layers=3)
            until_it_works(lambda: docker("push", name))  # noqa: B023

    failures: list[BaseException] = []
    pushers = [threading.Thread(target=_kept(failures, work)) for work in (push_by_skopeo, push_by_docker)]
    killer.start()
    for pusher in pushers:
        pusher.start()
    for pusher in pushers:
        pusher.join()
    killer.stop()
    assert not failures, failures
    for number, layout in enumerate(layouts):
        source = f"docker://{front.address}/skopeo/app:{number}"
        target = f"oci:{scratch / f'out-{number}'}:latest"
        until_it_works(lambda: tools.skopeo("copy", "--src-tls-verify=false", "--preserve-digests", source, target))  # noqa: B023
        assert Layout(scratch / f"out-{number}", layout.digest).blobs == layout.blobs
    for name, image in images.items():
        with contextlib.suppress(AssertionError):
            docker.forget(name)
        until_it_works(lambda: docker("pull", name))  # noqa: B023
        assert docker.inspect(name)["Id"] == image
    # Only those of killed replicas are left, and end by themselves.
    stuck = "SELECT count(*) FROM upload_session WHERE writer IS NOT NULL"
    assert query(settings.database.url, stuck)[0][0] <= killer.kills * 10


def _kept(failures: list[BaseException], work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    return run
