"""What the filesystem driver does beyond the contract: other processes, crashes, full disks, foreign files."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from storage.base import Checkpoint
from storage.digest import Digest
from storage.errors import ContentMissing, OutOfSpace, StorageError, UploadBusy, UploadLost
from storage.filesystem import FilesystemStore
from tests.conftest import needs_root
from tests.services.processes import run
from tests.storage.conftest import (
    begun,
    dropped,
    fill_disk,
    keys,
    open_files,
    read,
    resumed,
    small_disk,
    stored,
    suspended,
)

CONTENT = bytes(range(256)) * 5000
HALF = len(CONTENT) // 2 + 7
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")

#: Writes what it is sent, tells the checkpoint, writes on; then waits, or dies where it stands.
WRITER = """
import asyncio, os, signal, sys
from pathlib import Path
from storage.filesystem import FilesystemStore

async def main(root, algorithm, end):
    upload = FilesystemStore(Path(root)).resume(FilesystemStore(Path(root)).begin("one", algorithm))
    await upload.write([sys.stdin.buffer.read()])
    print(upload.offset, upload.checkpoint().state.hex(), flush=True)
    await upload.write([b"never noted" * 10000])
    if end == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print("waiting", flush=True)
    signal.pause()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FilesystemStore]:
    made = FilesystemStore(tmp_path / "store")
    yield made
    await made.close()
    assert not open_files(tmp_path)


@contextmanager
def writer(store: FilesystemStore, content: bytes, algorithm: str, end: str) -> Iterator[tuple[int, Checkpoint]]:
    command = [sys.executable, "-c", WRITER, str(store.root), algorithm, end]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(content)
            process.stdin.close()
            offset, state = process.stdout.readline().split(b" ")
            checkpoint = Checkpoint("uploads/one", algorithm, int(offset), bytes.fromhex(state.decode()))
            # The end of its output, or its word that it is waiting.
            process.stdout.readline()
            yield process.pid, checkpoint
        finally:
            process.kill()


def crashed(store: FilesystemStore, content: bytes, algorithm: str) -> Checkpoint:
    with writer(store, content, algorithm, "die") as (_, checkpoint):
        pass
    return checkpoint


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("has_state", [True, False])
async def test_an_upload_goes_on_after_its_process_was_killed(
    store: FilesystemStore, algorithm: str, has_state: bool
) -> None:
    checkpoint = crashed(store, CONTENT[:HALF], algorithm)
    assert checkpoint.offset == HALF
    assert (store.root / checkpoint.key).stat().st_size > HALF
    upload = await resumed(store, checkpoint if has_state else replace(checkpoint, state=b""))
    assert (store.root / checkpoint.key).stat().st_size == HALF
    await upload.write([CONTENT[HALF:]])
    key = await upload.commit(Digest.of(CONTENT, algorithm))
    assert await read(store, key, 0, len(CONTENT)) == CONTENT


async def test_a_state_of_this_boot_spares_the_second_reading(store: FilesystemStore) -> None:
    checkpoint = crashed(store, CONTENT[:HALF], "sha256")
    (store.root / checkpoint.key).write_bytes(bytes(HALF))
    upload = await resumed(store, checkpoint)
    await upload.verify(Digest.of(CONTENT[:HALF]))
    await dropped(store, upload)


async def test_a_state_of_another_boot_is_not_believed(store: FilesystemStore) -> None:
    checkpoint = crashed(store, CONTENT[:HALF], "sha256")
    # What a power cut leaves of bytes that were not synced: the length, and zeros.
    (store.root / checkpoint.key).write_bytes(bytes(HALF))
    other_boot = bytes(16) + checkpoint.state[16:]
    upload = await resumed(store, replace(checkpoint, state=other_boot))
    await upload.verify(Digest.of(bytes(HALF)))
    await dropped(store, upload)


async def test_a_state_names_the_boot_of_this_machine(store: FilesystemStore) -> None:
    checkpoint = await suspended(store, CONTENT)
    assert checkpoint.state[:16].hex() == BOOT_ID
    await store.delete(checkpoint.key)


async def test_bytes_lost_in_a_power_cut_end_the_upload(store: FilesystemStore) -> None:
    checkpoint = await suspended(store, CONTENT)
    os.truncate(store.root / checkpoint.key, HALF)
    with pytest.raises(UploadLost):
        await resumed(store, checkpoint)
    assert (store.root / checkpoint.key).stat().st_size == HALF


async def test_a_writer_in_another_process_keeps_others_out_until_it_is_dead(store: FilesystemStore) -> None:
    with writer(store, CONTENT[:HALF], "sha256", "wait") as (pid, checkpoint):
        for _ in range(3):
            with pytest.raises(UploadBusy):
                await resumed(store, checkpoint)
        assert (store.root / checkpoint.key).stat().st_size > HALF
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        upload = await resumed(store, checkpoint)
    await dropped(store, upload)


async def test_a_resume_that_comes_late_does_not_touch_what_was_published(store: FilesystemStore) -> None:
    checkpoint = await suspended(store, CONTENT)
    key = await (await resumed(store, checkpoint)).commit(Digest.of(CONTENT))
    with pytest.raises(UploadLost):
        await resumed(FilesystemStore(store.root), replace(checkpoint, offset=10))
    assert await keys(store) == {key}
    assert await read(store, key, 0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("end", ["commit", "abort", "replace"])
@pytest.mark.parametrize("offset", [0, 10])
async def test_a_resume_that_opened_the_file_before_it_was_published_does_not_write_to_it(
    store: FilesystemStore, monkeypatch: pytest.MonkeyPatch, end: str, offset: int
) -> None:
    checkpoint = await suspended(store, CONTENT)
    source, target = store.root / checkpoint.key, store.root / "published"

    real = fcntl.flock

    with monkeypatch.context() as patch:

        def lock(descriptor: int, operation: int) -> None:
            # The worst moment: the former holder ends the upload when we have the file open and not yet locked.
            if end == "abort":
                source.unlink()
            else:
                source.rename(target)
            if end == "replace":
                source.write_bytes(CONTENT)
            real(descriptor, operation)

        patch.setattr(fcntl, "flock", lock)
        with pytest.raises(UploadLost):
            await resumed(store, replace(checkpoint, offset=offset))
    assert end == "abort" or target.read_bytes() == CONTENT
    target.unlink(missing_ok=True)
    await store.delete(checkpoint.key)


async def test_a_published_file_says_its_digest_and_its_upload(store: FilesystemStore) -> None:
    key = await stored(store, CONTENT, "an-upload")
    digest = Digest.of(CONTENT)
    assert key == f"blobs/sha256/{digest.hex[:2]}/{digest.hex}.an-upload"
    assert store.open(key).path == str(store.root / key)


@pytest.mark.parametrize(
    "key",
    ["", "uploads/", "uploads/..", "uploads/a/b", "blobs/sha256/ab/cd", "../etc/passwd", "/etc/passwd", "hythe.db"],
)
async def test_a_key_cannot_lead_out_of_the_store(store: FilesystemStore, key: str) -> None:
    with pytest.raises(ValueError):
        store.open(key)
    with pytest.raises(ValueError):
        await store.delete(key)
    with pytest.raises(ValueError):
        await resumed(store, Checkpoint(key, "sha256"))


@pytest.mark.parametrize("sync", [True, False])
async def test_two_stores_on_one_directory_see_the_same(store: FilesystemStore, sync: bool) -> None:
    other = FilesystemStore(store.root, sync=sync)
    key = await stored(other, CONTENT)
    assert await read(store, key, 0, len(CONTENT)) == CONTENT
    await store.delete(key)
    # A directory it knows was there may have been taken away by a person.
    assert await keys(other) == set()
    await other.close()


async def test_nothing_but_uploads_and_blobs_lies_in_the_root(store: FilesystemStore) -> None:
    await stored(store, CONTENT)
    await store.probe()
    assert {path.name for path in store.root.iterdir()} == {"uploads", "blobs"}


async def test_files_are_not_for_everybody(store: FilesystemStore) -> None:
    key = await stored(store, CONTENT)
    for path in [store.root / key, *(store.root / key).parents[:3]]:
        assert not path.stat().st_mode & 0o007, path


async def test_a_cancelled_write_is_over_before_the_upload_is_let_go(store: FilesystemStore) -> None:
    upload = await begun(store)
    writing = asyncio.create_task(upload.write([CONTENT] * 20))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    offset = upload.offset
    await upload.suspend()
    assert offset in (0, 20 * len(CONTENT))
    assert (store.root / "uploads/one").stat().st_size == offset
    await store.delete("uploads/one")


async def test_a_file_that_is_not_ours_does_not_stop_the_listing(store: FilesystemStore) -> None:
    key = await stored(store, CONTENT)
    stranger = (store.root / key).with_name(".nfs0000000000000001")
    stranger.write_bytes(b"kept alive by a client of the network filesystem")
    assert key in await keys(store)
    for found in await keys(store):
        # All that is listed can be deleted: whoever clears leftovers relies on it.
        await store.delete(found)


@needs_root
async def test_a_commit_without_room_for_a_name_publishes_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=8m,nr_inodes=300") as disk:
        store = FilesystemStore(disk / "data")
        upload = await begun(store, CONTENT)
        fillers = take_inodes(disk)
        with pytest.raises(OutOfSpace):
            await upload.commit(Digest.of(CONTENT))
        assert await keys(store) == {"uploads/one"}
        with pytest.raises(OutOfSpace):
            await resumed(store, store.begin("two", "sha256"))
        for filler in fillers:
            filler.unlink()
        key = await upload.commit(Digest.of(CONTENT))
        assert await keys(store) == {key}
        await store.close()
        assert not open_files(disk)


def take_inodes(disk: Path) -> list[Path]:
    fillers: list[Path] = []
    try:
        while True:
            filler = disk / f"filler-{len(fillers)}"
            filler.touch()
            fillers.append(filler)
    except OSError:
        return fillers


@needs_root
async def test_half_a_write_that_met_a_full_disk_leaves_no_bytes_behind(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = FilesystemStore(disk / "data")
        upload = await begun(store, CONTENT[:1000])
        with pytest.raises(OutOfSpace):
            await upload.write([bytes(1 << 20)] * 8)
        assert (disk / "data/uploads/one").stat().st_size == 1000
        assert upload.offset == 1000
        fill_disk(disk)
        await dropped(store, upload)
        assert await keys(store) == set()
        await store.close()


@needs_root
async def test_a_disk_that_refuses_writing_is_an_error_of_the_store(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = FilesystemStore(disk / "data")
        key = await stored(store, CONTENT)
        run("mount", "-o", "remount,ro", str(disk))
        for attempt in (store.probe(), resumed(store, store.begin("two", "sha256"))):
            with pytest.raises(StorageError):
                await attempt
        assert await read(store, key, 0, len(CONTENT)) == CONTENT
        await store.close()


async def test_a_file_shorter_than_its_row_is_no_short_answer(store: FilesystemStore) -> None:
    key = await stored(store, CONTENT)
    os.truncate(store.root / key, HALF)
    with pytest.raises(ContentMissing):
        await read(store, key, 0, len(CONTENT))
