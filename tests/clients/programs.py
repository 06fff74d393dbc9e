"""Real clients as one: each logs in, pushes an image of its own making, and pulls, by `REPOSITORY:TAG`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import requests
from docker import DockerClient
from docker.errors import DockerException
from oras.client import OrasClient

from tests.clients.team import Team
from tests.content import digest_of
from tests.services.containers import ContainerTools
from tests.services.docker import DockerDaemon
from tests.services.images import packed_image, random_layer, write_layout

#: What clients raise when they are refused something, each its own way.
REFUSED: Final = (AssertionError, DockerException, ValueError, requests.RequestException)


class Client(Protocol):
    """A client, who holds nothing of what it pushed or pulled before."""

    def log_in(self, name: str, password: str) -> None:
        """Log in, or raise one of `REFUSED`, as all here do."""

    def push(self, name: str) -> str:
        """Make an image, push it, return the digest that it has by what the client says."""

    def pull(self, name: str) -> str:
        """Pull; return the digest of what came."""


@dataclass(frozen=True)
class DockerCommand:
    """docker's command."""

    docker: DockerDaemon
    team: Team

    def log_in(self, name: str, password: str) -> None:
        self.docker("login", "--username", name, "--password", password, self.team.address)

    def push(self, name: str) -> str:
        reference = f"{self.team.address}/{name}"
        image = self.docker.make_image(reference)
        said = self.docker("push", reference)
        self.docker.forget(image)
        return said_digest(said)

    def pull(self, name: str) -> str:
        return said_digest(self.docker("pull", f"{self.team.address}/{name}"))


@dataclass(frozen=True)
class DockerLibrary:
    """docker's library for Python, whose work dockerd does too."""

    docker: DockerDaemon
    client: DockerClient
    team: Team

    def log_in(self, name: str, password: str) -> None:
        self.client.login(name, password, registry=self.team.address)

    def push(self, name: str) -> str:
        repository, _, tag = f"{self.team.address}/{name}".rpartition(":")
        image = self.docker.make_image(f"{repository}:{tag}")
        said = list(self.client.images.push(repository, tag, stream=True, decode=True))
        self.docker.forget(image)
        assert not [line for line in said if "error" in line], said
        (digest,) = [line["aux"]["Digest"] for line in said if "aux" in line]
        return str(digest)

    def pull(self, name: str) -> str:
        repository, _, tag = f"{self.team.address}/{name}".rpartition(":")
        (digest,) = self.client.images.pull(repository, tag).attrs["RepoDigests"]
        return str(digest).partition("@")[2]


@dataclass(frozen=True)
class ContainerTool:
    """podman or buildah, which have the same commands for this."""

    name: str
    tools: ContainerTools
    team: Team
    trust: list[str]

    def log_in(self, name: str, password: str) -> None:
        self._run("login", *self.trust, "--username", name, "--password", password, self.team.address)

    def push(self, name: str) -> str:
        layout = write_layout(self.tools.home / "layout", packed_image([random_layer()]))
        image = self._run("pull", "--quiet", layout.reference)
        told = self.tools.home / "digest"
        self._run("push", "--quiet", *self.trust, "--digestfile", str(told), image, self._reference(name))
        self._run("rmi", "--force", image)
        return told.read_text()

    def pull(self, name: str) -> str:
        image = self._run("pull", "--quiet", *self.trust, self._reference(name))
        template = {"podman": "{{.Digest}}", "buildah": "{{.FromImageDigest}}"}[self.name]
        return self._run("inspect", "--type", "image", "--format", template, image)

    def _reference(self, name: str) -> str:
        return f"docker://{self.team.address}/{name}"

    def _run(self, *arguments: str) -> str:
        command = {"podman": self.tools.podman, "buildah": self.tools.buildah}[self.name]
        return command(*arguments)


@dataclass(frozen=True)
class Skopeo:
    """skopeo."""

    tools: ContainerTools
    team: Team
    trust: list[str]

    def log_in(self, name: str, password: str) -> None:
        self.tools.skopeo("login", *self.trust, "--username", name, "--password", password, self.team.address)

    def push(self, name: str) -> str:
        layout = write_layout(self.tools.home / "layout", packed_image([random_layer()]))
        told = self.tools.home / "digest"
        trust = [option.replace("--", "--dest-") for option in self.trust]
        self.tools.skopeo("copy", *trust, "--digestfile", str(told), layout.reference, self._reference(name))
        return told.read_text()

    def pull(self, name: str) -> str:
        out = self.tools.home / "out"
        trust = [option.replace("--", "--src-") for option in self.trust]
        self.tools.skopeo("copy", *trust, "--preserve-digests", self._reference(name), f"oci:{out}:latest")
        (entry,) = json.loads((out / "index.json").read_text())["manifests"]
        return str(entry["digest"])

    def _reference(self, name: str) -> str:
        return f"docker://{self.team.address}/{name}"


class Oras:
    """oras, as a library. It says who it is with every request: the tokens that it can use are for pulling alone.

    It keeps the first one that it gets, and that is for a question whether a layer is there already.
    """

    def __init__(self, scratch: Path, team: Team, trust: bool | str) -> None:
        """Believe `trust`: a file of authorities, or those of the system."""
        self._scratch = scratch
        self._team = team
        self._options = {"hostname": team.address, "insecure": team.authority is None, "tls_verify": trust}
        self._oras = OrasClient(**self._options)

    def log_in(self, name: str, password: str) -> None:
        self._oras = OrasClient(**self._options, auth_backend="basic")
        self._oras.login(name, password, hostname=self._team.address, config_path=str(self._scratch / "config.json"))
        # It only writes that down: whether it is good is seen when it is used.
        self._manifest("work/none:1")

    def push(self, name: str) -> str:
        (self._scratch / "artifact").write_bytes(random_layer())
        files = [str(self._scratch / "artifact")]
        target = f"{self._team.address}/{name}"
        answer = self._oras.push(target=target, files=files, disable_path_validation=True, quiet=True)
        return str(answer.headers["Docker-Content-Digest"])

    def pull(self, name: str) -> str:
        assert self._oras.pull(target=f"{self._team.address}/{name}", outdir=str(self._scratch / "out"))
        return digest_of(self._manifest(name).content)

    def _manifest(self, name: str) -> requests.Response:
        repository, _, tag = name.rpartition(":")
        answer: requests.Response = self._oras.do_request(f"{self._team.url}/v2/{repository}/manifests/{tag}")
        assert answer.status_code != 401, answer.text
        return answer


def said_digest(text: str) -> str:
    """Return the one digest that docker says."""
    (digest,) = re.findall(r"[Dd]igest: (sha256:[0-9a-f]{64})", text)
    return str(digest)
