"""`hythe migrate`, `copy-store` and `copy-database`: what is done beside a server, by whoever runs it."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any, Final

import click

from hythe.browse import Result, human_size
from registry.affinity import Affinity
from registry.app import open_facts, open_store
from registry.config import Settings, check_s3
from registry.copying import Copied, copy_store
from registry.errors import ConfigurationError, MetadataError
from registry.lock import held
from registry.metadata.copying import copy_database
from registry.metadata.schema import upgrade
from registry.metadata.sqlite import sqlite_path
from storage.errors import StorageError

#: Seconds between two looks at how far it is.
_PAUSE: Final = 0.2


class Progress:
    """One line on a terminal that is written again and again; nothing in a pipe."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._next = 0.0

    def say(self, text: str, *, is_last: bool = False) -> None:
        """Show how far it is."""
        if self._is_shown and (is_last or time.monotonic() >= self._next):
            self._next = time.monotonic() + _PAUSE
            click.echo(f"\r\x1b[K{text}", err=True, nl=is_last)

    def end(self) -> None:
        """Leave the line empty."""
        if self._is_shown:
            click.echo("\r\x1b[K", err=True, nl=False)


def migrate(settings: Settings) -> Result:
    """Bring the database up to date."""
    copy = upgrade(settings.database.url)
    text = "the database is up to date" + (f"; what it was before is in {copy}" if copy else "")
    return Result({"copy": copy}, text)


def copy_blobs(settings: Settings, source: str, target: str) -> Result:
    """Copy all blobs from one driver's store to another's, both as the settings describe them."""
    if source == target:
        raise ConfigurationError("--from and --to name the same store")
    if "s3" in (source, target):
        check_s3(settings.storage.s3)
    try:
        copied = asyncio.run(_copy_blobs(settings, source, target))
    except* (StorageError, MetadataError) as group:
        raise ConfigurationError(f"stopped; run it again to go on: {_first(group)}") from None
    if copied.bad:
        listed = "".join(f"\n  {digest}: {reason}" for digest, reason in copied.bad.items())
        raise ConfigurationError(f"{len(copied.bad)} blobs of {copied.blobs} could not be copied:{listed}")
    text = (
        f"{copied.blobs} blobs ({human_size(copied.size)}) are in the {target} store, "
        f"{copied.new} of them ({human_size(copied.new_size)}) since now"
    )
    return Result({key: getattr(copied, key) for key in ("blobs", "size", "new", "new_size")}, text)


async def _copy_blobs(settings: Settings, source: str, target: str) -> Copied:
    affinity = Affinity(enabled=False)
    database = open_facts(settings, affinity)
    old, new = (open_store(settings, affinity, driver) for driver in (source, target))
    progress = Progress()

    def say(copied: Copied, total: int) -> None:
        percent = 100 * copied.size // total if total else 100
        progress.say(f"{copied.blobs} blobs, {human_size(copied.size)} of {human_size(total)} ({percent}%)")

    try:
        return await copy_store(database, old, new, say)
    finally:
        progress.end()
        await old.close()
        await new.close()
        await database.close()


def copy_facts(source: str, target: str) -> Result:
    """Copy all that one database knows into another one that is empty."""
    files = [path.resolve() for url in (source, target) if (path := sqlite_path(url))]
    if sqlite_path(source) and not files[0].exists():
        raise ConfigurationError(f"--from: there is no {files[0]}")
    directories = dict.fromkeys(path.parent for path in files)
    progress = Progress()
    # Nobody may write meanwhile: what he was told is kept would not be.
    with held([directory / "hythe.lock" for directory in directories]):
        for url in (source, target):
            upgrade(url)
        rows = copy_database(source, target, lambda table, done, total: progress.say(f"{table}: {done} of {total}"))
    progress.end()
    return Result(rows, f"{sum(rows.values())} rows of {len(rows)} tables were copied")


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
