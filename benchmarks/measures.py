"""What is measured: each group of measures runs all its servers in turn, round after round, from empty data.

The disk is brought to rest before whatever writes: docker-registry leaves what it wrote to the kernel, and the next
server would wait for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import content, load, programs
from benchmarks.servers import DOCKER_REGISTRY, HYTHE, HYTHE_2, NGINX, Kind, Server, place
from storage.digest import Digest

_REPOSITORY: Final = "bench/library"
_CLIENTS: Final = 16
_PULLS: Final = 3
#: Seconds after which a server that was just started is idle.
SETTLING: Final = 1.0


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    blob: int = 1 << 30
    small_blobs: int = 2000
    wrk_seconds: int = 5
    layers: int = 20
    tags: int = 100_000
    tokens: int = 4000


QUICK: Final = Sizes(blob=128 << 20, small_blobs=200, wrk_seconds=1, layers=5, tags=10_000, tokens=400)


@dataclass(frozen=True)
class Sample:
    """Work that a server did once.

    Attributes:
        measure: what was measured.
        server: which server did it.
        amount: bytes, blobs, requests or images.
        seconds: it took.
        cpu: seconds of user and system time of the server's processes.
        load_cpu: the same of what put the load on it.
    """

    measure: str
    server: str
    amount: float
    seconds: float
    cpu: float
    load_cpu: float


@dataclass(frozen=True)
class Level:
    """Something that a server has: seconds to start, or bytes of memory."""

    measure: str
    server: str
    value: float


Result = Sample | Level


def timed(measure: str, server: Server, work: Callable[[], float]) -> Sample:
    """Measure `work`, which returns how much it did."""
    cpu, load_cpu, began = server.cpu_seconds(), _own_cpu(), time.perf_counter()
    amount = work()
    seconds = time.perf_counter() - began
    return Sample(measure, server.name, amount, seconds, server.cpu_seconds() - cpu, _own_cpu() - load_cpu)


def _own_cpu() -> float:
    """Return what this process used, and the programs that it ran to their ends."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def push_image(server: Server, repository: str, image: content.SmallImage) -> None:
    """Push a small image under the tag `latest`."""
    client = load.Client(server)
    for blob in image.blobs:
        client.push_blob(repository, Digest.of(blob), [load.in_http_chunks(blob)])
    client.push_manifest(repository, "latest", content.MANIFEST_TYPE, image.manifest)
    client.close()


class Blob:
    """A large blob in and out, and the memory before and under it."""

    name = "blob"
    is_large = True
    kinds = (DOCKER_REGISTRY, HYTHE, NGINX)

    def __init__(self, sizes: Sizes, directory: Path) -> None:
        self._blob = content.large_blob(sizes.blob, directory / "blob")

    def measure(self, kind: Kind, directory: Path) -> Iterator[Result]:
        """Measure one server once."""
        blob = self._blob
        path = f"/v2/{_REPOSITORY}/blobs/{blob.digest}"
        with kind.running(directory) as server:
            time.sleep(SETTLING)
            yield Level("memory, idle", server.name, server.resident())
            client = load.Client(server)
            if kind.takes_pushes:
                # A virtual machine may have given free memory back: each server begins with some that is there.
                write_alone(blob, directory / "written")
                os.sync()
                yield timed("blob push", server, lambda: _push(client, blob))
            else:
                yield write_alone(blob, directory / "written")
                place(directory, path, blob.file)
            os.sync()
            yield timed("blob pull", server, lambda: sum(client.pull(path) for _ in range(_PULLS)))
            client.close()
            yield Level("memory, peak with a large blob", server.name, server.peak())


def _push(client: load.Client, blob: content.LargeBlob) -> float:
    client.push_blob(_REPOSITORY, blob.digest, blob.framed())
    return blob.size


def write_alone(blob: content.LargeBlob, file: Path) -> Sample:
    """Write the same bytes and sync them, with nothing else: what the machine itself takes of each push.

    In a virtual machine that gives free memory back to its host that may be more than what a server does.
    """
    os.sync()
    cpu, began = time.process_time(), time.perf_counter()
    with file.open("wb", buffering=0) as output:
        for block in blob.plain():
            output.write(block)
        os.fdatasync(output.fileno())
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    file.unlink()
    return Sample("blob push", "write, sync alone", blob.size, seconds, cpu, 0)


class Small:
    """Many small blobs in and out, by many clients."""

    name = "small"
    is_large = False
    kinds = (DOCKER_REGISTRY, HYTHE, NGINX)

    def __init__(self, sizes: Sizes, directory: Path) -> None:
        contents = content.small_contents(sizes.small_blobs + _CLIENTS)
        self._files = directory / "small"
        self._files.mkdir()
        for each in contents:
            (self._files / str(Digest.of(each))).write_bytes(each)
        blobs = [load.SmallBlob.of(_REPOSITORY, each) for each in contents]
        self._warm_up, self._blobs = blobs[:_CLIENTS], blobs[_CLIENTS:]

    def measure(self, kind: Kind, directory: Path) -> Iterator[Result]:
        """Measure one server once."""
        with kind.running(directory) as server:
            if kind.takes_pushes:
                load.push_all(server, _REPOSITORY, self._warm_up, _CLIENTS)
                os.sync()
                yield timed("small blobs in", server, lambda: self._push(server))
            else:
                for file in self._files.iterdir():
                    place(directory, f"/v2/{_REPOSITORY}/blobs/{file.name}", file)
            load.pull_all(server, self._warm_up, _CLIENTS)
            yield timed("small blobs out", server, lambda: self._pull(server))
            yield Level("memory, peak with small blobs", server.name, server.peak())

    def _push(self, server: Server) -> float:
        load.push_all(server, _REPOSITORY, self._blobs, _CLIENTS)
        return len(self._blobs)

    def _pull(self, server: Server) -> float:
        load.pull_all(server, self._blobs, _CLIENTS)
        return len(self._blobs)


class Manifest:
    """A manifest of 2 KB, by tag and by digest."""

    name = "manifest"
    is_large = False
    kinds = (DOCKER_REGISTRY, HYTHE, HYTHE_2, NGINX)

    def __init__(self, sizes: Sizes, directory: Path) -> None:
        del directory
        self._seconds = sizes.wrk_seconds
        self._image = content.small_image()

    def measure(self, kind: Kind, directory: Path) -> Iterator[Result]:
        """Measure one server once."""
        base = f"/v2/{_REPOSITORY}/manifests"
        by_tag, by_digest = f"{base}/latest", f"{base}/{Digest.of(self._image.manifest)}"
        with kind.running(directory) as server:
            if kind.takes_pushes:
                push_image(server, _REPOSITORY, self._image)
            else:
                place(directory, by_tag, self._image.manifest)
                place(directory, by_digest, self._image.manifest)
            self._pull(server, by_tag, 1)
            yield timed("manifest by tag", server, lambda: self._pull(server, by_tag, self._seconds))
            yield timed("manifest by digest", server, lambda: self._pull(server, by_digest, self._seconds))

    def _pull(self, server: Server, path: str, seconds: int) -> float:
        return programs.wrk(server, path, seconds, content.ACCEPT)


class Image:
    """An image of many layers, pushed by skopeo."""

    name = "image"
    is_large = False
    kinds = (DOCKER_REGISTRY, HYTHE)

    def __init__(self, sizes: Sizes, directory: Path) -> None:
        self._layout = directory / "image"
        content.image_layout(self._layout, sizes.layers)

    def measure(self, kind: Kind, directory: Path) -> Iterator[Result]:
        """Measure one server once."""
        with kind.running(directory) as server:
            os.sync()
            yield timed("image push", server, lambda: self._push(server))

    def _push(self, server: Server) -> float:
        programs.skopeo_push(server, self._layout, _REPOSITORY)
        return 1


class Start:
    """From the start of the process to the first answer, with many tags in the database.

    Hythe alone: docker-registry looks at none of its files when it starts.
    """

    name = "start"
    is_large = False
    kinds = (HYTHE,)

    def __init__(self, sizes: Sizes, directory: Path) -> None:
        self._directory = directory / "tags"
        self._directory.mkdir()
        with HYTHE.started(self._directory):
            pass
        content.fill_with_tags(self._directory / "data" / "hythe.db", sizes.tags)

    def measure(self, kind: Kind, directory: Path) -> Iterator[Result]:
        """Measure one server once."""
        del directory
        with kind.started(self._directory) as server:
            yield Level("start", kind.name, server.start_seconds)
