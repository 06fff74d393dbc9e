"""nginx.conf and Caddyfile as they are, but for names: before two replicas that share PostgreSQL and an S3 store."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import secrets
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.plain import PlainClient, with_query
from tests.conftest import Bucket, needs
from tests.content import digest_of
from tests.deploy.files import DEPLOY, substitute
from tests.services.containers import ContainerTools
from tests.services.images import Layout, packed_image, random_layer, write_layout
from tests.services.postgres import Postgres, needs_postgres
from tests.services.processes import HytheServer, Program, free_port, run, wait_until
from tests.services.s3 import needs_juicefs

pytestmark = [needs("openssl"), needs_postgres, needs_juicefs]

HALF = secrets.token_bytes(8 << 20)


@dataclass(frozen=True)
class Site:
    """A proxy before two replicas, and what a client must know."""

    url: str
    #: Where the proxy listens without TLS, if it does.
    plain_url: str
    trust: ssl.SSLContext
    certificate: Path
    password: str
    replicas: tuple[HytheServer, HytheServer]

    @property
    def authorization(self) -> str:
        return f"Basic {base64.b64encode(f'alice:{self.password}'.encode()).decode()}"

    def client(self) -> PlainClient:
        return PlainClient(self.url, self.trust)


@pytest.fixture(scope="module")
def replicas(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres, juicefs_bucket: Bucket
) -> Iterator[tuple[HytheServer, HytheServer]]:
    """Two servers with the settings of replicas.toml, but for where things are."""
    url = postgres_server.create()
    store = {f"HYTHE_STORAGE__S3__{key.upper()}": value for key, value in juicefs_bucket.settings().items()}
    with contextlib.ExitStack() as ending:
        made = []
        for number in (1, 2):
            port = free_port()
            directory = tmp_path_factory.mktemp(f"replica{number}")
            here = {"HYTHE_DATABASE__URL": url, "HYTHE_SERVER__LISTEN": f"127.0.0.1:{port}", "TMPDIR": str(directory)}
            command = [sys.executable, "-m", "hythe", "serve", "--config", str(DEPLOY / "replicas.toml")]
            made.append(HytheServer(command, directory / "log", {**here, **store}, port=port))
            ending.callback(made[-1].stop)
            made[-1].start()
        yield made[0], made[1]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=needs(name)) for name in ("nginx", "caddy")])
def site(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    replicas: tuple[HytheServer, HytheServer],
) -> Iterator[Site]:
    """One proxy after the other."""
    directory = tmp_path_factory.mktemp(request.param)
    said = run(str(DEPLOY / "compose-secrets"), "localhost", "alice", str(directory))
    password = said.split()[-1]
    certificate = directory / "secrets" / "tls.crt"
    port, plain_port = free_port(), free_port()
    prepare = {"nginx": prepare_nginx, "caddy": prepare_caddy}[request.param]
    proxy = prepare(directory, port, plain_port, password, replicas)
    plain = f"http://localhost:{plain_port}" if request.param == "nginx" else ""
    trust = ssl.create_default_context(cafile=str(certificate))
    try:
        proxy.start()
        made = Site(f"https://localhost:{port}", plain, trust, certificate, password, replicas)
        wait_until(lambda: is_ready(proxy, made), f"{request.param}; it says {proxy.output}")
        yield made
    finally:
        proxy.stop()


def is_ready(proxy: Program, site: Site) -> bool:
    assert proxy.process is not None
    assert proxy.process.poll() is None, proxy.output.read_text()
    try:
        with site.client() as client:
            return client.ask("GET", f"{site.url}/readyz").status == 200
    except OSError:
        return False


def prepare_nginx(
    directory: Path, port: int, plain_port: int, password: str, replicas: tuple[HytheServer, HytheServer]
) -> Program:
    places = {
        "hythe-1:5000": replicas[0].address,
        "hythe-2:5000": replicas[1].address,
        "    listen [::]:80;\n": "",
        "    listen [::]:443 ssl;\n": "",
        "listen 80;": f"listen 127.0.0.1:{plain_port};",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "/etc/nginx/hythe/": f"{directory}/secrets/",
        "registry.example.org": "localhost",
    }
    (directory / "hythe.conf").write_text(substitute(DEPLOY / "nginx.conf", places))
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"""
        {"user root;" if os.geteuid() == 0 else ""}
        daemon off;
        pid {directory}/pid;
        error_log stderr;
        events {{}}
        http {{ access_log off; {temporary} include {directory}/hythe.conf; }}
    """
    (directory / "nginx.conf").write_text(main)
    command = ["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", "stderr"]
    said = run(*command, "-t")
    assert "test is successful" in said
    assert "[warn]" not in said
    return Program(command, directory / "log")


def prepare_caddy(
    directory: Path, port: int, plain_port: int, password: str, replicas: tuple[HytheServer, HytheServer]
) -> Program:
    places = {
        "hythe-1:5000": replicas[0].address,
        "hythe-2:5000": replicas[1].address,
        "/etc/caddy/users": str(directory / "users"),
        "registry.example.org {": f"https://localhost:{port} {{\n\tbind 127.0.0.1\n"
        f"\ttls {directory}/secrets/tls.crt {directory}/secrets/tls.key\n",
    }
    text = substitute(DEPLOY / "Caddyfile", places)
    # It manages itself over a port of its own, and redirects from port 80, which are not ours here.
    (directory / "Caddyfile").write_text(f"{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{text}")
    hashed = run("caddy", "hash-password", "--plaintext", password).strip()
    (directory / "users").write_text(f"alice {hashed}\n")
    home = {"HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    command = ["caddy", "--config", str(directory / "Caddyfile"), "--adapter", "caddyfile"]
    said = run(command[0], "validate", *command[1:], timeout=60, **home)
    assert "Valid configuration" in said
    return Program([command[0], "run", *command[1:]], directory / "log", home)


def served(replica: HytheServer) -> int:
    """Return how many requests to the protocol a replica has answered."""
    with PlainClient(replica.url) as client:
        text = client.ask("GET", f"{replica.url}/metrics").body.decode()
    counts = re.findall(r"^hythe_requests_total\{[^}]*\} ([\d.e+]+)$", text, re.MULTILINE)
    return int(sum(float(count) for count in counts))


def push(site: Site, content: list[bytes], repository: str = "org/team/app") -> str:
    """Push a blob, each part in a request of unknown length; return its digest."""
    digest = digest_of(b"".join(content))
    with site.client() as client:
        where = f"{site.url}/v2/{repository}/blobs/uploads/"
        begun = client.ask("POST", where, Authorization=site.authorization)
        assert begun.status == 202
        assert begun.location.startswith(site.url)
        for part in content:
            pieces = (part[start : start + (1 << 16)] for start in range(0, len(part), 1 << 16))
            begun = client.ask("PATCH", begun.location, pieces, Authorization=site.authorization)
            assert begun.status == 202, begun.body
        closing = with_query(begun.location, f"digest={digest}")
        closed = client.ask("PUT", closing, Authorization=site.authorization)
        assert closed.status == 201, closed.body
    return digest


def pull(site: Site, digest: str, repository: str = "org/team/app") -> bytes:
    with site.client() as client:
        url = f"{site.url}/v2/{repository}/blobs/{digest}"
        return client.ask("GET", url, Authorization=site.authorization).body


def test_a_large_layer_goes_in_in_chunks_over_both_replicas_and_comes_out(site: Site) -> None:
    before = [served(replica) for replica in site.replicas]
    digest = push(site, [HALF, HALF[::-1]])
    assert pull(site, digest) == HALF + HALF[::-1]
    assert pull(site, digest) == HALF + HALF[::-1]
    after = [served(replica) for replica in site.replicas]
    # Begun, two parts, closed, pulled twice.
    assert min(now - then for now, then in zip(after, before, strict=True)) >= 2


def test_who_does_not_say_who_it_is_is_asked(site: Site) -> None:
    with site.client() as client:
        refused = client.ask("GET", f"{site.url}/v2/")
        assert (refused.status, refused.headers["WWW-Authenticate"].split()[0]) == (401, "Basic")
        wrong = f"Basic {base64.b64encode(b'alice:wrong').decode()}"
        assert client.ask("GET", f"{site.url}/v2/", Authorization=wrong).status == 401
        assert client.ask("GET", f"{site.url}/v2/", Authorization=site.authorization).status == 200
        assert client.ask("GET", f"{site.url}/readyz").status == 200
        assert client.ask("GET", f"{site.url}/metrics", Authorization=site.authorization).status == 404


def test_without_tls_nobody_is_served(site: Site) -> None:
    if not site.plain_url:
        pytest.skip("Caddy redirects by itself, from port 80")
    with PlainClient(site.plain_url) as client:
        sent = client.ask("GET", f"{site.plain_url}/v2/x")
        assert (sent.status, sent.location) == (308, "https://localhost/v2/x")


@needs("skopeo")
def test_skopeo_pushes_and_pulls_with_a_password(site: Site, tmp_path: Path) -> None:
    tools = ContainerTools(tmp_path / "home")
    tools.set_up()
    (trusted := tmp_path / "certs").mkdir()
    (trusted / "ca.crt").write_bytes(site.certificate.read_bytes())
    layout = write_layout(tmp_path / "in", packed_image([random_layer(), random_layer(3_000_000)]))
    name = f"docker://{site.url.removeprefix('https://')}/org/team/app:1"
    known = [f"alice:{site.password}"]
    tools.skopeo("copy", "--dest-cert-dir", str(trusted), "--dest-creds", *known, layout.reference, name)
    out = f"oci:{tmp_path / 'out'}:latest"
    tools.skopeo("copy", "--src-cert-dir", str(trusted), "--src-creds", *known, "--preserve-digests", name, out)
    assert Layout(tmp_path / "out", layout.digest).blobs == layout.blobs


def test_while_one_replica_is_away_the_other_serves(site: Site) -> None:
    digest = push(site, [HALF])
    away = site.replicas[0]
    assert away.stop() == 0
    try:
        for _ in range(4):
            assert pull(site, digest) == HALF
        again = push(site, [HALF[:100_000]])
        assert pull(site, again) == HALF[:100_000]
    finally:
        away.start()
    before = served(away)
    wait_until(lambda: pull(site, digest) == HALF and served(away) > before, "the replica's return")
