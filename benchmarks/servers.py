"""The servers that are measured: each a process tree of its own on a free port, its log in a file."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from tests.services.processes import Program, free_port

_PATIENCE: Final = 30.0
#: [clock_getcpuclockid(3)] Linux makes the number of a process's clock from its id.
_CPUCLOCK_SCHED: Final = 2


class BenchmarkError(Exception):
    """Something cannot be measured; the message is for a person."""


@dataclass
class Server:
    """A running server.

    Attributes:
        name: what tables call it.
        directory: where its data is.
        port: on loopback.
        program: its process.
        trust: how to connect over TLS, None where it speaks plainly.
        start_seconds: from the start of the process to the first answer.
    """

    name: str
    directory: Path
    port: int
    program: Program
    trust: ssl.SSLContext | None = None
    start_seconds: float = 0

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return "127.0.0.1", self.port

    def connect(self) -> socket.socket:
        """Connect to it."""
        return _connect(self.address, self.trust)

    def cpu_seconds(self) -> float:
        """Return what its processes have used so far, user and system.

        By the process clocks: /proc/PID/stat has the same numbers, rounded to hundredths, which is too coarse for
        what sendfile takes.
        """
        return sum(time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED) for pid in self._pids())

    def resident(self) -> int:
        """Return the resident bytes of its processes now."""
        return sum(_status(pid, "VmRSS") for pid in self._pids())

    def peak(self) -> int:
        """Return the most bytes that its processes ever had resident."""
        return sum(_status(pid, "VmHWM") for pid in self._pids())

    def _pids(self) -> list[int]:
        root = psutil.Process(self.program.pid)
        return [root.pid, *(child.pid for child in root.children(recursive=True))]


@dataclass(frozen=True)
class Kind:
    """A kind of server: how it is set up in a directory, with a port, and started."""

    name: str
    command: Callable[[Path, int], Sequence[str]]
    takes_pushes: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    trust: ssl.SSLContext | None = None

    @contextlib.contextmanager
    def running(self, directory: Path) -> Iterator[Server]:
        """Run one with its data in `directory`, which is made, while the block lasts."""
        directory.mkdir()
        with self.started(directory) as server:
            yield server

    @contextlib.contextmanager
    def started(self, directory: Path) -> Iterator[Server]:
        """The same in a directory that is there."""
        port = free_port()
        program = Program(self.command(directory, port), directory / f"{self.name}.log", self.environment)
        began = time.perf_counter()
        program.start()
        try:
            _wait_for_answer(program, port, self.trust)
            seconds = time.perf_counter() - began
            yield Server(self.name, directory, port, program, self.trust, seconds)
        finally:
            program.stop()


def _wait_for_answer(program: Program, port: int, trust: ssl.SSLContext | None) -> None:
    """Wait for the first answer to a request of `/v2/`, looking every millisecond."""
    end = time.monotonic() + _PATIENCE
    while not _answers(port, trust):
        assert program.process is not None
        if program.process.poll() is not None or time.monotonic() > end:
            text = program.output.read_text(errors="replace")
            raise BenchmarkError(f"{program.command[0]} does not answer:\n{text[-2000:]}")
        time.sleep(0.001)


def _connect(address: tuple[str, int], trust: ssl.SSLContext | None) -> socket.socket:
    sock = socket.create_connection(address)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return trust.wrap_socket(sock, server_hostname=address[0]) if trust else sock


def _answers(port: int, trust: ssl.SSLContext | None) -> bool:
    try:
        with _connect(("127.0.0.1", port), trust) as sock:
            sock.settimeout(_PATIENCE)
            sock.sendall(b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return sock.recv(16).startswith(b"HTTP/1.1")
    except ConnectionError:
        return False


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise BenchmarkError(f"/proc/{pid}/status has no {field}")


def find_program(name: str) -> str:
    """Return the path of an installed program."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found is None:
        raise BenchmarkError(f"{name} is not installed: deploy/test-packages installs what the benchmarks need")
    return found


def versions() -> dict[str, str]:
    """Return the versions of what is measured, and of what measures."""
    commands = {
        "hythe": (sys.executable, "-m", "hythe", "--version"),
        "docker-registry": (find_program("docker-registry"), "--version"),
        "nginx": (find_program("nginx"), "-v"),
        "skopeo": (find_program("skopeo"), "--version"),
    }
    return {name: _version(command) for name, command in commands.items()}


def _version(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.strip().rpartition("version")[2].strip(": ").rpartition("/")[2]


# --- how each is started -----------------------------------------------------------------------------------


def _hythe(*arguments: str) -> Callable[[Path, int], Sequence[str]]:
    def command(directory: Path, port: int) -> Sequence[str]:
        fixed = ["--data", str(directory / "data"), "--listen", f"127.0.0.1:{port}"]
        return [sys.executable, "-m", "hythe", "serve", *fixed, *arguments]

    return command


def _docker_registry(directory: Path, port: int) -> Sequence[str]:
    """As Debian configures it, without its accounts."""
    config = directory / "config.yml"
    config.write_text(
        f"""\
version: 0.1
log:
  fields:
    service: registry
storage:
  cache:
    blobdescriptor: inmemory
  filesystem:
    rootdirectory: {directory / "data"}
  delete:
    enabled: true
http:
  addr: 127.0.0.1:{port}
  headers:
    X-Content-Type-Options: [nosniff]
health:
  storagedriver:
    enabled: true
    interval: 10s
    threshold: 3
"""
    )
    return [find_program("docker-registry"), "serve", str(config)]


def nginx_command(directory: Path, port: int, listen: str = "") -> Sequence[str]:
    """As Debian configures it, with the files below `data`, where `place` puts them.

    `listen` says more of how it listens, such as over TLS.
    """
    place(directory, "/v2/index.html", b"{}")
    config = directory / "nginx.conf"
    config.write_text(
        f"""\
user {pwd.getpwuid(os.getuid()).pw_name};
daemon off;
worker_processes auto;
pid {directory / "nginx.pid"};
error_log stderr;
events {{
    worker_connections 768;
}}
http {{
    sendfile on;
    tcp_nopush on;
    access_log {directory / "access.log"};
    client_body_temp_path {directory / "bodies"};
    server {{
        listen 127.0.0.1:{port}{listen};
        root {directory / "data"};
    }}
}}
"""
    )
    return [find_program("nginx"), "-p", str(directory), "-e", "stderr", "-c", str(config)]


def place(directory: Path, path: str, content: bytes | Path) -> None:
    """Put a file where nginx, with its data in `directory`, serves it as `path`."""
    target = directory / "data" / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        target.hardlink_to(content)
    else:
        target.write_bytes(content)


DOCKER_REGISTRY: Final = Kind("docker-registry", _docker_registry)
HYTHE: Final = Kind("hythe", _hythe())
HYTHE_2: Final = Kind("hythe, 2 workers", _hythe("--workers", "2"))
NGINX: Final = Kind("nginx", nginx_command, takes_pushes=False)
