"""Moving a registry: its blobs to another store while it serves, its facts to another database, and back."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from registry.metadata.copying import copy_database as copy_facts
from registry.metadata.schema import upgrade
from tests.conftest import Bucket
from tests.content import Image, digest_of
from tests.facts import query
from tests.hythe.test_cli import hythe, push
from tests.services.postgres import Postgres, needs_postgres
from tests.services.processes import HytheServer, hythe_server
from tests.services.s3 import needs_juicefs

LARGE = 18 << 20

Environment = dict[str, str]


@pytest.fixture
def place(tmp_path: Path) -> Environment:
    """Where the registry of this test is, as the server and the commands are told alike."""
    data = tmp_path / "data"
    return {"HYTHE_STORAGE__FILESYSTEM__ROOT": str(data), "HYTHE_DATABASE__URL": f"sqlite:///{data / 'hythe.db'}"}


@pytest.fixture
def bucket(juicefs_bucket: Bucket) -> Environment:
    return {f"HYTHE_STORAGE__S3__{key.upper()}": value for key, value in juicefs_bucket.settings().items()}


def push_large(server: HytheServer) -> str:
    content = secrets.token_bytes(LARGE)
    address = f"{server.url}/v2/large/blobs/uploads/?digest={digest_of(content)}"
    assert requests.post(address, data=content, timeout=60).status_code == 201
    return digest_of(content)


def check(server: HytheServer, repository: str, images: list[Image], large: str) -> None:
    """Check that all of it is served, whole."""
    for image in images:
        for blob in image.blobs:
            found = requests.get(f"{server.url}/v2/{repository}/blobs/{digest_of(blob)}", timeout=60)
            assert found.content == blob
        assert (
            requests.get(f"{server.url}/v2/{repository}/manifests/{image.digest}", timeout=60).content == image.manifest
        )
    assert digest_of(requests.get(f"{server.url}/v2/large/blobs/{large}", timeout=60).content) == large


def copied(*arguments: str, **environment: str) -> dict[str, int]:
    done = hythe("copy-store", *arguments, "--json", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, int] = json.loads(done.stdout)
    return found


@needs_juicefs
def test_blobs_move_to_a_bucket_and_back_while_the_registry_serves(
    tmp_path: Path, place: Environment, bucket: Environment
) -> None:
    both = place | bucket
    to_bucket, back = ["--from", "filesystem", "--to", "s3"], ["--from", "s3", "--to", "filesystem"]
    with hythe_server(tmp_path, environment=place) as server:
        images = [push(server, "team/app", layers=3) for _ in range(3)]
        large = push_large(server)
        first = copied(*to_bucket, **both)
        assert (first["blobs"], first["new"]) == (13, 13)
        assert first["size"] == first["new_size"] > LARGE
        images.append(push(server, "team/app", layers=2))
        again = copied(*to_bucket, **both)
        assert (again["blobs"], again["new"]) == (16, 3)
    with hythe_server(tmp_path, environment=both | {"HYTHE_STORAGE__DRIVER": "s3"}) as server:
        check(server, "team/app", images, large)
        images.append(push(server, "team/app"))
        elsewhere = both | {"HYTHE_STORAGE__FILESYSTEM__ROOT": str(tmp_path / "elsewhere")}
        assert copied(*back, **elsewhere)["new"] == 18
    with hythe_server(tmp_path, environment=elsewhere) as server:
        check(server, "team/app", images, large)


def refused(*arguments: str, **environment: str) -> str:
    done = hythe(*arguments, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


@needs_juicefs
def test_a_damaged_blob_is_named_and_not_copied_and_the_others_are(
    tmp_path: Path, place: Environment, bucket: Environment
) -> None:
    with hythe_server(tmp_path, environment=place) as server:
        image = push(server, "team/app", layers=3)
    bad = digest_of(image.layers[1])
    (file,) = (tmp_path / "data/blobs").rglob(f"{bad.removeprefix('sha256:')}*")
    file.write_bytes(bytes(file.stat().st_size))
    arguments = ["copy-store", "--from", "filesystem", "--to", "s3"]
    said = refused(*arguments, **place, **bucket)
    assert "1 blobs of 4" in said
    assert bad in said
    file.write_bytes(image.layers[1])
    assert copied(*arguments[1:], **place, **bucket)["new"] == 1


@needs_juicefs
def test_two_registries_do_not_share_a_bucket(tmp_path: Path, bucket: Environment) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    environment = bucket | {"HYTHE_STORAGE__DRIVER": "s3"}
    with hythe_server(tmp_path / "one", environment=environment) as server:
        push(server, "team/app")
    other = hythe("serve", "--data", str(tmp_path / "two"), "--listen", "127.0.0.1:0", **environment)
    assert other.returncode == 1
    assert "belong to another registry" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "filesystem", "--to", "filesystem"], "the same store"),
        (["--from", "filesystem", "--to", "s3"], "storage.s3.bucket"),
    ],
)
def test_a_copy_that_makes_no_sense_is_refused(place: Environment, arguments: list[str], said: str) -> None:
    assert hythe("migrate", **place).returncode == 0
    assert said in refused("copy-store", *arguments, **place)


def test_migrate_makes_a_database_and_finds_it_made(place: Environment) -> None:
    for _ in range(2):
        done = hythe("migrate", **place)
        assert (done.returncode, done.stdout, done.stderr) == (0, "the database is up to date\n", "")
    assert json.loads(hythe("migrate", "--json", **place).stdout) == {"copy": None}


# --- facts ----------------------------------------------------------------------------------------------


@pytest.fixture
def target(postgres_server: Postgres) -> Iterator[str]:
    made = postgres_server.create()
    yield made
    postgres_server.drop(made)


def copy_database(source: str, target: str, *more: str) -> subprocess.CompletedProcess[str]:
    return hythe("copy-database", "--from", source, "--to", target, *more)


TABLES = {
    "repository": "id, parent_id, name, created_at",
    "blob": "*",
    "manifest": "*",
    "manifest_reference": "*",
    "tag": "*",
    "tag_event": "*",
    "identity": "*",
}


def all_rows(url: str) -> dict[str, list[tuple[Any, ...]]]:
    found = {table: query(url, f"SELECT {columns} FROM {table}") for table, columns in TABLES.items()}
    return {table: sorted(rows, key=repr) for table, rows in found.items()}


@needs_postgres
def test_the_facts_move_to_postgresql_and_the_registry_goes_on_there(
    tmp_path: Path, place: Environment, target: str
) -> None:
    source = place["HYTHE_DATABASE__URL"]
    with hythe_server(tmp_path, environment=place) as server:
        images = [push(server, "team/app", "latest") for _ in range(3)]
        large = push_large(server)
        done = copy_database(source, target)
        assert (done.returncode, done.stdout) == (1, "")
        assert "another server uses" in done.stderr
    done = copy_database(source, target, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["manifest"] == 3
    assert all_rows(target) == all_rows(source)
    with hythe_server(tmp_path, environment=place | {"HYTHE_DATABASE__URL": target}) as server:
        check(server, "team/app", images, large)
        # New rows are numbered after those that came.
        images.append(push(server, "team/other/app", "latest"))
        check(server, "team/other/app", images[-1:], large)
    assert "has content already" in copy_database(source, target).stderr


@needs_postgres
def test_a_crash_is_not_forgotten_because_the_facts_were_copied(
    tmp_path: Path, place: Environment, target: str
) -> None:
    with hythe_server(tmp_path, environment=place) as server:
        server.kill()
    assert copy_database(place["HYTHE_DATABASE__URL"], target).returncode == 0
    assert (tmp_path / "data" / "hythe.lock").read_bytes() == b"running\n"


@needs_postgres
def test_what_is_copied_is_one_moment_whatever_is_written_meanwhile(
    tmp_path: Path, postgres_server: Postgres, template: str
) -> None:
    source, file = postgres_server.create(template), f"sqlite:///{tmp_path / 'copy.db'}"
    upgrade(file)
    name = urlsplit(source).path[1:]
    written: list[str] = []

    def write(table: str, _copied: int, _total: int) -> None:
        if not written:
            written.append(table)
            postgres_server.execute(
                'INSERT INTO upload_session (id, repository, key, algorithm, "offset", state, claimed_at,'
                " created_at, updated_at) VALUES ('later', 'a', 'k', 'sha256', 0, '', 0, 0, 0)",
                name,
            )

    rows = copy_facts(source, file, write)
    assert written
    assert rows["upload_session"] == 0
    assert query(source, "SELECT id FROM upload_session") == [("later",)]
    postgres_server.drop(source)


@needs_postgres
@pytest.mark.parametrize("make", [lambda path: path / "none.db", lambda path: path / "none" / "hythe.db"])
def test_a_source_that_is_not_there_is_not_made(tmp_path: Path, target: str, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path)
    done = copy_database(f"sqlite:///{source}", target)
    assert (done.returncode, done.stdout) == (1, "")
    assert str(source) in done.stderr
    assert not source.exists()
