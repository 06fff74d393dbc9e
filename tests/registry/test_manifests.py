"""Pushing and pulling manifests. [distribution-spec: end-3, 7a, 7b]"""

import base64
import json
from io import BytesIO
from typing import Any

import pytest
from aiohttp import ClientSession

from registry.config import Settings
from storage.digest import HEX_LENGTH
from storage.oci import DOCKER_LIST, DOCKER_MANIFEST, OCI_CONFIG, OCI_EMPTY, OCI_INDEX, OCI_MANIFEST
from tests.conftest import Start
from tests.content import LAYER, Client, Image, Pusher, descriptor, digest_of, make_image, make_index
from tests.facts import query
from tests.registry.talk import Answer, ask, in_pieces
from tests.services.processes import HytheServer

MANIFESTS = "/v2/org/team/app/manifests/"
UNKNOWN = digest_of(b"never pushed")
ALGORITHMS = sorted(HEX_LENGTH)
EMPTY = b"{}"


async def put(
    client: Client,
    content: bytes | dict[str, Any],
    reference: str = "v1",
    media_type: str | None = OCI_MANIFEST,
    query: str = "",
) -> Answer:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    options: dict[str, Any] = {"headers": {"Content-Type": media_type}} if media_type is not None else {}
    path = f"{MANIFESTS}{reference}{query}"
    return await ask(client, "PUT", path, data=data, skip_auto_headers=["Content-Type"], **options)


async def get(client: Client, reference: str = "v1", **headers: str) -> Answer:
    return await ask(client, "GET", MANIFESTS + reference, headers=headers)


@pytest.fixture
async def image(client: Client) -> Image:
    """An image whose blobs are pushed, its manifest not yet."""
    image = make_image(layers=2)
    for blob in image.blobs:
        await Pusher(client).blob(blob)
    return image


@pytest.fixture
def document(image: Image) -> dict[str, Any]:
    """The manifest of the image, to be changed."""
    content: dict[str, Any] = json.loads(image.manifest)
    return content


# --- what is kept and sent ------------------------------------------------------------------------------


REWRITTEN = {
    "compact": lambda text: json.dumps(json.loads(text), separators=(",", ":")),
    "pretty": lambda text: json.dumps(json.loads(text), indent=3),
    "pretty with CRLF": lambda text: json.dumps(json.loads(text), indent=3).replace("\n", "\r\n"),
    "trailing newline": lambda text: text + "\n",
    "blank all around": lambda text: f" \t\r\n{text}\n\n \t",
    "odd order": lambda text: json.dumps(dict(reversed(json.loads(text).items()))),
    "beyond ASCII": lambda text: text[:-1] + ', "annotations": {"who": "Jürgen \\u00e9 \\/ 🐳"}}',
    "a field twice": lambda text: text[:-1] + ', "x": 1, "x": 2}',
}


@pytest.mark.parametrize("rewrite", REWRITTEN.values(), ids=REWRITTEN)
@pytest.mark.parametrize("reference", ["v1", "by digest"])
async def test_the_exact_bytes_are_kept(client: Client, image: Image, rewrite: Any, reference: str) -> None:
    content = rewrite(image.manifest.decode()).encode()
    digest = digest_of(content)
    created = await put(client, content, digest if reference == "by digest" else reference)
    assert (created.status, created.headers["Docker-Content-Digest"]) == (201, digest)
    assert (await get(client, digest)).body == content


async def test_a_manifest_may_come_with_no_length(client: Client, image: Image) -> None:
    headers = {"Content-Type": OCI_MANIFEST}
    created = await ask(client, "PUT", f"{MANIFESTS}v1", data=in_pieces(image.manifest, 100), headers=headers)
    assert created.status == 201
    assert (await get(client)).body == image.manifest


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_manifest_is_found_by_the_digest_it_was_pushed_under(
    client: Client, image: Image, algorithm: str
) -> None:
    digest = digest_of(image.manifest, algorithm)
    created = await put(client, image.manifest, digest)
    assert created.status == 201
    assert created.headers["Docker-Content-Digest"] == digest
    assert created.headers["Location"] == MANIFESTS + digest
    pulled = await get(client, digest)
    assert (pulled.body, pulled.headers["Docker-Content-Digest"]) == (image.manifest, digest)


async def test_a_manifest_pushed_under_a_tag_has_a_sha256(client: Client, image: Image) -> None:
    created = await put(client, image.manifest)
    assert created.headers["Docker-Content-Digest"] == image.digest
    assert created.headers["Location"] == MANIFESTS + image.digest


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_an_image_may_name_its_content_in_either_algorithm(client: Client, algorithm: str) -> None:
    image = make_image(layers=2, algorithm=algorithm)
    for blob in image.blobs:
        await Pusher(client).blob(blob, algorithm)
    assert (await put(client, image.manifest)).status == 201


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("reference", ["tag", "digest"])
async def test_head_and_get_of_a_manifest_have_the_same_headers(
    client: Client, image: Image, reference: str, algorithm: str
) -> None:
    digest = digest_of(image.manifest, algorithm)
    await put(client, image.manifest, digest, query="?tag=v1")
    path = MANIFESTS + ("v1" if reference == "tag" else digest)
    head, whole = await ask(client, "HEAD", path), await ask(client, "GET", path)
    assert (head.status, head.body) == (200, b"")
    for name in ("Content-Length", "Content-Type", "Docker-Content-Digest", "ETag"):
        assert head.headers[name] == whole.headers[name]
    assert set(head.headers) == set(whole.headers)
    assert head.headers["Docker-Content-Digest"] == digest
    assert head.headers["Content-Length"] == str(len(image.manifest))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("reference", ["v1", UNKNOWN, digest_of(b"never pushed", "sha512")])
@pytest.mark.parametrize("name", ["org/team/app", "no/such"])
async def test_a_manifest_that_never_was_is_unknown(
    client: Client, image: Image, method: str, reference: str, name: str
) -> None:
    answer = await ask(client, method, f"/v2/{name}/manifests/{reference}")
    assert answer.status == 404
    if method == "GET":
        assert answer.codes == ["MANIFEST_UNKNOWN"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_manifest_is_only_visible_in_its_repository(client: Client, image: Image, method: str) -> None:
    await put(client, image.manifest)
    await Pusher(client, "org/team/other").blob(b"theirs")
    for name in ("org/team/other", "org/team", "org/team/app/deeper"):
        for reference in ("v1", image.digest):
            assert (await ask(client, method, f"/v2/{name}/manifests/{reference}")).status == 404


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("condition", ['"{digest}"', 'W/"{digest}"', '"other", "{digest}"', "*"])
async def test_a_manifest_that_the_client_has_is_not_sent(
    client: Client, image: Image, method: str, condition: str
) -> None:
    await put(client, image.manifest)
    headers = {"If-None-Match": condition.format(digest=image.digest)}
    answer = await ask(client, method, f"{MANIFESTS}v1", headers=headers)
    assert (answer.status, answer.body) == (304, b"")
    assert answer.headers["Docker-Content-Digest"] == image.digest


async def test_a_manifest_that_the_client_does_not_have_is_sent(client: Client, image: Image) -> None:
    await put(client, image.manifest)
    answer = await get(client, **{"If-None-Match": '"other"'})
    assert (answer.status, answer.body) == (200, image.manifest)


# --- types ----------------------------------------------------------------------------------------------


ACCEPTS = [None, "*/*", "application/json", OCI_INDEX, f"{DOCKER_MANIFEST}, {OCI_MANIFEST};q=0.5, */*;q=0.1"]


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST])
@pytest.mark.parametrize("accept", ACCEPTS)
async def test_known_types_are_sent_as_they_were_pushed_whatever_is_accepted(
    client: Client, document: dict[str, Any], media_type: str, accept: str | None
) -> None:
    if media_type in (OCI_INDEX, DOCKER_LIST):
        document = {"schemaVersion": 2, "manifests": []}
    assert (await put(client, document | {"mediaType": media_type}, media_type=media_type)).status == 201
    answer = await ask(
        client,
        "GET",
        f"{MANIFESTS}v1",
        headers={"Accept": accept} if accept else {},
        skip_auto_headers=["Accept"],
    )
    assert (answer.status, answer.headers["Content-Type"]) == (200, media_type)


@pytest.mark.parametrize(
    "media_type", [OCI_MANIFEST, DOCKER_MANIFEST, "application/vnd.acme.rocket.v1+json", "application/json"]
)
async def test_the_type_of_the_push_counts_where_the_body_says_none(
    client: Client, document: dict[str, Any], media_type: str
) -> None:
    del document["mediaType"]
    assert (await put(client, document, media_type=media_type)).status == 201
    assert (await get(client)).headers["Content-Type"] == media_type


@pytest.mark.parametrize("parameters", ["; charset=utf-8", ";charset=UTF-8", " ; a=b; c=d"])
async def test_parameters_of_a_type_are_never_kept(client: Client, image: Image, parameters: str) -> None:
    assert (await put(client, image.manifest, media_type=OCI_MANIFEST + parameters)).status == 201
    for method in ("GET", "HEAD"):
        assert (await ask(client, method, f"{MANIFESTS}v1")).headers["Content-Type"] == OCI_MANIFEST


@pytest.mark.parametrize("media_type", ["application/vnd.acme.rocket.v1+json", "application/vnd.Acme.Rocket.v1+json"])
@pytest.mark.parametrize("says_so", [True, False])
async def test_a_type_that_nobody_has_heard_of_is_kept_to_the_letter(
    client: Client, media_type: str, says_so: bool
) -> None:
    content = {"stages": 3} | ({"mediaType": media_type} if says_so else {})
    created = await put(client, content, media_type=media_type)
    assert created.status == 201, created
    pulled = await get(client)
    assert (pulled.headers["Content-Type"], pulled.json) == (media_type, content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}, OCI_INDEX),
        ({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": []}, DOCKER_LIST),
        ({"schemaVersion": 2, "manifests": []}, OCI_INDEX),
    ],
)
async def test_without_a_content_type_the_body_tells(client: Client, content: dict[str, Any], expected: str) -> None:
    assert (await put(client, content, media_type=None)).status == 201
    assert (await get(client)).headers["Content-Type"] == expected


async def test_the_same_bytes_may_have_another_type_in_another_repository(
    client: Client, document: dict[str, Any]
) -> None:
    del document["mediaType"]
    content = json.dumps(document).encode()
    await put(client, content)
    other = await ask(
        client, "PUT", "/v2/other/manifests/v1", data=content, headers={"Content-Type": "application/vnd.acme+json"}
    )
    assert other.status == 201
    assert (await get(client)).headers["Content-Type"] == OCI_MANIFEST
    answer = await ask(client, "GET", "/v2/other/manifests/v1")
    assert answer.headers["Content-Type"] == "application/vnd.acme+json"


async def test_bytes_first_pushed_under_an_unknown_type_hold_their_blobs_once_they_are_an_image(
    client: Client, settings: Settings, document: dict[str, Any]
) -> None:
    del document["mediaType"]
    content = json.dumps(document).encode()
    assert (await put(client, content, media_type="application/vnd.acme+json")).status == 201
    assert (await put(client, content)).status == 201
    # What no manifest refers to, the collector may take.
    references = "SELECT digest FROM manifest_reference WHERE blob_id IS NOT NULL ORDER BY position"
    held = [digest for (digest,) in query(settings.database.url, references)]
    assert held == [entry["digest"] for entry in [document["config"], *document["layers"]]]


# --- refusals -------------------------------------------------------------------------------------------


async def refused(client: Client, answer: Answer, status: int, *codes: str) -> None:
    """Check a refusal, and that nothing came of the push."""
    assert (answer.status, answer.codes) == (status, list(codes))
    assert (await get(client)).status == 404


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_digest_that_is_not_of_the_body_is_refused(client: Client, image: Image, algorithm: str) -> None:
    digest = digest_of(b"something else", algorithm)
    await refused(client, await put(client, image.manifest, digest), 400, "DIGEST_INVALID")
    assert (await get(client, digest)).status == 404


@pytest.mark.parametrize("digest", ["sha256:abc", "sha256:" + "A" * 64, "md5:" + "0" * 32, ":", "x:y"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_a_malformed_digest_is_refused(client: Client, image: Image, method: str, digest: str) -> None:
    answer = await ask(client, method, MANIFESTS + digest, data=image.manifest if method == "PUT" else None)
    assert (answer.status, answer.codes) == (400, ["DIGEST_INVALID"])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"no json", b"[]", b'"text"', b"null", b"\xff\xfe", b"{} {}", b'{"schemaVersion": 2}\0']
)
@pytest.mark.parametrize("media_type", [OCI_MANIFEST, OCI_INDEX, "application/vnd.acme.rocket.v1+json", None])
async def test_what_is_no_json_object_is_refused(client: Client, content: bytes, media_type: str | None) -> None:
    await refused(client, await put(client, content, media_type=media_type), 400, "MANIFEST_INVALID")


GOOD = {"mediaType": LAYER, "digest": UNKNOWN, "size": 1}
WRONG_SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "no schema version": ({"schemaVersion": None}, "$.schemaVersion"),
    "schema version 3": ({"schemaVersion": 3}, "$.schemaVersion"),
    "no config": ({"config": None}, "$.config"),
    "config without a digest": ({"config": {"mediaType": OCI_CONFIG, "size": 1}}, "$.config"),
    "config without a media type": ({"config": {"digest": UNKNOWN, "size": 1}}, "$.config"),
    "layers that are no list": ({"layers": {}}, "$.layers"),
    "a layer that is no object": ({"layers": [GOOD, "x"]}, "$.layers[1]"),
    "a layer with a bad digest": ({"layers": [GOOD, GOOD | {"digest": "sha256:abc"}]}, "$.layers[1].digest"),
    "a layer of an unknown algorithm": ({"layers": [GOOD | {"digest": "md5:0"}]}, "$.layers[0].digest"),
    "a layer of negative size": ({"layers": [GOOD | {"size": -1}]}, "$.layers[0].size"),
    "a layer of half a byte": ({"layers": [GOOD | {"size": 0.5}]}, "$.layers[0].size"),
    "a layer of a size in text": ({"layers": [GOOD | {"size": "1"}]}, "$.layers[0].size"),
    "a layer of no media type": ({"layers": [GOOD | {"mediaType": ""}]}, "$.layers[0].mediaType"),
    "a subject with a bad digest": ({"subject": GOOD | {"digest": "x"}}, "$.subject.digest"),
    "annotations that are no texts": ({"annotations": {"a": 1}}, "$.annotations[...]"),
}


@pytest.mark.parametrize(("change", "place"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
async def test_a_manifest_of_the_wrong_shape_is_refused_with_the_place(
    client: Client, document: dict[str, Any], change: dict[str, Any], place: str
) -> None:
    changed = {name: value for name, value in (document | change).items() if value is not None}
    answer = await put(client, changed)
    await refused(client, answer, 400, "MANIFEST_INVALID")
    assert place in json.dumps(answer.json)


@pytest.mark.parametrize("child", [{}, "x", GOOD | {"digest": "sha256:abc"}, GOOD | {"platform": "linux/amd64"}])
async def test_an_index_of_the_wrong_shape_is_refused_with_the_place(client: Client, child: Any) -> None:
    answer = await put(client, {"schemaVersion": 2, "manifests": [child]}, media_type=OCI_INDEX)
    await refused(client, answer, 400, "MANIFEST_INVALID")
    assert "$.manifests[" in json.dumps(answer.json)


@pytest.mark.parametrize(
    ("inside", "outside"), [(OCI_MANIFEST, DOCKER_MANIFEST), (OCI_INDEX, OCI_MANIFEST), (OCI_MANIFEST, "text/plain")]
)
async def test_two_different_types_are_refused(
    client: Client, document: dict[str, Any], inside: str, outside: str
) -> None:
    answer = await put(client, document | {"mediaType": inside}, media_type=outside)
    await refused(client, answer, 400, "MANIFEST_INVALID")
    assert inside in json.dumps(answer.json)
    assert outside in json.dumps(answer.json)


async def test_an_index_under_the_type_of_an_image_is_refused(client: Client) -> None:
    answer = await put(client, {"schemaVersion": 2, "manifests": []}, media_type=OCI_MANIFEST)
    await refused(client, answer, 400, "MANIFEST_INVALID")


async def test_an_image_under_the_type_of_an_index_is_refused(client: Client, document: dict[str, Any]) -> None:
    del document["mediaType"]
    await refused(
        client, await put(client, document | {"manifests": []}, media_type=OCI_INDEX), 400, "MANIFEST_INVALID"
    )


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        "application/json",
        None,
    ],
)
async def test_schema_1_is_refused_by_its_name(client: Client, media_type: str | None) -> None:
    content = {"schemaVersion": 1, "name": "org/team/app", "tag": "v1", "fsLayers": [{"blobSum": UNKNOWN}]}
    answer = await put(client, content, media_type=media_type)
    await refused(client, answer, 400, "MANIFEST_INVALID")
    assert "schema 1" in answer.json["errors"][0]["message"]


@pytest.mark.parametrize("reference", [".hidden", "-dash", "a" * 129, "with space", "täg"])
async def test_a_push_under_what_is_no_tag_is_refused(client: Client, image: Image, reference: str) -> None:
    await refused(client, await put(client, image.manifest, reference), 400, "MANIFEST_INVALID")


# --- what must be there first ---------------------------------------------------------------------------


async def test_each_missing_descriptor_is_an_error_of_its_own(client: Client) -> None:
    image = make_image(layers=3)
    await Pusher(client).blob(image.layers[1])
    answer = await put(client, image.manifest)
    await refused(client, answer, 404, *["MANIFEST_BLOB_UNKNOWN"] * 3)
    missing = [digest_of(blob) for blob in (image.config, image.layers[0], image.layers[2])]
    assert [error["detail"]["digest"] for error in answer.json["errors"]] == missing
    for digest, error in zip(missing, answer.json["errors"], strict=True):
        assert digest in error["message"]


async def test_a_missing_child_of_an_index_is_named(client: Client, image: Image) -> None:
    await put(client, image.manifest, image.digest)
    absent = make_image()
    answer = await put(client, make_index(image, absent), media_type=OCI_INDEX)
    await refused(client, answer, 404, "MANIFEST_BLOB_UNKNOWN")
    assert answer.json["errors"][0]["detail"] == {"digest": absent.digest, "mediaType": OCI_MANIFEST}


async def test_what_another_repository_holds_is_missing_here(client: Client) -> None:
    theirs = await Pusher(client, "org/other").image("v1")
    await refused(client, await put(client, theirs.manifest), 404, *["MANIFEST_BLOB_UNKNOWN"] * 2)
    index = make_index(theirs)
    await refused(client, await put(client, index, media_type=OCI_INDEX), 404, "MANIFEST_BLOB_UNKNOWN")


async def test_a_refused_first_push_leaves_no_repository(client: Client) -> None:
    await put(client, make_image().manifest)
    assert (await ask(client, "GET", "/v2/_catalog")).json == {"repositories": []}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_subject_need_not_be_there_and_is_confirmed(
    client: Client, document: dict[str, Any], algorithm: str
) -> None:
    subject = descriptor(b"later, perhaps", OCI_MANIFEST, algorithm)
    answer = await put(client, document | {"subject": subject})
    assert (answer.status, answer.headers["OCI-Subject"]) == (201, subject["digest"])


async def test_without_a_subject_none_is_confirmed(client: Client, image: Image) -> None:
    assert "OCI-Subject" not in (await put(client, image.manifest)).headers


@pytest.mark.parametrize(
    "layer",
    [
        GOOD | {"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"},
        GOOD | {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"},
        GOOD | {"urls": ["https://layers.test/one"]},
    ],
)
async def test_foreign_layers_need_not_be_there(
    client: Client, document: dict[str, Any], layer: dict[str, Any]
) -> None:
    document["layers"].append(layer)
    assert (await put(client, document)).status == 201


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, OCI_INDEX])
async def test_sparse_manifests_are_taken_where_the_configuration_says_so(start: Start, media_type: str) -> None:
    client = await start(registry={"sparse_manifests": True})
    image = make_image()
    content = image.manifest if media_type == OCI_MANIFEST else make_index(image, make_image())
    assert (await put(client, content, media_type=media_type)).status == 201
    assert (await get(client)).body == content


# --- kinds ----------------------------------------------------------------------------------------------


async def test_an_index_and_an_index_of_indexes_are_kept(client: Client, image: Image) -> None:
    await put(client, image.manifest, image.digest)
    inner = make_index(image)
    assert (await put(client, inner, digest_of(inner), OCI_INDEX)).status == 201
    outer = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor(inner, OCI_INDEX)]}
    assert (await put(client, outer, media_type=OCI_INDEX)).status == 201
    assert (await get(client)).json == outer


@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
async def test_a_list_for_two_platforms_is_kept(client: Client, media_type: str) -> None:
    images = [await Pusher(client).image(architecture=name) for name in ("amd64", "arm64")]
    children = [
        descriptor(image.manifest, OCI_MANIFEST, platform={"os": "linux", "architecture": name, "os.version": "1"})
        for image, name in zip(images, ("amd64", "arm64"), strict=True)
    ]
    content = {"schemaVersion": 2, "mediaType": media_type, "manifests": children}
    assert (await put(client, content, media_type=media_type)).status == 201
    assert (await get(client)).json == content


@pytest.mark.parametrize("layers", [[], None])
async def test_an_artifact_with_an_empty_config_and_no_layers_is_kept(client: Client, layers: list[Any] | None) -> None:
    await Pusher(client).blob(EMPTY)
    content = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.acme.sbom",
        "config": descriptor(EMPTY, OCI_EMPTY),
        "layers": layers,
    }
    assert (await put(client, content)).status == 201
    assert (await get(client)).json == content


async def test_inline_data_and_custom_fields_are_kept(client: Client, document: dict[str, Any]) -> None:
    await Pusher(client).blob(EMPTY)
    inline = descriptor(EMPTY, OCI_EMPTY, data=base64.b64encode(EMPTY).decode(), com_acme={"deep": [1, None]})
    content = document | {"config": inline, "com.acme": [{"a": 1.5}], "annotations": {"a": "b"}}
    assert (await put(client, content)).status == 201
    assert (await get(client)).json == content


@pytest.mark.parametrize("data", ["not base64!", base64.b64encode(b"{ }").decode(), base64.b64encode(b"[]").decode()])
async def test_inline_data_that_is_something_else_is_refused(
    client: Client, document: dict[str, Any], data: str
) -> None:
    await Pusher(client).blob(EMPTY)
    answer = await put(client, document | {"config": descriptor(EMPTY, OCI_EMPTY, data=data)})
    await refused(client, answer, 400, "MANIFEST_INVALID")
    assert "$.config.data" in json.dumps(answer.json)


# --- size -----------------------------------------------------------------------------------------------


def padded(document: dict[str, Any], size: int) -> bytes:
    content = json.dumps(document).encode()
    return content + b" " * (size - len(content))


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_manifest_of_4_mib_is_taken(client: Client, document: dict[str, Any], is_streamed: bool) -> None:
    content = padded(document, 4 << 20)
    data = in_pieces(content, 1 << 20) if is_streamed else BytesIO(content)
    headers = {"Content-Type": OCI_MANIFEST}
    assert (await ask(client, "PUT", f"{MANIFESTS}v1", data=data, headers=headers)).status == 201
    assert (await get(client)).body == content


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_manifest_over_the_limit_is_too_large(start: Start, is_streamed: bool) -> None:
    client = await start(registry={"manifest_bytes": 65536, "sparse_manifests": True})
    document = json.loads(make_image().manifest)
    assert (await put(client, padded(document, 65536), "fits")).status == 201
    content = padded(document, 65537)
    data = in_pieces(content) if is_streamed else content
    answer = await ask(client, "PUT", f"{MANIFESTS}v1", data=data, headers={"Content-Type": OCI_MANIFEST})
    await refused(client, answer, 413, "MANIFEST_INVALID")


# --- tags by parameter ----------------------------------------------------------------------------------


def tag_query(tags: list[str]) -> str:
    return "?" + "&".join(f"tag={tag}" for tag in tags)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("count", [1, 10, 100])
async def test_a_push_by_digest_may_set_many_tags(client: Client, image: Image, count: int, algorithm: str) -> None:
    tags = [f"t{number:03}" for number in range(count)]
    digest = digest_of(image.manifest, algorithm)
    answer = await put(client, image.manifest, digest, query=tag_query(tags))
    assert answer.status == 201
    assert ", ".join(answer.headers.getall("OCI-Tag")).split(", ") == tags
    assert answer.headers["Docker-Content-Digest"] == digest
    assert (await ask(client, "GET", "/v2/org/team/app/tags/list")).json["tags"] == tags
    for tag in tags[:: max(1, count // 3)]:
        assert (await get(client, tag)).headers["Docker-Content-Digest"] == digest


async def test_more_than_100_tags_are_too_many(client: Client, image: Image) -> None:
    answer = await put(client, image.manifest, image.digest, query=tag_query([f"t{n}" for n in range(101)]))
    assert (answer.status, answer.codes) == (414, ["MANIFEST_INVALID"])
    assert (await ask(client, "GET", "/v2/org/team/app/tags/list")).json["tags"] == []
    assert (await get(client, image.digest)).status == 404


async def test_a_tag_named_twice_counts_once(client: Client, image: Image) -> None:
    answer = await put(client, image.manifest, image.digest, query=tag_query(["a", "b", "a"]))
    assert answer.headers.getall("OCI-Tag") == ["a", "b"]


@pytest.mark.parametrize("bad", ["-bad", "", "a" * 129, "a/b"])
async def test_one_bad_tag_and_none_is_set(client: Client, image: Image, bad: str) -> None:
    answer = await put(client, image.manifest, image.digest, query=tag_query(["good", bad]))
    assert (answer.status, answer.codes) == (400, ["MANIFEST_INVALID"])
    assert (await get(client, "good")).status == 404
    assert (await get(client, image.digest)).status == 404


async def test_tags_of_a_refused_manifest_are_not_set(client: Client) -> None:
    image = make_image()
    await put(client, image.manifest, image.digest, query="?tag=a&tag=b")
    assert (await get(client, "a")).status == 404


async def test_tag_parameters_move_tags_that_are_there(client: Client, image: Image) -> None:
    before = await Pusher(client).image("latest")
    await put(client, image.manifest, image.digest, query="?tag=latest&tag=v2")
    assert (await get(client, "latest")).body == image.manifest
    assert (await get(client, before.digest)).body == before.manifest


async def test_tag_parameters_do_not_go_with_a_push_by_tag(client: Client, image: Image) -> None:
    await refused(client, await put(client, image.manifest, "v1", query="?tag=v2"), 400, "MANIFEST_INVALID")


async def test_no_tags_are_confirmed_where_none_were_named(client: Client, image: Image) -> None:
    assert "OCI-Tag" not in (await put(client, image.manifest, image.digest)).headers


async def test_a_hundred_tags_may_be_as_long_as_tags_can_be(server: HytheServer) -> None:
    # The longest line that a request can need; the server's own limits apply, so it is a server of its own.
    tags = [f"{number:03}".ljust(128, "x") for number in range(100)]
    content = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    path = f"{server.url}{MANIFESTS}{digest_of(content)}{tag_query(tags)}"
    async with (
        ClientSession(max_line_size=65536, max_headers=500) as session,
        session.put(path, data=content, headers={"Content-Type": OCI_INDEX}) as response,
    ):
        assert response.status == 201
        assert ", ".join(response.headers.getall("OCI-Tag")).split(", ") == tags


@pytest.mark.parametrize("field", ["artifactType", "config"])
async def test_a_media_type_with_a_nul_is_refused(client: Client, field: str) -> None:
    document = json.loads((await Pusher(client).image()).manifest)
    if field == "config":
        document["config"]["mediaType"] = "application/\0"
    else:
        document["artifactType"] = "a\0b"
    answer = await ask(
        client,
        "PUT",
        "/v2/org/team/app/manifests/nul",
        data=json.dumps(document),
        headers={"Content-Type": OCI_MANIFEST},
    )
    assert (answer.status, answer.codes) == (400, ["MANIFEST_INVALID"])
