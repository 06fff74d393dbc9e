"""A full disk: what cannot be kept is refused as such, all else goes on, and so do uploads when there is room."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from storage.oci import OCI_MANIFEST
from tests.conftest import needs_root
from tests.content import Image, digest_of, make_image
from tests.hythe.test_cli import hythe
from tests.services.processes import HytheServer, free_port, wait_until
from tests.storage.conftest import fill_disk, small_disk

pytestmark = needs_root

CONTENT = bytes(range(256)) * (48 << 10)  # 12 MiB, for a disk of 8
UPLOADS = "/v2/org/app/blobs/uploads/"
Answer = tuple[int, dict[str, str], bytes]


@contextlib.contextmanager
def serving(directory: Path, blobs: Path, facts: Path) -> Iterator[HytheServer]:
    port = free_port()
    command = [sys.executable, "-m", "hythe", "serve", "--listen", f"127.0.0.1:{port}"]
    settings = {
        "HYTHE_STORAGE__FILESYSTEM__ROOT": str(blobs),
        "HYTHE_DATABASE__URL": f"sqlite:///{facts / 'hythe.db'}",
    }
    server = HytheServer(command, directory / "hythe.log", settings, data=blobs, port=port)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "size=8m") as mounted:
        yield mounted


@pytest.fixture(params=["everything on it", "blobs on it"])
def full(request: pytest.FixtureRequest, tmp_path: Path, disk: Path) -> Iterator[HytheServer]:
    """A server whose blobs are on the small disk."""
    facts = disk if request.param == "everything on it" else tmp_path / "facts"
    with serving(tmp_path, disk / "data", facts) as server:
        yield server


@pytest.fixture(params=["everything on it", "facts on it"])
def without_facts(request: pytest.FixtureRequest, tmp_path: Path, disk: Path) -> Iterator[HytheServer]:
    """A server whose database is on the small disk."""
    blobs = disk / "data" if request.param == "everything on it" else tmp_path / "blobs"
    with serving(tmp_path, blobs, disk) as server:
        yield server


def ask(
    server: HytheServer,
    method: str,
    path: str,
    body: bytes | Iterator[bytes] = b"",
    **headers: str,
) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        connection.request(method, path, body, fields, encode_chunked=not isinstance(body, bytes))
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def assert_out_of_room(answer: Answer) -> None:
    status, headers, body = answer
    assert status == 507, body
    assert headers["Content-Type"] == "application/json"
    said = json.loads(body)
    (error,) = said["errors"]
    assert error["code"] == "DENIED"
    assert "no space left" in error["message"]
    assert said["request_id"] == headers["X-Request-Id"]
    # Where the disk is, and what the system said, is for the log.
    assert "/" not in error["message"].replace("and/or", "")


def push_blob(server: HytheServer, content: bytes) -> str:
    digest = digest_of(content)
    assert ask(server, "POST", f"{UPLOADS}?digest={digest}", content)[0] == 201
    return f"/v2/org/app/blobs/{digest}"


def put_manifest(server: HytheServer, image: Image, tag: str) -> Answer:
    return ask(server, "PUT", f"/v2/org/app/manifests/{tag}", image.manifest, Content_Type=OCI_MANIFEST)


def push(server: HytheServer, tag: str) -> Image:
    image = make_image()
    for blob in image.blobs:
        push_blob(server, blob)
    assert put_manifest(server, image, tag)[0] == 201
    return image


def assert_served(server: HytheServer, image: Image, tag: str) -> None:
    assert ask(server, "GET", f"/v2/org/app/manifests/{tag}")[2] == image.manifest
    for blob in image.blobs:
        assert ask(server, "GET", f"/v2/org/app/blobs/{digest_of(blob)}")[2] == blob
    assert json.loads(ask(server, "GET", "/v2/org/app/tags/list")[2])["tags"] == [tag]
    assert ask(server, "GET", "/v2/")[0] == 200


def begin(server: HytheServer) -> str:
    status, headers, _ = ask(server, "POST", UPLOADS)
    assert status == 202
    return headers["Location"].removeprefix(server.url)


def in_pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), 32 << 10):
        yield content[start : start + (32 << 10)]


@pytest.mark.parametrize("chunked", [True, False])
def test_an_upload_beyond_the_disk_is_refused_and_goes_on_when_there_is_room(
    full: HytheServer, disk: Path, chunked: bool
) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(5 << 20))
    image = push(full, "latest")
    content = CONTENT[: 5 << 20]
    location = begin(full)
    assert_out_of_room(ask(full, "PATCH", location, in_pieces(content) if chunked else content))
    assert_served(full, image, "latest")
    status, headers, _ = ask(full, "GET", location)
    assert status == 204
    offset = int(headers["Range"].removeprefix("0-")) + 1
    offset = 0 if offset == 1 else offset
    assert offset < len(content)
    ballast.unlink()
    sent = f"{offset}-{len(content) - 1}"
    status, headers, _ = ask(full, "PATCH", location, content[offset:], Content_Range=sent)
    assert status == 202
    assert ask(full, "PUT", f"{location}?digest={digest_of(content)}")[0] == 201
    assert ask(full, "GET", f"/v2/org/app/blobs/{digest_of(content)}")[2] == content


def test_a_blob_in_one_request_that_does_not_fit_is_refused(full: HytheServer) -> None:
    image = push(full, "latest")
    assert_out_of_room(ask(full, "POST", f"{UPLOADS}?digest={digest_of(CONTENT)}", CONTENT))
    assert_served(full, image, "latest")
    assert ask(full, "GET", f"/v2/org/app/blobs/{digest_of(CONTENT)}")[0] == 404


def test_a_refused_upload_that_is_cancelled_gives_its_room_back(full: HytheServer) -> None:
    location = begin(full)
    assert_out_of_room(ask(full, "PATCH", location, CONTENT))
    assert ask(full, "DELETE", location)[0] == 204
    push_blob(full, CONTENT[: 2 << 20])


def test_readiness_tells_of_a_full_store(full: HytheServer, disk: Path) -> None:
    assert ask(full, "GET", "/readyz")[0] == 200
    fill_disk(disk)
    status, _, body = ask(full, "GET", "/readyz")
    assert status == 503
    assert json.loads(body)["store"] != "ok"
    assert ask(full, "GET", "/healthz")[0] == 200
    (disk / "ballast").unlink()
    assert ask(full, "GET", "/readyz")[0] == 200


def large_image(server: HytheServer) -> Image:
    """An image whose manifest takes more room than a log of the database can have to spare."""
    image = make_image(annotations={"padding": "x" * (2 << 20)})
    for blob in image.blobs:
        push_blob(server, blob)
    return image


def test_a_manifest_without_room_for_it_is_refused_and_pushed_when_there_is(
    without_facts: HytheServer, disk: Path
) -> None:
    image, large = push(without_facts, "latest"), large_image(without_facts)
    fill_disk(disk)
    for _ in range(3):
        assert_out_of_room(put_manifest(without_facts, large, "latest"))
        assert_served(without_facts, image, "latest")
    (disk / "ballast").unlink()
    assert put_manifest(without_facts, large, "latest")[0] == 201
    assert_served(without_facts, large, "latest")


def test_whatever_is_asked_of_a_full_disk_it_is_no_internal_error(without_facts: HytheServer, disk: Path) -> None:
    image = push(without_facts, "latest")
    location = begin(without_facts)
    fill_disk(disk)
    # Enough of each that no spare room in the database's log is left.
    for number in range(40):
        blob = f"content {number}".encode()
        for method, path, body in [
            ("POST", UPLOADS, b""),
            ("POST", f"{UPLOADS}?digest={digest_of(blob)}", blob),
            ("POST", f"{UPLOADS}?mount={digest_of(image.config)}&from=org/app".replace("org/app/", "other/"), b""),
            ("PATCH", location, b""),
            ("PUT", f"/v2/org/app/manifests/t{number}", image.manifest),
            ("DELETE", f"/v2/org/app/manifests/t{number}", b""),
        ]:
            answer = ask(without_facts, method, path, body)
            if answer[0] >= 500:
                assert_out_of_room(answer)
    (disk / "ballast").unlink()
    assert ask(without_facts, "GET", "/v2/org/app/manifests/latest")[2] == image.manifest
    push(without_facts, "again")
    assert ask(without_facts, "GET", "/readyz")[0] == 200


def test_what_was_acknowledged_before_and_after_is_there_after_a_crash(without_facts: HytheServer, disk: Path) -> None:
    image, large = push(without_facts, "latest"), large_image(without_facts)
    fill_disk(disk)
    assert_out_of_room(put_manifest(without_facts, large, "large"))
    without_facts.kill()
    (disk / "ballast").unlink()
    without_facts.start()
    assert_served(without_facts, image, "latest")
    assert put_manifest(without_facts, large, "large")[0] == 201


def test_a_server_that_starts_on_a_full_disk_serves_or_says_why_not(without_facts: HytheServer, disk: Path) -> None:
    image = push(without_facts, "latest")
    assert without_facts.stop() == 0
    without_facts.output.unlink()
    fill_disk(disk)
    super(HytheServer, without_facts).start()
    assert without_facts.process

    def is_decided() -> bool:
        return said_no(without_facts) or is_ready(without_facts)

    wait_until(is_decided, "a decision")
    if said_no(without_facts):
        assert without_facts.stop() == 1
        said = without_facts.output.read_text()
        assert "Traceback" not in said
        assert "hythe: " in said
        (disk / "ballast").unlink()
        without_facts.start()
    else:
        assert_served(without_facts, image, "latest")
        (disk / "ballast").unlink()
    assert_served(without_facts, image, "latest")
    assert put_manifest(without_facts, image, "again")[0] == 201


def said_no(server: HytheServer) -> bool:
    assert server.process
    return server.process.poll() is not None


def is_ready(server: HytheServer) -> bool:
    with contextlib.suppress(OSError):
        return ask(server, "GET", "/v2/")[0] == 200
    return False


def test_a_log_on_the_full_disk_breaks_nothing_and_goes_on_when_there_is_room(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path, disk / "data", disk) as server:
        # Its output goes to the disk too, as where somebody wrote 2>>hythe.log.
        assert server.stop() == 0
        server.output = disk / "hythe.log"
        server.start()
        image = push(server, "latest")
        fill_disk(disk)
        assert_out_of_room(ask(server, "POST", f"{UPLOADS}?digest={digest_of(CONTENT)}", CONTENT))
        assert_served(server, image, "latest")
        fill_disk(disk)

        def is_stopped() -> bool:
            assert_served(server, image, "latest")
            # Lines do not end at the end of a page: the last one did not fit.
            return server.output.stat().st_size % 4096 == 0

        wait_until(is_stopped, "the log to meet the full disk")
        # Lines are written in batches: enough that several of them meet it.
        for _ in range(80):
            assert is_stopped()
        (disk / "ballast").unlink()
        _, headers, _ = ask(server, "GET", "/v2/")
        wait_until(lambda: headers["X-Request-Id"] in server.output.read_text(errors="replace"), "the log to go on")


def test_a_token_is_good_though_its_use_cannot_be_noted(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path, tmp_path / "blobs", disk) as server:

        def command(*arguments: str) -> str:
            done = hythe(*arguments, standard_input="correct horse", **server.environment)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        command("user", "add", "--admin", "alice", "--password-stdin")
        token = command("token", "create", "build", "--user", "alice")
        assert ask(server, "GET", "/v2/")[0] == 401
        fill_disk(disk)
        assert ask(server, "GET", "/v2/", Authorization=f"Bearer {token}")[0] == 200
        assert "the use of a token is not noted" in (tmp_path / "hythe.log").read_text()
