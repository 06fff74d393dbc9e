"""nginx.conf and Caddyfile as they are, but for names: before two replicas that share PostgreSQL and an S3 store.

Clients come from 127.0.0.2 where it matters who asks: the proxies come from 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.clients.plain import Answer, PlainClient, with_query
from tests.clients.team import basic
from tests.conftest import Bucket, needs
from tests.content import digest_of
from tests.deploy.files import DEPLOY, ROOT, read_variables, substitute
from tests.services.containers import ContainerTools
from tests.services.images import Layout, packed_image, random_layer, write_layout
from tests.services.postgres import Postgres, needs_postgres
from tests.services.processes import HytheServer, Program, free_port, run, wait_until
from tests.services.s3 import needs_juicefs

pytestmark = [needs("openssl"), needs_postgres, needs_juicefs]

HALF = secrets.token_bytes(8 << 20)
NAME = "org/team/app"
CLIENT = "127.0.0.2"
#: What a client may say of itself, and is not believed.
FORGED = {
    "X_Forwarded_For": "203.0.113.9",
    "X_Forwarded_Host": "evil.example",
    "X_Forwarded_Proto": "http",
    "Forwarded": "for=203.0.113.9;host=evil.example;proto=http",
    "X_Real_IP": "203.0.113.9",
}


@dataclass(frozen=True)
class Replicas:
    """Two servers with one database, and alice, who administers."""

    servers: tuple[HytheServer, HytheServer]
    #: What `compose-secrets` made.
    directory: Path
    password: str
    #: Where their facts are, as commands find them.
    environment: Mapping[str, str]

    @property
    def certificate(self) -> Path:
        return self.directory / "secrets" / "tls.crt"

    def hythe(self, *arguments: str, **environment: str) -> str:
        """Run a command as whoever has the environment of a replica."""
        return run(sys.executable, "-m", "hythe", *arguments, timeout=60, **{**self.environment, **environment})

    def audit(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.hythe("audit", "--json"))
        return found


@dataclass(frozen=True)
class Site:
    """A proxy before two replicas, and what a client must know."""

    url: str
    #: Where the proxy listens without TLS, if it does.
    plain_url: str
    trust: ssl.SSLContext
    replicas: Replicas

    @property
    def address(self) -> str:
        return self.url.removeprefix("https://")

    def client(self, source: str = "") -> PlainClient:
        return PlainClient(self.url, self.trust, source)

    def log_in(self, password: str = "", **parameters: str) -> Answer:
        """Ask for a token as docker does, by alice's password."""
        query = urlencode({"account": "alice", "service": "hythe", **parameters})
        with self.client() as client:
            by = basic("alice", password or self.replicas.password)
            return client.ask("GET", f"{self.url}/v2/token?{query}", **by)

    def token(self, actions: str = "pull,push") -> dict[str, str]:
        """Return the header of a token for requests."""
        return bearer(self.log_in(scope=f"repository:{NAME}:{actions}"))


def bearer(answer: Answer) -> dict[str, str]:
    """Return the header of the token that was given."""
    assert answer.status == 200, answer.body
    return {"Authorization": f"Bearer {answer.json['token']}"}


@pytest.fixture(scope="module")
def replicas(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres, juicefs_bucket: Bucket
) -> Iterator[Replicas]:
    """Two servers with the settings of replicas.toml, but for where things are, started at once and anew."""
    secret = tmp_path_factory.mktemp("secrets")
    run(str(DEPLOY / "compose-secrets"), "localhost", "alice", str(secret))
    made = read_variables(secret / ".env")
    facts = {"HYTHE_DATABASE__URL": postgres_server.create()}
    shared = {
        **facts,
        "HYTHE_ACCOUNTS__ADMIN": made["HYTHE_ADMIN"],
        "HYTHE_ACCOUNTS__ADMIN_PASSWORD": made["HYTHE_ADMIN_PASSWORD"],
        **{f"HYTHE_STORAGE__S3__{key.upper()}": value for key, value in juicefs_bucket.settings().items()},
    }
    command = [sys.executable, "-m", "hythe", "serve", "--config", str(DEPLOY / "replicas.toml")]
    # The first believes whoever connects to it, as the file says; the second its proxy alone, as one may have it.
    own = [{}, {"HYTHE_SERVER__TRUSTED_PROXIES": "127.0.0.1"}]
    with contextlib.ExitStack() as ending:
        servers = []
        for number, more in enumerate(own, 1):
            port, directory = free_port(), tmp_path_factory.mktemp(f"replica{number}")
            here = {"HYTHE_SERVER__LISTEN": f"127.0.0.1:{port}", "TMPDIR": str(directory), **more}
            servers.append(HytheServer(command, directory / "log", {**shared, **here}, port=port))
            ending.callback(servers[-1].stop)
            Program.start(servers[-1])
        for server in servers:
            server.wait_for(f"{server.url}/v2/")
        yield Replicas((servers[0], servers[1]), secret, made["HYTHE_ADMIN_PASSWORD"], facts)


@pytest.fixture(scope="module")
def watcher(replicas: Replicas) -> dict[str, str]:
    """The header of a robot that may do nothing but look at numbers."""
    replicas.hythe("user", "add", "--robot", "prometheus")
    token = replicas.hythe("token", "create", "metrics", "--user", "prometheus", "--days", "0").strip()
    return basic("prometheus", token)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=needs(name)) for name in ("nginx", "caddy")])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, replicas: Replicas
) -> Iterator[Site]:
    """One proxy after the other."""
    directory = tmp_path_factory.mktemp(request.param)
    port, plain_port = free_port(), free_port()
    prepare = {"nginx": prepare_nginx, "caddy": prepare_caddy}[request.param]
    proxy = prepare(directory, port, plain_port, replicas)
    plain = f"http://localhost:{plain_port}" if request.param == "nginx" else ""
    trust = ssl.create_default_context(cafile=str(replicas.certificate))
    try:
        proxy.start()
        made = Site(f"https://localhost:{port}", plain, trust, replicas)
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


def prepare_nginx(directory: Path, port: int, plain_port: int, replicas: Replicas) -> Program:
    places = {
        "hythe-1:5000": replicas.servers[0].address,
        "hythe-2:5000": replicas.servers[1].address,
        "    listen [::]:80;\n": "",
        "    listen [::]:443 ssl;\n": "",
        "listen 80;": f"listen 127.0.0.1:{plain_port};",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "/etc/nginx/hythe/": f"{replicas.directory}/secrets/",
        "registry.example.org": "localhost",
    }
    text = substitute(DEPLOY / "nginx.conf", places)
    program = nginx_program(directory, text)
    said = run(*program.command, "-t")
    assert "test is successful" in said
    assert "[warn]" not in said
    return program


def nginx_program(directory: Path, text: str) -> Program:
    """Return an nginx whose files are in `directory`, with `text` inside of `http`."""
    (directory / "hythe.conf").write_text(text)
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
    return Program(command, directory / "log")


def prepare_caddy(directory: Path, port: int, plain_port: int, replicas: Replicas) -> Program:
    secret = replicas.directory / "secrets" / "tls"
    places = {
        "hythe-1:5000": replicas.servers[0].address,
        "hythe-2:5000": replicas.servers[1].address,
        "registry.example.org {": f"https://localhost:{port} {{\n\tbind 127.0.0.1\n\ttls {secret}.crt {secret}.key\n",
    }
    text = substitute(DEPLOY / "Caddyfile", places)
    # It manages itself over a port of its own, and redirects from port 80, which are not ours here.
    (directory / "Caddyfile").write_text(f"{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{text}")
    home = {"HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    command = ["caddy", "--config", str(directory / "Caddyfile"), "--adapter", "caddyfile"]
    said = run(command[0], "validate", *command[1:], timeout=60, **home)
    assert "Valid configuration" in said
    return Program([command[0], "run", *command[1:]], directory / "log", home)


def served(replica: HytheServer, watcher: Mapping[str, str]) -> int:
    """Return how many requests to the protocol a replica has answered."""
    with PlainClient(replica.url) as client:
        answer = client.ask("GET", f"{replica.url}/metrics", **watcher)
    assert answer.status == 200, answer.body
    # Routes of other paths than the protocol's are these paths.
    counts = re.findall(
        r'^hythe_requests_total\{(?=[^}]*route="[^/"])[^}]*\} ([\d.e+]+)$', answer.body.decode(), re.MULTILINE
    )
    return int(sum(float(count) for count in counts))


@contextlib.contextmanager
def both_asked(site: Site, watcher: Mapping[str, str], least: int = 1) -> Iterator[None]:
    """Fail unless each replica has answered so many requests meanwhile."""
    before = [served(replica, watcher) for replica in site.replicas.servers]
    yield
    after = [served(replica, watcher) for replica in site.replicas.servers]
    assert min(now - then for now, then in zip(after, before, strict=True)) >= least


def push(site: Site, content: list[bytes]) -> str:
    """Push a blob, each part in a request of unknown length; return its digest."""
    digest, by = digest_of(b"".join(content)), site.token()
    with site.client() as client:
        begun = client.ask("POST", f"{site.url}/v2/{NAME}/blobs/uploads/", **by)
        assert begun.status == 202
        assert begun.location.startswith(site.url)
        for part in content:
            begun = client.ask("PATCH", begun.location, in_pieces(part), **by)
            assert begun.status == 202, begun.body
        closed = client.ask("PUT", with_query(begun.location, f"digest={digest}"), **by)
        assert closed.status == 201, closed.body
    return digest


def in_pieces(content: bytes) -> Iterator[bytes]:
    return (content[start : start + (1 << 16)] for start in range(0, len(content), 1 << 16))


def pull(site: Site, digest: str) -> bytes:
    with site.client() as client:
        return client.ask("GET", f"{site.url}/v2/{NAME}/blobs/{digest}", **site.token("pull")).body


def test_of_replicas_that_start_at_once_one_makes_the_first_account(replicas: Replicas) -> None:
    said = [server.output.read_text() for server in replicas.servers]
    assert sum(text.count("the first account was made") for text in said) == 1
    users = json.loads(replicas.hythe("user", "list", "--json"))
    assert [user["name"] for user in users if user["kind"] == "user"] == ["alice"]


def test_a_large_layer_goes_in_in_chunks_over_both_replicas_and_comes_out(site: Site, watcher: dict[str, str]) -> None:
    # Begun, two parts, closed, pulled twice.
    with both_asked(site, watcher, least=2):
        digest = push(site, [HALF, HALF[::-1]])
        assert pull(site, digest) == HALF + HALF[::-1]
        assert pull(site, digest) == HALF + HALF[::-1]


def test_docker_is_sent_to_the_address_that_it_used_for_a_token_and_logs_in(site: Site) -> None:
    with site.client() as client:
        asked = client.ask("GET", f"{site.url}/v2/")
        assert asked.status == 401
        assert asked.headers.get_all("WWW-Authenticate") == [f'Bearer realm="{site.url}/v2/token",service="hythe"']
    assert site.log_in("wrong").status == 401
    given = site.log_in(client_id="docker", offline_token="true")
    with site.client() as client:
        assert client.ask("GET", f"{site.url}/v2/", **bearer(given)).status == 200
        # What docker keeps, in place of the password, and how it asks by that.
        form = {"grant_type": "refresh_token", "service": "hythe", "client_id": "docker"}
        form |= {"refresh_token": given.json["refresh_token"], "scope": f"repository:{NAME}:pull,push"}
        kind = "application/x-www-form-urlencoded"
        again = client.ask("POST", f"{site.url}/v2/token", urlencode(form).encode(), Content_Type=kind)
        assert client.ask("POST", f"{site.url}/v2/{NAME}/blobs/uploads/", **bearer(again)).status == 202


def test_who_does_not_say_who_it_is_gets_nothing_but_what_is_for_all(site: Site, watcher: dict[str, str]) -> None:
    blob = f"{site.url}/v2/{NAME}/blobs/{push(site, [b'secret'])}"
    with site.client() as client:
        for method, url in (("GET", blob), ("POST", f"{site.url}/v2/{NAME}/blobs/uploads/")):
            refused = client.ask(method, url)
            assert refused.status == 401
            actions = "pull" if method == "GET" else "pull,push"
            assert f'scope="repository:{NAME}:{actions}"' in refused.headers["WWW-Authenticate"]
        assert client.ask("GET", blob, **basic("alice", "wrong")).status == 401
        assert client.ask("GET", blob, **basic("alice", site.replicas.password)).body == b"secret"
        assert client.ask("GET", f"{site.url}/healthz").status == 200
        assert client.ask("GET", f"{site.url}/readyz").status == 200
        assert client.ask("GET", f"{site.url}/metrics", **watcher).status == 404
    for replica in site.replicas.servers:
        with PlainClient(replica.url) as client:
            assert client.ask("GET", f"{replica.url}/metrics").status == 401


def test_who_may_not_push_is_told_so_however_large_the_layer_is(site: Site) -> None:
    with site.client() as client:
        begun = client.ask("POST", f"{site.url}/v2/{NAME}/blobs/uploads/", **site.token())
    for by in ({}, site.token("pull")):
        # A proxy may end a connection whose request it did not read to its end.
        with site.client() as client:
            refused = client.ask("PATCH", begun.location, in_pieces(HALF), **by)
            assert (refused.status, refused.json["errors"][0]["code"]) == (401, "UNAUTHORIZED")


def test_the_audit_names_the_client_and_not_the_proxy_whatever_the_client_says(
    site: Site, watcher: dict[str, str]
) -> None:
    program = secrets.token_hex(8)
    query = urlencode({"service": "hythe", "offline_token": "true", "client_id": program})
    by = basic("alice", site.replicas.password)
    with both_asked(site, watcher, least=2), site.client(CLIENT) as client:
        for forged in ({}, {}, FORGED, FORGED):
            assert client.ask("GET", f"{site.url}/v2/token?{query}", **by, **forged).status == 200
        assert client.ask("GET", f"{site.url}/v2/", **basic(program, "wrong"), **FORGED).status == 401

    def found() -> list[tuple[str, str]]:
        return [(event["action"], event["address"]) for event in site.replicas.audit() if event["target"] == program]

    # What was refused is written a moment later.
    wait_until(lambda: len(found()) == 5, "the audit", 60)
    assert sorted(found()) == [("login", CLIENT), *[("login.keep", CLIENT)] * 4]


def test_a_client_that_says_it_came_by_another_address_is_sent_to_no_other_one_for_a_token(
    site: Site, watcher: dict[str, str]
) -> None:
    with both_asked(site, watcher), site.client(CLIENT) as client:
        for _ in range(4):
            asked = client.ask("GET", f"{site.url}/v2/", **FORGED)
            assert asked.headers["WWW-Authenticate"] == f'Bearer realm="{site.url}/v2/token",service="hythe"'


def test_commands_ask_through_the_proxy_too(site: Site) -> None:
    push(site, [b"for the list"])
    alice = {"HYTHE_USER": "alice", "HYTHE_PASSWORD": site.replicas.password}
    trust = {"SSL_CERT_FILE": str(site.replicas.certificate)}
    assert "org/" in site.replicas.hythe("ls", "--server", site.url, **alice, **trust)


def test_without_tls_nobody_is_served(site: Site) -> None:
    if not site.plain_url:
        pytest.skip("Caddy redirects by itself, from port 80")
    with PlainClient(site.plain_url) as client:
        sent = client.ask("GET", f"{site.plain_url}/v2/x")
        assert (sent.status, sent.location) == (308, "https://localhost/v2/x")


@needs("skopeo")
def test_skopeo_logs_in_pushes_pulls_and_logs_out(site: Site, tmp_path: Path) -> None:
    tools = ContainerTools(tmp_path / "home")
    tools.set_up()
    (trusted := tmp_path / "certs").mkdir()
    (trusted / "ca.crt").write_bytes(site.replicas.certificate.read_bytes())
    layout = write_layout(tmp_path / "in", packed_image([random_layer(), random_layer(3_000_000)]))
    name, out = f"docker://{site.address}/{NAME}:1", f"oci:{tmp_path / 'out'}:latest"
    trust = f"{trusted}"
    tools.skopeo("login", "--cert-dir", trust, "--username=alice", "--password", site.replicas.password, site.address)
    tools.skopeo("copy", "--dest-cert-dir", trust, layout.reference, name)
    tools.skopeo("copy", "--src-cert-dir", trust, "--preserve-digests", name, out)
    assert Layout(tmp_path / "out", layout.digest).blobs == layout.blobs
    tools.skopeo("logout", site.address)
    with pytest.raises(AssertionError, match=r"unauthorized|authentication required"):
        tools.skopeo("inspect", "--cert-dir", trust, name)


def test_while_one_replica_is_away_the_other_serves(site: Site, watcher: dict[str, str]) -> None:
    digest = push(site, [HALF])
    away = site.replicas.servers[0]
    assert away.stop() == 0
    try:
        for _ in range(4):
            assert pull(site, digest) == HALF
        again = push(site, [HALF[:100_000]])
        assert pull(site, again) == HALF[:100_000]
    finally:
        away.start()
    before = served(away, watcher)
    wait_until(lambda: pull(site, digest) == HALF and served(away, watcher) > before, "the replica's return")


@needs("nginx")
def test_what_docs_say_of_nginx_sends_clients_to_the_right_address_for_a_token(
    replicas: Replicas, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "operate.md").read_text()
    locations = re.findall(r"^    location .*?^    }$", text, re.MULTILINE | re.DOTALL)
    assert len(locations) == 2
    port, replica = free_port(), replicas.servers[0]
    inside = "\n".join(locations).replace("127.0.0.1:5000", replica.address)
    proxy = nginx_program(tmp_path, f"server {{ listen 127.0.0.1:{port}; {inside} }}")
    proxy.start()
    try:
        for url in (f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/registry"):
            proxy.wait_for(f"{url}/v2/")
            with PlainClient(url) as client:
                asked = client.ask("GET", f"{url}/v2/", **FORGED)
                assert asked.headers["WWW-Authenticate"] == f'Bearer realm="{url}/v2/token",service="hythe"'
                assert client.ask("GET", f"{url}/v2/", **basic("alice", replicas.password)).status == 200
    finally:
        proxy.stop()
