"""Deleting tags, manifests and blobs. [distribution-spec: end-9, end-10]"""

import pytest

from storage.digest import HEX_LENGTH
from storage.oci import OCI_INDEX
from tests.conftest import Start
from tests.content import Client, Pusher, descriptor, digest_of, make_index
from tests.registry.talk import ask

APP = "/v2/org/team/app"
ALGORITHMS = sorted(HEX_LENGTH)
UNKNOWN = digest_of(b"never pushed")


async def status(client: Client, path: str, method: str = "GET") -> int:
    return (await ask(client, method, path)).status


async def test_a_deleted_tag_leaves_its_manifest(client: Client) -> None:
    image = await Pusher(client).image("v1")
    await Pusher(client).manifest(image.manifest, "v2")
    assert await status(client, f"{APP}/manifests/v1", "DELETE") == 202
    assert await status(client, f"{APP}/manifests/v1") == 404
    assert await status(client, f"{APP}/manifests/v2") == 200
    assert await status(client, f"{APP}/manifests/{image.digest}") == 200
    assert (await ask(client, "GET", f"{APP}/tags/list")).json["tags"] == ["v2"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_deleted_manifest_takes_all_its_tags_with_it(client: Client, algorithm: str) -> None:
    image, other = await Pusher(client).image(), await Pusher(client).image("other")
    digest = digest_of(image.manifest, algorithm)
    path = f"{APP}/manifests/{digest}"
    await ask(client, "PUT", f"{path}?tag=v1&tag=v2", data=image.manifest, headers={"Content-Type": image.media_type})
    assert await status(client, path, "DELETE") == 202
    for reference in (digest, "v1", "v2"):
        assert await status(client, f"{APP}/manifests/{reference}") == 404
    assert (await ask(client, "GET", f"{APP}/tags/list")).json["tags"] == ["other"]
    assert await status(client, f"{APP}/manifests/{other.digest}") == 200


async def test_a_tag_that_moved_away_outlives_its_former_manifest(client: Client) -> None:
    before, after = await Pusher(client).image("latest"), await Pusher(client).image("latest")
    assert await status(client, f"{APP}/manifests/{before.digest}", "DELETE") == 202
    assert (await ask(client, "GET", f"{APP}/manifests/latest")).body == after.manifest


async def test_a_manifest_deleted_in_one_repository_lives_on_in_another(client: Client) -> None:
    image = await Pusher(client).image("v1")
    other = Pusher(client, "org/other")
    for blob in image.blobs:
        await other.blob(blob)
    await other.manifest(image.manifest, "v1")
    await ask(client, "DELETE", f"{APP}/manifests/{image.digest}")
    for reference in ("v1", image.digest):
        assert await status(client, f"/v2/org/other/manifests/{reference}") == 200


async def test_what_was_deleted_can_be_pushed_again(client: Client) -> None:
    image = await Pusher(client).image("v1")
    await ask(client, "DELETE", f"{APP}/manifests/{image.digest}")
    await Pusher(client).manifest(image.manifest, "v1")
    assert (await ask(client, "GET", f"{APP}/manifests/v1")).body == image.manifest


async def test_a_child_of_an_index_can_be_deleted_before_it(client: Client) -> None:
    image = await Pusher(client).image()
    index = make_index(image)
    await Pusher(client).manifest(index, "v1", OCI_INDEX)
    assert await status(client, f"{APP}/manifests/{image.digest}", "DELETE") == 202
    assert (await ask(client, "GET", f"{APP}/manifests/v1")).body == index
    assert await status(client, f"{APP}/manifests/{digest_of(index)}", "DELETE") == 202


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_blob_deleted_in_one_repository_lives_on_in_another(client: Client, algorithm: str) -> None:
    digest = await Pusher(client).blob(b"shared", algorithm)
    await Pusher(client, "org/other").blob(b"shared", algorithm)
    assert await status(client, f"{APP}/blobs/{digest}", "DELETE") == 202
    for method in ("GET", "HEAD"):
        assert await status(client, f"{APP}/blobs/{digest}", method) == 404
    assert (await ask(client, "GET", f"/v2/org/other/blobs/{digest}")).body == b"shared"


async def test_a_deleted_blob_can_be_pushed_again(client: Client) -> None:
    for _ in range(2):
        digest = await Pusher(client).blob(b"again")
        assert (await ask(client, "GET", f"{APP}/blobs/{digest}")).body == b"again"
        assert await status(client, f"{APP}/blobs/{digest}", "DELETE") == 202


async def test_a_manifest_outlives_the_deletion_of_its_blobs(client: Client) -> None:
    image = await Pusher(client).image("v1")
    for blob in image.blobs:
        assert await status(client, f"{APP}/blobs/{digest_of(blob)}", "DELETE") == 202
    assert (await ask(client, "GET", f"{APP}/manifests/v1")).body == image.manifest


async def test_a_deleted_blob_is_missing_for_the_next_manifest(client: Client) -> None:
    image = await Pusher(client).image("v1")
    await ask(client, "DELETE", f"{APP}/blobs/{digest_of(image.config)}")
    path, headers = f"{APP}/manifests/v2", {"Content-Type": image.media_type}
    answer = await ask(client, "PUT", path, data=image.manifest, headers=headers)
    assert answer.codes == ["MANIFEST_BLOB_UNKNOWN"]
    assert answer.json["errors"][0]["detail"]["digest"] == descriptor(image.config, "")["digest"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("manifests/nothing", "MANIFEST_UNKNOWN"),
        (f"manifests/{UNKNOWN}", "MANIFEST_UNKNOWN"),
        (f"manifests/{digest_of(b'never pushed', 'sha512')}", "MANIFEST_UNKNOWN"),
        ("manifests/-no-tag", "MANIFEST_UNKNOWN"),
        (f"blobs/{UNKNOWN}", "BLOB_UNKNOWN"),
    ],
)
@pytest.mark.parametrize("name", ["org/team/app", "no/such"])
async def test_what_is_unknown_cannot_be_deleted(client: Client, name: str, path: str, code: str) -> None:
    await Pusher(client).image("v1")
    answer = await ask(client, "DELETE", f"/v2/{name}/{path}")
    assert (answer.status, answer.codes) == (404, [code])


@pytest.mark.parametrize("path", ["manifests/v1", "manifests/{image}", "blobs/{blob}"])
async def test_nothing_is_deleted_twice(client: Client, path: str) -> None:
    image = await Pusher(client).image("v1")
    path = f"{APP}/" + path.format(image=image.digest, blob=digest_of(image.config))
    assert await status(client, path, "DELETE") == 202
    assert await status(client, path, "DELETE") == 404


@pytest.mark.parametrize("digest", ["sha256:abc", "nothing"])
async def test_a_blob_of_a_malformed_digest_cannot_be_deleted(client: Client, digest: str) -> None:
    answer = await ask(client, "DELETE", f"{APP}/blobs/{digest}")
    assert (answer.status, answer.codes) == (400, ["DIGEST_INVALID"])


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("manifests/v1", {"GET", "HEAD", "PUT"}),
        ("manifests/{image}", {"GET", "HEAD", "PUT"}),
        ("blobs/{blob}", {"GET", "HEAD"}),
    ],
)
async def test_where_deleting_is_off_it_is_not_allowed_and_nothing_is_lost(
    start: Start, path: str, allowed: set[str]
) -> None:
    client = await start(registry={"delete": False})
    image = await Pusher(client).image("v1")
    path = f"{APP}/" + path.format(image=image.digest, blob=digest_of(image.config))
    answer = await ask(client, "DELETE", path)
    assert (answer.status, answer.codes) == (405, ["UNSUPPORTED"])
    assert set(answer.headers["Allow"].split(", ")) == allowed
    assert await status(client, path) == 200


async def test_where_deleting_is_off_uploads_can_still_be_cancelled(start: Start) -> None:
    client = await start(registry={"delete": False})
    begun = await ask(client, "POST", f"{APP}/blobs/uploads/")
    assert await status(client, begun.headers["Location"], "DELETE") == 204
