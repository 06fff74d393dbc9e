"""`hythe user`, `team`, `token`, `grant`, `revoke`, `grants`, `who-can`, `read-only` and `audit`: what they say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from hythe.browse import Result, table
from hythe.client import printable
from hythe.ledger import HOW, Ledger, us
from hythe.remote import Remote
from registry.access.passwords import hash_password, read_htpasswd
from registry.errors import AccountsError
from registry.metadata import accounts, audit, policy
from registry.metadata.audit import Event
from registry.metadata.tables import rfc3339

_SECOND: Final = 1_000_000
_AGO: Final = re.compile(r"([0-9]{1,6})([mhd])")
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


def add_user(ledger: Ledger, name: str, password: str | None, *, admin: bool) -> Result:
    """Make an account; without a password it is a robot's."""
    hashed = hash_password(password) if password is not None else None
    kind = accounts.ROBOT if password is None else accounts.USER
    detail = "administrator" if admin else kind
    ledger.change("user.add", name, detail, accounts.add, name, kind, hashed, admin=admin, by=us())
    rights = ", who may administer everything" if admin else ""
    return Result({"name": name, "kind": kind, "admin": admin}, f"{name} is a {kind} now{rights}")


def list_users(ledger: Ledger) -> Result:
    """List all accounts."""
    found = ledger.ask(accounts.everyone)
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


def set_password(ledger: Ledger, name: str, password: str) -> Result:
    """Change a password."""
    ledger.change("user.password", name, "", accounts.set_password, name, hash_password(password))
    return Result({"name": name}, f"{name} has a new password; whoever was logged in by the old one is not any more")


def set_disabled(ledger: Ledger, name: str, *, disabled: bool) -> Result:
    """Let an account do nothing any more, or again what it may."""
    action = "disable" if disabled else "enable"
    ledger.change(f"user.{action}", name, "", accounts.set_disabled, name, disabled=disabled)
    return Result({"name": name, "is_disabled": disabled}, f"{name} is {action}d")


def remove_user(ledger: Ledger, name: str) -> Result:
    """Remove an account."""
    ledger.change("user.remove", name, "", accounts.remove, name)
    return Result({"name": name}, f"{name} is removed, with its tokens and rules")


def import_users(ledger: Ledger, path: Path) -> Result:
    """Make accounts of the users of an htpasswd file."""
    found = read_htpasswd(path)
    taken, left = ledger.do(accounts.take_over, found, us(), HOW)
    lines = [f"{name} is a user now, with the same password" for name in taken]
    lines += [f"{name} is an account already, and stays as it is" for name in left]
    return Result({"imported": taken, "left": left}, "\n".join(lines) or f"there is nobody in {path}")


def change_team(ledger: Ledger, action: str, team: str, names: Sequence[str]) -> Result:
    """Make or remove a team, or let accounts join or leave it."""
    if action == "add":
        ledger.change("team.add", team, "", accounts.add_team, team)
    elif action == "remove":
        ledger.change("team.remove", team, "", accounts.remove_team, team)
    elif action == "join":
        ledger.change("team.join", team, ", ".join(names), accounts.join, team, list(names))
    else:
        ledger.change("team.leave", team, ", ".join(names), accounts.leave, team, list(names))
    return Result({"team": team, "members": list(names)}, f"team {team}: {action} {', '.join(names)}".rstrip())


def list_teams(ledger: Ledger) -> Result:
    """List all teams."""
    found = ledger.ask(accounts.teams)
    rows = [(each.name, ", ".join(each.members)) for each in found]
    return Result([each._asdict() for each in found], table(("TEAM", "MEMBERS"), rows))


def create_token(place: Ledger | Remote, owner: str | None, name: str, scope: Sequence[str], days: int) -> Result:
    """Make a personal token; it is shown once."""
    made = place.create_token(owner, name, scope, days)
    return Result(made, made["token"])


def list_tokens(place: Ledger | Remote, owner: str | None) -> Result:
    """List tokens, not what they are."""
    found = place.tokens(owner)
    rows = [
        [
            str(each["id"]),
            each["owner"],
            each["name"],
            " ".join(each["scope"]) or "-",
            each["ends_at"] or "-",
            each["used_at"] or "-",
        ]
        for each in found
    ]
    return Result(found, table(("ID", "OWNER", "NAME", "SCOPE", "ENDS", "USED"), rows))


def revoke_token(place: Ledger | Remote, token_id: int) -> Result:
    """Let a token be good for nothing."""
    gone = place.revoke_token(token_id)
    return Result(gone, f"token {token_id} ({printable(gone['name'])}) of {gone['owner']} is revoked")


def grant(place: Ledger | Remote, right: str, node: str, subject: str) -> Result:
    """Make a rule."""
    rule = place.grant(right, node, subject)
    return Result(rule, f"{subject} has {right} on {rule['node']}, and on all below it")


def revoke(place: Ledger | Remote, right: str, node: str, subject: str) -> Result:
    """Take a rule back."""
    rule = place.revoke(right, node, subject)
    return Result(rule, f"{subject} has {right} on {rule['node']} by this rule no more")


def list_rules(place: Ledger | Remote, node: str | None) -> Result:
    """List all rules, or those that hold for a node."""
    found = place.rules(node)
    columns = ("node", "right", "subject", "created_at", "created_by")
    rows = [[each[column] for column in columns] for each in found]
    return Result(found, table(("NODE", "RIGHT", "TO", "SINCE", "BY"), rows))


def who_can(place: Ledger | Remote, right: str, node: str) -> Result:
    """Say who may do something, and by which rules."""
    rows = [
        (each["name"], "{right} on {node} to {subject}".format(**each["rule"])) for each in place.holders(right, node)
    ]
    return Result([{"name": name, "rule": rule} for name, rule in rows], table(("WHO", "BY THE RULE"), rows))


def set_read_only(ledger: Ledger, reason: str | None) -> Result:
    """Let nothing be written, or everything again."""
    action = "read-only.off" if reason is None else "read-only.on"
    ledger.change(action, "", reason or "", policy.set_read_only, reason)
    text = "all may be written again" if reason is None else f"nothing is written from now on: {reason}"
    return Result({"read_only": reason}, text)


def show_read_only(ledger: Ledger) -> Result:
    """Say whether anything may be written."""
    reason = ledger.ask(policy.find).read_only
    return Result({"read_only": reason}, "all may be written" if reason is None else f"read-only: {reason}")


def list_audit(ledger: Ledger, since: str, user: str | None, repository: str | None, limit: int) -> Result:
    """Say who did what, the newest last."""
    found = ledger.ask(
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
    target = event.target if event.target != event.repository else ""
    return " ".join(filter(None, [event.repository, target, event.detail and f"({event.detail})"]))


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
