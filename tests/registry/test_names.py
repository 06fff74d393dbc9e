"""Names of repositories and tags, as far as they go. [distribution-spec: Pulling manifests]"""

import pytest

from storage.oci import OCI_INDEX
from tests.content import Client, Pusher
from tests.registry.talk import ask, begin, wire

INDEX = b'{"schemaVersion": 2, "manifests": []}'
WORDS = ["blobs", "manifests", "tags", "uploads", "referrers", "list", "v2"]
TRICKY = [
    *WORDS,
    *(f"{word}/{word}" for word in WORDS),
    *(f"org/{word}/app" for word in WORDS),
    "blobs/uploads",
    "org/blobs/uploads",
    "org/blobs/uploads/app",
    "org/manifests/v1",
    "tags/list",
    "org/tags/list",
    "blobs/manifests/tags/uploads/referrers",
    "a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p/q/r/s/t/u/v/w/x/y/z",
    "0",
    "a.b/c_d/e__f/g-h/i---j",
    "/".join(["a"] * 128),
    "a" * 255,
]


@pytest.mark.parametrize("name", TRICKY)
async def test_a_repository_of_any_good_name_works_in_all_its_parts(client: Client, name: str) -> None:
    push = Pusher(client, name)
    digest = await push.blob(b"a layer")
    await push.manifest(INDEX, "list", OCI_INDEX)
    created = await push.manifest(INDEX, media_type=OCI_INDEX, tag="uploads")
    assert (await ask(client, "GET", f"/v2/{name}/blobs/{digest}")).body == b"a layer"
    for tag in ("list", "uploads"):
        assert (await ask(client, "GET", f"/v2/{name}/manifests/{tag}")).body == INDEX
    tags = await ask(client, "GET", f"/v2/{name}/tags/list")
    assert tags.json == {"name": name, "tags": ["list", "uploads"]}
    referrers = await ask(client, "GET", f"/v2/{name}/referrers/{created.headers['Docker-Content-Digest']}")
    assert (referrers.status, referrers.json["manifests"]) == (200, [])
    assert (await ask(client, "GET", "/v2/_catalog")).json == {"repositories": [name]}


@pytest.mark.parametrize("name", TRICKY)
async def test_uploads_to_a_repository_of_any_good_name_work(client: Client, name: str) -> None:
    location = await begin(client, name)
    assert (await ask(client, "PATCH", location, data=b"a ")).status == 202
    status = await ask(client, "GET", location)
    assert (status.status, status.headers["Range"]) == (204, "0-1")
    assert (await ask(client, "DELETE", location)).status == 204


def paths_of(name: str) -> list[tuple[str, str]]:
    return [
        ("GET", f"/v2/{name}/manifests/v1"),
        ("PUT", f"/v2/{name}/manifests/v1"),
        ("GET", f"/v2/{name}/tags/list"),
        ("POST", f"/v2/{name}/blobs/uploads/"),
        ("GET", f"/v2/{name}/blobs/sha256:{'0' * 64}"),
        ("GET", f"/v2/{name}/referrers/sha256:{'0' * 64}"),
    ]


BAD_NAMES = [
    "a" * 256,
    "/".join(["a" * 31] * 8) + "/a",
    "UPPER",
    "org/Team",
    "-a",
    "a-",
    "a..b",
    "a._b",
    "a___b",
    ".a",
    "_a",
    "a//b",
    "a%20b",
    "a%00",
    "%C3%BC",
    "a:5000/b",
    "a@b",
    "%ff",
]


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_a_bad_name_is_refused_at_every_endpoint(client: Client, name: str) -> None:
    async with wire(client) as connection:
        for method, path in paths_of(name):
            await connection.request(method, path, ["Content-Length: 0"])
            answer = await connection.answer()
            assert (answer.status, answer.codes) == (400, ["NAME_INVALID"]), path


@pytest.mark.parametrize("tag", ["a" * 128, "_", "0", "A.b-c_D", "list", "latest"])
async def test_a_good_tag_can_be_pushed_and_pulled(client: Client, tag: str) -> None:
    await Pusher(client).manifest(INDEX, tag, OCI_INDEX)
    assert (await ask(client, "GET", f"/v2/org/team/app/manifests/{tag}")).body == INDEX
    assert (await ask(client, "GET", "/v2/org/team/app/tags/list")).json["tags"] == [tag]


@pytest.mark.parametrize("tag", ["a" * 129, ".a", "-a", "a%20b", "%C3%BC", "a%00"])
async def test_a_bad_tag_cannot_be_pushed_and_is_not_there(client: Client, tag: str) -> None:
    path = f"/v2/org/team/app/manifests/{tag}"
    async with wire(client) as connection:
        headers = [f"Content-Type: {OCI_INDEX}", f"Content-Length: {len(INDEX)}"]
        await connection.request("PUT", path, headers, INDEX)
        answer = await connection.answer()
        assert (answer.status, answer.codes) == (400, ["MANIFEST_INVALID"])
        await connection.request("GET", path)
        answer = await connection.answer()
        assert (answer.status, answer.codes) == (404, ["MANIFEST_UNKNOWN"])


@pytest.mark.parametrize("name", ["", "/"])
async def test_a_repository_must_have_a_name(client: Client, name: str) -> None:
    async with wire(client) as connection:
        for method, path in paths_of(name):
            await connection.request(method, path, ["Content-Length: 0"])
            answer = await connection.answer()
            assert answer.status in (400, 404), path
            assert answer.codes in (["UNSUPPORTED"], ["NAME_INVALID"]), path


@pytest.mark.parametrize("path", ["/v2/x", "/v2/org/app/nothing", "/v2/manifests/v1", "/v2/tags/list", "/v2/_other"])
async def test_a_path_without_a_meaning_is_not_found(client: Client, path: str) -> None:
    answer = await ask(client, "GET", path)
    assert (answer.status, answer.codes) == (404, ["UNSUPPORTED"])
