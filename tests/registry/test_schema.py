"""The database is brought to this version's schema, with what is in it, or left as it was."""

from __future__ import annotations

import shutil
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    create_engine,
    delete,
    insert,
    select,
)

import migrations
from registry.errors import ConfigurationError
from registry.metadata.schema import upgrade
from registry.metadata.tables import metadata
from tests.services.processes import hythe_server

SCRIPTS = Path(migrations.__file__).parent
REVISIONS = [script.revision for script in ScriptDirectory(str(SCRIPTS)).walk_revisions("base", "heads")][::-1]

#: A revision that a later version might bring: a new column, a new table, and rows that are written again.
LATER = """
import sqlalchemy as sa
from alembic import op

revision = "later"
down_revision = "{head}"


def upgrade():
    with op.batch_alter_table("blob") as batch:
        batch.add_column(sa.Column("note", sa.Text(), nullable=False, server_default="none"))
    op.create_table("later", sa.Column("id", sa.Integer(), primary_key=True))
    op.execute("UPDATE blob SET note = digest")
    {end}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "hythe.db"


@pytest.fixture
def later(tmp_path: Path) -> Path:
    return write_later(tmp_path, "pass")


def write_later(tmp_path: Path, end: str) -> Path:
    scripts = tmp_path / "later % migrations"
    shutil.copytree(SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "later.py").write_text(LATER.format(head=migrations.HEAD, end=end))
    return scripts


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def make(path: Path, revision: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    engine = create_engine(url(path))
    with engine.begin() as connection_:
        config.attributes["connection"] = connection_
        command.upgrade(config, revision)
    engine.dispose()


def has_log(path: Path) -> bool:
    """Return whether a file is written with a log. [SQLite: Database File Format, 1.3.3]"""
    return path.read_bytes()[18:20] == b"\x02\x02"


def test_a_file_has_its_log_before_anybody_uses_it(path: Path) -> None:
    upgrade(url(path))
    assert has_log(path)


def test_a_file_that_lost_its_log_in_a_copy_has_one_again(path: Path) -> None:
    upgrade(url(path))
    copy = path.with_name("copy.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM INTO ?", (str(copy),))
    assert not has_log(copy)
    upgrade(url(copy))
    assert has_log(copy)


@contextmanager
def connected(path: Path) -> Iterator[tuple[Connection, MetaData]]:
    engine = create_engine(url(path))
    found = MetaData()
    with engine.begin() as connection:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of reflection, on types and indexes it cannot tell
            found.reflect(connection)
        yield connection, found
    engine.dispose()


def fill(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Put a row into every table, whatever tables there are, each referring to the ones before; return them all."""
    with connected(path) as (connection, found):
        connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        for table in found.sorted_tables:
            if table.name == "policy":
                # There is one from the first.
                connection.execute(delete(table))
            if table.name != "alembic_version":
                connection.execute(insert(table).values(a_row(table)))
    return rows(path)


def a_row(table: Table) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column in table.columns:
        if isinstance(column.type, LargeBinary):
            row[column.name] = b"\x00 bytes \xff"
        elif isinstance(column.type, Boolean | Integer | BigInteger):
            row[column.name] = 1
        else:
            row[column.name] = f"{table.name}.{column.name} \u00e4"
    return row


def rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    with connected(path) as (connection, found):
        return {
            table.name: [dict(row._mapping) for row in connection.execute(select(table))]
            for table in found.sorted_tables
            if table.name != "alembic_version"
        }


def revision_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def differences(path: Path, expected: MetaData) -> list[Any]:
    with connected(path) as (connection, _):
        options = {"compare_type": True, "compare_server_default": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), expected))


def assert_kept(before: dict[str, list[dict[str, Any]]], after: dict[str, list[dict[str, Any]]]) -> None:
    """Where a later revision moves data elsewhere, this is the place to say so."""
    for table, kept in before.items():
        assert len(after[table]) == len(kept)
        for old, new in zip(kept, after[table], strict=True):
            assert {name: new[name] for name in old if name in new} == {name: old[name] for name in old if name in new}


def test_a_fresh_database_has_the_tables_that_the_code_knows(path: Path) -> None:
    assert upgrade(url(path)) is None
    assert differences(path, metadata) == []
    assert revision_of(path) == migrations.HEAD


def test_a_difference_would_be_noticed(path: Path) -> None:
    upgrade(url(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP INDEX tag_manifest")
    assert differences(path, metadata)


def test_the_foreign_keys_are_those_that_the_code_knows(path: Path) -> None:
    upgrade(url(path))
    with connected(path) as (_, found):
        for table in metadata.sorted_tables:
            ours, theirs = (
                {(key.parent.name, key.target_fullname, key.ondelete) for key in each.foreign_keys}
                for each in (table, found.tables[table.name])
            )
            assert ours == theirs, table.name


def test_the_head_is_the_newest_script() -> None:
    assert ScriptDirectory(str(SCRIPTS)).get_heads() == [migrations.HEAD]
    assert REVISIONS[-1] == migrations.HEAD


def test_a_database_of_this_version_is_left_alone(path: Path) -> None:
    upgrade(url(path))
    before = fill(path)
    assert upgrade(url(path)) is None
    assert rows(path) == before
    assert sorted(file.name for file in path.parent.iterdir() if "before" in file.name) == []


@pytest.mark.parametrize("revision", REVISIONS)
def test_every_earlier_schema_is_upgraded_with_its_data(path: Path, revision: str) -> None:
    make(path, revision)
    before = fill(path)
    copy = upgrade(url(path))
    assert (copy is None) == (revision == migrations.HEAD)
    assert differences(path, metadata) == []
    assert_kept(before, rows(path))
    if copy:
        assert revision_of(Path(copy)) == revision
        assert rows(Path(copy)) == before


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_later_version_upgrades_every_schema_with_its_data_after_a_copy(
    path: Path, later: Path, revision: str
) -> None:
    make(path, revision)
    before = fill(path)
    copy = upgrade(url(path), later, "later")
    assert copy == str(path.with_name(f"hythe.db.before-upgrade-from-{revision}"))
    assert revision_of(path) == "later"
    after = rows(path)
    assert_kept(before, after)
    assert after["blob"][0]["note"] == before["blob"][0]["digest"]
    assert revision_of(Path(copy)) == revision
    assert rows(Path(copy)) == before
    assert upgrade(url(path), later, "later") is None


def test_the_copy_holds_what_was_only_in_the_log(path: Path, later: Path) -> None:
    make(path, migrations.HEAD)
    with closing(sqlite3.connect(path, isolation_level=None)) as open_one:
        open_one.execute("PRAGMA wal_autocheckpoint=0")
        open_one.execute(
            "INSERT INTO blob (digest, size, key, created_at, touched_at) VALUES ('sha256:0', 1, 'k', 2, 3)"
        )
        assert path.with_name("hythe.db-wal").stat().st_size
        copy = upgrade(url(path), later, "later")
    assert copy
    assert [row["digest"] for row in rows(Path(copy))["blob"]] == ["sha256:0"]


def test_the_copy_is_as_private_as_the_database(path: Path, later: Path) -> None:
    make(path, migrations.HEAD)
    path.chmod(0o600)
    copy = upgrade(url(path), later, "later")
    assert copy
    assert Path(copy).stat().st_mode & 0o777 == 0o600


def test_a_copy_that_was_cut_short_before_is_made_again(path: Path, later: Path) -> None:
    make(path, migrations.HEAD)
    before = fill(path)
    path.with_name(f"hythe.db.before-upgrade-from-{migrations.HEAD}.part").write_bytes(b"half a database")
    copy = upgrade(url(path), later, "later")
    assert copy
    assert rows(Path(copy)) == before
    assert not list(path.parent.glob("*.part"))


def test_an_upgrade_that_fails_leaves_the_database_as_it_was(path: Path, tmp_path: Path) -> None:
    make(path, migrations.HEAD)
    before = fill(path)
    with pytest.raises(ZeroDivisionError):
        upgrade(url(path), write_later(tmp_path, "1 / 0"), "later")
    assert revision_of(path) == migrations.HEAD
    assert rows(path) == before
    assert differences(path, metadata) == []


def test_a_first_start_that_failed_half_way_can_be_repeated(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        upgrade(url(path), write_later(tmp_path, "1 / 0"), "later")
    assert upgrade(url(path)) is None
    assert differences(path, metadata) == []


def test_a_newer_database_is_refused_and_left_alone(path: Path, later: Path) -> None:
    upgrade(url(path), later, "later")
    content = path.read_bytes()
    with pytest.raises(ConfigurationError, match="newer version of Hythe") as raised:
        upgrade(url(path))
    assert "later" in str(raised.value)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == content
    assert not list(path.parent.glob("*before-upgrade*"))


def test_the_server_refuses_a_newer_database(tmp_path: Path, path: Path, later: Path) -> None:
    upgrade(url(path), later, "later")
    with hythe_server(tmp_path, start=False) as server:
        super(type(server), server).start()
        assert server.process
        assert server.process.wait(30) == 1
    output = server.output.read_text()
    assert "newer version of Hythe" in output
    assert "Traceback" not in output


def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE invoice (id INTEGER PRIMARY KEY)")
    content = path.read_bytes()
    with pytest.raises(ConfigurationError, match="not one of Hythe"):
        upgrade(url(path))
    assert path.read_bytes() == content


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"To whom it may concern: " * 100)
    with pytest.raises(ConfigurationError, match=r"^database\.url"):
        upgrade(url(path))
    assert path.read_bytes() == b"To whom it may concern: " * 100


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^database\.url"):
        upgrade(url(tmp_path))


def test_every_revision_says_what_it_does() -> None:
    for script in ScriptDirectory(str(SCRIPTS)).walk_revisions():
        assert script.doc, script.path
        assert Path(script.path).name.startswith(f"{script.revision}_")
