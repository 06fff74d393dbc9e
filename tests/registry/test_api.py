"""The JSON API is what `openapi.json` says, no less and no more."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from importlib import resources
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis.generation import GenerationMode

from storage.oci import OCI_INDEX
from tests.content import Client, Image, descriptor, digest_of, make_image, make_index
from tests.services.processes import HytheServer, hythe_server

DESCRIPTION: dict[str, Any] = json.loads(resources.files("registry").joinpath("openapi.json").read_text())
schema = schemathesis.openapi.from_dict(DESCRIPTION)
schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])

NAME = "org/team/app"
UNKNOWN = "sha256:" + "0" * 64
PASSWORD = "correct horse"


def operations() -> list[tuple[str, str]]:
    return [(method, path) for path, methods in DESCRIPTION["paths"].items() for method in methods]


def push_image(url: str, tag: str, **more: Any) -> Image:
    image = make_image(**more)
    for content in image.blobs:
        params = {"digest": digest_of(content)}
        requests.post(f"{url}/v2/{NAME}/blobs/uploads/", params=params, data=content).raise_for_status()
    push_manifest(url, image.manifest, image.media_type, tag)
    return image


def push_manifest(url: str, content: bytes, media_type: str, tag: str) -> None:
    headers = {"Content-Type": media_type}
    requests.put(f"{url}/v2/{NAME}/manifests/{tag}", data=content, headers=headers).raise_for_status()


def fill(url: str) -> None:
    image = push_image(url, "latest", annotations={"org.example": "yes"})
    subject = descriptor(image.manifest, image.media_type)
    push_manifest(url, make_index(image, subject=subject), OCI_INDEX, "index")
    for number in range(3):
        push_image(url, f"v{number}")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HytheServer]:
    """A registry with something in it, for tests that remove nothing."""
    with hythe_server(tmp_path_factory.mktemp("full")) as server:
        fill(server.url)
        yield server


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HytheServer]:
    """A registry with an administrator, and something in it that anything may happen to."""
    directory = tmp_path_factory.mktemp("target")
    with hythe_server(directory) as server:
        fill(server.url)
    with hythe_server(directory, environment={"HYTHE_ACCOUNTS__ADMIN_PASSWORD": PASSWORD}) as server:
        yield server


def check(method: str, url: str, path: str, status: int, /, **params: str | int) -> Any:
    """Ask, hold the answer against the description, and return it."""
    response = requests.request(method, url + path, params=params)
    assert response.status_code == status, response.text
    assert str(status) in described(method, path) or f"{status // 100}XX" in described(method, path)
    schema[path][method].validate_response(response)
    return response.json()


def described(method: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = DESCRIPTION["paths"][path][method.lower()]["responses"]
    return found


async def test_the_description_names_the_routes_of_the_application_and_no_others(client: Client) -> None:
    assert client.app is not None
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in client.app.router.routes()
        if route.resource is not None and route.resource.canonical.startswith("/api/")
    }
    assert routes == set(operations())


def test_the_description_is_good_openapi_and_every_operation_has_a_name_of_its_own() -> None:
    schema.validate()
    names = [DESCRIPTION["paths"][path][method]["operationId"] for method, path in operations()]
    assert len(set(names)) == len(names)


def test_nothing_is_described_that_nothing_points_to() -> None:
    components = dict(DESCRIPTION["components"])
    # Schemes of security are named by themselves, not by reference.
    schemes = components.pop("securitySchemes")
    assert {name for entry in DESCRIPTION["security"] for name in entry} == set(schemes)
    named = {f"#/components/{kind}/{name}" for kind, entries in components.items() for name in entries}
    assert set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(DESCRIPTION))) == named


def test_the_registry_serves_its_own_description(full: HytheServer) -> None:
    assert check("GET", full.url, "/api/v1/openapi.json", 200) == DESCRIPTION


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("/api/v1/repositories", {}),
        ("/api/v1/repositories", {"path": ""}),
        ("/api/v1/repositories", {"path": "org/team", "n": 1, "last": "a"}),
        ("/api/v1/repositories", {"path": "no/where"}),
        ("/api/v1/tags", {"repository": NAME}),
        ("/api/v1/tags", {"repository": NAME, "n": 10**12, "last": "index"}),
        ("/api/v1/manifest", {"repository": NAME, "reference": "latest"}),
        ("/api/v1/manifest", {"repository": NAME, "reference": "index"}),
    ],
)
def test_what_is_found_is_as_described(full: HytheServer, path: str, params: dict[str, Any]) -> None:
    check("GET", full.url, path, 200, **params)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    ("params", "status", "code"),
    [
        ({}, 400, "UNSUPPORTED"),
        ({"repository": NAME}, 400, "UNSUPPORTED"),
        ({"reference": "latest"}, 400, "UNSUPPORTED"),
        ({"repository": "Not//good", "reference": "latest"}, 400, "NAME_INVALID"),
        ({"repository": NAME, "reference": "sha256:short"}, 400, "DIGEST_INVALID"),
        ({"repository": NAME, "reference": UNKNOWN}, 404, "MANIFEST_UNKNOWN"),
        ({"repository": NAME, "reference": "nothing"}, 404, "MANIFEST_UNKNOWN"),
        ({"repository": "no/where", "reference": "latest"}, 404, "MANIFEST_UNKNOWN"),
    ],
)
def test_a_manifest_that_cannot_be_named_or_found_is_refused_as_described(
    full: HytheServer, method: str, params: dict[str, str], status: int, code: str
) -> None:
    answer = check(method, full.url, "/api/v1/manifest", status, **params)
    assert [error["code"] for error in answer["errors"]] == [code]


@pytest.mark.parametrize(
    ("path", "params", "status", "code"),
    [
        ("/api/v1/repositories", {"path": "/org"}, 400, "NAME_INVALID"),
        ("/api/v1/repositories", {"n": 0}, 400, "UNSUPPORTED"),
        ("/api/v1/repositories", {"n": "-1"}, 400, "UNSUPPORTED"),
        ("/api/v1/tags", {}, 400, "UNSUPPORTED"),
        ("/api/v1/tags", {"repository": "a" * 256}, 400, "NAME_INVALID"),
        ("/api/v1/tags", {"repository": NAME, "n": "many"}, 400, "UNSUPPORTED"),
        ("/api/v1/tags", {"repository": "org"}, 404, "NAME_UNKNOWN"),
    ],
)
def test_a_listing_that_cannot_be_had_is_refused_as_described(
    full: HytheServer, path: str, params: dict[str, Any], status: int, code: str
) -> None:
    answer = check("GET", full.url, path, status, **params)
    assert [error["code"] for error in answer["errors"]] == [code]


def test_the_pages_of_a_listing_lead_through_all_of_it_once(full: HytheServer) -> None:
    params: dict[str, Any] = {"repository": NAME, "n": 2}
    names: list[str] = []
    while True:
        page = check("GET", full.url, "/api/v1/tags", 200, **params)
        assert len(page["tags"]) <= 2
        names += [tag["name"] for tag in page["tags"]]
        if page["next"] is None:
            break
        params["last"] = page["next"]
    assert names == sorted(set(names))
    assert {"index", "latest", "v0", "v1", "v2"} <= set(names)


def test_a_tag_is_removed_alone_and_a_manifest_with_all_its_tags(server: HytheServer) -> None:
    image = push_image(server.url, "a")
    for tag in ("b", "c"):
        push_manifest(server.url, image.manifest, image.media_type, tag)
    path = "/api/v1/manifest"
    removed = check("DELETE", server.url, path, 200, repository=NAME, reference="a")
    assert removed == {"repository": NAME, "reference": "a", "tags": ["a"]}
    assert check("GET", server.url, path, 200, repository=NAME, reference=image.digest)["tags"] == ["b", "c"]
    removed = check("DELETE", server.url, path, 200, repository=NAME, reference=image.digest)
    assert removed["tags"] == ["b", "c"]
    check("GET", server.url, path, 404, repository=NAME, reference=image.digest)
    assert check("GET", server.url, "/api/v1/tags", 200, repository=NAME)["tags"] == []


def test_removing_is_refused_as_described_where_it_is_switched_off(tmp_path: Any) -> None:
    with hythe_server(tmp_path, environment={"HYTHE_REGISTRY__DELETE": "false"}) as server:
        push_image(server.url, "latest")
        params = {"repository": NAME, "reference": "latest"}
        answer = check("DELETE", server.url, "/api/v1/manifest", 405, **params)
        assert answer["errors"][0]["code"] == "UNSUPPORTED"
        check("GET", server.url, "/api/v1/manifest", 200, **params)


def not_described() -> list[tuple[str, str]]:
    methods = ("POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE")
    return [
        (method, path)
        for path in DESCRIPTION["paths"]
        for method in methods
        if (method.lower(), path) not in operations()
    ]


@pytest.mark.parametrize(("method", "path"), not_described())
def test_a_method_that_is_not_described_is_refused_with_those_that_are(
    full: HytheServer, method: str, path: str
) -> None:
    with requests.request(method, full.url + path) as response:
        assert response.status_code == 405
        allowed = {name.strip().lower() for name in response.headers["Allow"].split(",")}
    assert allowed == set(DESCRIPTION["paths"][path])


def test_a_failing_database_is_answered_as_described(server: HytheServer) -> None:
    push_image(server.url, "latest")
    with sqlite3.connect(server.data / "hythe.db") as database:
        database.execute("DROP TABLE tag")
    database.close()
    for method, path, params in [
        ("GET", "/api/v1/repositories", {}),
        ("GET", "/api/v1/tags", {"repository": NAME}),
        ("GET", "/api/v1/manifest", {"repository": NAME, "reference": "latest"}),
        ("DELETE", "/api/v1/manifest", {"repository": NAME, "reference": "latest"}),
    ]:
        answer = check(method, server.url, path, 503, **params)
        assert "tag" not in answer["errors"][0]["message"]


@schema.parametrize()
@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
)
def test_schemathesis_finds_nothing(target: HytheServer, case: schemathesis.Case[Any]) -> None:
    case.call_and_validate(base_url=target.url, auth=("admin", PASSWORD))
