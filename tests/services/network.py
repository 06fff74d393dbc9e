"""A small network of the tests' own: each host is a network namespace, all on one bridge with ours."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.services.processes import Program, free_port, is_open, run, wait_until

#: It passes on what a socket that it was started with gets.
_PROXY = Path("/lib/systemd/systemd-socket-proxyd")


@dataclass(frozen=True)
class Host:
    """A namespace and its address. What is started by `inside` sees nothing but this network."""

    namespace: str
    address: str

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return `command` such that it runs there; its pid is the one started."""
        return ["ip", "netns", "exec", self.namespace, *command]


@dataclass
class Network:
    """A bridge. `address` is ours on it."""

    name: str
    prefix: str
    directory: Path
    hosts: list[Host] = field(default_factory=list)
    _services: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def address(self) -> str:
        """Where hosts find what is forwarded."""
        return f"{self.prefix}.1"

    def add_host(self) -> Host:
        """Make a host."""
        number = len(self.hosts)
        host = Host(f"{self.name}-{number}", f"{self.prefix}.{number + 2}")
        ours, its = f"{self.name}{number}", ("-n", host.namespace)
        run("ip", "netns", "add", host.namespace)
        self.hosts.append(host)
        run("ip", "link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        run("ip", "link", "set", ours, "master", self.name, "up")
        run("ip", *its, "address", "add", f"{host.address}/24", "dev", "eth0")
        run("ip", *its, "link", "set", "eth0", "up")
        run("ip", *its, "link", "set", "lo", "up")
        return host

    def forward(self, port: int) -> str:
        """Let hosts have a service of our loopback; return its `HOST:PORT` for them."""
        there = free_port(self.address)
        command = ["systemd-socket-activate", "--listen", f"{self.address}:{there}"]
        command += [str(_PROXY), "--connections-max=4096", f"127.0.0.1:{port}"]
        program = Program(command, self.directory / f"forward-{port}.log")
        self._services.callback(program.stop)
        program.start()
        wait_until(lambda: is_open(there, self.address), "a forwarded port")
        return f"{self.address}:{there}"

    def close(self) -> None:
        """Take all of it down."""
        self._services.close()
        for host in self.hosts:
            run("ip", "netns", "delete", host.namespace)
        run("ip", "link", "delete", self.name)


@contextlib.contextmanager
def network(directory: Path) -> Iterator[Network]:
    """Keep a network, without hosts yet, while the block lasts; its logs go to `directory`."""
    # [RFC 2544, C.2.2] addresses that no real network has.
    made = Network(f"hy{secrets.token_hex(3)}", f"198.18.{secrets.randbelow(256)}", directory)
    run("ip", "link", "add", made.name, "type", "bridge")
    try:
        run("ip", "address", "add", f"{made.address}/24", "dev", made.name)
        run("ip", "link", "set", made.name, "up")
        yield made
    finally:
        made.close()
