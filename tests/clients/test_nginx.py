"""A real nginx between clients and a server: every address that is given out leads back through it."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.oci import OCI_MANIFEST
from tests.clients.plain import PlainClient, with_query
from tests.conftest import needs, needs_root
from tests.content import Image, descriptor, digest_of, make_image
from tests.services.containers import ContainerTools
from tests.services.docker import DockerDaemon
from tests.services.images import Layout, packed_image, random_layer, write_layout
from tests.services.nginx import Nginx, nginx
from tests.services.processes import HytheServer

pytestmark = [needs("nginx"), pytest.mark.clients]


@pytest.fixture
def proxy(server: HytheServer, scratch: Path) -> Iterator[Nginx]:
    """An nginx at the root, on another port."""
    with nginx(scratch / "nginx", server) as running:
        yield running


@pytest.fixture(params=["", "/registry", "/tools/images.v2"])
def proxy_anywhere(request: pytest.FixtureRequest, server: HytheServer, scratch: Path) -> Iterator[Nginx]:
    """An nginx that takes a path prefix away, or none."""
    with nginx(scratch / "nginx", server, prefix=request.param) as running:
        yield running


@needs("dockerd", "docker")
@needs_root
def test_docker_pushes_and_pulls_through_another_port(docker: DockerDaemon, proxy: Nginx) -> None:
    name = f"{proxy.address}/org/team/app:1"
    image = docker.make_image(name, size=3_000_000, layers=3)
    docker("push", name)
    docker.forget(name)
    docker("pull", name)
    assert docker.inspect(name)["Id"] == image


@needs("skopeo")
def test_skopeo_copies_in_and_out_through_another_port(tools: ContainerTools, proxy: Nginx, scratch: Path) -> None:
    layout = write_layout(scratch / "in", packed_image([random_layer(), random_layer(3_000_000)]))
    name = f"docker://{proxy.address}/org/team/app:1"
    tools.skopeo("copy", "--dest-tls-verify=false", "--preserve-digests", layout.reference, name)
    tools.skopeo("copy", "--src-tls-verify=false", "--preserve-digests", name, f"oci:{scratch / 'out'}:latest")
    assert Layout(scratch / "out", layout.digest).blobs == layout.blobs


def test_an_upload_goes_on_where_each_location_says(proxy_anywhere: Nginx) -> None:
    content = secrets.token_bytes(3_000_000)
    digest = digest_of(content)
    uploads = f"{proxy_anywhere.url}/v2/org/team/app/blobs/uploads/"
    with PlainClient(uploads) as client:
        begun = client.ask("POST", uploads)
        assert begun.location.startswith(uploads)
        first = client.ask("PATCH", begun.location, iter([content[:1_000_000], content[1_000_000:2_000_000]]))
        assert (first.status, first.headers["Range"]) == (202, "0-1999999")
        asked = client.ask("GET", first.location)
        assert (asked.status, asked.headers["Range"]) == (204, "0-1999999")
        last = client.ask("PATCH", asked.location, content[2_000_000:], Content_Range="2000000-2999999")
        assert last.status == 202
        closed = client.ask("PUT", with_query(last.location, f"digest={digest}"))
        assert (closed.status, closed.location) == (201, f"{proxy_anywhere.url}/v2/org/team/app/blobs/{digest}")
        assert client.ask("GET", closed.location).body == content


def test_what_was_pushed_mounted_or_refused_is_where_the_answer_says(proxy_anywhere: Nginx) -> None:
    image = make_image(layers=0)
    digest = digest_of(image.config)
    root = f"{proxy_anywhere.url}/v2"
    with PlainClient(root) as client:
        pushed = client.ask("POST", f"{root}/a/blobs/uploads/?digest={digest}", image.config)
        assert (pushed.status, client.ask("GET", pushed.location).body) == (201, image.config)
        mounted = client.ask("POST", f"{root}/b/blobs/uploads/?mount={digest}&from=a")
        assert (mounted.status, client.ask("GET", mounted.location).body) == (201, image.config)
        begun = client.ask("POST", f"{root}/b/blobs/uploads/")
        refused = client.ask("PATCH", begun.location, b"content", Content_Range="5-11")
        assert (refused.status, client.ask("DELETE", refused.location).status) == (416, 204)
        named = client.ask("PUT", f"{root}/b/manifests/1", image.manifest, Content_Type=OCI_MANIFEST)
        assert (named.status, client.ask("GET", named.location).body) == (201, image.manifest)


def test_listings_are_followed_to_their_end(proxy_anywhere: Nginx) -> None:
    root = f"{proxy_anywhere.url}/v2"
    tags, names = [f"t{number}" for number in range(7)], ["a", "b/c", "d/e/f"]
    subject, *referrers = (make_image(layers=0), *(make_image(layers=0) for _ in range(5)))
    with PlainClient(root) as client:
        for name in names:
            push(client, f"{root}/{name}", subject, tags)
        for referrer in referrers:
            refer(referrer, subject)
            push(client, f"{root}/a", referrer, [])
        expected = sorted(referrer.digest for referrer in referrers)
        found = [entry["digest"] for entry in follow(client, f"{root}/a/referrers/{subject.digest}?n=2", "manifests")]
        assert found == expected
        assert follow(client, f"{root}/a/tags/list?n=3", "tags") == tags
        assert follow(client, f"{root}/_catalog?n=2", "repositories") == names


def refer(image: Image, subject: Image) -> None:
    pointed = {**json.loads(image.manifest), "subject": descriptor(subject.manifest, OCI_MANIFEST)}
    image.manifest = json.dumps(pointed).encode()


def push(client: PlainClient, repository: str, image: Image, tags: list[str]) -> None:
    pushed = client.ask("POST", f"{repository}/blobs/uploads/?digest={digest_of(image.config)}", image.config)
    assert pushed.status == 201
    named = "&".join(f"tag={tag}" for tag in tags)
    url = f"{repository}/manifests/{image.digest}?{named}"
    assert client.ask("PUT", url, image.manifest, Content_Type=OCI_MANIFEST).status == 201


def follow(client: PlainClient, url: str, key: str) -> list[Any]:
    """Return what stands on page after page; at least one link was there to follow."""
    page = client.ask("GET", url)
    found = json.loads(page.body)[key]
    pages = 1
    while page.next_page is not None:
        page = client.ask("GET", page.next_page)
        assert page.status == 200, page.url
        found += json.loads(page.body)[key]
        pages += 1
    assert pages > 1
    return list(found)
