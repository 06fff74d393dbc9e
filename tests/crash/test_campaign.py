"""The server is killed at random moments while a client pushes. What it acknowledged must be there, and whole.

`make crash` runs it 200 times; among the other tests it is short.
"""

from __future__ import annotations

import http.client
import os
import random
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

from tests.content import Image, digest_of, make_image
from tests.services.processes import HytheServer, hythe_server, wait_until

CRASHES = int(os.environ.get("HYTHE_CRASHES", "12"))
REPOSITORY = "org/app"


class Client:
    """Pushes images as docker does, and remembers what it was promised."""

    def __init__(self, server: HytheServer) -> None:
        self.server = server
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.interrupted: list[Image] = []
        self.ending = threading.Event()
        #: Held for each push, so that promises stand still while they are verified.
        self.pushing = threading.Lock()
        self.number = 0

    def push_until_told(self) -> None:
        while not self.ending.is_set():
            image = make_image(layers=2)
            try:
                with self.pushing:
                    self.push(image)
            except ConnectionRefusedError:
                # It is down: nothing of this image was ever sent.
                time.sleep(0.01)
            except (OSError, http.client.HTTPException):
                self.interrupted.append(image)
                time.sleep(0.01)

    def push(self, image: Image) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        with closing(connection):
            for blob in image.blobs:
                self.push_blob(connection, blob)
            self.number += 1
            tag = f"v{self.number % 5}"
            ask(connection, "PUT", f"manifests/{tag}", 201, image.manifest, {"Content-Type": image.media_type})
            self.manifests[image.digest] = image.manifest
            self.tags[tag] = image.digest

    def push_blob(self, connection: http.client.HTTPConnection, blob: bytes) -> None:
        location = ask(connection, "POST", "blobs/uploads/", 202)
        # In one piece, as docker does, it is over before it has a row; in two it has one.
        middle = len(blob) // 2 if len(self.blobs) % 2 else len(blob)
        for part in filter(None, (blob[:middle], blob[middle:])):
            location = ask(connection, "PATCH", location, 202, iter([part]))
        ask(connection, "PUT", f"{location}?digest={digest_of(blob)}", 201)
        self.blobs[digest_of(blob)] = blob


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    expected: int,
    body: object = None,
    headers: dict[str, str] | None = None,
) -> str:
    url = path if path.startswith("/") else f"/v2/{REPOSITORY}/{path}"
    chunked = method == "PATCH"
    connection.request(method, url, body=body, headers=headers or {}, encode_chunked=chunked)  # type: ignore[arg-type]
    response = connection.getresponse()
    content = response.read()
    assert response.status == expected, (method, url, response.status, content)
    return response.getheader("Location", "")


def read(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", f"/v2/{REPOSITORY}/{path}")
    response = connection.getresponse()
    content = response.read()
    assert response.status == 200, (path, response.status, content)
    return content


def verify(client: Client, blobs: dict[str, bytes], manifests: dict[str, bytes]) -> None:
    """Read every promise back and hash it again."""
    connection = http.client.HTTPConnection("127.0.0.1", client.server.port, timeout=20)
    with closing(connection):
        for digest in blobs:
            assert digest_of(read(connection, f"blobs/{digest}")) == digest
        for digest in manifests:
            assert digest_of(read(connection, f"manifests/{digest}")) == digest
        for tag in client.tags:
            # The move that was under way when the server died may have happened, or not.
            assert digest_of(read(connection, f"manifests/{tag}")) in newer_than(client, tag)


def newer_than(client: Client, tag: str) -> set[str]:
    acknowledged = client.tags[tag]
    return {acknowledged, *(image.digest for image in client.interrupted)}


def stored_files(data: Path) -> set[str]:
    return {str(path.relative_to(data)) for path in data.glob("blobs/*/*/*")} | {
        str(path.relative_to(data)) for path in data.glob("uploads/*")
    }


def known_files(data: Path) -> set[str]:
    with closing(sqlite3.connect(data / "hythe.db")) as connection:
        rows = connection.execute("SELECT key FROM blob UNION SELECT key FROM upload_session")
        return {row[0] for row in rows}


def test_nothing_acknowledged_is_lost_when_the_server_is_killed_again_and_again_campaign(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}, {CRASHES} crashes")  # noqa: T201 - to repeat a run that failed
    dice = random.Random(seed)
    environment = {"HYTHE_UPLOADS__IDLE_SECONDS": "2", "HYTHE_UPLOADS__SWEEP_SECONDS": "1"}
    with hythe_server(tmp_path, environment=environment) as server:
        client = Client(server)
        pushing = threading.Thread(target=client.push_until_told)
        pushing.start()
        try:
            for crash in range(CRASHES):
                time.sleep(dice.uniform(0.05, 0.6))
                blobs, manifests = dict(client.blobs), dict(client.manifests)
                server.kill()
                server.start()
                newest = dict(list(blobs.items())[-50:]), dict(list(manifests.items())[-20:])
                with client.pushing:
                    verify(client, *newest)
                if (crash + 1) % 20 == 0:
                    print(f"{crash + 1} crashes, {len(blobs)} blobs promised and found")  # noqa: T201 - long work shows progress
        finally:
            client.ending.set()
            pushing.join()
        for image in client.interrupted:
            client.push(image)
        verify(client, client.blobs, client.manifests)
        assert len(client.manifests) > CRASHES, "the client hardly got to push"
        data = server.data
        wait_until(lambda: stored_files(data) == known_files(data), "the sweep to clear what the crashes left", 30)
        wait_until(lambda: not list(data.glob("uploads/*")), "idle uploads to be swept", 30)
    assert server.process is not None
    assert server.process.returncode == 0
