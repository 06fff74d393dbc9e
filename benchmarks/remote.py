"""Beyond one disk: Hythe and docker-registry on the same kind of S3 server, Ceph's, fresh for each of them.

The S3 server and PostgreSQL share the machine with everything else, so what they take is in nobody's figures, and two
replicas cannot be twice as fast as one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import content, load, programs
from benchmarks.measures import Level, Result, Sizes, timed
from benchmarks.servers import DOCKER_REGISTRY, HYTHE, Kind, Server, find_program
from tests.services.faults import FaultyProxy
from tests.services.postgres import postgres
from tests.services.s3 import S3, ceph

_REPOSITORY: Final = "bench/remote"
_CLIENTS: Final = 16
#: Blobs pushed one after another, for the time that each takes.
_ALONE: Final = 100
_LAYERS: Final = 10
_LARGE_LAYERS: Final = 8


@dataclass(frozen=True)
class Place:
    """Where a registry keeps things. Its S3 may be reached through something that counts."""

    server: S3
    endpoint: str
    bucket: str
    database: str


def _hythe(place: Place, directory: Path, port: int) -> Sequence[str]:
    config = directory / "hythe.toml"
    config.write_text(
        f"""\
[server]
listen = "127.0.0.1:{port}"
[storage]
driver = "s3"
[storage.s3]
bucket = "{place.bucket}"
prefix = "hythe/"
endpoint = "{place.endpoint}"
addressing = "path"
access_key = "{place.server.access_key}"
secret_key = "{place.server.secret_key}"
[database]
url = "{place.database}"
"""
    )
    return [*HYTHE.command(directory, port)[:4], "--config", str(config)]


def _docker_registry(place: Place, directory: Path, port: int) -> Sequence[str]:
    """As its documentation has it for such a server; bytes pass through it, as they do through Hythe."""
    config = directory / "config.yml"
    config.write_text(
        f"""\
version: 0.1
storage:
  cache:
    blobdescriptor: inmemory
  s3:
    accesskey: {place.server.access_key}
    secretkey: {place.server.secret_key}
    region: {place.server.region}
    regionendpoint: {place.endpoint}
    bucket: {place.bucket}
    secure: false
    v4auth: true
    rootdirectory: /docker-registry
  redirect:
    disable: true
  delete:
    enabled: true
http:
  addr: 127.0.0.1:{port}
"""
    )
    # Its S3 library cannot take the certificates that this variable names, and plain HTTP needs none.
    return ["env", "--unset=AWS_CA_BUNDLE", find_program("docker-registry"), "serve", str(config)]


_COMMANDS: Final[dict[str, Callable[[Place, Path, int], Sequence[str]]]] = {
    DOCKER_REGISTRY.name: _docker_registry,
    HYTHE.name: _hythe,
}
TWO_REPLICAS: Final = Kind("hythe, 2 replicas", HYTHE.command)


@dataclass
class _Replicas(Server):
    """Two servers as one: clients come to one and the other in turn."""

    second: Server | None = None
    _turns: Iterator[int] = field(default_factory=itertools.count)

    @property
    def address(self) -> tuple[str, int]:
        assert self.second is not None
        return self.second.address if next(self._turns) % 2 else ("127.0.0.1", self.port)

    def cpu_seconds(self) -> float:
        assert self.second is not None
        return super().cpu_seconds() + self.second.cpu_seconds()


class Remote:
    """Blobs and images through S3, and how many of its requests they take."""

    name = "s3"
    is_large = True
    kinds = (DOCKER_REGISTRY, HYTHE, TWO_REPLICAS)

    def __init__(self, sizes: Sizes, directory: Path) -> None:
        self._blob = content.large_blob(sizes.blob, directory / "remote-blob")
        contents = content.small_contents(sizes.small_blobs // 2 + _ALONE)
        blobs = [load.SmallBlob.of(_REPOSITORY, each) for each in contents]
        self._alone, self._small = blobs[:_ALONE], blobs[_ALONE:]
        self._layout = directory / "remote-image"
        content.image_layout(self._layout, _LAYERS)
        self._counted: set[str] = set()

    def measure(self, kind: Kind, directory: Path) -> Iterator[Result]:
        """Measure one server once."""
        directory.mkdir()
        if kind is TWO_REPLICAS:
            with _placed(directory) as place, _two(place, directory) as server:
                yield timed("S3, small blobs in", server, lambda: self._push_small(server))
                yield timed("S3, small blobs out", server, lambda: self._pull_small(server))
            return
        with _placed(directory) as place, _running(kind.name, place, directory) as server:
            yield from self._speed(server)
        if kind.name not in self._counted:
            # Once is enough: neither depends on how busy the machine is.
            self._counted.add(kind.name)
            yield from self._requests(kind, directory)
            if kind is HYTHE:
                yield from self._memory(directory)

    def _speed(self, server: Server) -> Iterator[Result]:
        client = load.Client(server)
        yield timed("S3, blob push", server, lambda: self._push(client, _REPOSITORY))
        yield timed("S3, blob pull", server, lambda: client.pull(f"/v2/{_REPOSITORY}/blobs/{self._blob.digest}"))
        client.close()
        for share, seconds in _shares([_seconds(server, blob) for blob in self._alone]):
            yield Level(f"S3, a small blob in, {share}", server.name, seconds)
        yield timed("S3, small blobs in", server, lambda: self._push_small(server))
        yield timed("S3, small blobs out", server, lambda: self._pull_small(server))
        yield timed("S3, image push", server, lambda: self._push_image(server))

    def _requests(self, kind: Kind, directory: Path) -> Iterator[Result]:
        """Count what an image takes of S3."""
        where = directory / "counted"
        where.mkdir()
        with _placed(where, counted=True) as place, _running(kind.name, place, where) as server:
            assert isinstance(place, _Counted)
            place.proxy.requests.clear()
            programs.skopeo_push(server, self._layout, _REPOSITORY)
            yield Level(f"S3 requests, image of {_LAYERS} layers in", kind.name, len(place.proxy.requests))
            place.proxy.requests.clear()
            programs.skopeo_pull(server, where / "pulled", _REPOSITORY)
            yield Level(f"S3 requests, image of {_LAYERS} layers out", kind.name, len(place.proxy.requests))

    def _memory(self, directory: Path) -> Iterator[Result]:
        """Push large layers all at once."""
        where = directory / "memory"
        where.mkdir()
        with _placed(where) as place, _running(HYTHE.name, place, where) as server:
            threads = [
                threading.Thread(target=self._push_by_another, args=(server, f"bench/{number}"))
                for number in range(_LARGE_LAYERS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            yield Level(f"S3, memory, peak with {_LARGE_LAYERS} large layers", server.name, server.peak())

    def _push_by_another(self, server: Server, repository: str) -> None:
        client = load.Client(server)
        self._push(client, repository)
        client.close()

    def _push(self, client: load.Client, repository: str) -> float:
        client.push_blob(repository, self._blob.digest, self._blob.framed())
        return self._blob.size

    def _push_small(self, server: Server) -> float:
        load.push_all(server, _REPOSITORY, self._small, _CLIENTS)
        return len(self._small)

    def _pull_small(self, server: Server) -> float:
        load.pull_all(server, self._small, _CLIENTS)
        return len(self._small)

    def _push_image(self, server: Server) -> float:
        programs.skopeo_push(server, self._layout, "bench/image")
        return 1


@dataclass(frozen=True)
class _Counted(Place):
    proxy: FaultyProxy


@contextlib.contextmanager
def _placed(directory: Path, *, counted: bool = False) -> Iterator[Place]:
    """Start a fresh S3 server and a fresh database."""
    with ceph(directory / "ceph") as server, postgres(directory, sync=True) as database:
        bucket, url = server.new_bucket(), database.create()
        os.sync()
        if not counted:
            yield Place(server, server.endpoint, bucket, url)
            return
        with FaultyProxy(server.endpoint) as proxy:
            yield _Counted(server, proxy.endpoint, bucket, url, proxy)


@contextlib.contextmanager
def _running(name: str, place: Place, directory: Path) -> Iterator[Server]:
    def command(where: Path, port: int) -> Sequence[str]:
        return _COMMANDS[name](place, where, port)

    with Kind(name, command).running(directory / "server") as server:
        yield server


@contextlib.contextmanager
def _two(place: Place, directory: Path) -> Iterator[Server]:
    (directory / "second").mkdir()
    with _running(HYTHE.name, place, directory) as one, _running(HYTHE.name, place, directory / "second") as other:
        yield _Replicas(TWO_REPLICAS.name, one.directory, one.port, one.program, second=other)


def _seconds(server: Server, blob: load.SmallBlob) -> float:
    began = time.perf_counter()
    load.push_all(server, _REPOSITORY, [blob], 1)
    return time.perf_counter() - began


def _shares(seconds: list[float]) -> list[tuple[str, float]]:
    percentiles = statistics.quantiles(seconds, n=100)
    return [("p50", percentiles[49]), ("p99", percentiles[98])]
