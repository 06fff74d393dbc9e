"""A registry elsewhere, as commands about rights and tokens ask it: as HYTHE_USER, by its API."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hythe.client import ServerError, ask


class Remote:
    """Asks and changes a registry as far as HYTHE_USER may. All methods raise `ServerError`."""

    def __init__(self, server: str) -> None:
        """Take the registry at `server`, as `client.ask` does."""
        self._server = server

    def grant(self, right: str, node: str, subject: str) -> Any:
        """Make a rule."""
        return ask(self._server, "PUT", "rules", node=node, right=right, subject=subject)

    def revoke(self, right: str, node: str, subject: str) -> Any:
        """Take a rule back."""
        return ask(self._server, "DELETE", "rules", node=node, right=right, subject=subject)

    def rules(self, node: str | None) -> Any:
        """Return the rules that hold for a node."""
        if node is None:
            raise ServerError("say for which node: a registry elsewhere shows what holds for one that you administer")
        return ask(self._server, "GET", "rules", node=node)["rules"]

    def holders(self, right: str, node: str) -> Any:
        """Return who has a right, and by which rules."""
        return ask(self._server, "GET", "holders", right=right, node=node)["holders"]

    def create_token(self, owner: str | None, name: str, scope: Sequence[str], days: int) -> Any:
        """Make a personal token of one's own."""
        _demand_own(owner)
        return ask(self._server, "POST", "tokens", name=name, scope=scope, days=str(days))

    def tokens(self, owner: str | None) -> Any:
        """Return one's own personal tokens."""
        _demand_own(owner)
        return ask(self._server, "GET", "tokens")["tokens"]

    def revoke_token(self, token_id: int) -> Any:
        """Let a token of one's own be good for nothing."""
        return ask(self._server, "DELETE", "tokens", id=str(token_id))


def _demand_own(owner: str | None) -> None:
    if owner not in (None, os.environ.get("HYTHE_USER")):
        raise ServerError("tokens of others are made where the database is; elsewhere, everybody makes his own")
