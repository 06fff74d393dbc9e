"""What only a database with many writers, on another host, can do to the facts."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import Connection, text

import migrations
import registry.metadata.postgres
from registry.access.accounts import make_accounts
from registry.config import AccountSettings
from registry.errors import ConfigurationError, MetadataUnavailable
from registry.metadata import accounts, blobs, manifests, repositories, rules, sessions, tags
from registry.metadata.blobs import StoredBlob
from registry.metadata.engine import Database, open_database, parse_url
from registry.metadata.manifests import PushedManifest
from registry.metadata.prepared import driver
from registry.metadata.schema import upgrade
from storage.base import Checkpoint
from storage.digest import Digest
from storage.names import RepositoryName, parse_tag
from storage.oci import parse_manifest
from tests.content import make_image
from tests.facts import query
from tests.services.postgres import Postgres, needs_postgres, postgres

pytestmark = needs_postgres

NAME, OTHER = RepositoryName("org/team/app"), RepositoryName("org/team/other")
ROUNDS = 30


@pytest.fixture
def url(postgres_server: Postgres, template: str) -> Iterator[str]:
    made = postgres_server.create(template)
    yield made
    postgres_server.drop(made)


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    made = open_database(url, connections=8)
    yield made
    await made.close()


def add_blob(connection: Connection, name: RepositoryName, content: bytes) -> bool:
    stored = StoredBlob(f"blobs/{secrets.token_hex(16)}", len(content))
    return blobs.add(connection, name, Digest.of(content), stored)


def pushed(content: bytes) -> PushedManifest:
    return PushedManifest(parse_manifest(content, ""), Digest.of(content), content)


# --- units that meet ------------------------------------------------------------------------------------


async def test_the_same_blob_added_by_many_at_once_is_one_row_and_one_of_them_was_first(database: Database) -> None:
    for _ in range(ROUNDS):
        content = secrets.token_bytes(20)
        names = [RepositoryName(f"at/once/{secrets.token_hex(2)}") for _ in range(4)] * 2
        added = await asyncio.gather(*(database.write(add_blob, name, content) for name in names))
        assert sorted(added) == [False] * 7 + [True]
        held = [await database.look_up(blobs.find, name, Digest.of(content)) for name in names]
        assert len(set(held)) == 1
        assert held[0]


async def test_a_manifest_deleted_everywhere_at_once_is_gone(database: Database, url: str) -> None:
    for _ in range(ROUNDS):
        image = make_image()
        for name in (NAME, OTHER):
            for data in image.blobs:
                await database.write(add_blob, name, data)
            await database.write(manifests.put, name, pushed(image.manifest), [], "", sparse=False)
        digest = Digest.parse(image.digest)
        await asyncio.gather(*(database.write(manifests.remove, name, digest, "") for name in (NAME, OTHER)))
    assert query(url, "SELECT digest FROM manifest") == []


async def test_a_sparse_manifest_and_its_blobs_that_come_at_once_find_each_other(database: Database, url: str) -> None:
    for _ in range(ROUNDS):
        image = make_image()
        putting = database.write(manifests.put, NAME, pushed(image.manifest), [], "", sparse=True)
        await asyncio.gather(*(database.write(add_blob, NAME, data) for data in image.blobs), putting)
    assert query(url, "SELECT count(*) FROM manifest_reference WHERE blob_id IS NULL") == [(0,)]


async def test_of_many_claims_at_once_one_holds_the_session(database: Database) -> None:
    for number in range(ROUNDS):
        await database.note(sessions.create, f"{number}", NAME, Checkpoint(f"uploads/{number}", "sha256"))
        claims = [database.note(sessions.claim, f"{number}", NAME, f"writer {each}") for each in range(8)]
        results = await asyncio.gather(*claims, return_exceptions=True)
        assert sum(not isinstance(result, BaseException) for result in results) == 1


async def test_a_path_pushed_to_by_many_at_once_is_one_tree(database: Database, url: str) -> None:
    for number in range(ROUNDS):
        name = RepositoryName(f"deep{number}/a/b/c")
        await asyncio.gather(*(database.write(repositories.ensure, name) for _ in range(8)))
    assert query(url, "SELECT count(*) FROM repository") == [(4 * ROUNDS,)]


async def test_of_servers_that_start_at_once_on_an_empty_database_one_makes_the_first_account(
    database: Database, url: str, postgres_server: Postgres
) -> None:
    for _ in range(5):
        settings = [AccountSettings(admin=f"admin{number}", admin_password="correct horse") for number in range(4)]
        assert all(await asyncio.gather(*(make_accounts(database, each) for each in settings)))
        assert len(await database.read(accounts.everyone)) == 1
        assert len(await database.read(rules.everything, None)) == 1
        postgres_server.execute("DELETE FROM account", urlsplit(url).path[1:])


async def test_a_unit_that_is_refused_for_good_says_why_and_is_undone(database: Database, url: str) -> None:
    def twice(connection: Connection) -> None:
        for _ in range(2):
            sessions.create(connection, "one", NAME, Checkpoint("uploads/one", "sha256"))

    with pytest.raises(Exception, match="upload_session"):
        await database.write(twice)
    assert query(url, "SELECT id FROM upload_session") == []


# --- connections that are lost --------------------------------------------------------------------------


def end_connections(server: Postgres, url: str) -> None:
    name = urlsplit(url).path[1:]
    server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


async def test_connections_that_died_while_nobody_asked_are_not_noticed(
    database: Database, postgres_server: Postgres, url: str
) -> None:
    await asyncio.gather(*(database.write(repositories.ensure, NAME) for _ in range(8)))
    for _ in range(5):
        end_connections(postgres_server, url)
        assert await database.look_up(blobs.find, NAME, Digest.of(b"absent")) is None
        end_connections(postgres_server, url)
        await database.write(repositories.ensure, OTHER)


@pytest.mark.parametrize("how", ["read", "write"])
async def test_a_unit_whose_connection_is_lost_before_its_commit_is_run_again(
    database: Database, postgres_server: Postgres, url: str, how: str
) -> None:
    runs: list[int] = []

    def unlucky(connection: Connection) -> int:
        runs.append(int(connection.scalar(text("SELECT pg_backend_pid()")) or 0))
        if len(runs) == 1:
            postgres_server.execute(f"SELECT pg_terminate_backend({runs[0]})")
        return int(connection.scalar(text("SELECT count(*) FROM repository")) or 0)

    assert await getattr(database, how)(unlucky) == 0
    assert len(runs) == 2
    assert runs[0] != runs[1]


async def test_a_commit_whose_answer_is_lost_is_not_made_again(
    database: Database, postgres_server: Postgres, url: str
) -> None:
    runs: list[int] = []

    def unlucky(connection: Connection) -> None:
        runs.append(int(connection.scalar(text("SELECT pg_backend_pid()")) or 0))
        repositories.ensure(connection, NAME)
        # The next thing that goes to the server is the commit.
        postgres_server.execute(f"SELECT pg_terminate_backend({runs[0]})")

    with pytest.raises(MetadataUnavailable, match="during a commit"):
        await database.write(unlucky)
    assert len(runs) == 1
    await database.write(repositories.ensure, NAME)


async def test_a_database_that_is_away_is_waited_for_and_then_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres(tmp_path) as server:
        url = server.create()
        upgrade(url)
        database = open_database(url)
        await database.write(repositories.ensure, NAME)
        server.stop()
        waiting = asyncio.create_task(database.read(repositories.find, NAME))
        await asyncio.sleep(0.3)
        server.start()
        assert await waiting
        server.stop()
        monkeypatch.setattr(registry.metadata.postgres, "_PATIENCE", 1.0)
        with pytest.raises(MetadataUnavailable):
            await database.write(repositories.ensure, NAME)
        server.start()
        assert await database.read(repositories.find, NAME)
        await database.close()


async def test_a_read_sees_one_moment_whatever_is_written_meanwhile(database: Database) -> None:
    began, may_go_on = Event(), Event()

    def look_twice(connection: Connection) -> tuple[Any, Any]:
        first = repositories.names(connection, [""], "", 10)
        began.set()
        may_go_on.wait(30)
        return first, repositories.names(connection, [""], "", 10)

    reading = asyncio.create_task(database.read(look_twice))
    await asyncio.to_thread(began.wait, 30)
    await database.write(repositories.ensure, NAME)
    may_go_on.set()
    assert await reading == ([], [])
    assert await database.read(repositories.names, [""], "", 10) == [NAME]


async def test_a_server_that_takes_no_writes_any_more_is_left_for_the_one_that_does(
    database: Database, postgres_server: Postgres, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = urlsplit(url).path[1:]
    await asyncio.gather(*(database.write(repositories.ensure, NAME) for _ in range(8)))
    # As a primary that became a standby answers those who are still connected to it.
    for connection in list(database._open):  # type: ignore[attr-defined]
        driver(connection).execute("SET default_transaction_read_only = on")
    await database.write(repositories.ensure, OTHER)
    assert await database.read(repositories.find, OTHER)
    postgres_server.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    end_connections(postgres_server, url)
    monkeypatch.setattr(registry.metadata.postgres, "_PATIENCE", 1.0)
    with pytest.raises(MetadataUnavailable, match="read-only"):
        await database.write(repositories.ensure, RepositoryName("a/third"))


async def test_a_unit_that_waited_too_long_for_a_connection_is_not_begun(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.metadata.postgres, "_PATIENCE", 1.0)
    database = open_database(url, connections=1)
    may_go_on = Event()
    blocking = asyncio.create_task(database.read(lambda _: may_go_on.wait(30)))
    await asyncio.sleep(0.1)
    waiting = asyncio.create_task(database.write(repositories.ensure, NAME))
    await asyncio.sleep(1.2)
    may_go_on.set()
    await blocking
    with pytest.raises(MetadataUnavailable, match="busy"):
        await waiting
    await database.close()
    assert query(url, "SELECT name FROM repository") == []


async def test_a_tag_that_is_deleted_while_it_is_moved_is_there_or_not_but_never_an_event_alone(
    database: Database, url: str
) -> None:
    image = make_image()
    for data in image.blobs:
        await database.write(add_blob, NAME, data)
    tag = parse_tag("latest")
    first = pushed(image.manifest)
    other = pushed(image.manifest + b" ")
    for number in range(ROUNDS):
        moved = (first, other)[number % 2]
        await database.write(manifests.put, NAME, (other, first)[number % 2], [tag], "", sparse=False)
        moving = database.write(manifests.put, NAME, moved, [tag], "", sparse=False)
        await asyncio.gather(moving, database.write(tags.delete_tag, NAME, tag, ""), return_exceptions=True)
        ((last,),) = query(url, "SELECT digest FROM tag_event ORDER BY id DESC LIMIT 1")
        held = query(url, "SELECT m.digest FROM tag t JOIN manifest m ON m.id = t.manifest_id")
        assert held == ([(last,)] if last else [])


# --- the schema -----------------------------------------------------------------------------------------


@pytest.fixture
def empty(postgres_server: Postgres) -> Iterator[str]:
    made = postgres_server.create()
    yield made
    postgres_server.drop(made)


async def test_servers_that_start_at_once_bring_an_empty_database_up_to_date_once(empty: str) -> None:
    assert await asyncio.gather(*(asyncio.to_thread(upgrade, empty) for _ in range(6))) == [None] * 6
    assert query(empty, "SELECT version_num FROM alembic_version") == [(migrations.HEAD,)]
    assert query(empty, "SELECT count(*) FROM identity") == [(1,)]


def test_a_database_of_a_newer_version_is_refused(url: str, postgres_server: Postgres) -> None:
    postgres_server.execute("UPDATE alembic_version SET version_num = 'later'", urlsplit(url).path[1:])
    with pytest.raises(ConfigurationError, match="newer version"):
        upgrade(url)


def test_a_database_of_somebody_else_is_refused(empty: str, postgres_server: Postgres) -> None:
    postgres_server.execute("CREATE TABLE public.theirs (id int)", urlsplit(empty).path[1:])
    postgres_server.execute("GRANT ALL ON public.theirs TO hythe", urlsplit(empty).path[1:])
    with pytest.raises(ConfigurationError, match="not one of Hythe"):
        upgrade(empty)


@pytest.mark.parametrize("part", ["password", "database", "port"])
def test_a_database_that_cannot_be_reached_is_said_without_its_password(empty: str, part: str) -> None:
    url = parse_url(empty)
    wrong = {"password": url.set(password="s3cret"), "database": url.set(database="nowhere"), "port": url.set(port=1)}
    with pytest.raises(ConfigurationError, match=r"^database\.url") as raised:
        upgrade(wrong[part].render_as_string(hide_password=False))
    assert "s3cret" not in str(raised.value)
    assert str(url.password) not in str(raised.value)


@pytest.mark.parametrize(
    "wrong", ["", "hythe.db", "sqlite://", "sqlite:///", "mysql://localhost/x", "sqlite:/x", "://"]
)
def test_an_address_of_no_database_that_we_know_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^database\.url"):
        parse_url(wrong)
