"""Manifests: what is understood of them, what is refused and where, and that nothing else can happen."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.digest import Digest
from storage.errors import InvalidManifest
from storage.oci import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA_1,
    IMAGES,
    INDEXES,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_MANIFEST,
    Manifest,
    Relation,
    parse_manifest,
)
from tests.content import LAYER, descriptor, digest_of

ARTIFACT = "application/vnd.example.artifact"
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"


def image(**more: Any) -> dict[str, Any]:
    config, layers = descriptor(b"config", OCI_CONFIG), [descriptor(b"one", LAYER), descriptor(b"two", LAYER)]
    return {"schemaVersion": 2, "config": config, "layers": layers} | more


def index(**more: Any) -> dict[str, Any]:
    platform = {"os": "linux", "architecture": "arm64", "variant": "v8", "os.version": "1"}
    manifests = [descriptor(b"image", OCI_MANIFEST, platform=platform), descriptor(b"other", OCI_MANIFEST)]
    return {"schemaVersion": 2, "manifests": manifests} | more


def parse(document: Any, content_type: str = "") -> Manifest:
    return parse_manifest(json.dumps(document).encode(), content_type)


@pytest.mark.parametrize("media_type", sorted(IMAGES))
def test_an_image_links_its_config_and_its_layers(media_type: str) -> None:
    manifest = parse(image(), media_type)
    assert manifest.media_type == media_type
    assert [(link.relation, link.digest) for link in manifest.links] == [
        (Relation.CONFIG, Digest.of(b"config")),
        (Relation.LAYER, Digest.of(b"one")),
        (Relation.LAYER, Digest.of(b"two")),
    ]
    assert all(link.is_required for link in manifest.links)


@pytest.mark.parametrize("media_type", sorted(INDEXES))
def test_an_index_links_its_children(media_type: str) -> None:
    manifest = parse(index(), media_type)
    assert [link.relation for link in manifest.links] == [Relation.CHILD] * 2
    assert [str(link.descriptor.platform or "") for link in manifest.links] == ["linux/arm64/v8", ""]


@pytest.mark.parametrize(
    ("document", "content_type", "expected"),
    [
        (image(), "", OCI_MANIFEST),
        (index(), "", OCI_INDEX),
        (image(mediaType=DOCKER_MANIFEST), "", DOCKER_MANIFEST),
        (index(mediaType=DOCKER_LIST), "", DOCKER_LIST),
        (image(), DOCKER_MANIFEST, DOCKER_MANIFEST),
        (image(mediaType=OCI_MANIFEST), OCI_MANIFEST, OCI_MANIFEST),
        (image(), ARTIFACT, ARTIFACT),
        (index(manifests=[]), "", OCI_INDEX),
    ],
)
def test_the_type_is_what_the_request_or_the_body_or_the_shape_says(
    document: Any, content_type: str, expected: str
) -> None:
    assert parse(document, content_type).media_type == expected


@pytest.mark.parametrize(
    ("document", "where"),
    [
        (image(schemaVersion=1), "$.schemaVersion"),
        (image(schemaVersion="2"), "$.schemaVersion"),
        ({"layers": [], "config": descriptor(b"", OCI_CONFIG)}, "$.schemaVersion"),
        ({"schemaVersion": 2, "layers": []}, "$.config"),
        ({"schemaVersion": 2, "config": descriptor(b"", OCI_CONFIG)}, "$.layers"),
        (image(config=None), "$.config"),
        (image(config=[]), "$.config"),
        (image(layers={}), "$.layers"),
        (image(layers=[1]), "$.layers[0]"),
        (image(layers=[descriptor(b"", LAYER), {}]), "$.layers[1]"),
        (image(layers=[descriptor(b"", LAYER) | {"size": -1}]), "$.layers[0].size"),
        (image(layers=[descriptor(b"", LAYER) | {"size": 2**63}]), "$.layers[0].size"),
        (image(layers=[descriptor(b"", LAYER) | {"size": 1.5}]), "$.layers[0].size"),
        (image(layers=[descriptor(b"", LAYER) | {"digest": "sha256:0"}]), "$.layers[0].digest"),
        (image(layers=[descriptor(b"", LAYER) | {"digest": 7}]), "$.layers[0].digest"),
        (image(layers=[descriptor(b"", "")]), "$.layers[0].mediaType"),
        (image(config=descriptor(b"", OCI_CONFIG) | {"digest": "md5:0"}), "$.config.digest"),
        (image(subject={"digest": "x"}), "$.subject"),
        (image(subject=descriptor(b"", OCI_MANIFEST) | {"digest": "x"}), "$.subject.digest"),
        (image(annotations={"a": 1}), "$.annotations"),
        (image(artifactType=1), "$.artifactType"),
        (index(manifests=[descriptor(b"", OCI_MANIFEST, platform="linux")]), "$.manifests[0].platform"),
        (index(manifests=[descriptor(b"", OCI_MANIFEST) | {"digest": "sha256:"}]), "$.manifests[0].digest"),
    ],
)
def test_a_wrong_shape_is_refused_with_the_place(document: Any, where: str) -> None:
    with pytest.raises(InvalidManifest) as raised:
        parse(document)
    assert where in str(raised.value)


@pytest.mark.parametrize(
    ("document", "content_type"),
    [
        (image(mediaType=OCI_MANIFEST), OCI_INDEX),
        (image(mediaType=OCI_MANIFEST), DOCKER_MANIFEST),
        (image(mediaType=OCI_INDEX), ""),
        (index(mediaType=OCI_MANIFEST), ""),
        (index(), OCI_MANIFEST),
        (image(), DOCKER_LIST),
        (index() | image(), OCI_INDEX),
    ],
)
def test_a_manifest_that_is_another_type_than_it_says_is_refused(document: Any, content_type: str) -> None:
    with pytest.raises(InvalidManifest):
        parse(document, content_type)


@pytest.mark.parametrize("content_type", ["", *sorted(DOCKER_SCHEMA_1)])
def test_schema_1_is_refused_with_what_to_do(content_type: str) -> None:
    with pytest.raises(InvalidManifest, match="schema 1 is not supported: push again"):
        parse({"schemaVersion": 1, "name": "app", "tag": "latest", "fsLayers": []}, content_type)


@pytest.mark.parametrize(
    "layer", [descriptor(b"", FOREIGN), descriptor(b"", NONDISTRIBUTABLE), descriptor(b"", LAYER, urls=["http://a"])]
)
def test_what_lives_elsewhere_is_not_required(layer: dict[str, Any]) -> None:
    links = parse(image(layers=[layer])).links
    assert [link.is_required for link in links] == [True, False]


def test_empty_urls_make_no_layer_foreign() -> None:
    assert all(link.is_required for link in parse(image(layers=[descriptor(b"", LAYER, urls=[])])).links)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, OCI_CONFIG),
        ({"artifactType": ARTIFACT}, ARTIFACT),
        ({"config": descriptor(b"{}", OCI_EMPTY), "artifactType": ARTIFACT}, ARTIFACT),
        ({"config": descriptor(b"{}", ARTIFACT)}, ARTIFACT),
    ],
)
def test_the_type_of_an_artifact_is_its_own_or_its_configs(more: dict[str, Any], expected: str) -> None:
    assert parse(image(**more)).artifact_type == expected


def test_subject_and_annotations_are_read() -> None:
    manifest = parse(image(subject=descriptor(b"it", OCI_MANIFEST, "sha512"), annotations={"a": "b"}))
    assert str(manifest.subject) == digest_of(b"it", "sha512")
    assert manifest.annotations == {"a": "b"}
    assert parse(index(subject=None, annotations=None)).subject is None


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_inline_data_is_checked(algorithm: str) -> None:
    good = descriptor(b"config", OCI_CONFIG, algorithm, data=base64.b64encode(b"config").decode())
    assert parse(image(config=good)).links[0].digest == Digest.of(b"config", algorithm)


@pytest.mark.parametrize(
    "change",
    [
        {"data": base64.b64encode(b"gifnoc").decode()},
        {"data": base64.b64encode(b"config and more").decode()},
        {"size": 7},
        {"data": "not base64!"},
        {"data": "Y29uZmln\n"},
        {"data": "Y29uZml"},
        {"data": "é"},
    ],
)
def test_inline_data_that_is_not_what_the_descriptor_says_is_refused(change: dict[str, Any]) -> None:
    good = descriptor(b"config", OCI_CONFIG, data=base64.b64encode(b"config").decode())
    with pytest.raises(InvalidManifest, match=r"\$\.config\.data"):
        parse(image(config=good | change))


@pytest.mark.parametrize("content", [b'{"anything": [1, 2, {"at": "all"}]}', b'{"config": 1, "layers": 2}', b"{}"])
def test_a_type_nobody_has_heard_of_is_kept_without_understanding(content: bytes) -> None:
    manifest = parse_manifest(content, ARTIFACT)
    assert manifest == Manifest(ARTIFACT, (), None, "", {})


def test_of_a_type_nobody_has_heard_of_is_understood_what_can_be() -> None:
    subject = descriptor(b"it", OCI_MANIFEST)
    manifest = parse({"artifactType": "a", "subject": subject, "annotations": {"b": "c"}}, ARTIFACT)
    assert manifest == Manifest(ARTIFACT, (), Digest.of(b"it"), "a", {"b": "c"})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"mediaType": "\xff"}',
        b'{"mediaType": "\\ud800"}',
        b'{"schemaVersion": 2, "annotations": {"a": "\xc3"}, "config": {}, "layers": []}',
        b'{"schemaVersion": ' + b"9" * 10000 + b"}",
        b'{"schemaVersion": 1e999}',
        b'{"config":' + b'{"a":' * 100_000,
        b'{"layers":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
    ids=range(14),
)
@pytest.mark.parametrize("content_type", ["", OCI_MANIFEST, OCI_INDEX])
def test_what_is_no_manifest_is_refused(content: bytes, content_type: str) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(content, content_type)


content_types = st.sampled_from(["", ARTIFACT, *sorted(IMAGES | INDEXES | DOCKER_SCHEMA_1)]) | st.text()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(st.binary(), content_types)
def test_any_bytes_are_a_manifest_or_refused(content: bytes, content_type: str) -> None:
    understood_or_refused(content, content_type)


@given(values, content_types)
def test_any_json_is_a_manifest_or_refused(value: Any, content_type: str) -> None:
    understood_or_refused(json.dumps(value).encode(), content_type)


@given(st.data(), content_types)
def test_a_manifest_with_anything_in_any_place_is_understood_or_refused(data: st.DataObject, content_type: str) -> None:
    document = data.draw(st.sampled_from([image(), index()]))
    place: Any = document
    # Go down some steps, then put anything there.
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(values)
    understood_or_refused(json.dumps(document).encode(), content_type)


@given(
    data=values, field=st.sampled_from(["data", "urls", "annotations", "artifactType", "platform", "size", "digest"])
)
def test_a_descriptor_with_anything_in_it_is_understood_or_refused(data: Any, field: str) -> None:
    document = image(config=descriptor(b"config", OCI_CONFIG) | {field: data})
    understood_or_refused(json.dumps(document).encode(), "")


def understood_or_refused(content: bytes, content_type: str) -> None:
    with contextlib.suppress(InvalidManifest):
        manifest = parse_manifest(content, content_type)
        assert manifest.media_type
        assert not content_type or manifest.media_type == content_type
