"""Bringing a database to the schema of this version, before anybody uses it.

The usual case, nothing to do, is one look into `alembic_version`; Alembic is imported only for work. All revisions that
are missing are one transaction. Servers that start at once take turns.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Connection, NullPool, create_engine, event, inspect, text
from sqlalchemy.exc import DBAPIError

import migrations
from registry.errors import ConfigurationError
from registry.metadata.engine import parse_url

#: SQLite names it like this in a fresh database.
_NONE: Final = ""
#: Of the lock that servers on one PostgreSQL database take before they look; any number, for ever the same.
_TURN: Final = 0x687974686500


def upgrade(url: str, scripts: Path | None = None, head: str = migrations.HEAD) -> str | None:
    """Bring the database behind `url` to `head`.

    Args:
        url: of the database; a file is made where absent.
        scripts: the folder of migrations; Hythe's own where absent.
        head: the newest revision in it.

    Returns:
        The path of the copy made before an upgrade, or None where none was needed or none can be made.

    Raises:
        ConfigurationError: the database was made by a newer version, is no database of Hythe, or cannot be reached.
    """
    parsed = parse_url(url)
    scripts = scripts or Path(migrations.__file__).parent
    if parsed.get_backend_name() == "sqlite":
        return _upgrade_file(Path(parsed.database or ""), scripts, head)
    try:
        _upgrade_server(parsed, scripts, head)
    except DBAPIError as error:
        raise ConfigurationError(f"database.url: {str(error.orig).strip()}") from None
    return None


def is_current(path: Path) -> bool:
    """Return whether a file is a database of this version. Raises `ConfigurationError` as `upgrade` does."""
    return path.exists() and _revision_of_file(path) == migrations.HEAD


def _upgrade_file(path: Path, scripts: Path, head: str) -> str | None:
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    # In it are hashes of passwords and the keys by which tokens are signed; its directory may be an open one.
    with contextlib.suppress(OSError):
        path.touch(mode=0o640)
    current = _revision_of_file(path)
    copy = None
    if current != head:
        _check(current, scripts, head, str(path))
        copy = _copy(path, current) if current else None
        with _writing(path) as connection:
            _run(connection, scripts)
    _use_log(path)
    return str(copy) if copy else None


def _upgrade_server(url: URL, scripts: Path, head: str) -> None:
    from registry.metadata.postgres import connectable

    engine = create_engine(connectable(url), poolclass=NullPool)
    with engine.begin() as connection:
        if _revision(connection, str(url.database)) == head:
            return
    with engine.begin() as connection:
        # Held until the end of the transaction, whatever becomes of us.
        connection.execute(text("SELECT pg_advisory_xact_lock(:turn)"), {"turn": _TURN})
        current = _revision(connection, str(url.database))
        # Another server may have done it while we waited.
        if current != head:
            _check(current, scripts, head, str(url.database))
            _run(connection, scripts)


def _check(current: str, scripts: Path, head: str, name: str) -> None:
    if current and current not in _known(scripts):
        raise ConfigurationError(
            f"database.url: {name} was last used by a newer version of Hythe (its schema is {current}, "
            f"the newest known here is {head}): run that version, or restore what was kept before its upgrade"
        )


def _revision(connection: Connection, name: str) -> str:
    """Return the revision of a database, empty for a fresh one."""
    tables = inspect(connection).get_table_names()
    if not tables:
        return _NONE
    if "alembic_version" not in tables:
        raise ConfigurationError(f"database.url: {name} is a database, but not one of Hythe")
    return connection.scalar(text("SELECT version_num FROM alembic_version")) or _NONE


def _revision_of_file(path: Path) -> str:
    """Return the revision of a database; without SQLAlchemy, which takes longer than the rest of a start."""
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                return _NONE
            if "alembic_version" not in tables:
                raise ConfigurationError(f"database.url: {path} is a database, but not one of Hythe")
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            return str(row[0]) if row else _NONE
    except sqlite3.Error as error:
        raise ConfigurationError(f"database.url: {path}: {error}") from None


def _use_log(path: Path) -> None:
    """Let readers and the writer not wait for each other; the file remembers it. [SQLite: WAL]

    Here, before anybody uses it: connections that find a file without it, and change it at the same moment, are told
    that it is locked, however patient they are.
    """
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.Error as error:
        raise ConfigurationError(f"database.url: {path}: {error}") from None


def _copy(path: Path, revision: str) -> Path:
    """Copy the database, with what is still in its log, next to itself."""
    copy = path.with_name(f"{path.name}.before-upgrade-from-{revision}")
    temporary = copy.with_name(copy.name + ".part")
    temporary.unlink(missing_ok=True)
    # In it are hashes of passwords and the keys by which tokens are signed.
    temporary.touch(mode=0o600)
    with (
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(temporary)) as target,
    ):
        source.backup(target)
    shutil.copymode(path, temporary)
    temporary.replace(copy)
    return copy


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Connection]:
    """Yield a connection to a file in a transaction that is committed at the end."""
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: object) -> None:
        # Transactions are begun by hand: with sqlite3's own, a failed upgrade would leave half of its tables.
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.begin() as connection:
        yield connection


def _known(scripts: Path) -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory(str(scripts)).walk_revisions()}


def _run(connection: Connection, scripts: Path) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
