"""The database that the configuration names, as commands about accounts write to it, whether a server runs or not.

Whoever gets at it may do everything anyway, so nobody is asked who he is. Servers notice at once.
"""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Sequence
from typing import Any, Final, ParamSpec, TypeVar

from registry.access.personal import NewToken
from registry.access.rights import Right, nodes_above, parse_node
from registry.config import Settings
from registry.errors import AccountsError, ConfigurationError, MetadataError
from registry.lock import held
from registry.metadata import access_tokens, rules
from registry.metadata.audit import Event, audited
from registry.metadata.engine import Unit, open_database
from registry.metadata.schema import is_current, upgrade
from registry.metadata.sqlite import sqlite_path
from storage.errors import InvalidName

P = ParamSpec("P")
T = TypeVar("T")

#: What the audit names for a credential.
HOW: Final = "command line"


class Ledger:
    """Asks and changes the database; a change is in the audit. All raise `AccountsError`, `ConfigurationError`."""

    def __init__(self, settings: Settings) -> None:
        """Take the database that `settings` name."""
        self._settings = settings

    def change(
        self,
        action: str,
        target: str,
        detail: str,
        unit: Unit[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run a unit that changes something, with its event in the audit."""
        return self.do(audited, Event(us(), HOW, "", action, target=target, detail=detail), unit, *args, **kwargs)

    def do(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit that changes something, and keeps its event itself."""
        result: T = asyncio.run(self._run(lambda database: database.write(unit, *args, **kwargs)))
        return result

    def ask(self, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a unit that only reads; there must be a database, for nobody looks for something in a new one."""
        path = sqlite_path(self._settings.database.url)
        if path is not None and not path.exists():
            raise ConfigurationError(
                f"database.url: there is no {path.resolve()}: paths begin where a command is run, as for serve, so "
                "run this where that is, or name the directory with --data"
            )
        result: T = asyncio.run(self._run(lambda database: database.read(unit, *args, **kwargs)))
        return result

    def grant(self, right: str, node: str, subject: str) -> dict[str, Any]:
        """Make a rule."""
        place = node_of(node)
        self.do(audited, _about(place, "grant", right, subject), rules.grant, place, right, subject, us())
        return {"node": place or "/", "right": right, "subject": subject}

    def revoke(self, right: str, node: str, subject: str) -> dict[str, Any]:
        """Take a rule back."""
        place = node_of(node)
        self.do(audited, _about(place, "revoke", right, subject), rules.revoke, place, right, subject)
        return {"node": place or "/", "right": right, "subject": subject}

    def rules(self, node: str | None) -> list[dict[str, Any]]:
        """Return all rules, or those that hold for a node."""
        found = self.ask(rules.everything, None if node is None else nodes_above(node_of(node)))
        return [rule.described() for rule in found]

    def holders(self, right: str, node: str) -> list[dict[str, Any]]:
        """Return who has a right, and by which rules."""
        given_by = [str(each) for each in Right(right).given_by]
        found = self.ask(rules.holders, nodes_above(node_of(node)), given_by)
        return [{"name": name, "rule": rule.described()} for name, rule in found]

    def create_token(self, owner: str | None, name: str, scope: Sequence[str], days: int) -> dict[str, Any]:
        """Make a personal token of an account."""
        if owner is None:
            raise AccountsError("say whose it is: --user NAME")
        try:
            made = NewToken.of(owner, name, scope, days)
        except InvalidName as error:
            raise AccountsError(str(error)) from None
        kept = (made.owner, made.name, made.secret, made.bound, made.ends_at)
        return made.described(self.change("token.create", owner, made.detail(), access_tokens.add_personal, *kept))

    def tokens(self, owner: str | None) -> list[dict[str, Any]]:
        """Return the personal tokens of an account, or of all."""
        return [{"owner": name, **token.described()} for name, token in self.ask(access_tokens.of, owner)]

    def revoke_token(self, token_id: int) -> dict[str, Any]:
        """Let a token be good for nothing."""
        owner, token = self.change("token.revoke", str(token_id), "", access_tokens.revoke, token_id)
        return {"id": token_id, "owner": owner, "name": token.name}

    def _bring_up_to_date(self) -> None:
        """Bring the database to this version, as a server does; not under one that runs, which may be older."""
        url = self._settings.database.url
        path = sqlite_path(url)
        if path is None:
            upgrade(url)
        elif not is_current(path):
            with held([path.resolve().parent / "hythe.lock"]):
                upgrade(url)

    async def _run(self, work: Any) -> Any:
        self._bring_up_to_date()
        database = open_database(self._settings.database.url, sync=self._settings.database.sync, connections=1)
        try:
            return await work(database)
        except MetadataError as error:
            raise ConfigurationError(f"database.url: {error}") from None
        finally:
            await database.close()


def us() -> str:
    """Return whom the audit names: no account, but who sat at this machine."""
    try:
        return f"{getpass.getuser()} (command line)"
    except (KeyError, OSError):
        return "command line"


def node_of(text: str) -> str:
    """Return a node of the tree; `/` is its root. Raises `AccountsError`."""
    try:
        return parse_node(text)
    except InvalidName as error:
        raise AccountsError(str(error)) from None


def _about(node: str, action: str, right: str, subject: str) -> Event:
    return Event(us(), HOW, "", action, repository=node, target=node or "/", detail=f"{right} to {subject}")
