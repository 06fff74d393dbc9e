"""The image: built by buildah, and run by podman as compose.yaml has it run, read-only and by nobody."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.plain import PlainClient, with_query
from tests.clients.team import PASSWORD, basic
from tests.conftest import Bucket, needs, needs_root
from tests.content import digest_of
from tests.deploy import base
from tests.deploy.files import DEPLOY, read_yaml
from tests.deploy.image import Container, Image
from tests.services.certificates import Authority
from tests.services.postgres import Postgres, needs_postgres
from tests.services.processes import answers, wait_until
from tests.services.s3 import needs_juicefs

pytestmark = [
    needs("buildah", "podman", "runc", "nsenter"),
    needs_root,
    pytest.mark.skipif(bool(base.missing()), reason=base.missing()),
]

CONTENT = bytes(range(256)) * (12 << 10)  # 3 MiB
DIGEST = digest_of(CONTENT)
BLOB = f"/v2/org/team/app/blobs/{DIGEST}"
#: Who comes in first.
FIRST = {"HYTHE_ACCOUNTS__ADMIN_PASSWORD": PASSWORD}


def hardened() -> list[str]:
    """Return options of podman for what compose.yaml says of a replica's rights."""
    service = read_yaml(DEPLOY / "compose.yaml")["services"]["hythe-1"]
    assert service["read_only"] is True
    options = ["--read-only", "--read-only-tmpfs=false"]
    options += [f"--cap-drop={capability}" for capability in service["cap_drop"]]
    return options + [f"--security-opt={option.partition(':')[0]}" for option in service["security_opt"]]


def health_check(image: Image) -> list[str]:
    """Return the image's health check as a command."""
    kind, *command = image.configuration["Healthcheck"]["Test"]
    assert kind == "CMD"
    return list(command)


def push(container: Container, name: str = "admin") -> None:
    by = basic(name)
    with PlainClient(container.url) as client:
        begun = client.ask("POST", f"{container.url}/v2/org/team/app/blobs/uploads/", **by)
        sent = client.ask("PATCH", begun.location, iter([CONTENT[: 1 << 20], CONTENT[1 << 20 :]]), **by)
        assert sent.status == 202
        assert client.ask("PUT", with_query(sent.location, f"digest={DIGEST}"), **by).status == 201


def pull(container: Container, name: str = "admin", password: str = PASSWORD) -> bytes:
    with PlainClient(container.url) as client:
        assert client.ask("GET", f"{container.url}{BLOB}").status == 401
        return client.ask("GET", f"{container.url}{BLOB}", **basic(name, password)).body


def add_robot(container: Container) -> str:
    """Make a robot that may pull, by commands in the container; return its token."""
    container.execute("hythe", "user", "add", "--robot", "ci")
    container.execute("hythe", "grant", "pull", "org", "ci")
    return container.execute("hythe", "token", "create", "build", "--user", "ci").strip()


@pytest.fixture
def volume(image: Image) -> Iterator[str]:
    """The name of a volume that is new; podman gives it the owner of the image's directory."""
    image.tools.podman("volume", "create", "data")
    yield "data"
    image.tools.podman("volume", "rm", "data")


def test_the_image_says_what_it_is(image: Image) -> None:
    found = image.configuration
    assert (found["Entrypoint"], found["Cmd"]) == (["hythe"], ["serve"])
    assert found["User"] == "10001:10001"
    assert found["ExposedPorts"] == {"5000/tcp": {}}
    assert list(found["Volumes"]) == ["/data"]
    assert found["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert [variable for variable in found["Env"] if "HYTHE" in variable] == ["HYTHE_SERVER__LISTEN=0.0.0.0:5000"]


def test_it_holds_what_it_needs_and_nothing_of_how_it_was_built(image: Image) -> None:
    program = (
        "import boto3, psycopg, uvloop; from pathlib import Path; "
        "print([path for path in ('/source', '/etc/pip.conf', '/opt/hythe/bin/pip') if Path(path).exists()])"
    )
    assert image.run("-c", program, options=["--entrypoint=python"]) == (0, "[]\n")
    history = json.dumps(image.tools.podman("image", "history", "--no-trunc", "--format=json", "localhost/hythe"))
    assert "index-url" not in history


def test_it_serves_read_only_and_by_nobody_and_keeps_what_it_got(image: Image, volume: str) -> None:
    options = [*hardened(), f"--volume={volume}:/data"]
    with image.container(options=options, environment=FIRST) as container:
        container.start()
        container.wait_for(f"{container.url}/v2/")
        push(container)
        token = add_robot(container)
        status = dict(line.split(":\t") for line in container.execute("cat", "/proc/1/status").splitlines())
        assert status["Uid"].split() == ["10001"] * 4
        assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
        container.execute(*health_check(image))
        assert container.stop() == 0
    with image.container(options=options) as container:
        container.start()
        container.wait_for(f"{container.url}/v2/")
        assert pull(container) == pull(container, "ci", token) == CONTENT
        assert container.stop() == 0


def test_it_refuses_to_be_reached_until_it_is_told_who_does_tls_and_who_comes_in(image: Image) -> None:
    # As a volume, /data has its owner; as a tmpfs it would be root's.
    unsaid = ["--env=HYTHE_SERVER__LISTEN=0.0.0.0:5000", *hardened(), "--volume=/data"]
    code, said = image.run(options=[*unsaid, f"--env=HYTHE_ACCOUNTS__ADMIN_PASSWORD={PASSWORD}"])
    assert code == 1
    assert "set server.behind_proxy = true" in said
    assert "Traceback" not in said
    code, said = image.run(options=[*unsaid, "--env=HYTHE_SERVER__BEHIND_PROXY=true"])
    assert code == 1
    assert "accounts.admin_password" in said
    assert "Traceback" not in said


def test_with_tls_and_an_account_it_listens_where_others_reach_it_with_any_number_of_workers(
    image: Image, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "authority")
    (secret := tmp_path / "tls").mkdir()
    authority.sign(secret, "127.0.0.1")
    for path in secret.iterdir():
        path.chmod(0o644)
    listen = next(variable for variable in image.configuration["Env"] if "LISTEN" in variable).partition("=")
    environment = {
        **FIRST,
        listen[0]: listen[2],
        "HYTHE_SERVER__WORKERS": "2",
        "HYTHE_TLS__CERTIFICATE": "/etc/hythe/tls/tls.crt",
        "HYTHE_TLS__KEY": "/etc/hythe/tls/tls.key",
    }
    options = [*hardened(), "--tmpfs=/tmp", "--volume=/data", f"--volume={secret}:/etc/hythe/tls:ro"]
    with image.container(options=options, environment=environment, network="none") as container:
        container.start()
        wait_until(lambda: "Hythe listens on" in container.output.read_text(), "its first word")
        # Port 5000 of any address, listened on. [proc(5)]
        assert re.search(r": 00000000:1388 00000000:0000 0A", container.execute("cat", "/proc/net/tcp"))
        container.execute(*health_check(image))
        assert container.stop() == 0


def test_the_health_check_fails_where_nothing_answers(image: Image) -> None:
    program, *arguments = health_check(image)
    code, said = image.run(*arguments, options=[f"--entrypoint={program}"])
    assert code == 1, shlex.join(arguments)
    assert "ConnectionRefusedError" in said


@needs_postgres
@needs_juicefs
def test_it_serves_as_a_replica_as_compose_runs_it(
    image: Image, postgres_server: Postgres, juicefs_bucket: Bucket
) -> None:
    service = read_yaml(DEPLOY / "compose.yaml")["services"]["hythe-1"]
    store = juicefs_bucket.settings()
    environment = {
        "HYTHE_DATABASE__URL": postgres_server.create(),
        **{f"HYTHE_STORAGE__S3__{key.upper()}": value for key, value in store.items()},
        "HYTHE_ACCOUNTS__ADMIN": "alice",
        **FIRST,
    }
    assert set(service["environment"]) <= set(environment)
    options = [*hardened(), *(f"--tmpfs={path}" for path in service["tmpfs"])]
    for mount in service["volumes"]:
        source, _, rest = mount.partition(":")
        options.append(f"--volume={(DEPLOY / source).resolve()}:{rest}")
    with image.container(*service["command"], options=options, environment=environment) as container:
        container.start()
        container.wait_for(f"{container.url}/readyz")
        push(container, "alice")
        assert pull(container, "alice") == CONTENT
        # The database is named by the environment, so the file need not be.
        container.execute("hythe", "user", "add", "--robot", "ci")
        users = json.loads(container.execute("hythe", "user", "list", "--json", *service["command"][1:]))
        assert [user["name"] for user in users] == ["alice", "ci"]
        check = service["healthcheck"]["test"]
        container.execute(*[part.replace("5000", str(container.port)) for part in check[1:]])
        assert container.stop() == 0
    assert not answers(f"{container.url}/v2/")


def test_nothing_beside_the_sources_is_sent_to_the_builder() -> None:
    ignored = (DEPLOY.parent / ".containerignore").read_text().splitlines()
    copied = [line.split()[1:-1] for line in (DEPLOY / "Containerfile").read_text().splitlines() if "COPY " in line]
    named = {name for names in copied for name in names if not name.startswith(("-", "/"))}
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == named
    assert all((DEPLOY.parent / name).exists() for name in named)
