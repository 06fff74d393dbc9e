"""Names of images, as people type them."""

from __future__ import annotations

import pytest

from runner.errors import RunnerError
from runner.reference import ImageReference, is_loopback

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest", "written"),
    [
        ("busybox", "docker.io", "library/busybox", "latest", None, "busybox:latest"),
        ("busybox:1.36", "docker.io", "library/busybox", "1.36", None, "busybox:1.36"),
        ("team/app", "docker.io", "team/app", "latest", None, "team/app:latest"),
        ("docker.io/busybox", "docker.io", "library/busybox", "latest", None, "busybox:latest"),
        ("index.docker.io/team/app:1", "docker.io", "team/app", "1", None, "team/app:1"),
        ("localhost/app", "localhost", "app", "latest", None, "localhost/app:latest"),
        ("127.0.0.1:5000/a/b/c:1", "127.0.0.1:5000", "a/b/c", "1", None, "127.0.0.1:5000/a/b/c:1"),
        ("[::1]:5000/app", "[::1]:5000", "app", "latest", None, "[::1]:5000/app:latest"),
        ("ghcr.io/a/b@" + DIGEST, "ghcr.io", "a/b", None, DIGEST, "ghcr.io/a/b@" + DIGEST),
        ("ghcr.io/a/b:1@" + DIGEST, "ghcr.io", "a/b", "1", DIGEST, "ghcr.io/a/b:1@" + DIGEST),
    ],
)
def test_an_image_is_named_as_docker_names_it(
    text: str, host: str, repository: str, tag: str | None, digest: str | None, written: str
) -> None:
    found = ImageReference.parse(text)
    assert (found.host, found.repository, found.tag) == (host, repository, tag)
    assert (str(found.digest) if found.digest else None) == digest
    assert str(found) == written
    assert ImageReference.parse(written) == found
    assert found.target == (digest or tag)


@pytest.mark.parametrize(
    "text",
    ["", ":1", "App", "a//b", "a/../b", "a:b:c/", "a@sha256:short", "a@", "-x.de/a", "a b", "a\nb", "host:port/a"],
)
def test_what_names_no_image_is_refused_with_what_is_wrong(text: str) -> None:
    with pytest.raises(RunnerError, match="is no image"):
        ImageReference.parse(text)


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1", "127.8.0.1:5000", "[::1]:5000"])
def test_this_host_is_known_by_its_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example.org", "127.0.0.1.example.org:5000", "10.0.0.1", "[2001::1]:5000"])
def test_no_other_host_is_taken_for_this_one(host: str) -> None:
    assert not is_loopback(host)
