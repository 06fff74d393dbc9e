"""What every driver does. [storage/base.py]"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base import Store
from storage.digest import Digest
from storage.errors import ContentMissing, DigestMismatch, OutOfSpace, UploadBusy, UploadLost
from storage.s3 import S3Store
from tests.services.processes import wait_until
from tests.storage.conftest import Make, Room, begun, dropped, keys, read, resumed, stored, suspended, uploads

CONTENT = bytes(range(256)) * 5000
#: The clock that stamps files; `time` has no name for it. [clock_gettime(2)]
CLOCK_REALTIME_COARSE = 5
both_algorithms = pytest.mark.parametrize("algorithm", ["sha256", "sha512"])


async def test_beginning_an_upload_touches_nothing(store: Store) -> None:
    checkpoint = store.begin("one", "sha256")
    assert (checkpoint.algorithm, checkpoint.offset) == ("sha256", 0)
    assert await keys(store) == set()


@both_algorithms
async def test_what_is_written_and_committed_is_read_back(store: Store, algorithm: str) -> None:
    upload = await resumed(store, store.begin("one", algorithm))
    await upload.write([CONTENT[:10], b"", CONTENT[10:1000]])
    await upload.write([])
    await upload.write([CONTENT[1000:]])
    assert upload.offset == len(CONTENT)
    key = await upload.commit(Digest.of(CONTENT, algorithm))
    assert await read(store, key, 0, len(CONTENT)) == CONTENT
    assert await keys(store) == {key}


async def test_more_pieces_than_one_system_call_takes_are_written_in_order(store: Store) -> None:
    pieces = [bytes([number % 251]) * (number % 7) for number in range(3000)]
    upload = await resumed(store, store.begin("one", "sha256"))
    await upload.write(pieces)
    content = b"".join(pieces)
    assert upload.offset == len(content)
    key = await upload.commit(Digest.of(content))
    assert await read(store, key, 0, len(content)) == content


async def test_an_empty_blob_is_a_blob(store: Store) -> None:
    key = await stored(store, b"")
    assert await read(store, key, 0, 0) == b""
    assert await keys(store) == {key}


@pytest.mark.parametrize("part", [(0, 0), (0, 1), (17, 17), (1000, 1000000), (len(CONTENT) - 1, len(CONTENT))])
async def test_any_range_can_be_read(store: Store, part: tuple[int, int]) -> None:
    key = await stored(store, CONTENT)
    assert await read(store, key, *part) == CONTENT[slice(*part)]


async def test_content_comes_in_pieces_that_fit_in_memory(store: Store) -> None:
    key = await stored(store, CONTENT * 4)
    content = store.open(key)
    if content.path is not None:
        assert await asyncio.to_thread(Path(content.path).read_bytes) == CONTENT * 4
        assert max([len(piece) async for piece in content.read(0, len(CONTENT) * 4)]) <= 1 << 20


@pytest.mark.parametrize("extra", [1, 4096])
async def test_reading_beyond_the_end_is_no_short_answer(store: Store, extra: int) -> None:
    key = await stored(store, CONTENT)
    with pytest.raises(ContentMissing):
        await read(store, key, 5, len(CONTENT) + extra)


async def test_nothing_under_a_key_is_said_when_it_is_read(store: Store) -> None:
    key = await stored(store, CONTENT)
    await store.delete(key)
    content = store.open(key)
    with pytest.raises(ContentMissing):
        [piece async for piece in content.read(0, 1)]


async def test_deleting_leaves_nothing_and_deleting_again_is_fine(store: Store) -> None:
    key = await stored(store, CONTENT)
    await store.delete(key)
    await store.delete(key)
    assert await keys(store) == set()


async def test_an_upload_that_is_forgotten_leaves_nothing_and_cannot_go_on(store: Store) -> None:
    checkpoint = await suspended(store, CONTENT, "one")
    await suspended(store, CONTENT, "one-more")
    await store.forget("one")
    assert await uploads(store) == {"one-more"}
    with pytest.raises(UploadLost):
        # Where nobody looks before there is need to, the other algorithm is that need.
        await (await resumed(store, checkpoint)).commit(Digest.of(CONTENT, "sha512"))
    for name in ("one", "one-more", "never"):
        await store.forget(name)
    assert await keys(store) == set()


async def test_forgetting_an_upload_keeps_what_became_a_blob_of_it(store: Store) -> None:
    key = await stored(store, CONTENT, "one")
    await store.forget("one", key)
    assert await keys(store) == {key}
    assert await read(store, key, 0, len(CONTENT)) == CONTENT


@both_algorithms
async def test_a_suspended_upload_goes_on_where_it_stood(store: Store, algorithm: str) -> None:
    checkpoint = await suspended(store, CONTENT[:77777], algorithm=algorithm)
    upload = await resumed(store, checkpoint)
    assert upload.offset == 77777
    await upload.write([CONTENT[77777:]])
    key = await upload.commit(Digest.of(CONTENT, algorithm))
    assert await read(store, key, 0, len(CONTENT)) == CONTENT


@both_algorithms
@pytest.mark.parametrize("state", [b"", b"x", b"x" * 128, bytes(232)], ids=["none", "short", "wrong", "zeros"])
async def test_without_a_usable_state_the_bytes_are_hashed_again(store: Store, algorithm: str, state: bytes) -> None:
    if isinstance(store, S3Store):
        pytest.skip(
            "the state names the objects and parts that there are; tests/storage/test_s3.py loses the hash alone"
        )
    checkpoint = await suspended(store, CONTENT[:77777], algorithm=algorithm)
    upload = await resumed(store, replace(checkpoint, state=state))
    await upload.write([CONTENT[77777:]])
    key = await upload.commit(Digest.of(CONTENT, algorithm))
    assert await read(store, key, 0, len(CONTENT)) == CONTENT


async def test_bytes_after_the_checkpoint_are_dropped(store: Store) -> None:
    checkpoint = await suspended(store, CONTENT[:1000])
    upload = await resumed(store, checkpoint)
    await upload.write([b"came, but was never noted"])
    await upload.suspend()
    upload = await resumed(store, checkpoint)
    assert upload.offset == 1000
    await upload.write([CONTENT[1000:]])
    key = await upload.commit(Digest.of(CONTENT))
    assert await read(store, key, 0, len(CONTENT)) == CONTENT
    with pytest.raises(ContentMissing):
        await read(store, key, 0, len(CONTENT) + 1)


async def test_an_upload_that_lost_bytes_cannot_go_on(store: Store) -> None:
    checkpoint = await suspended(store, CONTENT[:1000])
    with pytest.raises(UploadLost):
        await resumed(store, replace(checkpoint, offset=1001))
    # It is nobody's now: who knows better may still have it.
    await dropped(store, await resumed(store, checkpoint))


async def test_an_upload_whose_bytes_are_gone_cannot_go_on(store: Store) -> None:
    with pytest.raises(UploadLost):
        await resumed(store, replace(store.begin("never", "sha256"), offset=1))
    assert await keys(store) == set()


async def test_an_upload_has_one_writer_at_a_time(store: Store) -> None:
    upload = await begun(store, CONTENT[:1000])
    for checkpoint in (upload.checkpoint(), store.begin("one", "sha256")):
        with pytest.raises(UploadBusy):
            await resumed(store, checkpoint)
    await upload.write([CONTENT[1000:]])
    key = await upload.commit(Digest.of(CONTENT))
    assert await read(store, key, 0, len(CONTENT)) == CONTENT


async def test_resuming_touches_nothing_before_the_first_step(store: Store) -> None:
    begun = store.resume(store.begin("one", "sha256"))
    assert (begun.offset, begun.checkpoint().offset) == (0, 0)
    await begun.suspend()
    assert await keys(store) == set()
    checkpoint = await suspended(store, CONTENT[:1000])
    waiting = store.resume(checkpoint)
    assert waiting.offset == 1000
    assert waiting.checkpoint() == checkpoint
    # It holds nothing yet, so another may go on.
    other = await resumed(store, checkpoint)
    for step in (waiting.write([b"x"]), waiting.commit(Digest.of(CONTENT[:1000]))):
        with pytest.raises(UploadBusy):
            await step
    await waiting.suspend()
    await other.write([CONTENT[1000:]])
    assert await other.commit(Digest.of(CONTENT)) in await keys(store)


@both_algorithms
async def test_a_last_write_lets_go_of_the_upload(store: Store, algorithm: str) -> None:
    upload = store.resume(store.begin("one", algorithm))
    await upload.write([CONTENT[:500], CONTENT[500:1000]], last=True)
    assert upload.offset == 1000
    checkpoint = upload.checkpoint()
    await upload.suspend()
    other = await resumed(store, checkpoint)
    await other.write([CONTENT[1000:]], last=True)
    key = await store.resume(other.checkpoint()).commit(Digest.of(CONTENT, algorithm))
    assert await read(store, key, 0, len(CONTENT)) == CONTENT


async def test_who_lost_an_upload_abandons_it_and_spoils_nothing(store: Store) -> None:
    checkpoint = await suspended(store, CONTENT[:1000])
    loser = await resumed(store, checkpoint)
    await loser.write([b"something else"])
    await loser.abandon()
    await loser.abandon()
    winner = await resumed(store, checkpoint)
    await winner.write([CONTENT[1000:]])
    key = await winner.commit(Digest.of(CONTENT))
    await loser.abandon()
    assert await read(store, key, 0, len(CONTENT)) == CONTENT
    await store.forget("one", key)
    assert await keys(store) == {key}


async def test_an_upload_can_be_abandoned_without_another_step(store: Store) -> None:
    checkpoint = await suspended(store, CONTENT)
    await store.resume(checkpoint).abandon()
    await store.resume(store.begin("never", "sha256")).abandon()
    assert await uploads(store) == {"one"}
    assert await (await resumed(store, checkpoint)).commit(Digest.of(CONTENT)) in await keys(store)


async def test_of_many_who_resume_at_once_one_gets_the_upload(store: Store) -> None:
    checkpoint = await suspended(store, CONTENT[:1000])
    results = await asyncio.gather(*(resumed(store, checkpoint) for _ in range(10)), return_exceptions=True)
    winners = [result for result in results if not isinstance(result, BaseException)]
    assert len(winners) == 1
    assert sum(isinstance(result, UploadBusy) for result in results) == 9
    await dropped(store, winners[0])


@pytest.mark.parametrize("step", ["suspend", "abandon"])
async def test_after_a_commit_letting_go_does_nothing(store: Store, step: str) -> None:
    upload = await begun(store, CONTENT)
    key = await upload.commit(Digest.of(CONTENT))
    await getattr(upload, step)()
    assert await read(store, key, 0, len(CONTENT)) == CONTENT


@both_algorithms
async def test_bytes_that_are_not_what_was_announced_are_not_published(store: Store, algorithm: str) -> None:
    upload = await begun(store, CONTENT)
    wrong = Digest.of(b"something else", algorithm)
    for check in (upload.verify, upload.commit):
        with pytest.raises(DigestMismatch) as raised:
            await check(wrong)
        assert str(wrong) in str(raised.value)
        assert str(Digest.of(CONTENT, algorithm)) in str(raised.value)
    await upload.verify(Digest.of(CONTENT, algorithm))
    await dropped(store, upload)
    assert await keys(store) == set()


async def test_a_digest_once_verified_is_checked_again_after_more_bytes(store: Store) -> None:
    upload = await begun(store, CONTENT)
    for algorithm in ("sha256", "sha512"):
        await upload.verify(Digest.of(CONTENT, algorithm))
    await upload.write([b"more"])
    for algorithm in ("sha256", "sha512"):
        with pytest.raises(DigestMismatch):
            await upload.commit(Digest.of(CONTENT, algorithm))
    await dropped(store, upload)


@pytest.mark.parametrize(("announced", "asked"), [("sha256", "sha512"), ("sha512", "sha256")])
async def test_a_commit_may_ask_for_the_other_algorithm(store: Store, announced: str, asked: str) -> None:
    upload = await begun(store, CONTENT, algorithm=announced)
    digest = Digest.of(CONTENT, asked)
    await upload.verify(digest)
    key = await upload.commit(digest)
    assert await read(store, key, 0, len(CONTENT)) == CONTENT


async def test_the_same_bytes_twice_are_two_objects_and_deleting_one_keeps_the_other(store: Store) -> None:
    first, second = await stored(store, CONTENT, "one"), await stored(store, CONTENT, "two")
    assert first != second
    assert await keys(store) == {first, second}
    await store.delete(first)
    assert await read(store, second, 0, len(CONTENT)) == CONTENT


async def test_many_uploads_at_once_do_not_mix(store: Store) -> None:
    contents = [bytes([number]) * (1000 + number) for number in range(32)]

    async def push(number: int) -> str:
        upload = await resumed(store, store.begin(f"upload-{number}", "sha256"))
        for start in range(0, len(contents[number]), 100):
            await upload.write([contents[number][start : start + 100]])
        return await upload.commit(Digest.of(contents[number]))

    pushed = await asyncio.gather(*map(push, range(32)))
    for content, key in zip(contents, pushed, strict=True):
        assert await read(store, key, 0, len(content)) == content


async def test_all_that_lies_in_the_store_is_listed_with_size_and_age(store: Store) -> None:
    before = time.time()
    blob = await stored(store, CONTENT, "one")
    await suspended(store, CONTENT[:100], "two")
    found = {item.key: item async for item in store.objects()}
    assert found.pop(blob).size == len(CONTENT)
    assert [(item.upload, item.size) for item in found.values()] == [("two", 100)]
    # The clock that stamps files ticks more coarsely than the one that is asked.
    assert all([before - 1 <= item.modified <= time.time() + 1 async for item in store.objects()])
    await store.forget("two")


async def test_publishing_counts_as_a_change_for_those_who_look_for_leftovers(store: Store) -> None:
    if isinstance(store, S3Store):
        pytest.skip("an object that is whole is published as it is; its session's row tells that it is needed")
    checkpoint = await suspended(store, CONTENT)
    before = {item.key: item.modified async for item in store.objects()}
    # Files are stamped by a clock that ticks coarsely.
    wait_until(lambda: time.clock_gettime(CLOCK_REALTIME_COARSE) > before[checkpoint.key], "a tick")
    key = await (await resumed(store, checkpoint)).commit(Digest.of(CONTENT))
    after = {item.key: item.modified async for item in store.objects()}
    assert after[key] > before[checkpoint.key]


async def test_a_probe_leaves_nothing(store: Store) -> None:
    await asyncio.gather(*(store.probe() for _ in range(5)))
    assert await keys(store) == set()


async def test_a_full_store_refuses_bytes_and_the_upload_goes_on_after_room_is_made(room: Room) -> None:
    upload = await begun(room.store, CONTENT[:1000])
    room.fill()
    for _ in range(2):
        with pytest.raises(OutOfSpace):
            await upload.write([CONTENT[1000:2000], CONTENT[2000:]])
        assert upload.offset == 1000
    room.make_room()
    await upload.write([CONTENT[1000:]])
    key = await upload.commit(Digest.of(CONTENT))
    assert await read(room.store, key, 0, len(CONTENT)) == CONTENT


async def test_an_upload_that_met_a_full_store_can_be_suspended_and_resumed(room: Room) -> None:
    upload = await begun(room.store, CONTENT[:1000])
    room.fill()
    with pytest.raises(OutOfSpace):
        await upload.write([CONTENT[1000:]])
    checkpoint = upload.checkpoint()
    await upload.suspend()
    upload = await resumed(room.store, checkpoint)
    room.make_room()
    await upload.write([CONTENT[1000:]])
    assert await upload.commit(Digest.of(CONTENT)) in await keys(room.store)


async def test_a_full_store_still_reads_deletes_and_lists(room: Room) -> None:
    first, second = [await stored(room.store, CONTENT, name) for name in ("one", "two")]
    room.fill()
    assert await read(room.store, first, 0, len(CONTENT)) == CONTENT
    await room.store.delete(first)
    assert await keys(room.store) == {second}
    room.make_room()


async def test_a_probe_says_that_the_store_is_full(room: Room) -> None:
    await stored(room.store, CONTENT)
    room.fill()
    with pytest.raises(OutOfSpace):
        await room.store.probe()
    room.make_room()
    await room.store.probe()
    assert len(await keys(room.store)) == 1


steps = st.tuples(
    st.binary(max_size=200), st.sampled_from(["go on", "resume", "resume without state", "lose the rest"])
)


@given(plan=st.lists(steps, max_size=8), algorithm=st.sampled_from(["sha256", "sha512"]))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_however_an_upload_is_cut_it_ends_as_the_bytes_it_was_sent(
    make: Make, plan: list[tuple[bytes, str]], algorithm: str
) -> None:
    async def play(store: Store) -> None:
        upload = await resumed(store, store.begin("one", algorithm))
        sent = b""
        for content, step in plan:
            await upload.write([content])
            sent += content
            if step == "go on":
                continue
            await upload.suspend()
            checkpoint = upload.checkpoint()
            if step == "lose the rest":
                upload = await resumed(store, checkpoint)
                await upload.write([b"the rest"])
                await upload.suspend()
            is_forgetful = "without" in step and not isinstance(store, S3Store)
            upload = await resumed(store, replace(checkpoint, state=b"") if is_forgetful else checkpoint)
            assert upload.offset == len(sent)
        key = await upload.commit(Digest.of(sent, algorithm))
        assert await read(store, key, 0, len(sent)) == sent
        await store.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(play(make(Path(directory))))
