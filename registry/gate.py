"""Who sends a request, and whether it may do what it asks for. Once for each, before its handler.

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
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from aiohttp import hdrs, web

from registry.access import OPEN, Held, Identity, Right, Scope
from registry.audit import Auditor
from registry.clients import Clients
from registry.config import Settings
from registry.errors import Denied, Hidden, ReadOnly, TooManyRequests, Unauthorized
from registry.limits import Rate, network_of
from registry.logins import LoginFailed, Logins, identity_of
from registry.metadata import policy, principals, rules
from registry.metadata.access_tokens import PREFIX
from registry.metadata.engine import Database, Watch
from registry.metadata.policy import Policy
from registry.responses import COUNTED, WHO
from registry.signing import GRACE, InvalidToken, Signer

#: Credentials that are remembered.
_KNOWN_LIMIT: Final = 10_000
#: One that is longer than any of ours is not looked at.
_HEADER_LIMIT: Final = 16 << 10

CATALOG: Final = "registry:catalog:*"


class Gate:
    """Lets requests in."""

    def __init__(
        self,
        database: Database,
        rights: Watch | None,
        signer: Signer,
        logins: Logins,
        clients: Clients,
        auditor: Auditor,
        settings: Settings,
    ) -> None:
        """Look into `database`, and only where `rights` tells that something changed, if it can be told."""
        self._database = database
        self._rights = rights
        self._signer = signer
        self._logins = logins
        self._clients = clients
        self._auditor = auditor
        self.rate = Rate(settings.limits.requests_per_second, 1)
        self._pulls = Rate(settings.limits.anonymous_pulls_per_hour, 3600)
        self._service = settings.accounts.service
        self._policy = Policy(-1, None, has_accounts=True)
        self._known: OrderedDict[bytes, Identity] = OrderedDict()
        self._nobody: Identity | None = None
        self._key = secrets.token_bytes(32)

    async def identify(self, request: web.Request) -> Identity:
        """Return who sends a request.

        Raises:
            Unauthorized: the credentials are not good.
            TooManyRequests: too many were not, or this client sends too many requests.
        """
        identity = request[WHO] = await self._identify(request)
        if self.rate.is_on:
            self.rate.demand(self.client_of(request, identity), "too many requests: slow down")
        return identity

    def client_of(self, request: web.Request, identity: Identity) -> str:
        """Return whom limits count a request for: an account, or an address."""
        return f"account {identity.account}" if identity.account else network_of(self._clients.address(request))

    def demand(self, request: web.Request, identity: Identity, name: str, right: Right) -> None:
        """Let a request do what takes `right` on the repository `name`, or raise.

        Raises:
            Unauthorized: with other credentials, or another token, it might.
            Hidden: this account may not even know whether it is there.
            Denied: this account may not do that.
        """
        if identity.may(name, right):
            return
        if identity.holds(name, right):
            raise self.challenge(request, [resource(name, right)], "insufficient_scope")
        if not identity.account:
            raise self.challenge(request, [resource(name, right)])
        who = f"{identity.name} by this token" if identity.bound is not None else identity.name
        self._auditor.refused(request, identity, str(right), f"{who} may not {right}", repository=name)
        if right is Right.PULL:
            raise Hidden(f"there is no repository {name}, or {who} may not pull from it")
        raise Denied(_DENIED[right].format(who=who, name=name or "/"))

    def demand_known(self, request: web.Request, identity: Identity) -> None:
        """Let in who said who it is, if only by a token for nobody; raise `Unauthorized` for others."""
        if not identity.is_known:
            raise self.challenge(request, [])

    def demand_account(self, request: web.Request, identity: Identity) -> None:
        """Let in who has an account, or whoever comes where there are none; raise `Unauthorized` for others."""
        if not identity.account and identity is not OPEN:
            raise self.challenge(request, [])

    def demand_catalog(self, request: web.Request, identity: Identity) -> None:
        """The same, and its token must be for the catalog."""
        if not identity.is_known:
            raise self.challenge(request, [CATALOG])
        if identity.scope is not None and not identity.scope.catalog:
            raise self.challenge(request, [CATALOG], "insufficient_scope")

    def demand_valid(self, request: web.Request, identity: Identity) -> None:
        """Refuse a token whose time is over; raises `Unauthorized`."""
        if identity.is_ended:
            raise self.challenge(request, [], "invalid_token")

    def count_pull(self, request: web.Request, identity: Identity) -> None:
        """Count a pull of nobody's; raises `TooManyRequests` where there were too many."""
        if self._pulls.is_on and not identity.account:
            request[COUNTED] = True
            address = network_of(self._clients.address(request))
            self._pulls.demand(address, "too many pulls without an account: log in, or wait")

    def demand_writable(self) -> None:
        """Raise `ReadOnly` while nothing may be written."""
        if self._policy.read_only is not None:
            raise ReadOnly(self._policy.read_only)

    def challenge(self, request: web.Request, resources: Sequence[str], error: str = "") -> Unauthorized:
        """Return an error that says where to get a token, and for what. [distribution: Token Authentication]

        Clients read it by simple means: every value in quotes, one challenge, and no "basic" anywhere in it.
        """
        if not request.path.startswith("/v2/"):
            return Unauthorized(headers={hdrs.WWW_AUTHENTICATE: 'Basic realm="Hythe"'})
        parts = [f'realm="{self._clients.origin(request)}/v2/token"', f'service="{self._service}"']
        parts += [f'scope="{" ".join(resources)}"'] if resources else []
        parts += [f'error="{error}"'] if error else []
        return Unauthorized(_MESSAGES.get(error, ""), headers={hdrs.WWW_AUTHENTICATE: f"Bearer {','.join(parts)}"})

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

    async def _identify(self, request: web.Request) -> Identity:
        current = await self._current()
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
        if not identity.is_ended and current.version == self._policy.version:
            self._known[mark] = identity
            if len(self._known) > _KNOWN_LIMIT:
                self._known.popitem(last=False)
        return identity

    async def _current(self) -> Policy:
        """Return what holds now; what was remembered under another version is forgotten."""
        if self._rights is not None and self._rights() == self._policy.version:
            return self._policy
        found = await self._database.look_up(policy.find)
        if found.version != self._policy.version:
            self._known.clear()
            self._nobody = None
        self._policy = found
        return found

    async def _anonymous(self) -> Identity:
        if self._nobody is None:
            version = self._policy.version
            held = Held(await self._database.read(rules.held, None))
            nobody = Identity(held=held, is_known=False)
            if version != self._policy.version:
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
            raise self.challenge(request, [], "invalid_token")
        if not account:
            nobody = await self._anonymous()
            return replace(nobody, scope=scope, until=until, is_known=True, is_ended=until <= time.time())
        found = await self._database.read(principals.by_id, account, personal)
        if found is None or found.account.is_disabled or found.account.changed_at > at:
            reason = "the account is gone, disabled or changed, or the token behind it was revoked"
            raise self._refused(request, LoginFailed(str(claims["sub"]), reason), "invalid_token")
        credential = f"token {personal}" if personal else str(claims.get("by", ""))
        identity = identity_of(found, credential, until)
        return replace(identity, scope=scope, is_ended=identity.until <= time.time())

    def _refused(self, request: web.Request, error: LoginFailed, kind: str = "") -> Unauthorized | TooManyRequests:
        self._auditor.refused(request, Identity(), "login", str(error), target=error.name)
        if wait := self.rate.take(network_of(self._clients.address(request))):
            return TooManyRequests(headers={"Retry-After": str(int(wait) + 1)})
        answer = self.challenge(request, [], kind)
        return Unauthorized(_MESSAGES.get(kind, _WRONG), headers=answer.headers)


_WRONG: Final = "the name or the password is wrong"
_MESSAGES: Final = {
    "insufficient_scope": "the token is not for this: get one for the scope that is named",
    "invalid_token": "the token is not good, or not any more: get another one",
}


_DENIED: Final = {
    Right.PUSH: "{who} may not push to {name}",
    Right.DELETE: "{who} may not delete in {name}",
    Right.ADMIN: "{who} does not administer {name}",
}


def resource(name: str, right: Right) -> str:
    """Return the scope that a request needs, as token endpoints are asked for it."""
    return f"repository:{name}:{'pull' if right is Right.PULL else f'pull,{right}'}"


def _decode(value: str) -> tuple[str, str]:
    """Return name and password; empty ones where nobody can have meant any. [RFC 7617]"""
    try:
        name, _, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return "", ""
    return name, password
