"""What the clients need: a server whose data goes right away, one dockerd for all, and who asked for what."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from docker import DockerClient

from registry.config import Settings
from tests.clients.traffic import Traffic
from tests.conftest import environment_of
from tests.services.containers import ContainerTools
from tests.services.docker import DockerDaemon, docker_daemon
from tests.services.postgres import needs_postgres
from tests.services.processes import HytheServer, hythe_server
from tests.services.s3 import needs_ceph


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory that goes with its test: pytest keeps its own ones, and layers are large.

    Some clients take the path of an image for a part of its name, in which not every underscore is allowed.
    """
    directory = Path(tempfile.gettempdir()) / f"hythe-clients-{secrets.token_hex(8)}"
    directory.mkdir(mode=0o700)
    yield directory
    shutil.rmtree(directory)


#: Modules whose clients push to a registry on PostgreSQL and S3 as well.
BOTH: Final = frozenset(["test_builders", "test_docker", "test_oras", "test_skopeo"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let the clients meet both."""
    name = metafunc.module.__name__.rpartition(".")[2]
    remote = pytest.param("remote", marks=[needs_postgres, needs_ceph])
    if "backend" in metafunc.fixturenames and name in BOTH:
        metafunc.parametrize("backend", ["local", remote], indirect=True)
    elif "backend" in metafunc.fixturenames and name == "test_replicas":
        metafunc.parametrize("backend", [remote], indirect=True)


@pytest.fixture
def server(scratch: Path, backend: str, settings: Settings) -> Iterator[HytheServer]:
    """A registry in a process of its own with the default settings; what it logged is shown where a test fails."""
    with hythe_server(scratch, environment=environment_of(settings) if backend == "remote" else None) as running:
        yield running
    print(running.output.read_text(errors="replace")[-8000:])  # noqa: T201


@pytest.fixture
def traffic(server: HytheServer) -> Traffic:
    """Tell what the server was asked for."""
    return Traffic(server)


@pytest.fixture(scope="session")
def dockerd() -> Iterator[DockerDaemon]:
    """One dockerd for all tests: starting it takes seconds."""
    with tempfile.TemporaryDirectory(prefix="hythe-dockerd-") as directory, docker_daemon(Path(directory) / "d") as it:
        yield it


@pytest.fixture
def docker(dockerd: DockerDaemon) -> Iterator[DockerDaemon]:
    """The dockerd, which has no images before a test nor after it, and knows nobody."""
    yield dockerd
    dockerd.clear()


@pytest.fixture
def docker_py(docker: DockerDaemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerClient]:
    """docker's library for Python, connected to the dockerd."""
    monkeypatch.setenv("DOCKER_CONFIG", docker.environment_of_clients["DOCKER_CONFIG"])
    client = DockerClient(base_url=docker.socket)
    yield client
    client.close()


@pytest.fixture
def tools(scratch: Path) -> ContainerTools:
    """skopeo, buildah and podman, with nothing in their storage."""
    made = ContainerTools(scratch / "home")
    made.set_up()
    return made
