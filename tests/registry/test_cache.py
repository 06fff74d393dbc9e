"""What is answered from memory is never older than the last write that was acknowledged."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.cache import Cache, WriteCounter
from registry.metadata.sqlite import DataVersion
from storage.oci import OCI_MANIFEST
from tests.content import Image, digest_of, make_image
from tests.services.processes import HytheServer, hythe_server


def cache_of(limit: int, epoch: Callable[[], int] = WriteCounter()) -> Cache:  # noqa: B008
    return Cache(limit, epoch)


def test_what_was_put_is_found_until_somebody_writes() -> None:
    writes = WriteCounter()
    cache = cache_of(100, writes)
    assert cache.get("a") is None
    cache.put("a", "one", cache.epoch(), len("one"))
    assert cache.get("a") == "one"
    writes.value += 1
    assert cache.get("a") is None
    cache.put("a", "two", cache.epoch(), len("two"))
    assert cache.get("a") == "two"


def test_what_was_read_before_a_write_is_not_kept_after_it() -> None:
    writes = WriteCounter()
    cache = cache_of(100, writes)
    epoch = cache.epoch()
    writes.value += 1
    cache.put("a", "old", epoch, len("old"))
    assert cache.get("a") is None


def test_a_write_in_the_very_moment_of_keeping_is_noticed() -> None:
    # Another process may commit between any two looks at the epoch.
    looks = iter([0, 1, 1, 2, 2, 2, 2])
    cache = cache_of(100, lambda: next(looks))
    epoch = cache.epoch()
    cache.put("a", "old", epoch, len("old"))
    assert cache.get("a") is None


def test_the_least_recently_used_goes_first() -> None:
    cache = cache_of(10)
    for key in "abc":
        cache.put(key, "xxx", cache.epoch(), len("xxx"))
    assert cache.get("a") == "xxx"
    cache.put("d", "xxx", cache.epoch(), len("xxx"))
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c", "d"]


@pytest.mark.parametrize("limit", [0, 5])
def test_what_is_larger_than_the_limit_is_not_kept(limit: int) -> None:
    cache = cache_of(limit)
    cache.put("a", "xxxxxx", cache.epoch(), len("xxxxxx"))
    assert cache.get("a") is None
    assert cache._used == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.text("x", max_size=12) | st.none()), max_size=60))
def test_the_limit_holds_whatever_is_done(steps: list[tuple[str, str | None]]) -> None:
    writes = WriteCounter()
    cache = cache_of(20, writes)
    for key, value in steps:
        if value is None:
            writes.value += 1
        else:
            cache.put(key, value, cache.epoch(), len(value))
        assert cache._used == sum(size for _, size in cache._entries.values()) <= 20


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "facts.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE fact (value)")
        connection.execute("INSERT INTO fact VALUES ('one')")
    return path


@pytest.fixture
def version(database: Path) -> Iterator[DataVersion]:
    made = DataVersion(database)
    yield made
    made.close()


def test_a_commit_of_any_other_connection_begins_a_new_epoch(database: Path, version: DataVersion) -> None:
    with closing(sqlite3.connect(database)) as first, closing(sqlite3.connect(database)) as second:
        for number, connection in enumerate((first, second, first)):
            before = version()
            assert version() == before
            connection.execute("UPDATE fact SET value = ?", (number,))
            assert version() == before
            connection.commit()
            assert version() != before


def test_a_write_that_is_undone_begins_no_epoch(database: Path, version: DataVersion) -> None:
    before = version()
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE fact SET value = 'two'")
        connection.rollback()
    assert version() == before


def test_two_caches_on_one_file_see_each_others_writes_at_once(database: Path) -> None:
    versions = [DataVersion(database), DataVersion(database)]
    caches = [cache_of(1000, version) for version in versions]
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:

        def look_up(cache: Cache) -> str:
            epoch = cache.epoch()
            known = cache.get("fact")
            if not isinstance(known, str):
                known = str(connection.execute("SELECT value FROM fact").fetchone()[0])
                cache.put("fact", known, epoch, len(known))
            return known

        for number in range(50):
            connection.execute("UPDATE fact SET value = ?", (str(number),))
            assert [look_up(cache) for cache in caches * 2] == [str(number)] * 4
    for version in versions:
        version.close()


@pytest.fixture(params=["1", "2"])
def workers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HytheServer]:
    """A server of one process, and one of two."""
    with hythe_server(tmp_path, "--workers", request.param, environment={"TMPDIR": str(tmp_path)}) as server:
        yield server


def request(server: HytheServer, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """Send one request by a connection of its own: the kernel gives it to either worker."""
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()


def push(server: HytheServer, image: Image, tag: str) -> None:
    for blob in image.blobs:
        assert request(server, "POST", f"/v2/app/blobs/uploads/?digest={digest_of(blob)}", blob)[0] == 201
    move(server, image, tag)


def move(server: HytheServer, image: Image, tag: str) -> None:
    status, _ = request(server, "PUT", f"/v2/app/manifests/{tag}", image.manifest, Content_Type=OCI_MANIFEST)
    assert status == 201


def test_a_tag_that_moved_is_seen_at_once_by_every_other_connection(workers: HytheServer) -> None:
    images = [make_image(), make_image()]
    for image in images:
        push(workers, image, "latest")
    for number in range(30):
        move(workers, images[number % 2], "latest")
        for _ in range(8):
            assert request(workers, "GET", "/v2/app/manifests/latest") == (200, images[number % 2].manifest)


def test_what_was_deleted_is_gone_at_once_for_every_other_connection(workers: HytheServer) -> None:
    for _ in range(10):
        image = make_image()
        tag = f"t{secrets.token_hex(4)}"
        push(workers, image, tag)
        blob = f"/v2/app/blobs/{digest_of(image.layers[0])}"
        for _ in range(6):
            assert request(workers, "GET", f"/v2/app/manifests/{tag}")[0] == 200
            assert request(workers, "GET", blob) == (200, image.layers[0])
        assert request(workers, "DELETE", f"/v2/app/manifests/{image.digest}")[0] == 202
        assert request(workers, "DELETE", blob)[0] == 202
        for path in (f"/v2/app/manifests/{tag}", f"/v2/app/manifests/{image.digest}", blob):
            assert [request(workers, "GET", path)[0] for _ in range(6)] == [404] * 6


def test_both_workers_answer(tmp_path: Path) -> None:
    with hythe_server(tmp_path, "--workers", "2", environment={"TMPDIR": str(tmp_path)}) as server:
        runs = set()
        for _ in range(200):
            _, body = request(server, "GET", "/v2/app/manifests/absent")
            # A request id begins with a word that each process makes for itself.
            runs.add(json.loads(body)["request_id"].partition("-")[0])
        assert len(runs) == 2
