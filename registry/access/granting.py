"""`/api/v1/rules`, `holders` and `tokens`: what somebody may hand on.

Rights on a node are given by whoever administers it, or a node above. Tokens are made by whoever logs in with his
password: no token begets another one, which would outlive it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import hdrs, web

from registry.access.audit import Auditor
from registry.access.gate import Gate
from registry.access.personal import NewToken
from registry.access.rights import OPEN, Identity, Right, nodes_above, parse_node
from registry.errors import BadRequest, Conflict, Denied
from registry.metadata import access_tokens, rules
from registry.metadata.access_tokens import NAME_LIMIT
from registry.metadata.audit import audited
from registry.metadata.engine import Database
from registry.responses import json_response

_Handler = Callable[[web.Request, Identity], Awaitable[web.StreamResponse]]
_DAYS_LIMIT: Final = 36_500
_DEFAULT_DAYS: Final = "90"
#: What steers a terminal or ends a line, and what PostgreSQL does not take.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Granting:
    """Hands on rights and tokens."""

    def __init__(self, database: Database, gate: Gate, auditor: Auditor) -> None:
        """Keep them in `database`; `gate` says who may."""
        self._database = database
        self._gate = gate
        self._auditor = auditor

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/api/v1/rules", self._gated(self.rules), allow_head=False),
            web.put("/api/v1/rules", self._gated(self.grant)),
            web.delete("/api/v1/rules", self._gated(self.revoke)),
            web.get("/api/v1/holders", self._gated(self.holders), allow_head=False),
            web.get("/api/v1/tokens", self._gated(self.tokens), allow_head=False),
            web.post("/api/v1/tokens", self._gated(self.create_token)),
            web.delete("/api/v1/tokens", self._gated(self.revoke_token)),
        ]

    def _gated(self, handler: _Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Let accounts in, and nobody where there are none: what he did would hold for those who come."""

        async def handle(request: web.Request) -> web.StreamResponse:
            identity = await self._gate.identify(request)
            if identity is OPEN:
                raise Conflict("there are no accounts yet: make the first one by hythe user add --admin NAME")
            self._gate.demand_valid(request, identity)
            self._gate.demand_account(request, identity)
            if request.method != hdrs.METH_GET:
                self._gate.demand_writable()
            return await handler(request, identity)

        return handle

    async def rules(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """GET `rules`: all that hold for `node`."""
        node = self._node(request, identity)
        found = await self._database.read(rules.everything, nodes_above(node))
        return json_response({"rules": [rule.described() for rule in found]})

    async def grant(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """PUT `rules`: give `right` on `node` to `subject`."""
        return await self._change(request, identity, "grant", rules.grant, identity.name)

    async def revoke(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """DELETE `rules`: take the rule back that gives `right` on `node` to `subject`."""
        return await self._change(request, identity, "revoke", rules.revoke)

    async def holders(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """GET `holders`: who has `right` on `node`, and by which rule."""
        node = self._node(request, identity)
        right = _right(request)
        found = await self._database.read(rules.holders, nodes_above(node), [str(each) for each in right.given_by])
        return json_response({"holders": [{"name": name, "rule": rule.described()} for name, rule in found]})

    async def tokens(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """GET `tokens`: the personal tokens of whoever asks, not what they are."""
        found = await self._database.read(access_tokens.of, self._owner(request, identity))
        return json_response({"tokens": [{"owner": owner, **token.described()} for owner, token in found]})

    async def create_token(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """POST `tokens`: make one called `name`, for `days`, as far as each `scope` reaches. It is shown this once."""
        owner, name = self._owner(request, identity), _parameter(request, "name")
        if len(name) > NAME_LIMIT:
            raise BadRequest(f"name: expected up to {NAME_LIMIT} characters")
        days = _number(request, "days", _DEFAULT_DAYS)
        if days > _DAYS_LIMIT:
            raise BadRequest(f"days: expected 0, for one that never ends, to {_DAYS_LIMIT}")
        made = NewToken.of(owner, name, request.query.getall("scope", []), days)
        event = self._auditor.event(request, identity, "token.create", target=owner, detail=made.detail())
        token_id = await self._database.write(
            audited,
            event,
            access_tokens.add_personal,
            made.owner,
            made.name,
            made.secret,
            made.bound,
            made.ends_at,
            identity.changed_at,
        )
        self._auditor.tell(event)
        return json_response(made.described(token_id), status=201, headers={hdrs.CACHE_CONTROL: "no-store"})

    async def revoke_token(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """DELETE `tokens`: let the one with this `id` be good for nothing."""
        owner, token_id = self._owner(request, identity), _number(request, "id")
        event = self._auditor.event(request, identity, "token.revoke", target=str(token_id))
        _, token = await self._database.write(audited, event, access_tokens.revoke, token_id, owner)
        self._auditor.tell(event)
        return json_response({"id": token_id, "owner": owner, "name": token.name})

    def _node(self, request: web.Request, identity: Identity) -> str:
        node = parse_node(_parameter(request, "node"))
        self._gate.demand(request, identity, node, Right.ADMIN)
        return node

    def _owner(self, request: web.Request, identity: Identity) -> str:
        """Return whose tokens these are: those of whoever shows his password."""
        if identity.credential != "password" or identity.scope is not None:
            detail = "tokens are made and revoked with the password, not with another token"
            self._auditor.refused(request, identity, "tokens", detail)
            raise Denied(detail)
        return identity.name

    async def _change(
        self, request: web.Request, identity: Identity, action: str, unit: Callable[..., object], *more: str
    ) -> web.StreamResponse:
        """Run a unit on the rule that a request names, and say which that is."""
        node = self._node(request, identity)
        right, subject = _right(request), _parameter(request, "subject")
        detail = f"{right} to {subject}"
        event = self._auditor.event(request, identity, action, repository=node, target=node or "/", detail=detail)
        await self._database.write(audited, event, unit, node, right, subject, *more)
        self._auditor.tell(event)
        return json_response({"node": node or "/", "right": right, "subject": subject})


def _parameter(request: web.Request, name: str) -> str:
    text = request.query.get(name, "")
    if not text or _CONTROL.search(text):
        raise BadRequest(f"the parameter {name!r} is missing, or cannot be read")
    return text


def _right(request: web.Request) -> Right:
    text = _parameter(request, "right")
    try:
        return Right(text)
    except ValueError:
        raise BadRequest(f"right: expected {', '.join(Right)}, got {text[:100]!r}") from None


def _number(request: web.Request, name: str, default: str | None = None) -> int:
    text = _parameter(request, name) if default is None else request.query.get(name, default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest(f"{name}: expected a number, got {text[:100]!r}")
    return int(text)
