"""HTTP by hand, for what no client library would send."""

from __future__ import annotations

import contextlib
import socket

#: A server that says nothing for so long hangs. Seconds; longer than any patience of the server's own in these tests.
PATIENCE = 15.0


def exchange(port: int, sent: bytes, *, end: bool = True) -> bytes:
    """Send bytes and return all that comes back until the server closes; raise `TimeoutError` if it never does.

    With `end`, say that nothing more will be sent, as a client does that went away.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        # The server may have closed already: what it said before counts.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
            if end:
                connection.shutdown(socket.SHUT_WR)
        return _read_all(connection)


def _read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received
