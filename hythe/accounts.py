"""`hythe user`, `team`, `token`, `grant`, `revoke`, `grants`, `who-can`, `read-only` and `audit`.

They write to the database that the configuration names, whether a server runs or not: whoever gets at that may do
everything anyway. Servers notice at once.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, ParamSpec, TypeVar

from hythe.browse import Result, table
from registry.access import ROOT, Right, nodes_above
from registry.affinity import Affinity
from registry.app import open_facts
from registry.config import Settings
from registry.errors import AccountsError, ConfigurationError, MetadataError
from registry.logins import new_token, secret_hash
from registry.metadata import access_tokens, accounts, audit, policy, rules
from registry.metadata.audit import Event, audited
from registry.metadata.engine import Unit
from registry.metadata.schema import upgrade
from registry.metadata.tables import now
from registry.passwords import hash_password
from registry.responses import rfc3339
from storage.errors import InvalidName
from storage.names import parse_repository

P = ParamSpec("P")
T = TypeVar("T")

_SECOND: Final = 1_000_000
_DAY: Final = 86400 * _SECOND
_AGO: Final = re.compile(r"([0-9]{1,6})([mhd])")
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


def add_user(settings: Settings, name: str, password: str | None, *, admin: bool) -> Result:
    """Make an account; without a password it is a robot's."""
    hashed = hash_password(password) if password is not None else None
    kind = accounts.ROBOT if password is None else accounts.USER
    _change(settings, "user.add", name, "", accounts.add, name, kind, hashed, admin=admin, by=_us())
    rights = ", who may administer everything" if admin else ""
    return Result({"name": name, "kind": kind, "admin": admin}, f"{name} is a {kind} now{rights}")


def list_users(settings: Settings) -> Result:
    """List all accounts."""
    found = _ask(settings, accounts.everyone)
    data = [
        {
            "name": each.name,
            "kind": each.kind,
            "source": each.source,
            "is_disabled": each.is_disabled,
            "created_at": _time(each.created_at),
        }
        for each in found
    ]
    rows = [
        (each.name, each.kind, each.source, "disabled" if each.is_disabled else "", _time(each.created_at))
        for each in found
    ]
    return Result(data, table(("NAME", "KIND", "FROM", "STATE", "SINCE"), rows))


def set_password(settings: Settings, name: str, password: str) -> Result:
    """Change a password."""
    _change(settings, "user.password", name, "", accounts.set_password, name, hash_password(password))
    return Result({"name": name}, f"{name} has a new password; whoever was logged in by the old one is not any more")


def set_disabled(settings: Settings, name: str, *, disabled: bool) -> Result:
    """Let an account do nothing any more, or again what it may."""
    action = "disable" if disabled else "enable"
    _change(settings, f"user.{action}", name, "", accounts.set_disabled, name, disabled=disabled)
    return Result({"name": name, "is_disabled": disabled}, f"{name} is {action}d")


def remove_user(settings: Settings, name: str) -> Result:
    """Remove an account."""
    _change(settings, "user.remove", name, "", accounts.remove, name)
    return Result({"name": name}, f"{name} is removed, with its tokens and rules")


def change_team(settings: Settings, action: str, team: str, names: Sequence[str]) -> Result:
    """Make or remove a team, or let accounts join or leave it."""
    if action == "add":
        _change(settings, "team.add", team, "", accounts.add_team, team)
    elif action == "remove":
        _change(settings, "team.remove", team, "", accounts.remove_team, team)
    elif action == "join":
        _change(settings, "team.join", team, ", ".join(names), accounts.join, team, list(names))
    else:
        _change(settings, "team.leave", team, ", ".join(names), accounts.leave, team, list(names))
    return Result({"team": team, "members": list(names)}, f"team {team}: {action} {', '.join(names)}".rstrip())


def list_teams(settings: Settings) -> Result:
    """List all teams."""
    found = _ask(settings, accounts.teams)
    rows = [(each.name, ", ".join(each.members)) for each in found]
    return Result([each._asdict() for each in found], table(("TEAM", "MEMBERS"), rows))


def create_token(settings: Settings, owner: str, name: str, scope: Sequence[str], days: int) -> Result:
    """Make a personal token; it is shown once."""
    token = new_token()
    reach = json.dumps([_reach(text) for text in scope])
    ends_at = now() + days * _DAY if days else None
    token_id = _change(
        settings,
        "token.create",
        owner,
        name,
        access_tokens.add_personal,
        owner,
        name,
        secret_hash(token),
        reach,
        ends_at,
    )
    data = {"id": token_id, "owner": owner, "name": name, "token": token, "ends_at": rfc3339(ends_at)}
    return Result(data, token)


def list_tokens(settings: Settings, owner: str | None) -> Result:
    """List tokens, not what they are."""
    found = _ask(settings, access_tokens.of, owner)
    data = [
        {
            "id": token.id,
            "owner": name,
            "name": token.name,
            "scope": [f"{right}:{node or '/'}" for node, right in json.loads(token.scope)],
            "ends_at": rfc3339(token.ends_at),
            "used_at": rfc3339(token.used_at),
        }
        for name, token in found
    ]
    rows = [[" ".join(cell) if isinstance(cell, list) else str(cell or "") for cell in each.values()] for each in data]
    shown = [[cell or "-" for cell in row] for row in rows]
    return Result(data, table(("ID", "OWNER", "NAME", "SCOPE", "ENDS", "USED"), shown))


def revoke_token(settings: Settings, token_id: int) -> Result:
    """Let a token be good for nothing."""
    owner, token = _change(settings, "token.revoke", str(token_id), "", access_tokens.revoke, token_id)
    return Result({"id": token_id, "owner": owner}, f"token {token_id} ({token.name}) of {owner} is revoked")


def change_rule(settings: Settings, right: str, node: str, subject: str, *, grant: bool) -> Result:
    """Make a rule, or take it back."""
    place = _node(node)
    detail = f"{right} to {subject}"
    if grant:
        _change(settings, "grant", place or "/", detail, rules.grant, place, right, subject, _us())
    else:
        _change(settings, "revoke", place or "/", detail, rules.revoke, place, right, subject)
    verb = "may now" if grant else "may not by this rule any more"
    return Result(
        {"node": place or "/", "right": right, "subject": subject}, f"{subject} {verb} {right} {place or '/'}"
    )


def list_rules(settings: Settings, node: str | None) -> Result:
    """List all rules, or those that hold for a node."""
    found = _ask(settings, rules.everything, None if node is None else nodes_above(_node(node)))
    rows = [(rule.node or "/", rule.right, rule.subject, _time(rule.created_at), rule.created_by) for rule in found]
    data = [{**rule._asdict(), "node": rule.node or "/", "created_at": _time(rule.created_at)} for rule in found]
    return Result(data, table(("NODE", "RIGHT", "TO", "SINCE", "BY"), rows))


def who_can(settings: Settings, right: str, node: str) -> Result:
    """Say who may do something, and by which rules."""
    place = _node(node)
    given_by = [str(each) for each in Right(right).given_by]
    found = _ask(settings, rules.holders, nodes_above(place), given_by)
    explained = [
        (holder.name, f"{holder.rule.right} on {holder.rule.node or '/'} to {holder.rule.subject}") for holder in found
    ]
    data = [{"name": name, "rule": rule} for name, rule in explained]
    return Result(data, table(("WHO", "BY THE RULE"), explained))


def set_read_only(settings: Settings, reason: str | None) -> Result:
    """Let nothing be written, or everything again."""
    action = "read-only.off" if reason is None else "read-only.on"
    _change(settings, action, "", reason or "", policy.set_read_only, reason)
    text = "all may be written again" if reason is None else f"nothing is written from now on: {reason}"
    return Result({"read_only": reason}, text)


def show_read_only(settings: Settings) -> Result:
    """Say whether anything may be written."""
    reason = _ask(settings, policy.find).read_only
    return Result({"read_only": reason}, "all may be written" if reason is None else f"read-only: {reason}")


def list_audit(settings: Settings, since: str, user: str | None, repository: str | None, limit: int) -> Result:
    """Say who did what, the newest last."""
    found = _ask(
        settings,
        audit.find,
        since=_since(since),
        user=user,
        repository=repository,
        before=None,
        limit=limit,
    )
    events = [event for _, event in reversed(found)]
    data = [
        {**{name: getattr(event, name) for name in Event.__dataclass_fields__}, "at": _time(event.at)}
        for event in events
    ]
    rows = [
        (_time(event.at), event.actor or "-", event.address or "-", event.action, event.outcome, _what(event))
        for event in events
    ]
    return Result(data, table(("AT", "WHO", "FROM", "ACTION", "OUTCOME", "WHAT"), rows))


def _what(event: Event) -> str:
    return " ".join(filter(None, [event.repository, event.target, event.detail and f"({event.detail})"]))


def _change(
    settings: Settings, action: str, target: str, detail: str, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a unit that changes something, with its event in the audit."""
    event = Event(_us(), "command line", "", action, target=target, detail=detail)
    result: T = asyncio.run(_run(settings, lambda database: database.write(audited, event, unit, *args, **kwargs)))
    return result


def _ask(settings: Settings, unit: Unit[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    result: T = asyncio.run(_run(settings, lambda database: database.read(unit, *args, **kwargs)))
    return result


async def _run(settings: Settings, work: Any) -> Any:
    upgrade(settings.database.url)
    database = open_facts(settings, Affinity(enabled=False))
    try:
        return await work(database)
    except MetadataError as error:
        raise ConfigurationError(f"database.url: {error}") from None
    finally:
        await database.close()


def _us() -> str:
    """Return whom the audit names: no account, but who sat at this machine."""
    try:
        return f"{getpass.getuser()} (command line)"
    except (KeyError, OSError):
        return "command line"


def _node(text: str) -> str:
    """Return a node of the tree; `/` is its root. Raises `AccountsError`."""
    name = text.strip("/")
    try:
        return str(parse_repository(name)) if name else ROOT
    except InvalidName as error:
        raise AccountsError(str(error)) from None


def _reach(text: str) -> tuple[str, str]:
    """Read `RIGHT:NODE`. Raises `AccountsError`."""
    right, colon, node = text.partition(":")
    if not colon or right not in list(Right):
        raise AccountsError(f"--scope must look like pull:org/team, got {text!r}")
    return _node(node), right


def _since(text: str) -> int:
    """Read `7d`, `12h`, `30m` or a date, as microseconds since the epoch. Raises `AccountsError`."""
    if ago := _AGO.fullmatch(text):
        moment = datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    else:
        try:
            moment = datetime.fromisoformat(text).astimezone(UTC)
        except ValueError:
            raise AccountsError(f"--since must look like 7d, 12h, 30m or 2026-11-25, got {text!r}") from None
    return int(moment.timestamp() * _SECOND)


def _time(microseconds: int | None) -> str:
    return rfc3339(microseconds) or ""
