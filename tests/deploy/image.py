"""Hythe's image, built and run: by buildah and podman, without a network of theirs, and nothing left over."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.base import write_base, write_pip_configuration
from tests.deploy.files import DEPLOY, ROOT
from tests.services.containers import ContainerTools
from tests.services.isolation import isolated
from tests.services.processes import Program, free_port, run, wait_until

NAME = "localhost/hythe"
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass
class Container(Program):
    """A container of the image, run by podman in the foreground."""

    tools: ContainerTools | None = None
    port: int = 0

    @property
    def url(self) -> str:
        """Where it listens, if it has this machine's network."""
        return f"http://127.0.0.1:{self.port}"

    def execute(self, *command: str) -> str:
        """Run a command in it."""
        assert self.tools is not None
        # podman keeps what it must know of a container where only those see it who share its mounts.
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--"]
        command = (*inside, *self.tools.podman_command("exec", "hythe", *command))
        return run(*command, timeout=60, **self.tools.environment)


@dataclass(frozen=True)
class Image:
    """The image in the storage of these tools, as a whole machine would have it."""

    tools: ContainerTools

    @property
    def configuration(self) -> dict[str, Any]:
        """What it says of itself."""
        described: list[dict[str, Any]] = json.loads(self.tools.podman("image", "inspect", NAME))
        found: dict[str, Any] = described[0]
        return {**found["Config"], "Healthcheck": found["Healthcheck"]}

    @contextlib.contextmanager
    def container(
        self,
        *arguments: str,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        network: str = "host",
    ) -> Iterator[Container]:
        """Have a container to start, with a port of its own on this machine's loopback; it is gone after the block."""
        port = free_port()
        listen = {"HYTHE_SERVER__LISTEN": f"127.0.0.1:{port}"}
        with self._cgroup() as parent:
            variables = [f"--env={name}={value}" for name, value in {**listen, **(environment or {})}.items()]
            # podman has systemd run health checks; here they are run by hand.
            command = ["run", "--rm", "--name=hythe", "--no-healthcheck", "--log-driver=none"]
            command += [f"--network={network}", "--no-hosts"]
            command += [f"--cgroup-parent={parent}", *variables, *options, NAME, *arguments]
            output = self.tools.home / f"{secrets.token_hex(4)}.log"
            made = Container(
                isolated(*self.tools.podman_command(*command)),
                output,
                self.tools.environment,
                tools=self.tools,
                port=port,
            )
            try:
                yield made
            finally:
                made.stop()
                wait_until(lambda: not _processes_of(self.tools.home), "the end of podman's monitor")

    def run(self, *arguments: str, options: Sequence[str] = ()) -> tuple[int, str]:
        """Run it to its end, with a network that is empty; return the exit code and what it said."""
        with self.container(*arguments, options=options, network="none") as container:
            container.start()
            assert container.process is not None
            return container.process.wait(60), container.output.read_text()

    @contextlib.contextmanager
    def _cgroup(self) -> Iterator[str]:
        """Give podman a cgroup to make others in, and remove them all."""
        name = f"hythe-{secrets.token_hex(6)}"
        try:
            yield f"/{name}"
        finally:
            _remove_cgroups(name)


def build(directory: Path) -> Image:
    """Build the image in `directory`, from a base that is made of this machine's packages."""
    overlay = "overlay" in Path("/proc/filesystems").read_text()
    tools = ContainerTools(directory, "overlay" if overlay else "vfs")
    tools.set_up()
    write_base(directory / "base.tar")
    write_pip_configuration(directory / "pip.conf")
    base = tools.buildah("from", "scratch")
    tools.buildah("add", "--quiet", base, str(directory / "base.tar"), "/")
    tools.buildah("config", "--env", "PATH=/usr/bin:/bin", base)
    tools.buildah("commit", "--quiet", "--rm", base, "localhost/base")
    (directory / "base.tar").unlink()
    options = ["--quiet", "--format=docker", "--pull-never", "--build-arg=BASE=localhost/base"]
    options += [f"--secret=id=pip,src={directory / 'pip.conf'}", f"--tag={NAME}"]
    tools.buildah("build", *options, f"--file={DEPLOY / 'Containerfile'}", str(ROOT))
    return Image(tools)


def _remove_cgroups(name: str) -> None:
    for parent in [*_CGROUPS.glob(name), *_CGROUPS.glob(f"*/{name}")]:
        for directory, _, _ in os.walk(parent, topdown=False):
            Path(directory).rmdir()


def _processes_of(directory: Path) -> list[Path]:
    """Return who was started with this directory on its command line: conmon is nobody's child."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{directory}/".encode() in (process / "cmdline").read_bytes():
                found.append(process)
    return found
