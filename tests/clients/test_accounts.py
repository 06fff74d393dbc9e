"""A registry with accounts over TLS, set up by commands alone, and real clients before it."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.team import PASSWORD, Team, team_registry
from tests.conftest import needs
from tests.services.certificates import Authority
from tests.services.containers import ContainerTools
from tests.services.images import Layout, packed_image, random_layer, write_layout
from tests.services.processes import wait_until

pytestmark = [needs("openssl", "skopeo"), pytest.mark.clients]


@pytest.fixture
def team(scratch: Path) -> Iterator[Team]:
    with team_registry(scratch, with_tls=True, environment={"HYTHE_SERVER__HEAD_SECONDS": "2"}) as running:
        yield running


def certificate(team: Team) -> str:
    """Return what a new connection is shown, as PEM."""
    return ssl.get_server_certificate((team.host, team.port))


def connect(team: Team) -> ssl.SSLSocket:
    trust = team.trust()
    assert trust
    return trust.wrap_socket(socket.create_connection((team.host, team.port)), server_hostname=team.host)


def test_a_team_pushes_where_it_may_and_everybody_pulls_what_is_public(
    team: Team, tools: ContainerTools, scratch: Path
) -> None:
    layout = write_layout(scratch / "in", packed_image([random_layer(), random_layer(3_000_000)]))
    assert team.authority
    trust = team.authority.for_clients

    def push(name: str, who: str) -> None:
        target = f"docker://{team.address}/{name}:1"
        options = [f"--dest-cert-dir={trust}", f"--dest-creds={who}:{PASSWORD}", "--preserve-digests"]
        tools.skopeo("copy", *options, layout.reference, target)

    push("work/app", "bob")
    push("public/app", "alice")
    with pytest.raises(AssertionError, match=r"may not push|denied"):
        push("public/app", "bob")
    out = f"oci:{scratch / 'out'}:latest"
    tools.skopeo("copy", f"--src-cert-dir={trust}", "--preserve-digests", f"docker://{team.address}/public/app:1", out)
    assert Layout(scratch / "out", layout.digest).blobs == layout.blobs
    with pytest.raises(AssertionError, match=r"unauthorized|authentication required"):
        tools.skopeo("inspect", f"--cert-dir={trust}", f"docker://{team.address}/work/app:1")

    def audited() -> bool:
        found = json.loads(team.hythe("audit", "--json", "--user", "bob"))
        return {("manifest.push", "done", "work/app"), ("push", "refused", "public/app")} <= {
            (event["action"], event["outcome"], event["repository"]) for event in found
        }

    # What was refused is written a moment later.
    wait_until(audited, "the audit")
    holders = json.loads(team.hythe("who-can", "push", "work/app", "--json"))
    assert {"name": "bob", "rule": "push on work to team:dev"} in holders


def test_a_new_certificate_is_shown_and_no_connection_is_lost(team: Team) -> None:
    before = certificate(team)
    assert team.authority
    with connect(team) as connection:
        team.authority.sign(team.directory, team.host)

        # The old connection is used all the while: a silent one would be ended, as it should be.
        def is_renewed() -> bool:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            return certificate(team) != before

        wait_until(is_renewed, "the new certificate")


def test_a_certificate_without_its_key_changes_nothing(team: Team) -> None:
    before = certificate(team)
    (team.directory / "tls.key").write_text("not a key")
    wait_until(lambda: "stays as it was" in team.log.read_text(), "the look at the files")
    assert certificate(team) == before


def test_old_versions_of_tls_are_not_spoken(team: Team) -> None:
    done = subprocess.run(
        ["openssl", "s_client", "-connect", team.address, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
    assert b"Protocol  : TLSv1.1" not in done.stdout or b"Cipher    : 0000" in done.stdout


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(team: Team) -> None:
    with connect(team) as slow, connect(team) as idle:
        idle.settimeout(20)
        slow.settimeout(0.3)
        slow.sendall(b"GET /healthz HTTP/1.1\r\n")
        ended = False
        for _ in range(40):
            try:
                slow.sendall(b"a")
                ended = slow.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
            if ended:
                break
        assert ended
        assert idle.recv(1) == b""


def test_an_address_that_others_reach_is_refused_without_accounts(scratch: Path) -> None:
    authority = Authority(scratch / "authority")
    authority.sign(scratch, "127.0.0.1")
    environment = {"HYTHE_TLS__CERTIFICATE": str(scratch / "tls.crt"), "HYTHE_TLS__KEY": str(scratch / "tls.key")}
    command = [sys.executable, "-m", "hythe", "serve", "--listen", "0.0.0.0:0", "--data", str(scratch / "data")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert "hythe user add --admin" in done.stderr
