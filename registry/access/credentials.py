"""Who sends a request.

    Authorization: Bearer <token for requests>   signed here, good for minutes (`signing.py`, `tokens.py`)
                   Basic <name:password>         or a personal token, or one of another issuer, as the password
                   Bearer <personal token>       for scripts
    none                                         whatever everybody may

What a credential came to is remembered until it ends, or anybody's rights change: the policy says so, and is looked at
for each request. Nothing of a credential is kept but a hash, keyed anew by every process.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import replace
from typing import Final

from aiohttp import hdrs, web

from registry.access.audit import Auditor
from registry.access.challenges import Challenges
from registry.access.clients import Clients
from registry.access.limits import Rate, network_of, retry_after
from registry.access.logins import LoginFailed, Logins, identity_of
from registry.access.rights import OPEN, Held, Identity, Scope
from registry.access.signing import GRACE, InvalidToken, Signer
from registry.errors import TooManyRequests, Unauthorized
from registry.metadata import policy, principals, rules
from registry.metadata.access_tokens import PREFIX
from registry.metadata.engine import Database, Watch
from registry.metadata.policy import Policy
from registry.responses import POLICY

#: Credentials that are remembered.
_KNOWN_LIMIT: Final = 10_000
#: Repositories that a token may be for to be remembered; clients ask for one, or two to mount from another.
_SCOPE_LIMIT: Final = 10
#: One that is longer than any of ours is not looked at.
_HEADER_LIMIT: Final = 16 << 10


class Credentials:
    """Knows whom credentials stand for, and what holds for all of them.

    Attributes:
        policy: as it was found for the latest request.
    """

    def __init__(
        self,
        database: Database,
        rights: Watch | None,
        signer: Signer,
        logins: Logins,
        clients: Clients,
        auditor: Auditor,
        challenges: Challenges,
        rate: Rate,
    ) -> None:
        """Look into `database`, and only where `rights` tells that something changed, if it can be told.

        What is refused is told to `auditor`, and counts for `rate` as a request.
        """
        self._database = database
        self._rights = rights
        self._signer = signer
        self._logins = logins
        self._clients = clients
        self._auditor = auditor
        self._challenges = challenges
        self._rate = rate
        self.policy = Policy(-1, None, has_accounts=True)
        self._known: OrderedDict[bytes, Identity] = OrderedDict()
        self._nobody: Identity | None = None
        self._key = secrets.token_bytes(32)

    async def identify(self, request: web.Request) -> Identity:
        """Return who sends a request.

        Raises:
            Unauthorized: the credentials are not good.
            TooManyRequests: too many were not.
        """
        current = await self._current()
        request[POLICY] = current.version
        if not current.has_accounts:
            return OPEN
        header = request.headers.get(hdrs.AUTHORIZATION)
        if header is None:
            return await self._anonymous()
        mark = hmac.digest(self._key, header.encode("utf-8", "surrogateescape"), "sha256")
        known = self._known.get(mark)
        if known is not None and known.until > time.time():
            self._known.move_to_end(mark)
            return known
        identity = await self._read(request, header)
        if not identity.is_ended and current.version == self.policy.version and _is_small(identity.scope):
            self._known[mark] = identity
            if len(self._known) > _KNOWN_LIMIT:
                self._known.popitem(last=False)
        return identity

    async def is_still_known(self, request: web.Request) -> bool:
        """Return whether nobody's rights have changed since it was said who sends a request."""
        return (await self._current()).version == request[POLICY]

    async def log_in(self, request: web.Request, name: str, password: str) -> Identity:
        """Return whom a name and a password stand for. Raises as `identify` does."""
        try:
            return await self._logins.by_password(name, password, self._clients.address(request))
        except LoginFailed as error:
            raise self._refused(request, error) from None

    async def log_in_by_token(self, request: web.Request, token: str, kind: str) -> Identity:
        """Return whom a token of a kind stands for. Raises as `identify` does."""
        try:
            return await self._logins.by_token(token, self._clients.address(request), kind=kind)
        except LoginFailed as error:
            raise self._refused(request, error) from None

    async def _current(self) -> Policy:
        """Return what holds now; what was remembered under another version is forgotten."""
        if self._rights is not None and self._rights() == self.policy.version:
            return self.policy
        found = await self._database.look_up(policy.find)
        if found.version != self.policy.version:
            self._known.clear()
            self._nobody = None
        self.policy = found
        return found

    async def _anonymous(self) -> Identity:
        if self._nobody is None:
            version = self.policy.version
            held = Held(await self._database.read(rules.held, None))
            nobody = Identity(held=held, is_known=False)
            if version != self.policy.version:
                return nobody
            self._nobody = nobody
        return self._nobody

    async def _read(self, request: web.Request, header: str) -> Identity:
        kind, _, value = header.partition(" ")
        if kind.lower() == "basic":
            name, password = _decode(value)
            return await self.log_in(request, name, password)
        if kind.lower() == "bearer" and value.startswith(PREFIX):
            return await self.log_in_by_token(request, value.strip(), "personal")
        if kind.lower() == "bearer" and len(value) < _HEADER_LIMIT:
            return await self._read_bearer(request, value.strip())
        raise self._refused(request, LoginFailed("", "the header Authorization cannot be read"))

    async def _read_bearer(self, request: web.Request, token: str) -> Identity:
        try:
            claims = await self._signer.read(token)
            scope = Scope.of_claim(claims["access"])
            account, personal, at = int(claims["account"]), int(claims["token"]), int(claims["at"])
            until = float(claims["exp"])
        except (InvalidToken, KeyError, ValueError, TypeError) as error:
            raise self._refused(request, LoginFailed("", f"invalid token: {error}"), "invalid_token") from None
        if until + GRACE < time.time():
            raise self._challenges.to(request, error="invalid_token")
        if not account:
            nobody = await self._anonymous()
            return replace(nobody, scope=scope, until=until, is_known=True, is_ended=until <= time.time())
        found = await self._database.read(principals.by_id, account, personal)
        if found is None or found.account.is_disabled or found.account.changed_at != at:
            reason = "the account is gone, disabled or changed, or the token behind it was revoked"
            raise self._refused(request, LoginFailed(str(claims["sub"]), reason), "invalid_token")
        credential = f"token {personal}" if personal else str(claims.get("by", ""))
        identity = identity_of(found, credential, until)
        return replace(identity, scope=scope, is_ended=identity.until <= time.time())

    def _refused(self, request: web.Request, error: LoginFailed, kind: str = "") -> Unauthorized | TooManyRequests:
        self._auditor.refused(request, Identity(), "login", str(error), target=error.name)
        if wait := self._rate.take(network_of(self._clients.address(request))):
            return TooManyRequests(headers=retry_after(wait))
        return self._challenges.to_wrong(request, kind)


def _is_small(scope: Scope | None) -> bool:
    return scope is None or len(scope.repositories) <= _SCOPE_LIMIT


def _decode(value: str) -> tuple[str, str]:
    """Return name and password; empty ones where nobody can have meant any. [RFC 7617]"""
    try:
        name, _, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return "", ""
    return name, password
