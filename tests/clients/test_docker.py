"""docker against a server: dockerd does the work, its command and docker-py tell it what to do."""

import asyncio
import json
from urllib.request import Request, urlopen

import pytest
from docker import DockerClient

from tests.clients.traffic import Traffic, uploads_in
from tests.conftest import needs, needs_root
from tests.services.docker import DockerDaemon
from tests.services.processes import HytheServer
from tests.services.relay import Relay

pytestmark = [needs("dockerd", "docker"), needs_root, pytest.mark.clients]


@pytest.mark.parametrize("repository", ["app", "org/team/group/project/app", "blobs/uploads/manifests/tags/list"])
def test_an_image_comes_back_as_it_was_pushed(docker: DockerDaemon, server: HytheServer, repository: str) -> None:
    name = f"{server.address}/{repository}:1"
    image = docker.make_image(name)
    docker("push", name)
    docker.forget(image)
    docker("pull", name)
    assert docker.inspect(name)["Id"] == image


def test_an_image_of_many_layers_comes_back_whole(docker: DockerDaemon, server: HytheServer) -> None:
    name = f"{server.address}/org/app:layers"
    docker.make_image(name, size=1_000_000, layers=7)
    pushed = docker.inspect(name)
    docker("push", name)
    docker.forget(name)
    docker("pull", name)
    pulled = docker.inspect(name)
    assert (pulled["Id"], pulled["RootFS"]) == (pushed["Id"], pushed["RootFS"])
    assert len(pulled["RootFS"]["Layers"]) == 7


def test_an_image_pushed_again_is_not_uploaded_again(
    docker: DockerDaemon, server: HytheServer, traffic: Traffic
) -> None:
    name = f"{server.address}/org/app:1"
    docker.make_image(name)
    docker("push", name)
    assert uploads_in(traffic.new())["upload", "PUT", 201] == 2
    docker("push", name)
    again = traffic.new()
    assert not uploads_in(again)
    assert again["blob", "HEAD", 200] >= 1
    assert again["manifest", "PUT", 201] == 1


def test_a_layer_of_another_repository_is_mounted_and_not_uploaded(
    docker: DockerDaemon, server: HytheServer, traffic: Traffic
) -> None:
    first, second = f"{server.address}/org/first:1", f"{server.address}/other/second:1"
    image = docker.make_image(first, size=100_000)
    docker("push", first)
    traffic.new()
    received = traffic.value("hythe_received_bytes_total")
    docker("tag", first, second)
    docker("push", second)
    requests = traffic.new()
    assert requests["uploads", "POST", 201] == 1
    # Only the configuration and the manifest are sent.
    assert traffic.value("hythe_received_bytes_total") - received < 10_000
    docker.forget(image)
    docker("pull", second)
    assert docker.inspect(second)["Id"] == image


def test_what_was_deleted_by_digest_cannot_be_pulled(docker: DockerDaemon, server: HytheServer) -> None:
    name = f"{server.address}/org/app:1"
    docker.make_image(name)
    docker("push", name)
    digest = docker.inspect(name)["RepoDigests"][0].partition("@")[2]
    with urlopen(Request(f"{server.url}/v2/org/app/manifests/{digest}", method="DELETE"), timeout=10) as answer:
        assert answer.status == 202
    docker.forget(name)
    for reference in (name, f"{server.address}/org/app@{digest}"):
        with pytest.raises(AssertionError, match=r"manifest unknown|not found"):
            docker("pull", reference)


def test_an_image_is_pulled_by_digest(docker: DockerDaemon, server: HytheServer) -> None:
    name = f"{server.address}/org/app:1"
    image = docker.make_image(name)
    docker("push", name)
    by_digest = docker.inspect(name)["RepoDigests"][0]
    docker.forget(image)
    docker("pull", by_digest)
    assert docker.inspect(by_digest)["Id"] == image


def test_all_tags_of_a_repository_are_pushed_and_pulled(docker: DockerDaemon, server: HytheServer) -> None:
    repository = f"{server.address}/org/app"
    images = {f"{repository}:{tag}": docker.make_image(f"{repository}:{tag}") for tag in ("1", "2", "latest")}
    docker("push", "--all-tags", repository)
    docker.forget(*images)
    docker("pull", "--all-tags", repository)
    assert {name: docker.inspect(name)["Id"] for name in images} == images


def test_a_manifest_list_serves_each_platform_its_image(docker: DockerDaemon, server: HytheServer) -> None:
    repository = f"{server.address}/org/app"
    images = {
        architecture: docker.make_image(f"{repository}:{architecture}", architecture)
        for architecture in ("amd64", "arm64")
    }
    names = [f"{repository}:{architecture}" for architecture in images]
    for name in names:
        docker("push", name)
    docker("manifest", "create", "--insecure", f"{repository}:all", *names)
    docker("manifest", "annotate", f"{repository}:all", f"{repository}:arm64", "--os", "linux", "--variant", "v8")
    docker("manifest", "push", "--insecure", "--purge", f"{repository}:all")

    listed = json.loads(docker("manifest", "inspect", "--insecure", f"{repository}:all"))["manifests"]
    platforms = {(entry["platform"]["architecture"], entry["platform"].get("variant")) for entry in listed}
    assert platforms == {("amd64", None), ("arm64", "v8")}
    docker.forget(*names)
    for architecture, image in images.items():
        docker("pull", "--platform", f"linux/{architecture}", f"{repository}:all")
        pulled = docker.inspect(f"{repository}:all")
        assert (pulled["Id"], pulled["Architecture"]) == (image, architecture)
        docker.forget(f"{repository}:all")


async def test_a_push_whose_client_was_killed_succeeds_when_repeated(
    docker: DockerDaemon, server: HytheServer, traffic: Traffic
) -> None:
    async with Relay(server.port, hold_after=3_000_000) as relay:
        name = f"{relay.address}/org/app:large"
        image = docker.make_image(name, size=6_000_000)
        push = docker.begin("push", name)
        try:
            await relay.holds(60)
        finally:
            push.kill()
            push.wait()
        relay.cut()
        assert traffic.new()["manifest", "PUT", 201] == 0
        await asyncio.to_thread(docker, "push", name)
    docker.forget(name)
    docker("pull", f"{server.address}/org/app:large")
    assert docker.inspect(f"{server.address}/org/app:large")["Id"] == image


async def test_a_pull_that_was_cut_off_goes_on_where_it_stopped(
    docker: DockerDaemon, server: HytheServer, traffic: Traffic
) -> None:
    name = f"{server.address}/org/app:large"
    image = docker.make_image(name, size=6_000_000)
    docker("push", name)
    docker.forget(name)
    async with Relay(server.port, hold_after=3_000_000) as relay:
        relay.cut()
        name = f"{relay.address}/org/app:large"
        await asyncio.to_thread(docker, "pull", name)
    assert docker.inspect(name)["Id"] == image
    assert traffic.new()["blob", "GET", 206] == 1


def test_docker_py_pushes_tags_and_pulls(docker: DockerDaemon, docker_py: DockerClient, server: HytheServer) -> None:
    made = docker.make_image("made-here:1")
    repository = f"{server.address}/org/team/app"
    assert docker_py.images.get(made).tag(repository, tag="py")
    said = list(docker_py.images.push(repository, tag="py", stream=True, decode=True))
    assert not [line for line in said if "error" in line]
    assert docker_py.api.inspect_distribution(f"{repository}:py")["Descriptor"]["digest"].startswith("sha256:")
    docker.forget(made)
    pulled = docker_py.images.pull(repository, tag="py")
    assert pulled.id == made
    assert pulled.tags == [f"{repository}:py"]
