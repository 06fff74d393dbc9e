"""Whether a request may do what it asks for. Once for each, before its handler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aiohttp import web

from registry.access.audit import Auditor
from registry.access.challenges import CATALOG, Challenges, resource
from registry.access.clients import Clients
from registry.access.credentials import Credentials
from registry.access.limits import Rate, network_of
from registry.access.rights import OPEN, Identity, Right
from registry.config import LimitSettings
from registry.errors import Denied, Hidden, ReadOnly, Unauthorized
from registry.responses import COUNTED, WHO

_DENIED: Final = {
    Right.PUSH: "{who} may not push to {name}",
    Right.DELETE: "{who} may not delete in {name}",
    Right.ADMIN: "{who} does not administer {name}",
}


class Gate:
    """Lets requests in."""

    def __init__(
        self,
        credentials: Credentials,
        challenges: Challenges,
        clients: Clients,
        auditor: Auditor,
        rate: Rate,
        settings: LimitSettings,
    ) -> None:
        """Let `credentials` say who comes, and `challenges` how to be let in; count requests by `rate`."""
        self._credentials = credentials
        self._challenges = challenges
        self._clients = clients
        self._auditor = auditor
        self._rate = rate
        self._pulls = Rate(settings.anonymous_pulls_per_hour, 3600)

    async def identify(self, request: web.Request) -> Identity:
        """Return who sends a request.

        Raises:
            Unauthorized: the credentials are not good.
            TooManyRequests: too many were not, or this client sends too many requests.
        """
        identity = request[WHO] = await self._credentials.identify(request)
        if self._rate.is_on:
            self._rate.demand(self.client_of(request, identity), "too many requests: slow down")
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
            raise self.wider(request, [resource(name, right)])
        if not identity.account:
            raise self._challenges.to(request, [resource(name, right)])
        who = f"{identity.name} by this token" if identity.bound is not None else identity.name
        self._auditor.refused(request, identity, str(right), f"{who} may not {right}", repository=name)
        if right is Right.PULL:
            raise Hidden(f"there is no repository {name}, or {who} may not pull from it")
        raise Denied(_DENIED[right].format(who=who, name=name or "/"))

    async def demand_still(self, request: web.Request, name: str, right: Right) -> None:
        """Let a request do so whose body came only now: it may have taken hours, and rights may be gone meanwhile.

        Raises as `identify`, `demand` and `demand_writable` do.
        """
        if not await self._credentials.is_still_known(request):
            self.demand(request, await self._credentials.identify(request), name, right)
            self.demand_writable()

    def wider(self, request: web.Request, resources: Sequence[str]) -> Unauthorized:
        """Return the error by which a client gets a token for all of `resources`."""
        return self._challenges.to(request, resources, "insufficient_scope")

    def demand_known(self, request: web.Request, identity: Identity) -> None:
        """Let in who said who it is, if only by a token for nobody; raise `Unauthorized` for others."""
        if not identity.is_known:
            raise self._challenges.to(request)

    def demand_account(self, request: web.Request, identity: Identity) -> None:
        """Let in who has an account, or whoever comes where there are none; raise `Unauthorized` for others."""
        if not identity.account and identity is not OPEN:
            raise self._challenges.to(request)

    def demand_catalog(self, request: web.Request, identity: Identity) -> None:
        """The same, and its token must be for the catalog."""
        if not identity.is_known:
            raise self._challenges.to(request, [CATALOG])
        if identity.scope is not None and not identity.scope.catalog:
            raise self.wider(request, [CATALOG])

    def demand_valid(self, request: web.Request, identity: Identity) -> None:
        """Refuse a token whose time is over; raises `Unauthorized`."""
        if identity.is_ended:
            raise self._challenges.to(request, error="invalid_token")

    def count_pull(self, request: web.Request, identity: Identity) -> None:
        """Count a pull of nobody's; raises `TooManyRequests` where there were too many."""
        if self._pulls.is_on and not identity.account:
            request[COUNTED] = True
            address = network_of(self._clients.address(request))
            self._pulls.demand(address, "too many pulls without an account: log in, or wait")

    def demand_writable(self) -> None:
        """Raise `ReadOnly` while nothing may be written."""
        if self._credentials.policy.read_only is not None:
            raise ReadOnly(self._credentials.policy.read_only)
