"""The client, before real registries: ours, Debian's docker-registry, and the network between."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from runner.client import Registry
from runner.errors import Broken, NotAllowed, NotThere, RunnerError, Unreachable
from runner.logins import Login, Logins
from storage.digest import Digest
from storage.names import RepositoryName
from storage.oci import OCI_MANIFEST, Descriptor
from tests.clients.team import PASSWORD, Team, team_registry
from tests.content import Image, digest_of, make_image
from tests.services.certificates import Authority
from tests.services.processes import HytheServer, free_port
from tests.services.relay import Relay

NAME = RepositoryName("work/app")
PUBLIC = RepositoryName("public/app")
LARGE = bytes(range(256)) * (8 << 12)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "TLS"])
def team(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with team_registry(tmp_path_factory.mktemp("team"), with_tls=request.param) as made:
        yield made


#: Connects to a registry, and closes what is left of that in the end.
Connect = Callable[..., Registry]


@pytest.fixture
def logins(tmp_path: Path) -> Logins:
    return Logins(tmp_path / "docker")


@pytest.fixture
def connect(logins: Logins) -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def to(address: str, authority: Authority | None = None, login: Login | None = None) -> Registry:
            ca_file = str(authority.certificate) if authority else None
            registry = Registry(address, logins, ca_file=ca_file, login=login)
            stack.callback(registry.close)
            return registry

        yield to


@pytest.fixture
def bob(team: Team, connect: Connect) -> Registry:
    return connect(team.address, team.authority, Login("bob", PASSWORD))


@pytest.fixture
def nobody(team: Team, connect: Connect) -> Registry:
    return connect(team.address, team.authority)


def described(content: bytes) -> Descriptor:
    return Descriptor("application/octet-stream", digest_of(content), len(content))


def push(registry: Registry, name: RepositoryName, image: Image) -> None:
    for blob in image.blobs:
        registry.push_blob(name, Digest.of(blob), len(blob), iter([blob]))
    registry.push_manifest(name, "1", image.manifest, image.media_type)


def test_what_was_pushed_is_pulled_again(bob: Registry) -> None:
    image = make_image()
    assert not bob.has_blob(NAME, Digest.of(image.layers[0]))
    push(bob, NAME, image)
    assert bob.has_blob(NAME, Digest.of(image.layers[0]))
    for target in ("1", image.digest):
        found = bob.manifest(NAME, target)
        assert (found.content, found.media_type, str(found.digest)) == (image.manifest, OCI_MANIFEST, image.digest)
    for blob in image.blobs:
        assert b"".join(bob.blob(NAME, described(blob))) == blob


def test_a_blob_of_another_repository_is_mounted(bob: Registry) -> None:
    image = make_image()
    digest = Digest.of(image.layers[0])
    bob.push_blob(NAME, digest, len(image.layers[0]), iter([image.layers[0]]))
    other = RepositoryName("work/other")
    assert bob.mount_blob(other, digest, NAME)
    assert bob.has_blob(other, digest)
    assert not bob.mount_blob(other, Digest.of(b"nowhere"), NAME)


def test_nobody_pulls_what_is_public_and_is_told_to_log_in_for_the_rest(team: Team, nobody: Registry) -> None:
    image = make_image()
    team.push(PUBLIC, image)
    team.push(NAME, image)
    assert nobody.manifest(PUBLIC, "1").content == image.manifest
    with pytest.raises(NotAllowed, match=f"hythe login {team.address}"):
        nobody.manifest(NAME, "1")


def test_what_is_not_there_or_not_allowed_is_said(bob: Registry) -> None:
    with pytest.raises(NotThere, match="no repository secret/app"):
        bob.manifest(RepositoryName("secret/app"), "1")
    with pytest.raises(NotAllowed, match="bob may not push"):
        bob.push_manifest(PUBLIC, "1", b"{}", OCI_MANIFEST)
    with pytest.raises(RunnerError, match="schemaVersion"):
        bob.push_manifest(NAME, "1", b"{}", OCI_MANIFEST)


def test_a_login_is_a_refresh_token_afterwards_and_no_password(team: Team, logins: Logins, connect: Connect) -> None:
    login = connect(team.address, team.authority, Login("carol", PASSWORD)).log_in()
    assert (login.user, login.password) == ("carol", "")
    assert login.refresh_token
    logins.keep(team.address, login)
    image = make_image()
    push(connect(team.address, team.authority), NAME, image)
    assert PASSWORD not in logins._path.read_text()
    with pytest.raises(NotAllowed):
        connect(team.address, team.authority, Login("carol", "wrong")).log_in()


def test_a_registry_that_nobody_vouches_for_is_not_spoken_to(team: Team, connect: Connect) -> None:
    if team.authority is None:
        pytest.skip("it speaks plainly, on this host")
    with pytest.raises(Unreachable, match="certificate verify failed"):
        connect(team.address).check()


def test_where_no_registry_answers_that_is_said_at_once(connect: Connect) -> None:
    with pytest.raises(Unreachable, match="no registry answers"):
        connect(f"127.0.0.1:{free_port()}").check()


# --- what breaks --------------------------------------------------------------------------------------------


async def test_a_blob_whose_connection_is_cut_is_taken_up_where_it_broke(server: HytheServer, connect: Connect) -> None:
    direct = connect(server.address)
    await asyncio.to_thread(direct.push_blob, NAME, Digest.of(LARGE), len(LARGE), iter([LARGE]))
    async with Relay(server.port, 3_000_000) as relay:
        relay.cut()
        registry = connect(relay.address)
        pieces = await asyncio.to_thread(lambda: list(registry.blob(NAME, described(LARGE))))
    assert b"".join(pieces) == LARGE
    server.stop()
    asked = [json.loads(line) for line in server.output.read_text().splitlines() if '"request"' in line]
    # The last answer begins where the one before it ended.
    assert [entry["status"] for entry in asked if entry["path"].endswith(digest_of(LARGE))][-1] == 206


def test_a_blob_is_taken_from_where_it_was_left(server: HytheServer, connect: Connect) -> None:
    registry = connect(server.address)
    registry.push_blob(NAME, Digest.of(LARGE), len(LARGE), iter([LARGE]))
    assert b"".join(registry.blob(NAME, described(LARGE), 1_000_001)) == LARGE[1_000_001:]
    assert b"".join(registry.blob(NAME, described(LARGE), len(LARGE))) == b""


@pytest.mark.parametrize("size", [len(LARGE) - 1, len(LARGE) + 1])
def test_a_blob_of_another_size_than_was_said_is_refused(
    server: HytheServer, connect: Connect, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.client._PAUSE", 0.001)
    registry = connect(server.address)
    registry.push_blob(NAME, Digest.of(LARGE), len(LARGE), iter([LARGE]))
    wrong = msgspec.structs.replace(described(LARGE), size=size)
    with pytest.raises((Broken, Unreachable, RunnerError)):
        list(registry.blob(NAME, wrong))


def test_a_connection_that_ended_meanwhile_is_replaced(server: HytheServer, connect: Connect) -> None:
    registry = connect(server.address)
    registry.check()
    server.stop()
    server.start()
    registry.check()
