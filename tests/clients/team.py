"""A registry with accounts, set up by commands alone, and images in it."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.clients.plain import Answer, PlainClient
from tests.content import Image, digest_of
from tests.services.certificates import Authority
from tests.services.processes import Host, Program, free_port, is_open, wait_until

#: Everybody's.
PASSWORD = "correct horse"


@dataclass(frozen=True)
class Team:
    """Alice may do everything; bob and carol, the team, may push below `work`; everybody may pull below `public`."""

    directory: Path
    host: str
    port: int
    #: Who signed the server's certificate; None where it speaks plain HTTP.
    authority: Authority | None

    @property
    def address(self) -> str:
        """`HOST:PORT`, as it stands before an image's name."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Its address as a URL."""
        return f"{'https' if self.authority else 'http'}://{self.address}"

    @property
    def log(self) -> Path:
        """What the server said."""
        return self.directory / "hythe.log"

    def hythe(self, *arguments: str, standard_input: str = "") -> str:
        """Run a command on its data; return what it printed."""
        command = [sys.executable, "-m", "hythe", *arguments, "--data", str(self.directory / "data")]
        done = subprocess.run(command, check=False, capture_output=True, text=True, input=standard_input, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def trust(self) -> ssl.SSLContext | None:
        """Return what it takes to believe the server."""
        return ssl.create_default_context(cafile=str(self.authority.certificate)) if self.authority else None

    def add_user(self, name: str, *options: str) -> None:
        """Make an account."""
        self.hythe("user", "add", *options, name, "--password-stdin", standard_input=PASSWORD)

    def push(self, name: str, image: Image) -> None:
        """Push an image as alice, under the tag 1."""
        by = basic("alice")
        root = f"{self.url}/v2/{name}"
        with PlainClient(self.url, self.trust()) as client:
            for blob in image.blobs:
                assert client.ask("POST", f"{root}/blobs/uploads/?digest={digest_of(blob)}", blob, **by).status == 201
            manifest = client.ask("PUT", f"{root}/manifests/1", image.manifest, Content_Type=image.media_type, **by)
            assert manifest.status == 201, manifest

    def token(self, name: str, scope: str) -> dict[str, str]:
        """Return the header of a token for requests, as an account gets it."""
        url = f"{self.url}/v2/token?{urlencode({'scope': scope})}"
        with PlainClient(url, self.trust()) as client:
            return {"Authorization": f"Bearer {client.ask('GET', url, None, **basic(name)).json['token']}"}

    def post_token(self, **form: str) -> Answer:
        """Ask for a token by a form."""
        with PlainClient(self.url, self.trust()) as client:
            kind = "application/x-www-form-urlencoded"
            return client.ask("POST", f"{self.url}/v2/token", urlencode(form).encode(), Content_Type=kind)

    def requests(self) -> list[dict[str, Any]]:
        """Return the requests that the server has answered, as it logged them."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == "request"]


def basic(name: str, password: str = PASSWORD) -> dict[str, str]:
    """Return the header of who sends his password with every request."""
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}


@contextlib.contextmanager
def team_registry(
    directory: Path,
    *,
    host: Host | None = None,
    with_tls: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Team]:
    """Run a registry for a team with all its files in `directory`, while the block lasts; perhaps on another host."""
    address = host.address if host else "127.0.0.1"
    authority = Authority(directory / "authority") if with_tls else None
    team = Team(directory, address, free_port() if host is None else 5000, authority)
    directory.mkdir(parents=True, exist_ok=True)
    team.add_user("alice", "--admin")
    team.add_user("bob")
    team.add_user("carol")
    team.hythe("team", "add", "dev")
    team.hythe("team", "join", "dev", "bob", "carol")
    team.hythe("grant", "push", "work", "team:dev")
    team.hythe("grant", "pull", "public", "everybody")
    settings = dict(environment or {})
    if authority:
        authority.sign(directory, address)
        settings |= {"HYTHE_TLS__CERTIFICATE": str(directory / "tls.crt"), "HYTHE_TLS__KEY": str(directory / "tls.key")}
    command = [sys.executable, "-m", "hythe", "serve", "--listen", team.address, "--data", str(directory / "data")]
    server = Program(host.inside(command) if host else command, team.log, settings)
    server.start()
    try:
        wait_until(lambda: is_open(team.port, address), "the server")
        yield team
    finally:
        server.stop()
