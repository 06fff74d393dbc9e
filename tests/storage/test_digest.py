"""Digests, and hashers that are saved and restored, against hashlib."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage.digest
from storage.digest import HEX_LENGTH, Digest, check_algorithm, hasher, restore
from storage.errors import InvalidDigest

algorithms = st.sampled_from(sorted(HEX_LENGTH))
each_algorithm = pytest.mark.parametrize("algorithm", sorted(HEX_LENGTH))
digests = algorithms.flatmap(
    lambda algorithm: st.text("0123456789abcdef", min_size=HEX_LENGTH[algorithm], max_size=HEX_LENGTH[algorithm]).map(
        lambda text: f"{algorithm}:{text}"
    )
)


@pytest.fixture(params=["libcrypto", "hashlib"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Python whose libcrypto can be used, and one without."""
    if request.param == "hashlib":
        monkeypatch.setattr(storage.digest, "_LIBCRYPTO", None)
    return request.param  # type: ignore[no-any-return]


@given(algorithms, st.lists(st.tuples(st.binary(max_size=400), st.booleans())))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hasher_agrees_with_hashlib_however_often_it_is_saved_and_restored(
    build: str, algorithm: str, pieces: list[tuple[bytes, bool]]
) -> None:
    ours, theirs, content = hasher(algorithm), hashlib.new(algorithm), b""
    for piece, is_saved in pieces:
        ours.update(piece)
        theirs.update(piece)
        content += piece
        assert ours.digest() == Digest(algorithm, theirs.hexdigest())
        if is_saved and build == "libcrypto":
            restored = restore(algorithm, ours.save())
            assert restored
            ours = restored
    assert ours.digest() == Digest.of(content, algorithm)


@each_algorithm
@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 111, 112, 127, 128, 129, 1 << 20])
def test_every_place_in_a_block_can_be_saved(algorithm: str, size: int) -> None:
    first = hasher(algorithm)
    first.update(bytes(size))
    second = restore(algorithm, first.save())
    assert second
    second.update(b"more")
    assert first.digest() == Digest.of(bytes(size), algorithm)
    assert second.digest() == Digest.of(bytes(size) + b"more", algorithm)


@each_algorithm
def test_a_saved_state_is_a_copy(algorithm: str) -> None:
    first = hasher(algorithm)
    first.update(b"one")
    state = first.save()
    first.update(b"two")
    second = restore(algorithm, state)
    assert second
    assert second.digest() == Digest.of(b"one", algorithm)


@each_algorithm
def test_a_state_is_good_in_another_process(algorithm: str) -> None:
    first = hasher(algorithm)
    first.update(b"one")
    script = f"""
from storage.digest import restore
second = restore({algorithm!r}, bytes.fromhex({first.save().hex()!r}))
second.update(b"two")
print(second.digest(), end="")
"""
    other = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert other.stdout == str(Digest.of(b"onetwo", algorithm))


@each_algorithm
@given(state=st.binary(max_size=300))
def test_a_state_of_another_size_is_not_restored(algorithm: str, state: bytes) -> None:
    restored = restore(algorithm, state)
    assert (restored is not None) == (len(state) == len(hasher(algorithm).save()))


@each_algorithm
def test_without_libcrypto_there_is_no_state_and_none_is_taken(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = hasher(algorithm).save()
    monkeypatch.setattr(storage.digest, "_LIBCRYPTO", None)
    assert hasher(algorithm).save() == b""
    assert restore(algorithm, state) is None


def test_a_libcrypto_that_does_not_agree_with_hashlib_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.digest._load_libcrypto() is not None
    # Contexts of another layout: what is saved is not all there is.
    monkeypatch.setattr(storage.digest, "_agrees", lambda *_: False)
    assert storage.digest._load_libcrypto() is None
    monkeypatch.undo()
    monkeypatch.setattr("_hashlib.__file__", "/nonexistent/libcrypto.so")
    assert storage.digest._load_libcrypto() is None


@each_algorithm
def test_hashers_in_threads_do_not_meet(build: str, algorithm: str) -> None:
    def work(number: int) -> bool:
        ours, content = hasher(algorithm), bytes([number]) * 100_003
        for _ in range(20):
            ours.update(content)
        return ours.digest() == Digest.of(content * 20, algorithm)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(32)))


@given(digests)
def test_a_digest_is_read_and_written_alike(text: str) -> None:
    digest = Digest.parse(text)
    assert str(digest) == text
    assert digest == Digest(*text.split(":"))


@given(st.data())
def test_a_mutated_digest_is_refused(data: st.DataObject) -> None:
    text = data.draw(digests)
    position = data.draw(st.integers(0, len(text) - 1))
    mutated = data.draw(
        st.sampled_from(
            [
                text[:position] + text[position + 1 :],
                text[:position] + "g" + text[position + 1 :],
                text[:position] + "\n" + text[position + 1 :],
                text + "0",
                text + "\n",
                " " + text,
                text.replace("sha", "sha-"),
                text.replace(":", "::"),
                text.upper(),
            ]
        )
    )
    with pytest.raises(InvalidDigest):
        Digest.parse(mutated)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "sha256",
        "sha256:",
        "md5:d41d8cd98f00b204e9800998ecf8427e",
        "sha384:" + "0" * 96,
        "sha512:" + "0" * 64,
        "sha256:" + "0" * 128,
        "sha256:" + "A" * 64,
        "SHA256:" + "0" * 64,
        "sha256:" + "\u0660" * 64,
        "sha256:" + "0" * 63 + "\x00",
    ],
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(InvalidDigest):
        Digest.parse(text)


@given(st.text())
def test_any_text_is_a_digest_or_refused(text: str) -> None:
    for attempt in (text, f"sha256:{text}", f"{text}:{'0' * 64}"):
        with contextlib.suppress(InvalidDigest):
            assert str(Digest.parse(attempt)) == attempt


@given(st.text())
def test_only_two_algorithms_are_known(text: str) -> None:
    if text in HEX_LENGTH:
        return
    with pytest.raises(InvalidDigest):
        check_algorithm(text)


@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_a_refusal_does_not_repeat_all_that_was_sent(size: int) -> None:
    for text in ("x" * size, "x" * size + ":0", "sha256:" + "x" * size):
        with pytest.raises(InvalidDigest) as raised:
            Digest.parse(text)
        assert len(str(raised.value)) < 1000


@given(st.binary(), algorithms)
def test_the_digest_of_content_is_hashlibs(content: bytes, algorithm: str) -> None:
    assert str(Digest.of(content, algorithm)) == f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"
