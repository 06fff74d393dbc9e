"""oras, as a library, against a server: artifacts, and those that refer to others."""

import json
from pathlib import Path
from urllib.request import urlopen

import pytest
from oras.client import OrasClient
from oras.oci import Subject

from tests.services.processes import HytheServer

pytestmark = pytest.mark.clients

REPOSITORY = "org/team/group/project/artifact"
REPORT = "application/vnd.example.report+json"


@pytest.fixture
def oras(server: HytheServer, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> OrasClient:
    monkeypatch.setenv("HOME", str(scratch))
    return OrasClient(hostname=server.address, insecure=True)


def push(oras: OrasClient, server: HytheServer, tag: str, *files: str, **options: object) -> Subject:
    answer = oras.push(
        target=f"{server.address}/{REPOSITORY}:{tag}",
        files=list(files),
        disable_path_validation=True,
        quiet=True,
        **options,
    )
    content = answer.request.body
    return Subject(json.loads(content)["mediaType"], answer.headers["Docker-Content-Digest"], len(content))


@pytest.mark.parametrize("in_chunks", [False, True])
def test_an_artifact_comes_back_as_it_was_pushed(
    oras: OrasClient, server: HytheServer, scratch: Path, in_chunks: bool
) -> None:
    sent = {"model.bin": bytes(range(256)) * 5000, "notes.txt": b"what it is"}
    for name, content in sent.items():
        (scratch / name).write_bytes(content)
    files = [f"{scratch / 'model.bin'}:application/vnd.example.model", f"{scratch / 'notes.txt'}:text/plain"]
    push(oras, server, "1", *files, do_chunked=in_chunks, chunk_size=300_000)
    pulled = oras.pull(target=f"{server.address}/{REPOSITORY}:1", outdir=str(scratch / "out"))
    assert {Path(path).name: Path(path).read_bytes() for path in pulled} == sent
    assert oras.get_tags(f"{server.address}/{REPOSITORY}") == ["1"]


def test_an_artifact_that_refers_to_another_is_found_from_there(
    oras: OrasClient, server: HytheServer, scratch: Path
) -> None:
    (scratch / "image").write_bytes(b"content")
    (scratch / "report").write_bytes(b'{"flaws": []}')
    subject = push(oras, server, "image", str(scratch / "image"))
    made = {"org.opencontainers.image.created": "2026-01-01T00:00:00Z"}
    (scratch / "config").write_bytes(b"{}")
    report = push(
        oras,
        server,
        "report",
        f"{scratch / 'report'}:{REPORT}",
        subject=subject,
        manifest_annotations=made,
        manifest_config=f"{scratch / 'config'}:{REPORT}",
    )
    with urlopen(f"{server.url}/v2/{REPOSITORY}/referrers/{subject.digest}", timeout=10) as answer:
        (found,) = json.load(answer)["manifests"]
    assert found == {
        "mediaType": report.mediaType,
        "digest": report.digest,
        "size": report.size,
        # A manifest without an artifactType has its config's.
        "artifactType": REPORT,
        "annotations": made,
    }
    (pulled,) = oras.pull(target=f"{server.address}/{REPOSITORY}@{found['digest']}", outdir=str(scratch / "out"))
    assert Path(pulled).read_bytes() == (scratch / "report").read_bytes()


def test_an_artifact_that_was_deleted_is_gone_and_others_are_not(
    oras: OrasClient, server: HytheServer, scratch: Path
) -> None:
    for tag in ("1", "2"):
        (scratch / tag).write_bytes(tag.encode())
        push(oras, server, tag, str(scratch / tag))
    oras.delete_tags(f"{server.address}/{REPOSITORY}", ["1"])
    assert oras.get_tags(f"{server.address}/{REPOSITORY}") == ["2"]
    assert oras.pull(target=f"{server.address}/{REPOSITORY}:2", outdir=str(scratch / "out"))
