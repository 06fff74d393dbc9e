"""HTTP by hand, for what no client library would send."""

from __future__ import annotations

import contextlib
import socket

#: A server that says nothing for so long hangs. Seconds; longer than any patience of the server's own in these tests.
PATIENCE = 15.0


def exchange(port: int, sent: bytes, *, end: bool = True, until: bytes = b"") -> bytes:
    """Send bytes and return what comes back; raise `TimeoutError` if the server falls silent before it is done.

    Args:
        port: of the server, on loopback.
        sent: the bytes.
        end: say that nothing more will be sent, as a client does that went away.
        until: stop reading after these bytes; else when the server closes.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        # The server may have closed already: what it said before counts.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
            if end:
                connection.shutdown(socket.SHUT_WR)
        return _read(connection, until)


def _read(connection: socket.socket, until: bytes) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while not (until and until in received) and (piece := connection.recv(65536)):
            received += piece
    return received
