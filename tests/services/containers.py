"""skopeo, buildah and podman with storage, policy and configuration of the tests' own."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.services.isolation import isolated
from tests.services.processes import run

_RUNTIME = """
[containers]
default_ulimits = []
[network]
network_config_dir = "{networks}"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
"""


@dataclass(frozen=True)
class ContainerTools:
    """The three of them, with one home."""

    home: Path
    #: What keeps images: "vfs" copies all of one for each container, "overlay" needs a kernel that has it.
    driver: str = "vfs"

    def set_up(self) -> None:
        """Write their configuration."""
        configuration = self.home / ".config" / "containers"
        configuration.mkdir(parents=True)
        (configuration / "policy.json").write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        (configuration / "registries.conf").write_text("unqualified-search-registries = []\n")
        (configuration / "containers.conf").write_text(_RUNTIME.format(networks=self.home / "networks"))
        (configuration / "auth.json").write_text("{}")
        places = f'graphroot = "{self.home / "graph"}"\nrunroot = "{self.home / "run"}"\n'
        storage = f'[storage]\ndriver = "{self.driver}"\n{places}'
        (configuration / "storage.conf").write_text(storage)

    @property
    def environment(self) -> dict[str, str]:
        """What keeps them from the machine's configuration."""
        configuration = self.home / ".config" / "containers"
        return {
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "TMPDIR": str(self.home),
            "REGISTRY_AUTH_FILE": str(configuration / "auth.json"),
            "CONTAINERS_CONF": str(configuration / "containers.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(configuration / "registries.conf"),
            "CONTAINERS_STORAGE_CONF": str(configuration / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }

    def skopeo(self, *arguments: str) -> str:
        """Run skopeo; return what it printed, fail with it if it failed."""
        return run(*isolated("skopeo", *arguments), timeout=120, **self.environment).strip()

    def begin_skopeo(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start skopeo, for several at once or to end it early; the caller waits for it."""
        return subprocess.Popen(
            isolated("skopeo", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment},
        )

    def buildah(self, *arguments: str) -> str:
        """Run buildah."""
        return run(*isolated("buildah", *self._storage(), *arguments), timeout=120, **self.environment).strip()

    def podman(self, *arguments: str) -> str:
        """Run podman."""
        return run(*isolated(*self.podman_command(*arguments)), timeout=120, **self.environment).strip()

    def podman_command(self, *arguments: str) -> list[str]:
        """Return what runs podman; the environment and the isolation are the caller's to add."""
        return ["podman", *self._storage(), "--tmpdir", str(self.home / "podman"), *arguments]

    def _storage(self) -> list[str]:
        return [
            "--root",
            str(self.home / "graph"),
            "--runroot",
            str(self.home / "run"),
            "--storage-driver",
            self.driver,
        ]
