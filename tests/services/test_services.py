"""The servers that other tests lean on: each starts, does a little, and leaves nothing over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.services.postgres import Postgres, needs_postgres, postgres

#: Where these programs write by themselves, if nobody tells them not to.
OUTSIDE = [Path(name) for name in ("/etc/ceph", "/var/lib/ceph", "/var/log/ceph", "/run/ceph", "/dev/shm")]


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left_over(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = outside()
    yield
    assert not psutil.Process().children(recursive=True)
    assert outside() == before


def outside() -> set[Path]:
    return {path for root in OUTSIDE for path in root.rglob("*")}


@pytest.fixture(scope="module")
def database_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@needs_postgres
def test_a_database_is_made_copied_and_dropped(database_server: Postgres) -> None:
    url = database_server.create()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE tag (name text)")
        connection.execute("INSERT INTO tag VALUES ('b'), ('A'), ('a')")
    copy = database_server.create(template=url.rpartition("/")[2])
    with psycopg.connect(copy) as connection:
        assert connection.execute("SELECT name FROM tag ORDER BY name").fetchall() == [("a",), ("A",), ("b",)]
        database_server.drop(copy)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    database_server.drop(url)
    left = database_server.execute("SELECT count(*) FROM pg_database WHERE datname LIKE 'hythe%'")
    assert left == [(0,)]


@needs_postgres
def test_a_database_outlives_a_restart_and_a_crash(database_server: Postgres) -> None:
    url = database_server.create()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept ()")
    database_server.restart()
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO kept DEFAULT VALUES")
    database_server.kill()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)
    database_server.start()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchall() == [(1,)]


@needs_postgres
def test_the_role_of_hythe_is_let_in_by_its_password_alone_and_is_no_superuser(database_server: Postgres) -> None:
    url = database_server.create()
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(url.replace(database_server.password, "other"))
    with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("CREATE ROLE another")
