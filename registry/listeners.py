"""Sockets that listen, and the address to tell people."""

from __future__ import annotations

import socket
from typing import Any, Final

from registry.config import Settings, is_loopback, parse_listen
from registry.errors import ConfigurationError

#: Connections that wait to be taken.
BACKLOG: Final = 1024


def bind(settings: Settings) -> list[list[socket.socket]]:
    """Return listening sockets for each worker.

    Workers have sockets of their own, between which the kernel deals out connections; on a shared one the first to
    wake up would take most. The watching process keeps them all, so that no connection is lost with a worker.

    Raises:
        ConfigurationError: the address is not to be had.
    """
    workers = settings.server.workers
    host, port = parse_listen(settings.server.listen)
    stall = settings.uploads.stall_seconds
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses: list[tuple[int, Any]] = [
            (entry[0], entry[4]) for entry in (found[:1] if host == "localhost" else found)
        ]
        # Also with several workers the first look is for another server, with which ports are not to be shared.
        alone = [_listen(family, address, stall, shared=False) for family, address in addresses]
        if workers == 1:
            return [alone]
        addresses = [(sock.family, sock.getsockname()) for sock in alone]
        for sock in alone:
            sock.close()
        return [[_listen(family, address, stall, shared=True) for family, address in addresses] for _ in range(workers)]
    except OSError as error:
        reason = error.strerror or error
        raise ConfigurationError(
            f"server.listen: {settings.server.listen}: {reason} (choose another address with --listen HOST:PORT)"
        ) from None


def _listen(family: int, address: tuple[Any, ...], stall: int, *, shared: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        # [tcp(7)] Connections have it from here: a client that takes nothing of its answer keeps no place.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall * 1000)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def address_of(sock: socket.socket, settings: Settings) -> str:
    """Return `HOST:PORT` as clients write it."""
    host, _ = parse_listen(settings.server.listen)
    port = sock.getsockname()[1]
    if not is_loopback(host):
        return f"{socket.gethostname()}:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
