"""The example overlay, rendered by kustomize and held against Kubernetes' own schemas."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from hythe.cli import main
from registry.config import Settings, load
from tests.deploy.files import DEPLOY
from tests.services.processes import run

KUBERNETES = DEPLOY / "kubernetes"
#: The oldest that knows all that is used: a sleep before the end, in 1.30; and the newest that the package knows.
VERSIONS = ["1.30", kubernetes_validate.latest_version().rpartition(".")[0]]
_PROGRAMS = {"kustomize": ["kustomize", "build"], "kubectl": ["kubectl", "kustomize"]}
RENDER = next((command for program, command in _PROGRAMS.items() if shutil.which(program)), None)

pytestmark = pytest.mark.skipif(RENDER is None, reason="not installed: kustomize or kubectl")

Thing = dict[str, Any]


def render(directory: Path) -> list[Thing]:
    assert RENDER is not None
    return list(yaml.safe_load_all(run(*RENDER, str(directory))))


@pytest.fixture(scope="module", params=["base", "example"])
def things(request: pytest.FixtureRequest) -> list[Thing]:
    """All that is rendered of the base, and of the example."""
    return render(KUBERNETES / request.param)


@pytest.fixture(scope="module")
def example() -> list[Thing]:
    return render(KUBERNETES / "example")


def one(things: list[Thing], kind: str) -> Thing:
    (found,) = [thing for thing in things if thing["kind"] == kind]
    return found


def pod(things: list[Thing], kind: str) -> Thing:
    found: Thing = one(things, kind)["spec"]["template"]["spec"]
    return found


def container(things: list[Thing], kind: str) -> Thing:
    (found,) = pod(things, kind)["containers"]
    return dict(found)


def settings_of(things: list[Thing], kind: str, directory: Path) -> Settings:
    """Return what a container's configuration is, with something for each secret."""
    secrets = {
        "database-url": "postgresql://hythe:password@postgres/hythe",
        "s3-access-key": "access",
        "s3-secret-key": "secret",
        "admin-password": "correct horse",
    }
    environment = {}
    for variable in container(things, kind)["env"]:
        reference = variable["valueFrom"]["secretKeyRef"]
        assert reference["name"] == "hythe"
        environment[variable["name"]] = secrets[reference["key"]]
    (volume,) = [volume for volume in pod(things, kind)["volumes"] if "configMap" in volume]
    configuration = one(things, "ConfigMap")
    assert volume["configMap"]["name"] == configuration["metadata"]["name"]
    path = directory / "hythe.toml"
    path.write_text(configuration["data"]["hythe.toml"])
    assert container(things, kind)["args"][1:] == ["--config", "/etc/hythe/hythe.toml"]
    assert {"name": volume["name"], "mountPath": "/etc/hythe", "readOnly": True} in container(things, kind)[
        "volumeMounts"
    ]
    return load(path, environment)


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_is_what_kubernetes_takes(things: list[Thing], version: str) -> None:
    for thing in things:
        kubernetes_validate.validate(thing, version, strict=True)


def test_a_wrong_word_would_be_noticed(things: list[Thing]) -> None:
    wrong = one(things, "Service") | {"spec": {"sessionAfinity": "None"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_the_configuration_can_be_used_with_the_secrets(things: list[Thing], kind: str, tmp_path: Path) -> None:
    settings = settings_of(things, kind, tmp_path)
    assert settings.server.listen == "0.0.0.0:5000"
    assert settings.storage.driver == "s3"
    assert settings.database.url.startswith("postgresql://")


def test_nobody_comes_in_without_an_account_and_the_first_one_is_made_by_a_replica(
    things: list[Thing], tmp_path: Path
) -> None:
    settings = settings_of(things, "Deployment", tmp_path)
    assert (settings.server.allow_open, settings.server.behind_proxy) == (False, True)
    assert (settings.accounts.admin, settings.accounts.admin_password) == ("admin", "correct horse")
    # When it is taken away, what is left is good.
    variables = {variable["name"]: variable["valueFrom"] for variable in container(things, "Deployment")["env"]}
    optional = [name for name, source in variables.items() if source["secretKeyRef"].get("optional")]
    assert optional == ["HYTHE_ACCOUNTS__ADMIN_PASSWORD"]


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_a_pod_is_nobody_and_writes_nowhere(things: list[Thing], kind: str) -> None:
    spec, main_container = pod(things, kind), container(things, kind)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert main_container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert main_container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert main_container["resources"]["limits"].keys() == {"memory"}


def test_a_replica_has_time_to_finish(things: list[Thing], tmp_path: Path) -> None:
    deployment = container(things, "Deployment")
    pause = deployment["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = settings_of(things, "Deployment", tmp_path).server.drain_seconds
    assert pod(things, "Deployment")["terminationGracePeriodSeconds"] >= pause + drain + 10
    rolling = one(things, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxUnavailable": 0, "maxSurge": 1}


def test_a_replica_is_asked_what_it_answers(things: list[Thing]) -> None:
    deployment = container(things, "Deployment")
    asked = {name: deployment[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in asked.items()} == {
        "startup": "/healthz",
        "readiness": "/readyz",
        "liveness": "/healthz",
    }
    assert {probe["port"] for probe in asked.values()} == {port["name"] for port in deployment["ports"]}


def test_whatever_selects_pods_finds_them(things: list[Thing]) -> None:
    deployment = one(things, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        one(things, "Service")["spec"]["selector"],
        one(things, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        pod(things, "Deployment")["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels for selector in selectors)
    of_job = one(things, "Job")["spec"]["template"]["metadata"]["labels"].items()
    assert not any(selector.items() <= of_job for selector in selectors), "a job serves nobody"


def test_only_the_ingress_and_who_watches_reach_it(things: list[Thing]) -> None:
    policy = one(things, "NetworkPolicy")["spec"]
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": "http"}]
    assert len(rule["from"]) == 2
    assert all("namespaceSelector" in origin for origin in rule["from"])
    selector = policy["podSelector"]
    component = selector["matchExpressions"][0]
    for kind in ("Deployment", "Job"):
        labels = one(things, kind)["spec"]["template"]["metadata"]["labels"]
        assert labels[component["key"]] in component["values"]
        assert selector.get("matchLabels", {}).items() <= labels.items()


def test_all_but_the_deployment_can_be_applied_first(things: list[Thing]) -> None:
    # As docs/deploy.md does it, by `-l app.kubernetes.io/component!=registry`.
    component = "app.kubernetes.io/component"
    last = [thing["kind"] for thing in things if thing["metadata"].get("labels", {}).get(component) == "registry"]
    assert last == ["Deployment"]


def test_the_example_says_which_image_and_where(example: list[Thing]) -> None:
    images = {container(example, kind)["image"] for kind in ("Deployment", "Job")}
    assert images == {"registry.example.org/platform/hythe:0.1.0"}
    assert {thing["metadata"]["namespace"] for thing in example} == {"hythe"}
    assert "example-hythe" in one(example, "ConfigMap")["data"]["hythe.toml"]


def test_the_ingress_lets_large_layers_through_and_leaves_it_to_hythe_to_ask_who_it_is(example: list[Thing]) -> None:
    ingress = one(example, "Ingress")
    prefix = "nginx.ingress.kubernetes.io/"
    said = {key.removeprefix(prefix): value for key, value in ingress["metadata"]["annotations"].items()}
    assert (said["proxy-body-size"], said["proxy-request-buffering"], said["proxy-buffering"]) == ("0", "off", "off")
    assert int(said["proxy-read-timeout"]) >= 300
    assert not [name for name in said if name.startswith("auth")]
    service = one(example, "Service")
    backends = [path["backend"]["service"] for path in ingress["spec"]["rules"][0]["http"]["paths"]]
    ports = {port["name"] for port in service["spec"]["ports"]}
    assert all(end["name"] == service["metadata"]["name"] and end["port"]["name"] in ports for end in backends)


@pytest.mark.skipif("migrate" not in main.commands, reason="there is no command `hythe migrate` yet")
@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_every_command_of_hythe_exists(things: list[Thing], kind: str) -> None:
    assert container(things, kind)["args"][0] in main.commands
