"""From a name and a password, or something in its place, to an account.

What goes wrong is told to the audit, never to the client: it hears the same after the same time, whether there is such
an account or not, and whether it is disabled.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from typing import Final

import structlog

from registry.access.issuers import Issuers, looks_like_one
from registry.access.limits import LoginLimits
from registry.access.passwords import Passwords, is_ours
from registry.access.rights import Held, Identity
from registry.errors import MetadataError
from registry.metadata import access_tokens, accounts, principals
from registry.metadata.engine import Database
from registry.metadata.principals import Principal

#: Seconds that a refusal takes at least.
_REFUSAL_SECONDS: Final = 0.3
#: Seconds for which a password that was right is not checked again.
_VERDICT_SECONDS: Final = 60.0
_SECOND: Final = 1_000_000

log = structlog.get_logger()


class LoginFailed(Exception):
    """The credentials are not good. The message says why, for the audit alone."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class Logins:
    """Knows whom credentials stand for."""

    def __init__(self, database: Database, passwords: Passwords, issuers: Issuers, limits: LoginLimits) -> None:
        """Look into `database`; let `limits` slow down whoever guesses."""
        self._database = database
        self._passwords = passwords
        self._issuers = issuers
        self._limits = limits

    async def by_password(self, name: str, password: str, address: str) -> Identity:
        """Return whom a name and a password stand for; the password may be a token.

        Raises:
            LoginFailed: they are not good.
            TooManyRequests: too many were not, by this name or from this address.
        """
        if password.startswith(access_tokens.PREFIX):
            return await self.by_token(password, address, name=name)
        if looks_like_one(password):
            return await self._by_issuer(name, password, address)
        async with self._limits.attempt(name, address) as attempt:
            began = time.monotonic()
            found = await self._database.read(principals.by_name, name)
            is_right = await self._passwords.check(found.account.password if found else None, password)
            if found is None or not is_right or found.account.is_disabled:
                attempt.is_good = False
                await _wait_until(began + _REFUSAL_SECONDS)
                raise LoginFailed(name, _reason(found, is_right=is_right))
            attempt.is_good = True
        await self._improve(found, password)
        return identity_of(found, "password", time.time() + _VERDICT_SECONDS)

    async def by_token(self, token: str, address: str, name: str = "", kind: str = access_tokens.PERSONAL) -> Identity:
        """Return whom a personal or a refresh token stands for, who must be called `name` if that is given.

        Raises as `by_password` does.
        """
        began = time.monotonic()
        found = await self._database.read(principals.by_secret, access_tokens.secret_hash(token))
        if (
            found is None
            or found.token is None
            or found.token.kind != kind
            or found.account.is_disabled
            or name not in ("", found.account.name)
        ):
            reason = "the token is unknown, revoked, ended, or another account's"
            raise await self._refusal(name, reason, address, began)
        try:
            await self._database.note(access_tokens.note_use, found.token.id)
        except MetadataError as error:
            # On a full disk pulls go on.
            log.warning("the use of a token is not noted", error=str(error))
        return identity_of(found, f"{_kind_of(found)} {found.token.id}", time.time() + _VERDICT_SECONDS)

    async def _by_issuer(self, name: str, token: str, address: str) -> Identity:
        began = time.monotonic()
        vouched = await self._issuers.read(token)
        found = await self._database.read(principals.by_name, vouched.account) if vouched.account else None
        if found is None or found.account.is_disabled:
            reason = vouched.reason or f"there is no account {vouched.account}, or it is disabled"
            raise await self._refusal(name, f"token of another issuer: {reason}", address, began)
        return identity_of(found, vouched.credential, time.time() + _VERDICT_SECONDS, vouched.ends_at)

    async def _refusal(self, name: str, reason: str, address: str, began: float) -> LoginFailed:
        """Return the refusal of a token, in time; raises `TooManyRequests`.

        It counts for the address, not for the account: tokens cannot be guessed, and whoever guesses passwords shall
        not lock out robots. So one that is good does not come here, whatever others do at its address.
        """
        async with self._limits.attempt("", address) as attempt:
            attempt.is_good = False
            await _wait_until(began + _REFUSAL_SECONDS)
        return LoginFailed(name, reason)

    async def _improve(self, found: Principal, password: str) -> None:
        """Keep a password of our own by our own hash, if it came from elsewhere."""
        old = found.account.password
        if found.account.source != accounts.OWN or old is None or is_ours(old):
            return
        try:
            await self._database.note(accounts.rehash, found.account.id, old, await self._passwords.rehash(password))
        except MetadataError as error:
            log.warning("a password is not hashed anew yet", error=str(error))


def identity_of(found: Principal, credential: str, until: float, ends_at: float = math.inf) -> Identity:
    """Return who an account is, to those who decide. `until` and `ends_at` are in seconds since the epoch."""
    token = found.token
    if token is not None and token.ends_at is not None:
        ends_at = min(ends_at, token.ends_at / _SECOND)
    return Identity(
        name=found.account.name,
        account=found.account.id,
        held=Held(found.rules),
        bound=bound_of(token.scope) if token else None,
        credential=credential,
        token=token.id if token else 0,
        changed_at=found.account.changed_at,
        until=min(until, ends_at),
        ends_at=ends_at,
    )


def bound_of(scope: str) -> Held | None:
    """Return how far a token reaches; None where as far as its account."""
    rules: Sequence[tuple[str, str]] = json.loads(scope)
    return Held(rules) if rules else None


def _kind_of(found: Principal) -> str:
    return "token" if found.token and found.token.kind == access_tokens.PERSONAL else "refresh token"


def _reason(found: Principal | None, *, is_right: bool) -> str:
    if found is None:
        return "there is no such account"
    if found.account.is_disabled and (is_right or found.account.password is None):
        return "the account is disabled"
    return "the account has no password" if found.account.password is None else "wrong password"


async def _wait_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.monotonic()))
