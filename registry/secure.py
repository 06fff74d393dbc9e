"""TLS between a connection's transport and its protocol, and, for large bodies, in a thread.

An event loop that does TLS itself encrypts a layer piece by piece while everybody else waits. Here it can be lent: a
thread that is about to read or send a large body gets the socket and the state of TLS, and gives both back afterwards.
Meanwhile the loop touches neither, so it reads nothing.

OpenSSL knows no socket here, only two buffers in memory: what came in and what is to go out. Read by read from the
socket it would take two system calls for each record of 16 KiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

from registry.connections import Connections

#: The most that a record holds. [RFC 8446, 5.1]
_RECORD_SIZE: Final = 16 << 10
#: Bytes that a thread receives, or encrypts, at once.
_RECEIVED_SIZE: Final = 256 << 10
_SENT_SIZE: Final = 128 << 10


class PlainSocket(socket.socket):
    """The socket of a connection, for a thread."""

    def send_from(self, file: int, position: int, count: int) -> int:
        """Send bytes of a file from a position on, as many as fit; return how many. [os.sendfile]"""
        return os.sendfile(self.fileno(), file, position, count)


class SecureSocket:
    """The same of a connection over TLS: what is received is decrypted, what is sent is encrypted."""

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
    ) -> None:
        """Move bytes between `sock` and the two buffers of `tls`."""
        self._sock = sock
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        #: Encrypted bytes that the socket did not take yet, and how many bytes of the file they are.
        self._unsent = memoryview(b"")
        self._taken = 0
        self.fileno: Final = sock.fileno
        self.setsockopt: Final = sock.setsockopt

    @property
    def is_torn(self) -> bool:
        """Whether a record was sent in part, so that nothing else can follow it."""
        return bool(self._unsent)

    def recvmsg_into(self, parts: Sequence[memoryview]) -> tuple[int]:
        """Receive into one part after the other. [socket.socket.recvmsg_into]"""
        # Not much more than is wanted: what is behind it waits in memory for as long as the client likes.
        limit = max(2 * _RECORD_SIZE, min(sum(map(len, parts)), _RECEIVED_SIZE))
        received = 0
        try:
            for part in parts:
                while part:
                    count = self._receive(part, limit)
                    if not count:
                        return (received,)
                    received += count
                    part = part[count:]
        except OSError:
            # What came before is good; whatever is wrong is so at the next call too.
            if not received:
                raise
        return (received,)

    def send_from(self, file: int, position: int, count: int) -> int:
        """Send bytes of a file from a position on; where they do not fit, the same is to be asked for again."""
        if not self._unsent:
            piece = _buffers.sent[: min(count, _SENT_SIZE)]
            self._taken = os.preadv(file, [piece], position)
            _encrypt(self._tls, piece[: self._taken])
            self._unsent = memoryview(self._outgoing.read())
        while self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        return self._taken

    def _receive(self, part: memoryview, limit: int) -> int:
        """Return how many bytes came, 0 at the end; raises `BlockingIOError`."""
        while True:
            try:
                # [ssl.SSLObject.read] Given a buffer, it returns how many bytes it put there.
                return cast("int", self._tls.read(len(part), cast("bytearray", part)))
            except ssl.SSLWantReadError:
                count = self._sock.recv_into(_buffers.received, limit)
                if not count:
                    return 0
                self._incoming.write(_buffers.received[:count])


class _Buffers(threading.local):
    """What a thread receives into, and reads files into. One for each thread is enough: it works for one at a time."""

    def __init__(self) -> None:
        self.received = memoryview(bytearray(_RECEIVED_SIZE))
        self.sent = memoryview(bytearray(_SENT_SIZE))


_buffers: Final = _Buffers()


class Secure(asyncio.Protocol, asyncio.Transport):
    """A protocol to the transport below, which brings encrypted bytes, and a transport to the protocol above."""

    #: For whoever looks after connections: hands have a time of their own.
    head_since: None = None

    def __init__(
        self,
        inner: asyncio.Protocol,
        context: ssl.SSLContext,
        connections: Connections,
        handshake_seconds: float,
    ) -> None:
        """Serve `inner` by `context`; whoever has not shaken hands after some seconds is dropped.

        Until then it has one of the places of `connections`, which `inner` takes afterwards.
        """
        super().__init__()
        self._connections = connections
        self._inner = inner
        self._context = context
        self._seconds = handshake_seconds
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._is_open = False
        self._is_paused = False
        self._is_lent = False

    # --- a protocol, to the transport below ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._deadline = asyncio.get_running_loop().call_later(self._seconds, self.abort)
        if not self._connections.enter(self):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._connections.leave(self)
        if self._is_open:
            self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        self._advance()

    def eof_received(self) -> None:
        if self._is_open:
            self._inner.eof_received()

    def pause_writing(self) -> None:
        if self._is_open:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._is_open:
            self._inner.resume_writing()

    def _advance(self) -> None:
        """Understand what came, and pass it on."""
        if self._is_lent or self._is_paused or self._transport.is_closing():
            return
        try:
            if not self._is_open:
                self._tls.do_handshake()
            data, is_end = self._decrypt()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError:
            # It may have something to say about that: an alert.
            self._flush()
            self._transport.close()
            return
        self._flush()
        self._open()
        if data and not self._transport.is_closing():
            self._inner.data_received(data)
        if is_end and not self._transport.is_closing():
            self._inner.eof_received()
            self.close()

    def _open(self) -> None:
        """Tell the protocol above, once, that hands are shaken."""
        if not self._is_open:
            self._deadline.cancel()
            self._is_open = True
            self._connections.leave(self)
            self._inner.connection_made(self)

    def _decrypt(self) -> tuple[bytes, bool]:
        """Return all that came, and whether nothing will any more."""
        pieces = []
        with contextlib.suppress(ssl.SSLWantReadError):
            while piece := self._tls.read(_RECORD_SIZE):
                pieces.append(piece)
            return b"".join(pieces), True
        return b"".join(pieces), False

    def _flush(self) -> None:
        """Send what TLS has to say; nothing where the connection is closed already."""
        data = self._outgoing.read()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    # --- a transport, to the protocol above ---------------------------------------------------------------------

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._inner

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "sslcontext":
            return self._context
        return self._tls if name == "ssl_object" else self._transport.get_extra_info(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self._is_lent
        if self._transport.is_closing():
            return
        try:
            _encrypt(self._tls, memoryview(data))
        except ssl.SSLError:
            # What came was no TLS, so there is nobody to say anything to.
            self.abort()
        self._flush()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        if self._is_open and not self._is_lent and not self._transport.is_closing():
            # [RFC 8446, 6.1] The end is said; nobody waits until the client says it too.
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def pause_reading(self) -> None:
        self._is_paused = True
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._is_paused = False
        self._go_on()

    def _go_on(self) -> None:
        """Read again, unless that is to wait, beginning with what a thread left behind."""
        if not (self._is_paused or self._is_lent or self._transport.is_closing()):
            self._transport.resume_reading()
            asyncio.get_running_loop().call_soon(self._advance)

    @contextlib.contextmanager
    def lend(self) -> Iterator[SecureSocket]:
        """Let a thread send and receive while the block lasts; nobody else does."""
        assert not self._is_lent
        self._transport.pause_reading()
        self._is_lent = True
        try:
            with _duplicate(self._transport) as sock:
                lent = SecureSocket(sock, self._tls, self._incoming, self._outgoing)
                try:
                    yield lent
                finally:
                    if lent.is_torn:
                        self.abort()
        finally:
            self._is_lent = False
            self._go_on()


@contextlib.contextmanager
def lend(transport: asyncio.Transport) -> Iterator[PlainSocket | SecureSocket]:
    """Let a thread have the socket of a connection while the block lasts; raises `ConnectionResetError` if it ended."""
    if transport.is_closing():
        raise ConnectionResetError("the client is gone")
    if isinstance(transport, Secure):
        with transport.lend() as secure:
            yield secure
    else:
        assert transport.get_extra_info("sslcontext") is None
        with _duplicate(transport) as plain:
            yield plain


def _duplicate(transport: asyncio.Transport) -> PlainSocket:
    """Return a socket of our own: the loop may close its one at any moment, and numbers are used again."""
    return PlainSocket(fileno=os.dup(transport.get_extra_info("socket").fileno()))


def _encrypt(tls: ssl.SSLObject, data: memoryview) -> None:
    while data:
        data = data[tls.write(cast("bytes", data)) :]
