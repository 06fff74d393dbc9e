"""buildah and podman against a server."""

import json
from pathlib import Path

import pytest

from tests.conftest import needs, needs_root
from tests.services.containers import ContainerTools
from tests.services.images import docker_archive, system_tar, tar_of
from tests.services.processes import HytheServer

pytestmark = [needs_root, pytest.mark.clients]

NAME = "org/team/group/project/app"


@needs("buildah")
@pytest.mark.parametrize("image_format", ["oci", "docker"])
def test_buildah_builds_pushes_and_pulls(
    tools: ContainerTools, server: HytheServer, scratch: Path, image_format: str
) -> None:
    (scratch / "system.tar").write_bytes(system_tar(10_000))
    container = tools.buildah("from", "scratch")
    tools.buildah("add", container, str(scratch / "system.tar"), "/")
    tools.buildah("config", "--label", "made-by=buildah", container)
    built = tools.buildah("commit", "--quiet", "--rm", "--format", image_format, container, "built-here").split()[-1]

    name = f"{server.address}/{NAME}:{image_format}"
    tools.buildah("push", "--tls-verify=false", "built-here", f"docker://{name}")
    tools.buildah("rmi", "--all", "--force")
    assert tools.buildah("pull", "--quiet", "--tls-verify=false", name) == built
    described = json.loads(tools.buildah("inspect", "--type", "image", name))
    assert described["OCIv1"]["config"]["Labels"]["made-by"] == "buildah"


@needs("buildah")
def test_buildah_pushes_a_manifest_of_two_platforms(tools: ContainerTools, server: HytheServer, scratch: Path) -> None:
    images = {}
    for architecture in ("amd64", "arm64"):
        container = tools.buildah("from", "scratch")
        tools.buildah("config", "--arch", architecture, "--label", f"of={architecture}", container)
        images[architecture] = tools.buildah("commit", "--quiet", "--rm", container, architecture).split()[-1]
    tools.buildah("manifest", "create", "both", *images)
    name = f"{server.address}/{NAME}:both"
    tools.buildah("manifest", "push", "--all", "--tls-verify=false", "both", f"docker://{name}")
    tools.buildah("rmi", "--all", "--force")
    for architecture, image in images.items():
        assert tools.buildah("pull", "--quiet", "--tls-verify=false", "--arch", architecture, name) == image


@needs("podman", "runc")
def test_podman_loads_pushes_and_pulls(tools: ContainerTools, server: HytheServer, scratch: Path) -> None:
    name = f"{server.address}/{NAME}:1"
    archive = scratch / "image.tar"
    archive.write_bytes(docker_archive(name, [system_tar(10_000), tar_of(more=b"more")], "amd64"))
    tools.podman("load", "--quiet", "--input", str(archive))
    image = tools.podman("image", "inspect", "--format", "{{.Id}}", name)
    tools.podman("push", "--quiet", "--tls-verify=false", name)
    tools.podman("rmi", "--force", name)
    assert tools.podman("pull", "--quiet", "--tls-verify=false", name) == image
