"""What all tests share: a registry in this process, a server in its own, and the check that nothing is left over."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil
import pytest
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web_runner import AppRunner, BaseRunner

from registry.app import ANSWERS, Process, build
from registry.config import Settings, load
from registry.connections import Connections
from registry.metadata.engine import Database, open_database
from registry.metadata.schema import upgrade
from registry.metadata.tables import identity, metadata, policy
from registry.wire import accept
from storage.base import Store
from tests.content import Client
from tests.services.postgres import Postgres, postgres
from tests.services.processes import HytheServer, hythe_server
from tests.services.s3 import S3, ceph, juicefs


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_over() -> Iterator[None]:
    """Fail the run if processes or mounts outlive it."""
    mounts = Path("/proc/self/mountinfo").read_text()
    yield
    leftovers = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert not leftovers, f"processes left over: {leftovers}"
    now = Path("/proc/self/mountinfo").read_text()
    extra = set(now.splitlines()) - set(mounts.splitlines())
    # [ip-netns(8)] The first network namespace with a name makes this one of a machine, and it stays.
    extra = {line for line in extra if line.split()[4] != "/run/netns"}
    assert not extra, f"mounts left over: {extra}"


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip, with the reason, where a program is not installed; `make test` installs all of them."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts, or runs dockerd")


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL for all tests."""
    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(scope="session")
def ceph_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A bucket of Ceph's gateway for all tests, where each has a prefix of its own."""
    with ceph(tmp_path_factory.mktemp("ceph")) as server:
        yield Bucket(server, server.new_bucket())


@pytest.fixture(scope="session")
def juicefs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A bucket of JuiceFS's gateway, likewise."""
    with juicefs(tmp_path_factory.mktemp("juicefs")) as server:
        yield Bucket(server, server.new_bucket())


@pytest.fixture(scope="session")
def template(postgres_server: Postgres) -> str:
    """The name of an empty database of this version, to be copied."""
    url = postgres_server.create()
    upgrade(url)
    return urlsplit(url).path[1:]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Where facts and bytes are: "local" in one directory, or "remote". [tests/registry/conftest.py]"""
    return str(getattr(request, "param", "local"))


@pytest.fixture(scope="session")
def template_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with an empty database of this version, to be copied: that takes a hundredth of making one."""
    path = tmp_path_factory.mktemp("template") / "hythe.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def database_in_turn(postgres_server: Postgres, template: str) -> str:
    """The address of a database that one test after another gets, empty: making one for each takes minutes."""
    return postgres_server.create(template)


@pytest.fixture
def data_directory() -> Iterator[Path]:
    """Where registries of this process have their data: in memory if there is room, as each makes hundreds of folders.

    What a disk adds to that is tested with servers in processes of their own, and with stores alone.
    """
    memory = Path("/dev/shm")
    is_roomy = memory.is_dir() and shutil.disk_usage(memory).free >= 1 << 30
    with tempfile.TemporaryDirectory(prefix="hythe-data-", dir=memory if is_roomy else None) as directory:
        yield Path(directory) / "data"


@pytest.fixture
def database_url(backend: str, data_directory: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an empty database of this version."""
    if backend == "local":
        path = data_directory / "hythe.db"
        # As an upgrade makes it.
        data_directory.mkdir(mode=0o750)
        shutil.copyfile(request.getfixturevalue("template_file"), path)
        yield f"sqlite:///{path}"
        return
    url = request.getfixturevalue("database_in_turn")
    yield url
    server: Postgres = request.getfixturevalue("postgres_server")
    # The name of the registry is in a new database too, and the version of the policy.
    seeded = (identity, policy)
    server.empty(url, [table.name for table in reversed(metadata.sorted_tables) if table not in seeded])
    server.execute("UPDATE policy SET read_only = NULL", urlsplit(url).path[1:])


@pytest.fixture
def settings(backend: str, data_directory: Path, database_url: str, request: pytest.FixtureRequest) -> Settings:
    """The defaults, with the data of this test alone."""
    changes = {
        "storage.filesystem.root": str(data_directory),
        "database.url": database_url,
        "log.access": "false",
    }
    if backend == "remote":
        bucket: Bucket = request.getfixturevalue("ceph_bucket")
        changes["storage.driver"] = "s3"
        changes |= {f"storage.s3.{key}": value for key, value in bucket.settings().items()}
    return load(None, {}, changes)


@pytest.fixture
def hasty_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stores of this process ask a server that fails as often as ever, but without seconds between."""
    monkeypatch.setattr("storage.bucket._PAUSE", 0.005)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)


@dataclass(frozen=True)
class Bucket:
    """A bucket, and where it is."""

    server: S3
    name: str

    def settings(self) -> dict[str, str]:
        """Return `[storage.s3]` for a registry with a prefix of its own in it."""
        return {
            "bucket": self.name,
            "prefix": f"{secrets.token_hex(6)}/",
            "region": self.server.region,
            "endpoint": self.server.endpoint,
            "addressing": "path",
            "access_key": self.server.access_key,
            "secret_key": self.server.secret_key,
        }


def environment_of(settings: Settings) -> dict[str, str]:
    """Return what makes a server of its own process use the same database and bucket."""
    s3 = settings.storage.s3
    named = ("bucket", "prefix", "region", "endpoint", "addressing", "access_key", "secret_key")
    return {
        "HYTHE_DATABASE__URL": settings.database.url,
        "HYTHE_STORAGE__DRIVER": settings.storage.driver,
        **{f"HYTHE_STORAGE__S3__{key.upper()}": str(getattr(s3, key)) for key in named},
    }


Start = Callable[..., Awaitable[Client]]


class _Runner(AppRunner):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connections = Connections(1000, 20)

    async def cleanup(self) -> None:
        await super().cleanup()
        await self.connections.close()

    @property
    def server(self) -> Any:
        http = super().server
        return None if http is None else lambda: accept(http, self.app[ANSWERS], self.connections)


class _Server(TestServer):
    keepalive_timeout = 75.0
    lingering_time = 10.0

    async def _make_runner(self, **kwargs: Any) -> BaseRunner:
        # aiohttp's test server cancels the handlers of cut connections; ours lets them keep what arrived.
        kwargs["handler_cancellation"] = False
        return _Runner(
            self.app,
            access_log=None,
            shutdown_timeout=5,
            max_field_size=16384,
            auto_decompress=False,
            keepalive_timeout=self.keepalive_timeout,
            lingering_time=self.lingering_time,
            **kwargs,
        )


@pytest.fixture
def process(backend: str) -> Process:
    """What the registries of this process take themselves for; a module may have its own."""
    return Process(alone=backend == "local")


@pytest.fixture
async def start(settings: Settings, process: Process) -> AsyncIterator[Start]:
    """Start registries: `client = await start(registry={"delete": False})`, perhaps with `store=`."""
    clients: list[Client] = []

    async def start_one(
        store: Store | None = None,
        keepalive_timeout: float = 75.0,
        lingering_time: float = 10.0,
        **tables: dict[str, object],
    ) -> Client:
        tree = msgspec.to_builtins(settings)
        for name, values in tables.items():
            tree[name] |= values
        changed = msgspec.convert(tree, Settings)
        server = _Server(build(changed, process=process, store=store))
        server.keepalive_timeout, server.lingering_time = keepalive_timeout, lingering_time
        client = TestClient(server)
        await client.start_server()
        clients.append(client)
        return client

    yield start_one
    for client in clients:
        await client.close()


@pytest.fixture
async def client(start: Start) -> Client:
    """A registry in this process with the default settings."""
    return await start()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty database, without a registry around it."""
    made = open_database(database_url)
    yield made
    await made.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HytheServer]:
    """A registry in a process of its own with the default settings."""
    with hythe_server(tmp_path) as running:
        yield running
