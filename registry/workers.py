"""Several processes that serve, and the one that watches over them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NoReturn

import structlog

#: A worker that dies sooner than this after its start is not started again at once. Seconds.
_RESTART_PAUSE: Final = 1.0
#: What ends a server.
STOPPING: Final = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger()

#: Serves as the worker with an index, the first with it or a later one, until told to stop or until the end of a pipe
#: tells that the watching process is gone. Returns the exit code.
Serve = Callable[[int, bool, int], int]


def supervise(
    sockets: list[list[socket.socket]], serve: Serve, ready: Callable[[], None], died: Callable[[], None]
) -> int:
    """Run a worker for each group of listening sockets until SIGTERM or SIGINT; return the exit code.

    Args:
        sockets: those of each worker.
        serve: what a worker does, in a process of its own.
        ready: called when all were started.
        died: called when one ended that nobody told to.
    """
    workers = _Workers(sockets, serve, died)
    for number in STOPPING:
        signal.signal(number, workers.stop)
    workers.start_all()
    ready()
    return workers.watch()


class _Workers:
    """The processes that serve, seen from the one that watches."""

    def __init__(self, sockets: list[list[socket.socket]], serve: Serve, died: Callable[[], None]) -> None:
        self._sockets = sockets
        self._serve = serve
        self._died = died
        self._children: dict[int, int] = {}
        self._is_stopping = False
        self._alive, self._held = os.pipe()

    def start_all(self) -> None:
        for index in range(len(self._sockets)):
            self._start(index, is_first=True)

    def stop(self, _number: int, _frame: object) -> None:
        """Tell all to drain, and take no more connections."""
        self._is_stopping = True
        _close(self._sockets)
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
            self._died()
            log.error("a worker died and is started again", worker=index, exit_code=code)
            time.sleep(_RESTART_PAUSE)
            self._start(index, is_first=False)
        return worst

    def _start(self, index: int, *, is_first: bool) -> None:
        """Start a worker, which ends when this process does. No signal may come in between and be lost."""
        with _signals_held():
            if self._is_stopping:
                return
            pid = os.fork()
            if not pid:
                for number in STOPPING:
                    signal.signal(number, signal.SIG_DFL)
                os.close(self._held)
                _close(sockets for other, sockets in enumerate(self._sockets) if other != index)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
                self._work(index, is_first)
            self._children[pid] = index

    def _work(self, index: int, is_first: bool) -> NoReturn:
        code = 1
        try:
            code = self._serve(index, is_first, self._alive)
        except BaseException as error:
            log.error("worker failed", worker=index, exc_info=error)
        finally:
            sys.stderr.flush()
            os._exit(code)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals to stop wait for the end of the block."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _close(sockets: Iterable[list[socket.socket]]) -> None:
    for group in sockets:
        for sock in group:
            sock.close()
