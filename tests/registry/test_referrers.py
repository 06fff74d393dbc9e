"""Who points to a manifest. [distribution-spec: end-12a, end-12b, Referrers Tag Schema]"""

import json
from typing import Any

import pytest

from storage.digest import HEX_LENGTH
from storage.oci import OCI_EMPTY, OCI_INDEX, OCI_MANIFEST
from tests.content import Client, Image, Pusher, descriptor, digest_of
from tests.registry.talk import Answer, ask
from tests.registry.test_tags import next_page

ALGORITHMS = sorted(HEX_LENGTH)
EMPTY = b"{}"
SBOM = "application/vnd.acme.sbom"
SIGNATURE = "application/vnd.acme.signature"
REFERRERS = "/v2/org/team/app/referrers/"


@pytest.fixture
async def image(client: Client) -> Image:
    await Pusher(client).blob(EMPTY)
    return await Pusher(client).image("v1")


async def refer(client: Client, subject: dict[str, Any], **more: Any) -> str:
    """Push an artifact about a subject; return its digest."""
    content = json.dumps(artifact(subject=subject, **more)).encode()
    await Pusher(client).manifest(content)
    return digest_of(content)


def artifact(**more: Any) -> dict[str, Any]:
    fields = {"mediaType": OCI_MANIFEST, "config": descriptor(EMPTY, OCI_EMPTY), "layers": []}
    return {"schemaVersion": 2, **fields, **more}


def of(image: Image, algorithm: str = "sha256") -> dict[str, Any]:
    return descriptor(image.manifest, OCI_MANIFEST, algorithm)


async def listed(client: Client, digest: str, query: str = "") -> list[dict[str, Any]]:
    answer = await ask(client, "GET", f"{REFERRERS}{digest}{query}")
    check_index(answer)
    found: list[dict[str, Any]] = answer.json["manifests"]
    return found


def check_index(answer: Answer) -> None:
    assert (answer.status, answer.headers["Content-Type"]) == (200, OCI_INDEX)
    assert (answer.json["schemaVersion"], answer.json["mediaType"]) == (2, OCI_INDEX)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_referrer_is_described(client: Client, image: Image, algorithm: str) -> None:
    content = artifact(subject=of(image, algorithm), artifactType=SBOM, annotations={"org.acme.a": "b", "ü": "ö"})
    data = json.dumps(content).encode()
    await Pusher(client).manifest(data)
    assert await listed(client, digest_of(image.manifest, algorithm)) == [
        descriptor(data, OCI_MANIFEST, artifactType=SBOM, annotations=content["annotations"])
    ]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_referrer_is_named_by_the_digest_it_was_pushed_under(
    client: Client, image: Image, algorithm: str
) -> None:
    data = json.dumps(artifact(subject=of(image), artifactType=SBOM)).encode()
    digest = digest_of(data, algorithm)
    await Pusher(client).manifest(data, digest)
    assert [entry["digest"] for entry in await listed(client, image.digest)] == [digest]


@pytest.mark.parametrize("name", ["org/team/app", "no/such"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_nobody_refers_to_what_is_unknown(client: Client, image: Image, name: str, algorithm: str) -> None:
    answer = await ask(client, "GET", f"/v2/{name}/referrers/{digest_of(b'never pushed', algorithm)}")
    check_index(answer)
    assert answer.json["manifests"] == []


@pytest.mark.parametrize("digest", ["sha256:abc", "sha256:" + "A" * 64, "md5:" + "0" * 32, "v1"])
async def test_a_malformed_digest_is_refused(client: Client, image: Image, digest: str) -> None:
    answer = await ask(client, "GET", REFERRERS + digest)
    assert (answer.status, answer.codes) == (400, ["DIGEST_INVALID"])


async def test_a_referrer_may_come_before_its_subject(client: Client) -> None:
    await Pusher(client).blob(EMPTY)
    subject = descriptor(b"later", OCI_MANIFEST)
    digest = await refer(client, subject)
    assert [entry["digest"] for entry in await listed(client, subject["digest"])] == [digest]


async def test_without_an_artifact_type_that_of_the_config_is_told(client: Client, image: Image) -> None:
    await refer(client, of(image), config=descriptor(EMPTY, "application/vnd.acme.config.v1+json"))
    (entry,) = await listed(client, image.digest)
    assert entry["artifactType"] == "application/vnd.acme.config.v1+json"
    assert "annotations" not in entry


@pytest.mark.parametrize("artifact_type", [SBOM, None])
async def test_an_index_can_be_a_referrer(client: Client, image: Image, artifact_type: str | None) -> None:
    fields: dict[str, Any] = {"artifactType": artifact_type} if artifact_type else {}
    content = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "subject": of(image)} | fields
    data = json.dumps(content).encode()
    created = await Pusher(client).manifest(data, media_type=OCI_INDEX)
    assert created.headers["OCI-Subject"] == image.digest
    assert await listed(client, image.digest) == [descriptor(data, OCI_INDEX, **fields)]


async def test_referrers_can_be_filtered_by_artifact_type(client: Client, image: Image) -> None:
    sbom = await refer(client, of(image), artifactType=SBOM)
    await refer(client, of(image), artifactType=SIGNATURE)
    answer = await ask(client, "GET", f"{REFERRERS}{image.digest}", params={"artifactType": SBOM})
    check_index(answer)
    assert [entry["digest"] for entry in answer.json["manifests"]] == [sbom]
    assert answer.headers["OCI-Filters-Applied"] == "artifactType"


async def test_a_filter_that_fits_nobody_was_applied_too(client: Client, image: Image) -> None:
    await refer(client, of(image), artifactType=SIGNATURE)
    answer = await ask(client, "GET", f"{REFERRERS}{image.digest}", params={"artifactType": SBOM})
    assert (answer.json["manifests"], answer.headers["OCI-Filters-Applied"]) == ([], "artifactType")


async def test_the_type_of_the_config_can_be_filtered_by(client: Client, image: Image) -> None:
    digest = await refer(client, of(image), config=descriptor(EMPTY, SBOM))
    assert [entry["digest"] for entry in await listed(client, image.digest, f"?artifactType={SBOM}")] == [digest]


async def test_without_a_filter_none_was_applied(client: Client, image: Image) -> None:
    assert "OCI-Filters-Applied" not in (await ask(client, "GET", f"{REFERRERS}{image.digest}")).headers


@pytest.mark.parametrize("query", ["n=2", f"n=2&artifactType={SBOM}"])
async def test_a_long_list_comes_in_pages(client: Client, image: Image, query: str) -> None:
    digests = [await refer(client, of(image), artifactType=SBOM, number=number) for number in range(5)]
    await refer(client, of(image), artifactType=SIGNATURE)
    expected = await listed(client, image.digest, f"?{query.replace('n=2', 'n=100')}")
    assert {entry["digest"] for entry in expected} >= set(digests)
    path, found = f"{REFERRERS}{image.digest}?{query}", []
    while path:
        answer = await ask(client, "GET", path)
        check_index(answer)
        assert len(answer.json["manifests"]) <= 2
        assert ("OCI-Filters-Applied" in answer.headers) == ("artifactType" in query)
        found += answer.json["manifests"]
        path = next_page(answer)
    assert found == expected


async def test_a_page_of_none_leads_nowhere(client: Client, image: Image) -> None:
    await refer(client, of(image))
    answer = await ask(client, "GET", f"{REFERRERS}{image.digest}?n=0")
    assert (answer.json["manifests"], answer.headers.get("Link")) == ([], None)


async def test_a_deleted_referrer_is_not_listed(client: Client, image: Image) -> None:
    gone = await refer(client, of(image), artifactType=SBOM)
    stays = await refer(client, of(image), artifactType=SIGNATURE)
    assert (await ask(client, "DELETE", f"/v2/org/team/app/manifests/{gone}")).status == 202
    assert [entry["digest"] for entry in await listed(client, image.digest)] == [stays]


async def test_referrers_outlive_their_subject(client: Client, image: Image) -> None:
    digest = await refer(client, of(image))
    await ask(client, "DELETE", f"/v2/org/team/app/manifests/{image.digest}")
    assert [entry["digest"] for entry in await listed(client, image.digest)] == [digest]


async def test_referrers_are_only_visible_in_their_repository(client: Client, image: Image) -> None:
    await refer(client, of(image))
    await Pusher(client, "org/other").blob(EMPTY)
    for name in ("org/other", "org/team", "org/team/app/deeper"):
        assert (await ask(client, "GET", f"/v2/{name}/referrers/{image.digest}")).json["manifests"] == []


# --- what clients listed themselves, before a registry did it ---------------------------------------------


def schema_tag(image: Image, algorithm: str) -> str:
    hexadecimal = digest_of(image.manifest, algorithm).partition(":")[2]
    return f"{algorithm}-{hexadecimal[:64]}"


async def list_by_tag(client: Client, tag: str, *entries: Any) -> Answer:
    content = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries)}
    path = f"/v2/org/team/app/manifests/{tag}"
    return await ask(client, "PUT", path, data=json.dumps(content), headers={"Content-Type": OCI_INDEX})


async def push_without_subject(client: Client, **more: Any) -> dict[str, Any]:
    data = json.dumps(artifact(artifactType=SBOM, **more)).encode()
    await Pusher(client).manifest(data)
    return descriptor(data, OCI_MANIFEST, artifactType=SBOM)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_what_was_listed_by_tag_is_merged_in(client: Client, image: Image, algorithm: str) -> None:
    tagged = await push_without_subject(client)
    digest = await refer(client, of(image, algorithm), artifactType=SIGNATURE)
    assert (await list_by_tag(client, schema_tag(image, algorithm), tagged)).status == 201
    found = await listed(client, digest_of(image.manifest, algorithm))
    assert tagged in found
    assert sorted(entry["digest"] for entry in found) == sorted([digest, tagged["digest"]])


async def test_what_was_listed_both_ways_is_told_once(client: Client, image: Image) -> None:
    data = json.dumps(artifact(subject=of(image), artifactType=SBOM)).encode()
    await Pusher(client).manifest(data)
    await list_by_tag(client, schema_tag(image, "sha256"), descriptor(data, OCI_MANIFEST, artifactType=SIGNATURE))
    assert await listed(client, image.digest) == [descriptor(data, OCI_MANIFEST, artifactType=SBOM)]


async def test_what_was_listed_by_tag_is_filtered_too(client: Client, image: Image) -> None:
    tagged = await push_without_subject(client)
    await list_by_tag(client, schema_tag(image, "sha256"), tagged)
    assert await listed(client, image.digest, f"?artifactType={SBOM}") == [tagged]
    assert await listed(client, image.digest, f"?artifactType={SIGNATURE}") == []


async def test_what_was_listed_by_tag_goes_when_it_is_deleted(client: Client, image: Image) -> None:
    gone, stays = [await push_without_subject(client, number=number) for number in range(2)]
    await list_by_tag(client, schema_tag(image, "sha256"), gone, stays)
    await ask(client, "DELETE", f"/v2/org/team/app/manifests/{gone['digest']}")
    assert await listed(client, image.digest) == [stays]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_who_lists_by_tag_is_told_that_there_is_no_need(client: Client, image: Image, algorithm: str) -> None:
    warned = await list_by_tag(client, schema_tag(image, algorithm))
    assert warned.headers["Warning"].startswith('299 - "')
    assert warned.headers["Warning"].endswith('"')
    assert "Warning" not in (await list_by_tag(client, "v2")).headers


@pytest.mark.parametrize(
    "content",
    [
        {"manifests": 5},
        {"manifests": True},
        {"manifests": "text"},
        {"manifests": None},
        {"manifests": {"digest": "x"}},
        {"manifests": [5, None, [], {}]},
        {"manifests": [{"digest": []}, {"digest": {}}, {"digest": 5}, {"digest": None}]},
        {},
    ],
)
async def test_nonsense_under_the_tag_does_no_harm(client: Client, image: Image, content: dict[str, Any]) -> None:
    digest = await refer(client, of(image))
    path = f"/v2/org/team/app/manifests/{schema_tag(image, 'sha256')}"
    headers = {"Content-Type": "application/vnd.acme.rocket+json"}
    assert (await ask(client, "PUT", path, data=json.dumps(content), headers=headers)).status == 201
    assert [entry["digest"] for entry in await listed(client, image.digest)] == [digest]


async def test_an_image_under_the_tag_does_no_harm(client: Client, image: Image) -> None:
    await Pusher(client).manifest(image.manifest, schema_tag(image, "sha256"))
    assert await listed(client, image.digest) == []


async def test_what_is_no_digest_in_a_clients_own_list_is_passed_over(client: Client, image: Image) -> None:
    entries = [{"digest": digest} for digest in ("a\0b", "sha256:short", "", None, 7, "\0")]
    good = {"mediaType": OCI_MANIFEST, "digest": image.digest, "size": len(image.manifest)}
    index = {"schemaVersion": 2, "mediaType": "application/x-index", "manifests": [*entries, good]}
    pushed = await ask(
        client,
        "PUT",
        f"/v2/org/team/app/manifests/{image.digest.replace(':', '-')}",
        data=json.dumps(index),
        headers={"Content-Type": "application/x-index"},
    )
    assert pushed.status == 201
    assert await listed(client, image.digest) == [good]
