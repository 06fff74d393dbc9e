"""A dockerd of the tests' own: no network, no firewall rules, nothing of it outside its directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.services.images import docker_archive, system_tar, tar_of
from tests.services.isolation import isolated
from tests.services.processes import Program, run, wait_until

#: Debian's, where there is another one too: it is the one that came with the daemon.
CLIENT = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
#: Where dockerd looks for those whom it trusts.
_SYSTEM = Path("/etc/docker")
_NO_NETWORK = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")


@dataclass
class DockerDaemon(Program):
    """A dockerd and its containerd."""

    directory: Path = Path()

    @property
    def socket(self) -> str:
        """Where it listens."""
        return f"unix://{self.directory / 'socket'}"

    @property
    def environment_of_clients(self) -> dict[str, str]:
        """What makes a docker client talk to it, with a configuration of its own."""
        return {"DOCKER_HOST": self.socket, "DOCKER_CONFIG": str(self.directory / "client"), "DOCKER_CONTEXT": ""}

    def start(self) -> None:
        """Start it and wait until it answers."""
        super().start()
        wait_until(self._is_up, f"dockerd; it says {self.output}", 60)

    def _is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.output.read_text(errors="replace")
        if not (self.directory / "socket").exists():
            return False
        with contextlib.suppress(AssertionError):
            return bool(self("version"))
        return False

    def __call__(self, *arguments: str) -> str:
        """Run a docker command; return what it printed, fail with it if it failed."""
        return run(CLIENT, *arguments, timeout=120, **self.environment_of_clients).strip()

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a docker command, to end it early; the caller waits for it."""
        return subprocess.Popen(
            [CLIENT, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **self.environment_of_clients},
        )

    def inspect(self, image: str) -> dict[str, Any]:
        """Return what it knows about an image."""
        described: dict[str, Any] = json.loads(self("image", "inspect", image))[0]
        return described

    def make_image(self, name: str, architecture: str = "amd64", size: int = 1000, layers: int = 1) -> str:
        """Make an image of busybox with `size` random bytes in its first layer, tag it, return its id."""
        tars = [system_tar(size), *(tar_of(**{f"file{number}": name.encode()}) for number in range(1, layers))]
        archive = self.directory / "image.tar"
        archive.write_bytes(docker_archive(name, tars, architecture))
        try:
            self("load", "--input", str(archive))
        finally:
            archive.unlink()
        return str(self.inspect(name)["Id"])

    def forget(self, *images: str) -> None:
        """Remove images, so that a pull has to bring them."""
        self("image", "rm", "--force", *images)

    def trust(self, address: str, certificate: Path) -> None:
        """Let it believe a registry whose certificate was signed by the owner of this one."""
        place = self._trusted / address
        place.mkdir(parents=True)
        shutil.copy(certificate, place / "ca.crt")

    def clear(self) -> None:
        """Leave nothing over of a test: no image, nobody who is trusted, and a client who is not logged in."""
        images = set(self("image", "ls", "--all", "--quiet", "--no-trunc").split())
        if images:
            self.forget(*images)
        shutil.rmtree(self._trusted, ignore_errors=True)
        shutil.rmtree(self.directory / "client")
        (self.directory / "client").mkdir()

    @property
    def _trusted(self) -> Path:
        return self.directory / "etc" / "certs.d"


@contextlib.contextmanager
def docker_daemon(directory: Path) -> Iterator[DockerDaemon]:
    """Run a dockerd with all that is its own in `directory`, while the block lasts."""
    directory.mkdir(parents=True)
    (directory / "client").mkdir()
    (directory / "etc").mkdir()
    configuration = directory / "daemon.json"
    configuration.write_text(json.dumps({"deprecated-key-path": str(directory / "key.json")}))
    command = ["dockerd", "--config-file", str(configuration), "--host", f"unix://{directory / 'socket'}"]
    command += ["--data-root", str(directory / "root"), "--exec-root", str(directory / "exec")]
    command += ["--pidfile", str(directory / "pid"), "--storage-driver", "vfs", *_NO_NETWORK]
    # Whatever proxy the machine has is not for loopback.
    direct = {"HTTP_PROXY": "", "HTTPS_PROXY": "", "http_proxy": "", "https_proxy": ""}
    replaced = {str(_SYSTEM): directory / "etc"} if _SYSTEM.is_dir() else {}
    daemon = DockerDaemon(isolated(*command, replaced=replaced), directory / "log", direct, directory=directory)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()
        wait_until(lambda: not _processes_of(directory), "the end of containerd")
        shutil.rmtree(directory)


def _processes_of(directory: Path) -> list[int]:
    """Return who else was started with this directory on its command line: dockerd's containerd is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{directory}/exec".encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found
