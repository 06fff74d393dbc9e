"""compose.yaml and what makes its secrets: it is complete, asks for no rights, and holds nothing that is secret."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from hythe.cli import main
from registry.config import Settings, load
from tests.conftest import needs
from tests.deploy.files import DEPLOY, ROOT, read_variables, read_yaml, seconds
from tests.services.processes import run

COMPOSE: dict[str, Any] = read_yaml(DEPLOY / "compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
REPLICAS = ("hythe-1", "hythe-2")
#: It comes with a Python package, beside whose interpreter it lies.
PODMAN_COMPOSE = shutil.which("podman-compose", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

each_service = pytest.mark.parametrize("name", SERVICES)


def make_secrets(directory: Path, user: str = "alice") -> str:
    return run(str(DEPLOY / "compose-secrets"), "registry.example.org", user, str(directory))


def variables(directory: Path) -> dict[str, str]:
    """Return what stands in `.env`."""
    return read_variables(directory / ".env")


def settings_of(name: str, secrets: dict[str, str]) -> Settings:
    """Return the settings that a service has: the file that it mounts, with its environment over it."""
    assert SERVICES[name]["volumes"] == ["./replicas.toml:/etc/hythe/hythe.toml:ro"]
    assert SERVICES[name]["command"][1:] == ["--config", "/etc/hythe/hythe.toml"]
    filled = {
        name: re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: secrets[found[1]], value)
        for name, value in SERVICES[name]["environment"].items()
    }
    return load(DEPLOY / "replicas.toml", filled)


@needs("openssl")
def test_the_replicas_have_settings_that_exist_and_fit_the_services_beside_them(tmp_path: Path) -> None:
    make_secrets(tmp_path)
    secrets = variables(tmp_path)
    first, second, migrate = (settings_of(name, secrets) for name in (*REPLICAS, "migrate"))
    assert first == second == migrate
    assert first.server.listen == "0.0.0.0:5000"
    assert (first.server.allow_open, first.server.behind_proxy) == (False, True)
    assert (first.accounts.admin, first.accounts.admin_password) == ("alice", secrets["HYTHE_ADMIN_PASSWORD"])
    assert first.database.url == f"postgresql://hythe:{secrets['POSTGRES_PASSWORD']}@database/hythe"
    garage = tomllib.loads((DEPLOY / "garage.toml").read_text())
    assert f"http://store:{garage['s3_api']['api_bind_addr'].rpartition(':')[2]}" == first.storage.s3.endpoint
    assert garage["s3_api"]["s3_region"] == first.storage.s3.region
    assert SERVICES["store"]["environment"]["GARAGE_DEFAULT_BUCKET"] == first.storage.s3.bucket
    assert (garage["metadata_fsync"], garage["data_fsync"]) == (True, True)
    workers = len(REPLICAS) * first.server.workers
    assert workers * first.database.connections < 100, "PostgreSQL's own max_connections"


@each_service
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "network_mode", "userns_mode"} & set(service)
    assert not [mount for mount in service.get("volumes", []) if ".sock" in mount or mount.startswith("/")]


@each_service
def test_a_service_is_watched_and_started_again(name: str) -> None:
    service = SERVICES[name]
    if name == "migrate":
        assert (service["restart"], service["healthcheck"]) == ("no", {"disable": True})
        return
    assert service["restart"] == "unless-stopped"
    check = service["healthcheck"]
    assert check["test"][0] == "CMD"
    assert seconds(check["timeout"]) <= seconds(check["interval"])


def test_a_replica_waits_for_what_it_needs_and_is_waited_for() -> None:
    for name in REPLICAS:
        assert SERVICES[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "store": {"condition": "service_healthy"},
        }
        drain = load(DEPLOY / "replicas.toml", {}).server.drain_seconds
        assert seconds(SERVICES[name]["stop_grace_period"]) >= drain + 10
    assert SERVICES["migrate"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert set(SERVICES["proxy"]["depends_on"]) == set(REPLICAS)


def test_only_the_proxy_is_reached_from_outside() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    assert COMPOSE["networks"]["back"] == {"internal": True}
    assert SERVICES["proxy"]["networks"] == ["front"]
    assert SERVICES["database"]["networks"] == SERVICES["store"]["networks"] == ["back"]


def test_every_volume_and_every_file_that_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            if source.startswith("./secrets/"):
                continue
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"], mount


def test_no_secret_stands_in_it() -> None:
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY|URL", key):
                assert re.search(r"\$\{[A-Z0-9_]+:\?[^}]+\}", value), f"{name}: {key}"


@needs("git")
@pytest.mark.parametrize("name", [".env", "secrets/tls.key"])
def test_secrets_are_not_committed(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    assert run("git", "-C", str(ROOT), "check-ignore", f"deploy/{name}").strip() == f"deploy/{name}"


@needs("openssl")
def test_secrets_are_made_once_and_are_nobody_elses(tmp_path: Path) -> None:
    said = make_secrets(tmp_path)
    assert re.fullmatch(r"password of alice: [0-9a-f]{24}\n", said)
    assert variables(tmp_path)["HYTHE_ADMIN_PASSWORD"] == said.split()[-1]
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    made = variables(tmp_path)
    assert re.fullmatch("GK[0-9a-f]{24}", made["S3_ACCESS_KEY"])
    assert re.fullmatch("[0-9a-f]{64}", made["S3_SECRET_KEY"])
    used = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert set(made) == used
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for user in ("alice", "bob"):
        assert make_secrets(tmp_path, user) == ""
        assert {path: path.read_bytes() for path in before} == before


@needs("openssl")
def test_the_certificate_is_for_the_host(tmp_path: Path) -> None:
    make_secrets(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "secrets" / "tls.crt", tmp_path / "secrets" / "tls.key")
    shown = run("openssl", "x509", "-in", str(tmp_path / "secrets" / "tls.crt"), "-noout", "-ext", "subjectAltName")
    assert "DNS:registry.example.org" in shown


@needs("podman", "openssl")
@pytest.mark.skipif(PODMAN_COMPOSE is None, reason="not installed: podman-compose")
def test_podman_compose_understands_it(tmp_path: Path) -> None:
    assert PODMAN_COMPOSE is not None
    make_secrets(tmp_path)
    command = [PODMAN_COMPOSE, "--env-file", str(tmp_path / ".env"), "--file", str(DEPLOY / "compose.yaml"), "config"]
    shown = yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    assert set(shown["services"]) == set(SERVICES)
    secrets = variables(tmp_path)
    assert secrets["POSTGRES_PASSWORD"] in shown["services"]["hythe-2"]["environment"]["HYTHE_DATABASE__URL"]


@needs("podman")
@pytest.mark.skipif(PODMAN_COMPOSE is None, reason="not installed: podman-compose")
def test_without_secrets_it_says_how_to_make_them(tmp_path: Path) -> None:
    assert PODMAN_COMPOSE is not None
    (tmp_path / "none.env").touch()
    command = [PODMAN_COMPOSE, "--env-file", str(tmp_path / "none.env"), "--file", str(DEPLOY / "compose.yaml")]
    done = subprocess.run([*command, "config"], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "run deploy/compose-secrets" in done.stderr


@pytest.mark.skipif("migrate" not in main.commands, reason="there is no command `hythe migrate` yet")
def test_every_command_of_hythe_exists() -> None:
    assert {SERVICES[name]["command"][0] for name in (*REPLICAS, "migrate")} <= set(main.commands)
