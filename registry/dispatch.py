"""From a request below `/v2/` to its handler: the path is read, the method known, the gate passed. Once."""

from __future__ import annotations

from typing import Final

from aiohttp import hdrs, web

from registry.access.gate import Gate
from registry.access.rights import Identity, Right
from registry.calls import Call, Handler
from registry.errors import NotFound, Unsupported, UnsupportedEncoding
from registry.responses import ROUTE
from registry.routes import Endpoint, match
from storage.names import RepositoryName, parse_repository

#: What to do for an endpoint and a method, and which right it takes.
Table = dict[Endpoint, dict[str, tuple[Handler, Right]]]

_PREFIX_LENGTH: Final = len("/v2/")
#: Methods that change nothing.
_READING: Final = ("GET", "HEAD")


class Dispatcher:
    """The one handler behind `/v2/`."""

    def __init__(self, table: Table, gate: Gate) -> None:
        """Send requests where `table` says, if `gate` lets them."""
        self._table = table
        self._gate = gate

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request."""
        route = match(request.path[_PREFIX_LENGTH:])
        if route is None:
            raise NotFound
        request[ROUTE] = route.endpoint.name.lower()
        methods = self._table[route.endpoint]
        try:
            handler, right = methods[request.method]
        except KeyError:
            raise Unsupported(
                f"{request.method} is not supported here", headers={"Allow": ", ".join(methods)}
            ) from None
        name = parse_repository(route.name) if route.name else RepositoryName("")
        identity = await self._gate.identify(request)
        if route.endpoint is not Endpoint.TOKEN:
            self._admit(request, route.endpoint, identity, name, right)
        return await handler(Call(request, identity, name, route.argument))

    def _admit(
        self, request: web.Request, endpoint: Endpoint, identity: Identity, name: RepositoryName, right: Right
    ) -> None:
        gate = self._gate
        if endpoint is not Endpoint.UPLOAD:
            # What a token began may be finished after its end: `uploads.py` asks whether it did.
            gate.demand_valid(request, identity)
        if name:
            gate.demand(request, identity, name, right)
        elif endpoint is Endpoint.CATALOG:
            gate.demand_catalog(request, identity)
        else:
            gate.demand_known(request, identity)
        if endpoint is Endpoint.MANIFEST and request.method == "GET":
            gate.count_pull(request, identity)
        if request.method not in _READING:
            gate.demand_writable()
            if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
                raise UnsupportedEncoding(headers={hdrs.CONNECTION: "close"})
