"""How a client learns that it must say who it is, and where to get a token. [distribution: Token Authentication]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aiohttp import hdrs, web

from registry.access.clients import Clients
from registry.access.rights import Right
from registry.errors import Unauthorized

CATALOG: Final = "registry:catalog:*"
_WRONG: Final = "the name or the password is wrong"
_MESSAGES: Final = {
    "insufficient_scope": "the token is not for this: get one for the scope that is named",
    "invalid_token": "the token is not good, or not any more: get another one",
}


class Challenges:
    """Makes errors that say so."""

    def __init__(self, clients: Clients, service: str) -> None:
        """Name tokens' audience `service`, and us as `clients` know us."""
        self._clients = clients
        self._service = service

    def to(
        self, request: web.Request, resources: Sequence[str] = (), error: str = "", message: str = ""
    ) -> Unauthorized:
        """Return an error that says where to get a token, and for what.

        Clients read it by simple means: every value in quotes, one challenge, and no "basic" anywhere in it.
        """
        text = message or _MESSAGES.get(error, "")
        if not request.path.startswith("/v2/"):
            return Unauthorized(text, headers={hdrs.WWW_AUTHENTICATE: 'Basic realm="Hythe"'})
        parts = [f'realm="{self._clients.origin(request)}/v2/token"', f'service="{self._service}"']
        parts += [f'scope="{" ".join(resources)}"'] if resources else []
        parts += [f'error="{error}"'] if error else []
        return Unauthorized(text, headers={hdrs.WWW_AUTHENTICATE: f"Bearer {','.join(parts)}"})

    def to_wrong(self, request: web.Request, error: str = "") -> Unauthorized:
        """Return the same for credentials that are not good; of a name and a password, never which of the two."""
        return self.to(request, error=error, message="" if error else _WRONG)


def resource(name: str, right: Right) -> str:
    """Return the scope that a request needs, as token endpoints are asked for it."""
    return f"repository:{name}:{'pull' if right is Right.PULL else f'pull,{right}'}"
