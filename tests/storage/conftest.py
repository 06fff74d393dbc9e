"""The drivers that run the shared suite. A new one joins here, with one entry in each table."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.base import Checkpoint, Store, Upload
from storage.digest import Digest
from storage.filesystem import FilesystemStore
from storage.memory import MemoryStore
from storage.s3 import S3Store
from tests.conftest import Bucket, needs_root
from tests.services.s3 import needs_ceph, needs_juicefs

Make = Callable[[Path], Store]

DRIVERS = [
    "filesystem",
    "memory",
    pytest.param("ceph", marks=needs_ceph),
    pytest.param("juicefs", marks=needs_juicefs),
]


@pytest.fixture(params=DRIVERS)
def make(request: pytest.FixtureRequest) -> Make:
    """What makes an empty store, in an empty directory should it want one, of every driver in turn."""
    if request.param == "filesystem":
        return FilesystemStore
    if request.param == "memory":
        return lambda _: MemoryStore()
    bucket: Bucket = request.getfixturevalue(f"{request.param}_bucket")
    return lambda _: S3Store(**bucket.settings())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Room:
    """A store that can run full, and be given room again."""

    store: Store
    fill: Callable[[], None]
    make_room: Callable[[], None]


@contextlib.contextmanager
def small_disk(directory: Path, options: str = "size=4m") -> Iterator[Path]:
    """Mount a small disk for as long as the block lasts."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "hythe-test", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def fill_disk(directory: Path) -> None:
    """Leave not a byte on the disk."""
    with (directory / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@contextlib.contextmanager
def _filesystem_room(directory: Path) -> Iterator[Room]:
    with small_disk(directory / "disk") as disk:
        store = FilesystemStore(disk / "data")
        yield Room(store, lambda: fill_disk(disk), (disk / "ballast").unlink)


@contextlib.contextmanager
def _memory_room(_: Path) -> Iterator[Room]:
    store = MemoryStore()

    def fill() -> None:
        store.capacity = sum(map(len, store._bytes.values()))

    def make_room() -> None:
        store.capacity = 1 << 30

    yield Room(store, fill, make_room)


ROOMS: dict[str, Callable[[Path], AbstractContextManager[Room]]] = {
    "filesystem": _filesystem_room,
    "memory": _memory_room,
}


@pytest.fixture
async def store(make: Make, tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store of every driver in turn; uploads, files and descriptors left over fail the test."""
    made = make(tmp_path / "store")
    yield made
    left = [found.key async for found in made.objects() if found.key.startswith("uploads/")]
    await made.close()
    assert not left, f"uploads left over: {left}"
    assert not open_files(tmp_path)


@pytest.fixture(params=[pytest.param(name, marks=needs_root if name == "filesystem" else ()) for name in ROOMS])
async def room(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Room]:
    """A store of every driver in turn that can run full."""
    with ROOMS[request.param](tmp_path) as made:
        yield made
        await made.store.close()
        assert not open_files(tmp_path)


def open_files(below: Path) -> list[str]:
    """Return what this process holds open below a directory."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            targets.append(str(descriptor.readlink()))
    return [target for target in targets if target.startswith(str(below))]


async def resumed(store: Store, checkpoint: Checkpoint) -> Upload:
    """Go on with an upload, and take the first step, which tells whether that can be."""
    upload = store.resume(checkpoint)
    await upload.write([])
    return upload


async def begun(store: Store, content: bytes = b"", name: str = "one", algorithm: str = "sha256") -> Upload:
    """Begin an upload and write to it."""
    upload = store.resume(store.begin(name, algorithm))
    await upload.write([content])
    return upload


async def suspended(store: Store, content: bytes, name: str = "one", algorithm: str = "sha256") -> Checkpoint:
    """Begin an upload, write to it, and let go of it."""
    upload = await begun(store, content, name, algorithm)
    await upload.suspend()
    return upload.checkpoint()


async def stored(store: Store, content: bytes, name: str = "one", algorithm: str = "sha256") -> str:
    """Put a blob into the store and return its key."""
    upload = await begun(store, content, name, algorithm)
    return await upload.commit(Digest.of(content, algorithm))


async def read(store: Store, key: str, start: int, stop: int) -> bytes:
    """Return bytes of what lies under a key."""
    return b"".join([piece async for piece in store.open(key).read(start, stop)])


async def dropped(store: Store, upload: Upload, name: str = "one") -> None:
    """Let go of an upload and of its bytes."""
    await upload.abandon()
    await store.forget(name)


async def uploads(store: Store) -> set[str]:
    """Return the names of the uploads that may need what lies in the store."""
    return {found.upload async for found in store.objects()}


async def keys(store: Store) -> set[str]:
    """Return the keys of all that lies in the store."""
    return {found.key async for found in store.objects()}
