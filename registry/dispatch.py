"""From a request below `/v2/` to its handler: the path is read, the method known, the right asked for. Once."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from registry.access import Access, Identity, Right
from registry.calls import Call, Handler
from registry.errors import Denied, NotFound, Unsupported
from registry.responses import ROUTE
from registry.routes import Endpoint, match
from storage.names import RepositoryName, parse_repository

#: What to do for an endpoint and a method, and which right it takes.
Table = dict[Endpoint, dict[str, tuple[Handler, Right]]]

_PREFIX_LENGTH: Final = len("/v2/")
_NOBODY: Final = Identity()


class Dispatcher:
    """The one handler behind `/v2/`."""

    def __init__(self, table: Table, access: Access) -> None:
        """Send requests where `table` says, if `access` lets them."""
        self._table = table
        self._access = access

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
        name = parse_repository(route.name) if route.name else None
        if not self._access.may(_NOBODY, name, right):
            raise Denied
        return await handler(Call(request, _NOBODY, name or RepositoryName(""), route.argument))
