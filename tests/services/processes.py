"""Real programs as fixtures: started on a free port, waited for, ended by their pid."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Host(Protocol):
    """Where a program runs that is to have a network of its own. [tests/services/network.py]"""

    @property
    def address(self) -> str:
        """Its address, for us."""

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return `command` such that it runs there."""


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on now, on loopback or on another address of ours."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_open(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def wait_until(is_true: object, what: str, seconds: float = 20) -> None:
    """Wait until a callable returns something true."""
    assert callable(is_true)
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.01)


def answers(url: str) -> bool:
    """Return whether an HTTP server answers with anything at all."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@dataclass
class Program:
    """A program that runs beside the tests. Its output goes to a file, for when it failed."""

    command: Sequence[str]
    output: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    #: Whom it runs as, and that one's first group; nobody else than we where it is not said.
    user: str | None = None
    group: int | None = None

    def start(self) -> None:
        """Start it."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.environment},
                start_new_session=True,
                user=self.user,
                group=self.group,
                extra_groups=None if self.user is None else [],
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process is not None
        return self.process.pid

    def wait_for(self, url: str, seconds: float = 20) -> None:
        """Wait until it answers at `url`; fail with its output if it ends instead."""

        def is_up() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.output.read_text(errors="replace")
            return answers(url)

        wait_until(is_up, url, seconds)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send a signal, wait for the end, return the exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@dataclass
class HytheServer(Program):
    """A `hythe serve` of its own process, on a free port."""

    data: Path = Path()
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def address(self) -> str:
        """`HOST:PORT`, as it stands before an image's name."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Its address as a URL."""
        return f"http://{self.address}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        super().start()
        self.wait_for(f"{self.url}/v2/")

    def kill(self) -> None:
        """End it as a crash would."""
        self.stop(signal.SIGKILL)


@contextlib.contextmanager
def hythe_server(
    directory: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    start: bool = True,
    host: Host | None = None,
) -> Iterator[HytheServer]:
    """Run `hythe serve` with its data in `directory` and more arguments, while the block lasts.

    `environment` may name another database, or another store; `host` a network namespace to run in.
    """
    address = host.address if host else "127.0.0.1"
    port = 5000 if host else free_port()
    data = directory / "data"
    environment = {"HYTHE_STORAGE__FILESYSTEM__ROOT": str(data), **(environment or {})}
    environment.setdefault("HYTHE_DATABASE__URL", f"sqlite:///{data / 'hythe.db'}")
    command = [sys.executable, "-m", "hythe", "serve", "--listen", f"{address}:{port}", *arguments]
    command = host.inside(command) if host else command
    server = HytheServer(command, directory / "hythe.log", environment, data=data, host=address, port=port)
    try:
        if start:
            server.start()
        yield server
    finally:
        server.stop()


def run(*command: str, timeout: float = 120, **environment: str) -> str:
    """Run a command to its end and return what it printed; fail with all of it if it failed."""
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{text}"
    return text
