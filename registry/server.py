"""Serving: one process, or one that watches over several.

The start is a straight line: lock, migrate, bind, serve. The lock keeps a second server away from the same data;
the kernel lets go of it when the last process of the server is gone, however it died.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import structlog
from aiohttp import web

from registry.affinity import Affinity
from registry.app import ANSWERS, OBSERVER, Process, build
from registry.config import Settings, is_loopback, parse_listen
from registry.errors import ConfigurationError, MetadataError
from registry.logs import configure
from registry.metadata import sessions
from registry.metadata.engine import Database, sqlite_path
from registry.metadata.schema import upgrade
from registry.wire import accept

#: What the lock file says while a server runs; it stays there only if the server died.
_RUNNING: Final = b"running\n"
_BACKLOG: Final = 1024
#: A worker that dies sooner than this after its start is not started again at once. Seconds.
_RESTART_PAUSE: Final = 1.0

#: Objects made since the last look for garbage, before the next one; Python's own limit is 700.
_GARBAGE: Final = 20_000

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
#: For answers on their way out, when the time to drain is over.
_LAST_SECONDS: Final = 1.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Server:
    """What all processes of a server share. `sockets` are those of each worker."""

    settings: Settings
    sockets: list[list[socket.socket]]
    recover: float | None
    shared: Path | None = None


def serve(settings: Settings, announce: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    Args:
        settings: the configuration.
        announce: called once with the address, when requests are answered.

    Raises:
        ConfigurationError: the data is in use, the address is not to be had, the database is not ours.
    """
    configure(settings.log)
    _check_directory(Path(settings.storage.filesystem.root))
    with _exclusive(_lock_files(settings)) as died:
        # Before any worker publishes a file: what is older belongs to the last run.
        recover = time.time() if died else None
        copy = upgrade(settings.database.url)
        if copy:
            log.info("database upgraded", copy=copy)
        asyncio.run(_release_sessions(settings))
        sockets = _bind(settings)
        url = _url(sockets[0][0], settings)
        with contextlib.ExitStack() as stack:
            if settings.server.workers == 1:
                server = _Server(settings, sockets, recover)
                process = Process(recover=recover, affinity=_affinity(settings))
                return _run(_serve(server, process, lambda: announce(url)))
            shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hythe-")))
            return _supervise(_Server(settings, sockets, recover, shared), lambda: announce(url))


def _check_directory(root: Path) -> None:
    try:
        root.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"storage.filesystem.root: {root}: {error.strerror}") from None


def _lock_files(settings: Settings) -> list[Path]:
    root = Path(settings.storage.filesystem.root)
    database = sqlite_path(settings.database.url)
    return list(dict.fromkeys([root.resolve() / "hythe.lock", database.resolve().parent / "hythe.lock"]))


@contextlib.contextmanager
def _exclusive(paths: list[Path]) -> Iterator[bool]:
    """Hold the locks; yield whether the last holder died without letting go."""
    with contextlib.ExitStack() as stack:
        died = [stack.enter_context(_locked(path)) for path in paths]
        yield any(died)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another server uses the data in {path.parent}: stop it, or give this one its own with --data"
            ) from None
        died = os.pread(descriptor, len(_RUNNING), 0) == _RUNNING
        # On a full disk this fails, and a crash would go unnoticed; pulls are worth more.
        with contextlib.suppress(OSError):
            os.pwrite(descriptor, _RUNNING, 0)
        yield died
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


async def _release_sessions(settings: Settings) -> None:
    database = Database(settings.database.url, sync=settings.database.sync)
    try:
        await database.note(sessions.release_all)
    except MetadataError as error:
        # They end by themselves after a while.
        log.warning("claims of the last run are not released", error=str(error))
    finally:
        await database.close()


def _bind(settings: Settings) -> list[list[socket.socket]]:
    """Return listening sockets for each worker.

    Workers have sockets of their own, between which the kernel deals out connections; on a shared one the first to
    wake up would take most. The watching process keeps them all, so that no connection is lost with a worker.
    """
    workers = settings.server.workers
    host, port = parse_listen(settings.server.listen)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses: list[tuple[int, Any]] = [
            (entry[0], entry[4]) for entry in (found[:1] if host == "localhost" else found)
        ]
        # Also with several workers the first look is for another server, with which ports are not to be shared.
        alone = [_listen(family, address, shared=False) for family, address in addresses]
        if workers == 1:
            return [alone]
        addresses = [(sock.family, sock.getsockname()) for sock in alone]
        for sock in alone:
            sock.close()
        return [[_listen(family, address, shared=True) for family, address in addresses] for _ in range(workers)]
    except OSError as error:
        raise ConfigurationError(f"server.listen: {settings.server.listen}: {error.strerror or error}") from None


def _listen(family: int, address: tuple[Any, ...], *, shared: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _url(sock: socket.socket, settings: Settings) -> str:
    host, _ = parse_listen(settings.server.listen)
    port = sock.getsockname()[1]
    if not is_loopback(host):
        return f"{socket.gethostname()}:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _affinity(settings: Settings, index: int = 0) -> Affinity:
    return Affinity(index, enabled=settings.server.affinity)


def _calm_collector() -> None:
    """Let Python look for cyclic garbage less often: what requests leave behind has next to none.

    What was loaded so far stays for good and is not looked at again.
    """
    gc.freeze()
    gc.set_threshold(_GARBAGE, 20, 50)


def _run(main: object) -> int:
    """Run `main` on uvloop where it is installed: small requests are answered half as fast again."""
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)  # type: ignore[arg-type]


async def _serve(server: _Server, process: Process, ready: Callable[[], None], index: int = 0, parent: int = -1) -> int:
    """Serve on the sockets until told to stop, then drain.

    Args:
        server: what to serve.
        process: which of its processes this is.
        ready: called when requests are answered.
        index: of the worker.
        parent: a pipe whose end tells that the watching process is gone, or -1.
    """
    settings = server.settings
    app = build(settings, process=process)
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=_LAST_SECONDS,
        keepalive_timeout=75,
        # A push by digest may bring a hundred tags in its query.
        max_line_size=32768,
        max_field_size=16384,
    )
    await runner.setup()
    loop = asyncio.get_running_loop()
    http = runner.server
    assert http is not None
    listeners = [
        await loop.create_server(lambda: accept(http, app[ANSWERS]), sock=sock, backlog=_BACKLOG)
        for sock in server.sockets[index]
    ]
    stop = asyncio.Event()
    for number in _STOPPING:
        loop.add_signal_handler(number, stop.set)
    if parent >= 0:
        loop.add_reader(parent, stop.set)
    process.affinity.join()
    _calm_collector()
    ready()
    await stop.wait()
    for listener in listeners:
        listener.close()
    app[ANSWERS].end()
    await app[OBSERVER].drain(settings.server.drain_seconds)
    await runner.cleanup()
    return 0


def _supervise(server: _Server, ready: Callable[[], None]) -> int:
    """Start the workers, start those again that die, end them all in the end."""
    workers = _Workers(server)
    for number in _STOPPING:
        signal.signal(number, workers.stop)
    workers.start_all()
    ready()
    return workers.watch()


class _Workers:
    """The processes that serve, seen from the one that watches."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._children: dict[int, int] = {}
        self._is_stopping = False
        self._alive, self._held = os.pipe()

    def start_all(self) -> None:
        for index in range(self._server.settings.server.workers):
            self._start(index, self._server.recover)

    def stop(self, _number: int, _frame: object) -> None:
        """Tell all to drain, and take no more connections."""
        self._is_stopping = True
        _close(self._server.sockets)
        for pid in self._children:
            # It may have ended just now.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def watch(self) -> int:
        """Wait until all have ended, and return the exit code."""
        worst = 0
        while self._children:
            pid, status = os.wait()
            with _signals_held():
                index = self._children.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if self._is_stopping:
                # One that was told before it could listen for it has ended as it should.
                worst = worst or (0 if code == -signal.SIGTERM else abs(code))
                continue
            log.error("a worker died and is started again", worker=index, exit_code=code)
            time.sleep(_RESTART_PAUSE)
            self._start(index, None)
        return worst

    def _start(self, index: int, recover: float | None) -> None:
        """Start a worker, which ends when this process does. No signal may come in between and be lost."""
        with _signals_held():
            if self._is_stopping:
                return
            pid = os.fork()
            if not pid:
                for number in _STOPPING:
                    signal.signal(number, signal.SIG_DFL)
                os.close(self._held)
                _close(sockets for other, sockets in enumerate(self._server.sockets) if other != index)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
                _work(self._server, index, self._alive, recover)
            self._children[pid] = index


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals to stop wait for the end of the block."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _close(sockets: Iterable[list[socket.socket]]) -> None:
    for group in sockets:
        for sock in group:
            sock.close()


def _work(server: _Server, index: int, alive: int, recover: float | None) -> NoReturn:
    code = 1
    try:
        process = Process(
            alone=False,
            is_first=index == 0,
            recover=recover,
            shared=server.shared,
            affinity=_affinity(server.settings, index),
        )
        code = _run(_serve(server, process, lambda: None, index, alive))
    except BaseException as error:
        log.error("worker failed", worker=index, exc_info=error)
    finally:
        sys.stderr.flush()
        os._exit(code)
