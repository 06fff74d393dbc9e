"""Passwords: argon2 for our own accounts, bcrypt for those of an htpasswd file. Hashed in threads, few at a time."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from registry.errors import AccountsError, ConfigurationError, TooManyRequests
from storage.threads import Threads

if TYPE_CHECKING:
    from argon2 import PasswordHasher

#: [OWASP: Password Storage Cheat Sheet, Argon2id] 19 MiB and 2 passes: some 35 ms.
_MEMORY_KIB: Final = 19 << 10
_PASSES: Final = 2
#: Passwords that are hashed at once, and that may wait for it.
_THREADS: Final = 2
_WAITING_LIMIT: Final = 64
#: bcrypt looks at no more bytes of a password, and its library refuses more.
_BCRYPT_LIMIT: Final = 72
_BCRYPT: Final = re.compile(r"\$2[aby]\$[0-9]{2}\$[./A-Za-z0-9]{53}")
_PASSWORD_MINIMUM: Final = 8
_PASSWORD_LIMIT: Final = 1024


class Passwords:
    """Checks passwords off the event loop."""

    def __init__(self) -> None:
        self._threads = Threads(_THREADS, "passwords")
        self._waiting = 0

    async def check(self, hashed: str | None, password: str) -> bool:
        """Return whether `password` is the one that was hashed; where there is none, say no after the same time.

        Raises:
            TooManyRequests: too many wait for this already.
        """
        if self._waiting >= _WAITING_LIMIT:
            raise TooManyRequests("too many log in at once: try again later", headers={"Retry-After": "5"})
        self._waiting += 1
        try:
            return await self._threads.run(_check, hashed, password)
        finally:
            self._waiting -= 1

    async def rehash(self, password: str) -> str:
        """Hash a password that is one already, however short it is."""
        return await self._threads.run(_argon2().hash, password)

    async def close(self) -> None:
        """End the threads."""
        await self._threads.close()


def hash_password(password: str) -> str:
    """Return a password's argon2 hash. Raises `AccountsError` for one that is too short, or far too long."""
    if not _PASSWORD_MINIMUM <= len(password) <= _PASSWORD_LIMIT:
        raise AccountsError(f"a password has {_PASSWORD_MINIMUM} to {_PASSWORD_LIMIT} characters")
    return _argon2().hash(password)


def is_ours(hashed: str) -> bool:
    """Return whether a hash is as `hash_password` makes them."""
    return hashed.startswith("$argon2id$") and not _argon2().check_needs_rehash(hashed)


def read_htpasswd(path: Path) -> dict[str, str]:
    """Return the bcrypt hashes in a file, by name. [htpasswd -B]

    Raises:
        ConfigurationError: it cannot be read, or a line is of another kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return dict(_entries(path, text))


def _entries(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, hashed = line.strip().partition(":")
        # To its last character: of a line that is still being written, there is only the beginning.
        if not _BCRYPT.fullmatch(hashed):
            raise ConfigurationError(f"{path}, line {number}: not a bcrypt hash: make it with htpasswd -B")
        yield name, hashed


def _check(hashed: str | None, password: str) -> bool:
    if len(password) > _PASSWORD_LIMIT:
        password, hashed = "", None
    if hashed is not None and hashed.startswith("$2"):
        return _check_bcrypt(hashed, password)
    from argon2.exceptions import InvalidHashError, VerificationError

    try:
        return _argon2().verify(hashed or _nobodys(), password) and hashed is not None
    except (VerificationError, InvalidHashError):
        return False


def _check_bcrypt(hashed: str, password: str) -> bool:
    import bcrypt

    try:
        return bcrypt.checkpw(password.encode()[:_BCRYPT_LIMIT], hashed.encode())
    except ValueError:
        # A zero byte, or a hash that only began like one.
        return False


@cache
def _argon2() -> PasswordHasher:
    # Imported only where there are accounts.
    from argon2 import PasswordHasher

    return PasswordHasher(time_cost=_PASSES, memory_cost=_MEMORY_KIB, parallelism=1)


@cache
def _nobodys() -> str:
    """Return the hash of a password that nobody has."""
    return _argon2().hash(secrets.token_hex(16))
