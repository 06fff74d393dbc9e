"""skopeo against a server: copy in and out, list, inspect, delete."""

import json
from pathlib import Path

import pytest

from storage.oci import OCI_MANIFEST
from tests.clients.plain import PlainClient
from tests.conftest import needs
from tests.content import Image, digest_of
from tests.services.containers import ContainerTools
from tests.services.images import Layout, packed_image, random_layer, write_layout
from tests.services.processes import HytheServer

pytestmark = [needs("skopeo"), pytest.mark.clients]

REPOSITORY = "org/team/group/project/app"
IN, OUT = "--dest-tls-verify=false", "--src-tls-verify=false"


def test_an_image_comes_back_with_the_same_bytes(tools: ContainerTools, server: HytheServer, scratch: Path) -> None:
    layout = write_layout(scratch / "in", packed_image([random_layer(), random_layer(500_000)]))
    name = f"docker://{server.address}/{REPOSITORY}:1"
    tools.skopeo("copy", IN, "--preserve-digests", layout.reference, name)
    tools.skopeo("copy", OUT, "--preserve-digests", name, f"oci:{scratch / 'out'}:latest")
    assert Layout(scratch / "out", layout.digest).blobs == layout.blobs


def test_an_index_is_copied_with_all_its_platforms(tools: ContainerTools, server: HytheServer, scratch: Path) -> None:
    layers = [random_layer()]
    images = [packed_image(layers, architecture) for architecture in ("amd64", "arm64", "riscv64")]
    layout = write_layout(scratch / "in", *images)
    name = f"docker://{server.address}/{REPOSITORY}:all"
    tools.skopeo("copy", "--all", IN, "--preserve-digests", layout.reference, name)
    tools.skopeo("copy", "--all", OUT, "--preserve-digests", name, f"oci:{scratch / 'out'}:latest")
    assert Layout(scratch / "out", layout.digest).blobs == layout.blobs
    chosen = json.loads(tools.skopeo("--override-arch", "arm64", "inspect", "--tls-verify=false", name))
    assert chosen["Architecture"] == "arm64"


def test_tags_are_listed_and_an_image_is_inspected(tools: ContainerTools, server: HytheServer, scratch: Path) -> None:
    layout = write_layout(scratch / "in", packed_image([random_layer()]))
    for tag in ("1.0", "latest", "A"):
        tools.skopeo("copy", IN, layout.reference, f"docker://{server.address}/{REPOSITORY}:{tag}")
    listed = json.loads(tools.skopeo("list-tags", "--tls-verify=false", f"docker://{server.address}/{REPOSITORY}"))
    assert listed["Tags"] == ["1.0", "A", "latest"]
    image = json.loads(tools.skopeo("inspect", "--tls-verify=false", f"docker://{server.address}/{REPOSITORY}:A"))
    assert (image["Digest"], image["Architecture"]) == (layout.digest, "amd64")
    assert image["RepoTags"] == listed["Tags"]


def test_a_deleted_image_is_gone_under_all_its_tags(tools: ContainerTools, server: HytheServer, scratch: Path) -> None:
    repository = f"docker://{server.address}/{REPOSITORY}"
    gone, kept = (write_layout(scratch / name, packed_image([random_layer()])) for name in ("gone", "kept"))
    for layout, tag in ((gone, "1"), (gone, "2"), (kept, "3")):
        tools.skopeo("copy", IN, layout.reference, f"{repository}:{tag}")
    tools.skopeo("delete", "--tls-verify=false", f"{repository}:1")
    for reference in (f"{repository}:1", f"{repository}:2", f"{repository}@{gone.digest}"):
        with pytest.raises(AssertionError, match="manifest unknown"):
            tools.skopeo("inspect", "--tls-verify=false", reference)
    assert json.loads(tools.skopeo("list-tags", "--tls-verify=false", repository))["Tags"] == ["3"]


def test_an_image_converted_to_dockers_format_is_taken(
    tools: ContainerTools, server: HytheServer, scratch: Path
) -> None:
    layout = write_layout(scratch / "in", packed_image([random_layer()]))
    name = f"docker://{server.address}/{REPOSITORY}:docker"
    tools.skopeo("copy", IN, "--format", "v2s2", layout.reference, name)
    raw = json.loads(tools.skopeo("inspect", "--raw", "--tls-verify=false", name))
    assert raw["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"


def push_sha512(server: HytheServer, image: Image) -> str:
    """Push an image, all of it by sha512, under the tag 1; return the manifest's digest."""
    with PlainClient(server.url) as client:
        for blob in image.blobs:
            url = f"{server.url}/v2/{REPOSITORY}/blobs/uploads/?digest={digest_of(blob, 'sha512')}"
            assert client.ask("POST", url, blob).status == 201
        digest = digest_of(image.manifest, "sha512")
        url = f"{server.url}/v2/{REPOSITORY}/manifests/{digest}?tag=1"
        assert client.ask("PUT", url, image.manifest, Content_Type=OCI_MANIFEST).status == 201
    return digest


def test_an_image_of_sha512_goes_in_and_out(tools: ContainerTools, server: HytheServer) -> None:
    image = packed_image([random_layer(), random_layer(300_000)], algorithm="sha512")
    digest = push_sha512(server, image)
    with PlainClient(server.url) as client:
        for reference in ("1", digest):
            manifest = client.ask("GET", f"{server.url}/v2/{REPOSITORY}/manifests/{reference}")
            assert (manifest.body, manifest.headers["Docker-Content-Digest"]) == (image.manifest, digest)
        described = json.loads(image.manifest)
        for entry, content in zip([described["config"], *described["layers"]], image.blobs, strict=True):
            assert client.ask("GET", f"{server.url}/v2/{REPOSITORY}/blobs/{entry['digest']}").body == content
    # skopeo knows digests by sha256 only; of such an image it can read the manifest, and no more. So the rest is plain.
    raw = tools.skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{server.address}/{REPOSITORY}:1")
    assert raw.encode() == image.manifest
