"""Bodies in chunked encoding, read from a socket in a thread, with or without TLS. [RFC 9112, 7.1]

What is received goes into one of two large buffers, and the chunks are found there. Most clients send chunks that are
all alike; then the kernel is told where each is going to lie, so that what they hold lies together as it arrives, and
no byte is copied before it is hashed and written.
"""

from __future__ import annotations

import re
import select
import socket
from typing import Final

from registry.errors import BadRequest, RegistryError, SizeInvalid
from registry.secure import SecureSocket

#: A line that gives a chunk's size; extensions are allowed and mean nothing.
_SIZE_LINE: Final = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?")
_LINE_LIMIT: Final = 1024
#: The same as most clients write it; of anything else `is_whole` is not sure.
_PLAIN_SIZE_LINE: Final = re.compile(rb"([0-9a-fA-F]{1,8})\r\n")
#: All that stands between two chunks, as most clients write it.
_BETWEEN: Final = re.compile(rb"\r\n([1-9a-fA-F][0-9a-fA-F]{0,14})\r\n")
#: How many chunks are received at once where they are alike, and how large they must be. [POSIX: IOV_MAX]
_FORETOLD: Final = 64
_WORTH_FORETELLING: Final = 4 << 10
#: How long a thread waits for more, in milliseconds, and how often before it goes back to the pool.
_PAUSE: Final = 5
_PATIENCE: Final = 10

Piece = bytes | memoryview


class ChunkedBody:
    """Reads chunks from a socket. One thread at a time."""

    def __init__(self, start: bytes) -> None:
        self.is_finished = False
        #: Bytes of the current chunk that have not come yet.
        self.remaining = 0
        #: Bytes of the line end after a chunk that have not come yet.
        self.to_skip = 0
        #: Received and not understood yet, or not ours.
        self.rest = start
        self._is_trailer = False
        self._failure: RegistryError | None = None
        #: How far the current buffer was understood, and filled, and where the content found in it ends.
        self._position = self._filled = self._content = 0
        #: What stood before the last chunk; and if it is to stand before the next ones too, it and what each holds.
        self._last_header = self._header = b""
        self._size = 0
        self._buffers = [bytearray(), bytearray()]

    @property
    def is_waiting(self) -> bool:
        """Whether there is nothing to do until more comes."""
        return not self.is_finished and self._failure is None

    def read(self, sock: socket.socket | SecureSocket, size: int) -> memoryview:
        """Return what comes: a buffer full, or less when the client pauses.

        The kernel is asked to wake us for much at once; a client that sends 32 KiB at a time would wake us for each.
        """
        if self._failure is not None:
            raise self._failure
        buffer = self._next_buffer(max(size, 2 * len(self.rest)))
        buffer[: len(self.rest)] = self.rest
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(buffer) // 4)
        try:
            return self._fill(sock, memoryview(buffer), len(self.rest))
        finally:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _fill(self, sock: socket.socket | SecureSocket, view: memoryview, filled: int) -> memoryview:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        patience = _PATIENCE
        self._position = self._content = 0
        self._filled = filled
        try:
            self._parse(view)
            while not self.is_finished and self._filled < len(view) and patience:
                if not self._take_in(sock, view):
                    # The end of a body may be less than what the kernel waits for: look now and then.
                    patience -= not poll.poll(_PAUSE)
        except RegistryError as error:
            # What came before is good; the next call says what is wrong.
            self._failure = error
        self.rest = bytes(view[self._position : self._filled])
        return view[: self._content]

    def _take_in(self, sock: socket.socket | SecureSocket, view: memoryview) -> bool:
        """Receive what is there, and understand it; False where nothing is there."""
        if self._position == self._filled:
            self._position = self._filled = self._content
            is_next = self.to_skip == 2 and len(view) - self._content >= len(self._header) + self._size
            if self._header and (self.remaining or is_next):
                return self._take_in_foretold(sock, view)
        received = _receive(sock, [view[self._filled :]])
        if received is None:
            return False
        self._filled += received
        self._parse(view)
        return True

    def _take_in_foretold(self, sock: socket.socket | SecureSocket, view: memoryview) -> bool:
        """Do so where chunks have been alike: the kernel puts their headers aside and what they hold together.

        Whatever comes otherwise is put in a row again, and understood step by step.
        """
        start, width = self._content, len(self._header)
        first = min(self.remaining, len(view) - start)
        number = min(_FORETOLD, (len(view) - start - first) // (width + self._size))
        parts = [view[start : start + first]] if first else []
        heads = memoryview(bytearray(width * number))
        for index in range(number):
            position = start + first + index * self._size
            parts += heads[index * width : (index + 1) * width], view[position : position + self._size]
        received = _receive(sock, parts)
        if received is None:
            return False
        taken = min(first, received)
        self._content += taken
        self.remaining -= taken
        self.to_skip = 0 if self.remaining else 2
        whole, part = divmod(received - taken, width + self._size)
        seen = whole + (part >= width)
        if bytes(heads[: seen * width]) == self._header * seen:
            self._content += whole * self._size + max(0, part - width)
            if part >= width:
                self.remaining, self.to_skip = self._size + width - part, 0
            left = bytes(heads[whole * width : whole * width + part]) if part < width else b""
        else:
            left = b"".join(parts[bool(first) :])[: received - taken]
            self._header = b""
        view[self._content : self._content + len(left)] = left
        self._position, self._filled = self._content, self._content + len(left)
        self._parse(view)
        return True

    def _next_buffer(self, size: int) -> bytearray:
        self._buffers.reverse()
        if len(self._buffers[0]) != size:
            self._buffers[0] = bytearray(size)
        return self._buffers[0]

    def _parse(self, view: memoryview) -> None:
        """Find the chunks in what was received, and move what they hold together at the front."""
        end = self._filled
        while self._position < end and not self.is_finished:
            if self.remaining:
                taken = self._take_content(view, end)
            elif self.to_skip == 2 and (match := _BETWEEN.match(self._buffers[0], self._position, end)):
                # One look for what is done step by step below: it is done for every 32 KiB.
                taken, self.to_skip, self.remaining = len(match[0]), 0, int(match[1], 16)
                self._foretell(match[0])
            elif self.to_skip:
                taken = 1
                if view[self._position] != b"\r\n"[2 - self.to_skip]:
                    raise BadRequest("a chunk is longer than its header says")
                self.to_skip -= 1
            else:
                line = bytes(view[self._position : min(end, self._position + _LINE_LIMIT)])
                taken = line.find(b"\r\n") + 2
                if taken < 2:
                    if len(line) == _LINE_LIMIT:
                        raise BadRequest("a chunk header is too long")
                    return
                self._take_line(line[: taken - 2])
            self._position += taken

    def _foretell(self, header: bytes) -> None:
        """Expect the next chunks to be like this one, if the last one was."""
        is_again = header == self._last_header and self.remaining >= _WORTH_FORETELLING
        self._header, self._size = (header, self.remaining) if is_again else (b"", 0)
        self._last_header = header

    def _take_content(self, view: memoryview, end: int) -> int:
        taken = min(self.remaining, end - self._position)
        view[self._content : self._content + taken] = view[self._position : self._position + taken]
        self._content += taken
        self.remaining -= taken
        self.to_skip = 0 if self.remaining else 2
        return taken

    def _take_line(self, line: bytes) -> None:
        if self._is_trailer:
            self.is_finished = not line
            return
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise BadRequest("a chunk header is not a size")
        self.remaining = int(match[1], 16)
        self._is_trailer = not self.remaining


def is_whole(data: bytes, position: int) -> bool:
    """Return whether a body in chunks, from `position` on, ends where `data` does. False where that is not sure."""
    while match := _PLAIN_SIZE_LINE.match(data, position):
        size = int(match[1], 16)
        position = match.end() + size + 2
        if data[position - 2 : position] != b"\r\n":
            return False
        if not size:
            return position == len(data)
    return False


def _receive(sock: socket.socket | SecureSocket, into: list[memoryview]) -> int | None:
    """Return how many bytes came, None where there are none yet."""
    try:
        received = sock.recvmsg_into(into)[0]
    except BlockingIOError:
        return None
    except OSError as error:
        raise SizeInvalid(f"the connection broke: {error.strerror}") from None
    if not received:
        raise SizeInvalid("the body ended early")
    return received
