"""Accounts that the configuration names: the first administrator, and those of an htpasswd file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import structlog

from registry.access.passwords import hash_password, read_htpasswd
from registry.config import AccountSettings
from registry.errors import AccountsError, ConfigurationError, MetadataError
from registry.metadata import accounts, policy
from registry.metadata.audit import Event
from registry.metadata.engine import Database

#: Seconds between two looks at the file.
_PAUSE: Final = 5.0

#: Of a file: it is another one where any of these is.
_State = tuple[int, int, int] | None

log = structlog.get_logger()


async def make_accounts(database: Database, settings: AccountSettings) -> bool:
    """Make the accounts that `settings` name, and return whether there are any.

    Raises:
        ConfigurationError: they cannot be made as they are named.
        MetadataError: the database does not answer.
    """
    if settings.admin_password and not await _has_accounts(database):
        try:
            password = await asyncio.to_thread(hash_password, settings.admin_password)
            name = accounts.checked_name(settings.admin)
            event = Event("", "accounts.admin_password", "", "user.add", target=name, detail="administrator")
            if await database.write(accounts.add_first, name, password, event):
                log.info("the first account was made", name=settings.admin)
        except AccountsError as error:
            raise ConfigurationError(f"accounts.admin, accounts.admin_password: {error}") from None
    if settings.htpasswd:
        # After the administrator: where these are, he is not made any more.
        await Follower(database, Path(settings.htpasswd)).read()
    return await _has_accounts(database)


async def _has_accounts(database: Database) -> bool:
    return (await database.read(policy.find)).has_accounts


class Follower:
    """Lets accounts follow an htpasswd file, now and whenever it changes."""

    def __init__(self, database: Database, path: Path) -> None:
        """Follow the file at `path`."""
        self._database = database
        self._path = path
        #: The file as it was at the last look, and as it was when it was read.
        self._seen: _State = None
        self._read: _State = None

    async def read(self) -> None:
        """Let accounts be those of the file.

        Raises:
            ConfigurationError: it cannot be used; nothing changes then.
            MetadataError: the database does not answer.
        """
        self._read = await asyncio.to_thread(self._state)
        passwords = await asyncio.to_thread(read_htpasswd, self._path)
        try:
            changed, foreign = await self._database.write(accounts.follow, passwords, "accounts.htpasswd")
        except AccountsError as error:
            raise ConfigurationError(f"{self._path}: {error}") from None
        except MetadataError:
            # What is written there is for the next look.
            self._read = None
            raise
        if changed:
            log.info("accounts follow the htpasswd file", changed=", ".join(changed))
        for name in foreign:
            log.warning("an account of this name does not come from the htpasswd file, and stays as it is", name=name)

    async def look(self) -> None:
        """Read the file if it is not the one that was read, and has stood still since the last look.

        One that is being written lacks those who come last in it.
        """
        state = await asyncio.to_thread(self._state)
        is_still, self._seen = state == self._seen, state
        if not is_still or state == self._read:
            return
        try:
            await self.read()
        except (ConfigurationError, MetadataError) as error:
            log.error("accounts do not follow the htpasswd file", error=str(error))

    async def keep_looking(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(_PAUSE)
            await self.look()

    def _state(self) -> _State:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns
