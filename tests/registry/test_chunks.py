"""Bodies in chunks, read from a socket as they come: alike or not, cut anywhere, in buffers of any size."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.chunks import ChunkedBody
from registry.errors import BadRequest, RegistryError, SizeInvalid

BEHIND = b"GET /v2/ HTTP/1.1\r\n\r\n"
SIZES = [1, 4095, 4096, 4097, 8192, 32768, 32769, 40000]


def framed(content: bytes, sizes: list[int], style: str) -> bytes:
    stream, position = b"", 0
    for size in sizes:
        stream += style.format(size).encode() + b"\r\n" + content[position : position + size] + b"\r\n"
        position += size
    return stream


def read_all(pieces: list[bytes], start: bytes, size: int) -> tuple[bytes, ChunkedBody, RegistryError | None]:
    """Return what a body gives whose bytes are sent in these pieces, itself, and what went wrong in the end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def send() -> None:
        # Nobody may be there any more for what is behind a body.
        with ours, suppress(BrokenPipeError):
            for piece in pieces:
                ours.sendall(piece)

    sending = threading.Thread(target=send)
    sending.start()
    body, content, failure = ChunkedBody(start), b"", None
    try:
        with theirs:
            while not body.is_finished:
                content += body.read(theirs, size)
    except RegistryError as error:
        failure = error
    sending.join()
    return content, body, failure


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    pieces = []
    for length in cuts:
        pieces.append(stream[:length])
        stream = stream[length:]
    return [*pieces, stream]


rhythms = st.lists(st.tuples(st.sampled_from(SIZES), st.integers(1, 30)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rhythm=rhythms,
    cuts=st.lists(st.integers(1, 90_000), max_size=20),
    held=st.integers(0, 50_000),
    size=st.sampled_from([64 << 10, 100_000, 1 << 20]),
    style=st.sampled_from(["{:x}", "{:X}", "{:08x}", "{:x};extension=1", "{:x} ;x"]),
    seed=st.integers(0, 2**32),
)
def test_whatever_the_rhythm_what_was_sent_arrives(
    rhythm: list[tuple[int, int]], cuts: list[int], held: int, size: int, style: str, seed: int
) -> None:
    sizes = [each for each, times in rhythm for _ in range(times)]
    content = random.Random(seed).randbytes(sum(sizes))
    stream = framed(content, sizes, style) + b"0\r\n\r\n" + BEHIND
    received, body, failure = read_all(cut(stream[held:], cuts), stream[:held], size)
    assert failure is None
    assert received == content
    # What is behind the body is not ours, as far as it was read.
    assert BEHIND.startswith(body.rest)


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (b"8000\r\n", BadRequest),
        (b"\r\nzzzz\r\n", BadRequest),
        (b"\r\n8001\r\n", SizeInvalid),
        (b"\r\n80", SizeInvalid),
    ],
)
@pytest.mark.parametrize("times", [1, 2, 3, 40])
def test_where_the_rhythm_breaks_what_came_before_is_kept(broken: bytes, kind: type[RegistryError], times: int) -> None:
    content = random.Random(1).randbytes(32768 * times)
    stream = framed(content, [32768] * times, "{:x}").removesuffix(b"\r\n")
    received, _, failure = read_all([stream, broken], b"", 1 << 20)
    assert isinstance(failure, kind)
    assert received[: len(content)] == content


@pytest.mark.parametrize("missing", [1, 2, 3, 7, 8, 9, 20_000, 40_000])
def test_of_a_body_that_ends_early_all_is_kept_that_came(missing: int) -> None:
    content = random.Random(1).randbytes(32768 * 20)
    stream = framed(content, [32768] * 20, "{:x}")
    received, body, failure = read_all([stream[:-missing]], b"", 256 << 10)
    assert isinstance(failure, SizeInvalid)
    assert content.startswith(received)
    assert len(received) + body.remaining in (32768 * 19, 32768 * 20)
