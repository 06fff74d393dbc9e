"""Real clients before a registry with accounts, over TLS by an authority of our own and over plain HTTP on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.plain import Answer, PlainClient, with_query
from tests.clients.programs import REFUSED, Client, ContainerTool, DockerCommand, DockerLibrary, Oras, Skopeo
from tests.clients.team import PASSWORD, Team, team_registry
from tests.conftest import needs, needs_root
from tests.content import digest_of
from tests.services.containers import ContainerTools
from tests.services.docker import DockerDaemon
from tests.services.images import packed_image, random_layer, write_layout
from tests.services.network import network
from tests.services.processes import wait_until
from tests.services.relay import Relay

pytestmark = [needs("openssl", "skopeo"), pytest.mark.clients]

needs_docker = [needs("dockerd", "docker"), needs_root]
CLIENTS = {
    "docker": needs_docker,
    "docker-py": needs_docker,
    "podman": [needs("podman", "runc"), needs_root],
    "buildah": [needs("buildah"), needs_root],
    "skopeo": [],
    "oras": [],
}
IMAGE = packed_image([random_layer()])
#: The shortest there is: clients take every token to be good for so long.
TOKEN_SECONDS = 60


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hythe-access-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def plain(directory: Path) -> Iterator[Team]:
    """A registry on loopback, without encryption."""
    settings = {"HYTHE_ACCOUNTS__TOKEN_SECONDS": str(TOKEN_SECONDS), "HYTHE_UPLOADS__STALL_SECONDS": "120"}
    with team_registry(directory / "plain", environment=settings) as running:
        yield with_images(running)


@pytest.fixture(scope="module")
def tls(directory: Path) -> Iterator[Team]:
    """A registry over TLS on another host: docker believes whoever is on loopback."""
    with network(directory) as net, team_registry(directory / "tls", host=net.add_host(), with_tls=True) as running:
        yield with_images(running)


def with_images(team: Team) -> Team:
    for name in ("public/app", "secret/app"):
        team.push(name, IMAGE)
    return team


@pytest.fixture(params=["plain", pytest.param("tls", marks=[needs("ip"), needs_root])])
def team(request: pytest.FixtureRequest) -> Team:
    found: Team = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=[pytest.param(name, marks=marks) for name, marks in CLIENTS.items()])
def program(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(program: str, team: Team, request: pytest.FixtureRequest) -> Client:
    """A client who trusts the server, and is not logged in."""
    return new_client(program, team, request, trusting=True)


def new_client(program: str, team: Team, request: pytest.FixtureRequest, *, trusting: bool) -> Client:
    """Return a client who is not logged in; a trusting one knows the server's authority, where it has one."""
    authority = team.authority if trusting else None
    if program == "oras":
        scratch: Path = request.getfixturevalue("scratch")
        request.getfixturevalue("monkeypatch").setenv("HOME", str(scratch))
        return Oras(scratch, team, str(authority.certificate) if authority else True)
    if program.startswith("docker"):
        docker: DockerDaemon = request.getfixturevalue("docker")
        if authority:
            docker.trust(team.address, authority.certificate)
        if program == "docker":
            return DockerCommand(docker, team)
        return DockerLibrary(docker, request.getfixturevalue("docker_py"), team)
    tools: ContainerTools = request.getfixturevalue("tools")
    trust = [] if team.authority else ["--tls-verify=false"]
    trust += [f"--cert-dir={authority.for_clients}"] if authority else []
    return Skopeo(tools, team, trust) if program == "skopeo" else ContainerTool(program, tools, team, trust)


# --- a push that takes a minute, begun before all others ----------------------------------------------------------


@dataclass
class Upload:
    """An upload by hand, half of which was sent by a token that was good then."""

    team: Team
    token: dict[str, str]
    content: bytes
    location: str

    @classmethod
    def begin(cls, team: Team) -> Upload:
        content = random_layer()
        token = team.token("bob", "repository:work/plain:pull,push")
        with PlainClient(team.url) as client:
            begun = client.ask("POST", f"{team.url}/v2/work/plain/blobs/uploads/", None, **token)
            half = client.ask("PATCH", begun.location, content[:500], **token)
            assert half.status == 202, half
        return cls(team, token, content, half.location)

    def has_outlived_its_token(self) -> bool:
        return self.ask("GET", f"{self.team.url}/v2/").status == 401

    def finish(self) -> Answer:
        return self.ask("PUT", with_query(self.location, f"digest={digest_of(self.content)}"), self.content[500:])

    def ask(self, method: str, url: str, body: bytes | None = None) -> Answer:
        with PlainClient(url) as client:
            return client.ask(method, url, body, **self.token)


async def push_slowly(team: Team, directory: Path, given_up: threading.Event) -> Upload:
    """Hold a push of skopeo's, as carol, amid its layer until its token has ended; begin one by hand beside it."""
    tools = ContainerTools(directory / "home")
    tools.set_up()
    layout = write_layout(directory / "layout", packed_image([random_layer(3_000_000)]))
    async with Relay(team.port, hold_after=1_000_000) as relay:
        who = ["--dest-tls-verify=false", f"--dest-creds=carol:{PASSWORD}"]
        with tools.begin_skopeo("copy", *who, layout.reference, f"docker://{relay.address}/work/long:1") as push:
            try:
                await relay.holds(60)
                # Its token is younger than skopeo's.
                upload = Upload.begin(team)
                while not upload.has_outlived_its_token():
                    if await asyncio.to_thread(given_up.wait, 0.5):
                        break
                relay.go_on()
                said, _ = await asyncio.to_thread(push.communicate)
            finally:
                push.kill()
    assert push.returncode == 0, said
    return upload


@pytest.fixture(scope="module", autouse=True)
def long_push(plain: Team, directory: Path) -> Iterator[Future[Upload]]:
    """What `push_slowly` comes to; the other tests use the minute."""
    given_up = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        outcome = threads.submit(asyncio.run, push_slowly(plain, directory / "long", given_up))
        try:
            yield outcome
        finally:
            given_up.set()


# --- every client, both ways --------------------------------------------------------------------------------------


def test_an_image_comes_back_as_it_was_pushed(client: Client, program: str) -> None:
    client.log_in("bob", PASSWORD)
    pushed = client.push(f"work/{program}:1")
    assert client.pull(f"work/{program}:1") == pushed


def test_a_push_is_denied_where_only_pulling_is_allowed(client: Client) -> None:
    client.log_in("bob", PASSWORD)
    with pytest.raises(REFUSED, match=r"(?i)denied.*bob may not push to public/app"):
        client.push("public/app:2")
    assert client.pull("public/app:1") == IMAGE.digest


def test_what_may_not_be_pulled_is_as_what_is_not_there(client: Client) -> None:
    client.log_in("bob", PASSWORD)
    for name in ("secret/app", "secret/none"):
        with pytest.raises(REFUSED, match=r"name unknown: there is no repository|manifests/1: Not Found"):
            client.pull(f"{name}:1")


def test_a_wrong_password_is_refused(client: Client) -> None:
    with pytest.raises(REFUSED, match=r"the name or the password is wrong|invalid username/password"):
        client.log_in("bob", "wrong horse")


def test_without_a_login_what_is_public_is_pulled_and_nothing_else(client: Client) -> None:
    assert client.pull("public/app:1") == IMAGE.digest
    with pytest.raises(REFUSED, match=r"(?i)unauthorized"):
        client.pull("secret/app:1")


def test_without_a_login_nothing_is_pushed_and_no_client_tries_again(client: Client) -> None:
    with pytest.raises(REFUSED, match=r"(?i)unauthorized.*authentication required") as refused:
        client.push("work/app:1")
    assert "Retrying" not in str(refused.value)


@needs("ip")
@needs_root
def test_a_server_whose_authority_is_not_known_is_not_spoken_to(
    program: str, tls: Team, request: pytest.FixtureRequest
) -> None:
    client = new_client(program, tls, request, trusting=False)
    unknown = r"certificate signed by unknown authority|CERTIFICATE_VERIFY_FAILED"
    with pytest.raises(REFUSED, match=unknown):
        client.log_in("bob", PASSWORD)
    with pytest.raises(REFUSED, match=unknown):
        client.pull("public/app:1")


# --- what docker keeps --------------------------------------------------------------------------------------------

#: [docker-credential-helpers] the whole of the protocol, with a file for a store.
HELPER = f"""#!{sys.executable}
import json, pathlib, sys
file = pathlib.Path(__file__).with_name("store.json")
kept = json.loads(file.read_text())
action, sent = sys.argv[1], sys.stdin.read().strip()
if action == "store":
    entry = json.loads(sent)
    kept[entry["ServerURL"]] = entry
elif action == "erase":
    kept.pop(sent, None)
elif action == "list":
    print(json.dumps({{url: entry["Username"] for url, entry in kept.items()}}))
elif sent in kept:
    print(json.dumps(kept[sent]))
else:
    sys.exit("credentials not found in native keychain")
file.write_text(json.dumps(kept))
"""


@dataclass(frozen=True)
class CredentialStore:
    """What docker gave to its credential helper."""

    file: Path

    def entries(self) -> dict[str, dict[str, str]]:
        entries: dict[str, dict[str, str]] = json.loads(self.file.read_text())
        return entries


@pytest.fixture
def store(docker: DockerDaemon, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> CredentialStore:
    """A credential helper, which docker's clients are told to use."""
    helper = scratch / "docker-credential-test"
    helper.write_text(HELPER)
    helper.chmod(stat.S_IRWXU)
    (scratch / "store.json").write_text("{}")
    monkeypatch.setenv("PATH", f"{scratch}:{os.environ['PATH']}")
    configuration = Path(docker.environment_of_clients["DOCKER_CONFIG"]) / "config.json"
    configuration.write_text(json.dumps({"credsStore": "test"}))
    return CredentialStore(scratch / "store.json")


@needs("dockerd", "docker")
@needs_root
def test_docker_keeps_a_token_that_a_new_password_ends(
    docker: DockerDaemon, plain: Team, store: CredentialStore, request: pytest.FixtureRequest
) -> None:
    plain.add_user("dora")
    plain.hythe("grant", "push", "work/dora", "dora")
    command = DockerCommand(docker, plain)
    command.log_in("dora", PASSWORD)
    (entry,) = store.entries().values()
    assert (entry["ServerURL"], entry["Username"]) == (plain.address, "<token>")
    assert entry["Secret"].startswith("hythe_")
    configuration = Path(docker.environment_of_clients["DOCKER_CONFIG"]) / "config.json"
    assert json.loads(configuration.read_text())["auths"] == {plain.address: {}}

    library = DockerLibrary(docker, request.getfixturevalue("docker_py"), plain)
    clients: list[Client] = [command, library]
    for number, client in enumerate(clients):
        pushed = client.push(f"work/dora:{number}")
        assert client.pull(f"work/dora:{number}") == pushed

    plain.hythe("user", "password", "dora", "--password-stdin", standard_input="another horse")
    for client in clients:
        with pytest.raises(REFUSED, match=r"(?i)unauthorized"):
            client.pull("work/dora:1")
    docker("logout", plain.address)
    assert store.entries() == {}


def test_a_token_that_is_kept_stands_for_the_password_until_that_changes(plain: Team) -> None:
    plain.add_user("erin")
    plain.hythe("grant", "push", "work/erin", "erin")
    scope = "repository:work/erin:pull,push"
    asked = {"service": "hythe", "client_id": "docker", "access_type": "offline", "scope": scope}
    first = plain.post_token(grant_type="password", username="erin", password=PASSWORD, **asked).json
    second = plain.post_token(grant_type="refresh_token", refresh_token=first["refresh_token"], **asked).json
    assert second["refresh_token"] == first["refresh_token"]
    uploads = f"{plain.url}/v2/work/erin/blobs/uploads/"

    def begin(token: dict[str, Any]) -> int:
        with PlainClient(uploads) as client:
            return client.ask("POST", uploads, Authorization=f"Bearer {token['access_token']}").status

    assert [begin(first), begin(second)] == [202, 202]
    plain.hythe("user", "password", "erin", "--password-stdin", standard_input="another horse")
    assert [begin(first), begin(second)] == [401, 401]
    assert plain.post_token(grant_type="refresh_token", refresh_token=first["refresh_token"], **asked).status == 401


# --- the end of the minute ----------------------------------------------------------------------------------------


def test_an_upload_is_finished_by_the_token_that_began_it_after_its_end(long_push: Future[Upload]) -> None:
    upload = long_push.result(timeout=240)
    assert upload.has_outlived_its_token()
    assert upload.ask("POST", f"{upload.team.url}/v2/work/plain/blobs/uploads/").status == 401
    assert upload.finish().status == 201


def test_a_client_whose_token_ended_while_it_sent_a_layer_gets_another(plain: Team, long_push: Future[Upload]) -> None:
    long_push.result(timeout=240)

    def requests() -> list[dict[str, Any]]:
        return [line for line in plain.requests() if line["user"] == "carol"]

    # Lines are written a moment after the answers.
    wait_until(lambda: any("/manifests/" in line["path"] for line in requests()), "the end of the log")
    layer = [line["method"] for line in requests()].index("PATCH")
    sent, renewed, closed = requests()[layer : layer + 3]
    assert sent["bytes_in"] > 3_000_000
    assert (renewed["path"].partition("?")[0], renewed["status"]) == ("/v2/token", 200)
    assert (closed["method"], closed["status"]) == ("PUT", 201)
