"""Bringing a database to the schema of this version, before anybody uses it.

The usual case, nothing to do, is one look into `alembic_version`; Alembic is imported only for work.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Final

import migrations
from registry.errors import ConfigurationError
from registry.metadata.engine import sqlite_path

#: SQLite names it like this in a fresh database.
_NONE: Final = ""


def upgrade(url: str, scripts: Path | None = None, head: str = migrations.HEAD) -> str | None:
    """Bring the database behind `url` to `head`.

    Args:
        url: of the database; its file is made where absent.
        scripts: the folder of migrations; Hythe's own where absent.
        head: the newest revision in it.

    Returns:
        The path of the copy made before an upgrade, or None where none was needed.

    Raises:
        ConfigurationError: the database was made by a newer version, or is no database of Hythe.
    """
    path = sqlite_path(url)
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    current = _current(path)
    if current == head:
        return None
    scripts = scripts or Path(migrations.__file__).parent
    if current and current not in _known(scripts):
        raise ConfigurationError(
            f"database.url: {path} was last used by a newer version of Hythe (its schema is {current}, "
            f"the newest known here is {head}): run that version, or restore the copy it made before its upgrade"
        )
    copy = _copy(path, current) if current else None
    _run(path, scripts)
    return str(copy) if copy else None


def _current(path: Path) -> str:
    """Return the revision of a database, empty for a fresh one."""
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


def _copy(path: Path, revision: str) -> Path:
    """Copy the database, with what is still in its log, next to itself."""
    copy = path.with_name(f"{path.name}.before-upgrade-from-{revision}")
    temporary = copy.with_name(copy.name + ".part")
    temporary.unlink(missing_ok=True)
    with (
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(temporary)) as target,
    ):
        source.backup(target)
    shutil.copymode(path, temporary)
    temporary.replace(copy)
    return copy


def _known(scripts: Path) -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory(str(scripts)).walk_revisions()}


def _run(path: Path, scripts: Path) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.attributes["path"] = path
    command.upgrade(config, "head")
