"""Accounts: people and robots, and the teams that they are in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, and_, bindparam, delete, func, insert, or_, select, update

from registry.errors import AccountsError, AccountUnknown
from registry.metadata import audit, policy
from registry.metadata.audit import Event
from registry.metadata.engine import hold_still
from registry.metadata.prepared import Prepared
from registry.metadata.tables import access_rule, access_token, account, now, team, team_member

USER: Final = "user"
ROBOT: Final = "robot"
#: Where an account comes from: made here, or named in a file that says who there is.
OWN: Final = "own"
HTPASSWD: Final = "htpasswd"

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
#: What rules call those who are logged in, and all.
_RESERVED: Final = ("users", "everybody")

_columns: Final = (
    account.c.id,
    account.c.name,
    account.c.kind,
    account.c.source,
    account.c.password,
    account.c.is_disabled,
    account.c.created_at,
    account.c.changed_at,
)
#: Of accounts that are not disabled: neither by hand, nor as their file does not name them any more.
IS_ACTIVE: Final = and_(~account.c.is_disabled, or_(account.c.source != HTPASSWD, account.c.password.is_not(None)))
_by_name: Final = Prepared(select(*_columns).where(account.c.name == bindparam("name")))
_by_id: Final = Prepared(select(*_columns).where(account.c.id == bindparam("account_id")))


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who can log in. Times are microseconds since the epoch."""

    id: int
    name: str
    kind: str
    source: str
    password: str | None
    is_disabled: bool
    created_at: int
    changed_at: int


class Team(NamedTuple):
    """A team, and the names of its members."""

    name: str
    members: list[str]


def checked_name(name: str) -> str:
    """Return the name of an account or a team if it can be one, or raise `AccountsError`."""
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise AccountsError(
            f"{name[:80]!r} cannot be a name: up to 64 letters, digits, '.', '_', '-' and '@', a letter or digit "
            "first, and neither users nor everybody"
        )
    return name


def find(connection: Connection, name: str) -> Account | None:
    """Return the account called `name`, whatever somebody wrote there."""
    row = _by_name.first(connection, name=name) if _NAME.fullmatch(name) else None
    return _account(row) if row else None


def get(connection: Connection, account_id: int) -> Account | None:
    """Return the account with an id."""
    row = _by_id.first(connection, account_id=account_id)
    return _account(row) if row else None


def demand(connection: Connection, name: str) -> Account:
    """Return the account called `name`, or raise `AccountUnknown`."""
    found = find(connection, name)
    if found is None:
        raise AccountUnknown(f"there is no account {name[:80]}")
    return found


def demand_unchanged(connection: Connection, account_id: int, changed_at: int) -> None:
    """Keep an account as it was found until the end of the transaction, or raise `AccountsError`.

    Whoever showed a password that is changed at the same moment must not be given what would outlive it.
    """
    kept = select(account.c.changed_at).where(account.c.id == account_id).with_for_update()
    if connection.scalar(kept) != changed_at:
        raise AccountsError("the account was changed meanwhile: log in again")


def everyone(connection: Connection) -> list[Account]:
    """Return all accounts, by name."""
    return [_account(row) for row in connection.execute(select(*_columns).order_by(account.c.name))]


def add(
    connection: Connection,
    name: str,
    kind: str,
    password: str | None,
    *,
    admin: bool = False,
    source: str = OWN,
    by: str = "",
) -> int:
    """Make an account and return its id.

    Args:
        connection: to the database.
        name: which no other account has, whatever the case of its letters.
        kind: USER or ROBOT.
        password: its hash; None for one that has tokens only.
        admin: it may administer everything.
        source: OWN or HTPASSWD.
        by: who made it.

    Raises:
        AccountsError: the name is taken, or this is the first account and no administrator.
    """
    checked_name(name)
    hold_still(connection, account)
    taken = connection.scalar(select(account.c.name).where(func.lower(account.c.name) == name.lower()))
    if taken is not None:
        raise AccountsError(f"there is an account {taken} already")
    if not admin and source == OWN and connection.scalar(select(account.c.id).limit(1)) is None:
        raise AccountsError("the first account must be an administrator: add --admin")
    at = now()
    values = {"name": name, "kind": kind, "source": source, "password": password}
    result = connection.execute(insert(account).values(**values, created_at=at, changed_at=at))
    assert result.inserted_primary_key is not None
    account_id = int(result.inserted_primary_key[0])
    if admin:
        rule = {"node": "", "right": "admin", "account_id": account_id, "created_at": at, "created_by": by}
        connection.execute(insert(access_rule).values(**rule))
    policy.changed(connection)
    return account_id


def add_first(connection: Connection, name: str, password: str, event: Event) -> bool:
    """Make an administrator if there is no account at all, and keep the event of it; return whether that was so."""
    hold_still(connection, account)
    if connection.scalar(select(account.c.id).limit(1)) is not None:
        return False
    add(connection, name, USER, password, admin=True)
    audit.add(connection, event)
    return True


def set_password(connection: Connection, name: str, password: str) -> None:
    """Change a password (its hash is given); whoever is logged in by the old one is so no longer.

    Raises:
        AccountsError: there is no such account, or it has no password of its own.
    """
    found = _own(connection, name)
    if found.kind == ROBOT:
        raise AccountsError(f"{name} is a robot, which has no password: give it a token (hythe token create)")
    _change(connection, found.id, password=password)
    _forget_logins(connection, found.id)


def rehash(connection: Connection, account_id: int, old: str, new: str) -> None:
    """Keep the same password by a better hash, if it was not changed meanwhile. Nobody's rights change."""
    connection.execute(
        update(account).where(account.c.id == account_id, account.c.password == old).values(password=new)
    )


def set_disabled(connection: Connection, name: str, *, disabled: bool) -> None:
    """Let an account do nothing any more, or let it do again what it may. Raises `AccountsError`."""
    found = demand(connection, name)
    with keeping_an_administrator(connection):
        _change(connection, found.id, is_disabled=disabled)
    if disabled:
        _forget_logins(connection, found.id)


def remove(connection: Connection, name: str) -> None:
    """Remove an account with its tokens and rules. Raises `AccountsError`."""
    found = _own(connection, name)
    with keeping_an_administrator(connection):
        connection.execute(delete(account).where(account.c.id == found.id))


def follow(connection: Connection, passwords: Mapping[str, str], by: str = "") -> tuple[list[str], list[str]]:
    """Let the accounts that come from a file be those of `passwords`, hashes by name.

    Who is not named any more loses his password, and counts as disabled: what he may do, and his tokens, are there
    again if he comes back. Who was disabled by hand stays so.

    Returns:
        Names of accounts that were added or changed, and names in the file that belong to accounts of another source.
    """
    hold_still(connection, account)
    known = {found.name.lower(): found for found in everyone(connection)}
    named: set[str] = set()
    changed, foreign = [], []
    for name, password in passwords.items():
        if name.lower() in named:
            raise AccountsError(f"there is an account {name.lower()} already")
        named.add(name.lower())
        found = known.get(name.lower())
        if found is None:
            add(connection, name, USER, password, source=HTPASSWD)
        elif found.source != HTPASSWD:
            foreign.append(name)
            continue
        elif found.password != password:
            _change(connection, found.id, password=password)
            _forget_logins(connection, found.id)
        else:
            continue
        changed.append(name)
    for found in known.values():
        if found.source == HTPASSWD and found.password is not None and found.name.lower() not in named:
            _change(connection, found.id, password=None)
            _forget_logins(connection, found.id)
            changed.append(found.name)
    if changed:
        audit.add(connection, Event("", by, "", "user.follow", detail=", ".join(changed)))
    return changed, foreign


def take_over(
    connection: Connection, passwords: Mapping[str, str], by: str, how: str = ""
) -> tuple[list[str], list[str]]:
    """Make accounts of our own with these passwords, hashes by name; those that followed a file do so no longer.

    Returns:
        Names of accounts that are ours now, and names that were so before, which stay as they are.

    Raises:
        AccountsError: a name cannot be one, or there is no administrator yet.
    """
    hold_still(connection, account)
    known = {found.name.lower(): found for found in everyone(connection)}
    taken, left = [], []
    for name, password in passwords.items():
        found = known.get(name.lower())
        if found is None:
            add(connection, name, USER, password, by=by)
        elif found.source == HTPASSWD:
            _change(connection, found.id, source=OWN, password=password)
            if found.password != password:
                _forget_logins(connection, found.id)
        else:
            left.append(found.name)
            continue
        taken.append(name)
    if taken:
        audit.add(connection, Event(by, how, "", "user.import", detail=", ".join(taken)))
    return taken, left


def add_team(connection: Connection, name: str) -> None:
    """Make a team without members. Raises `AccountsError`."""
    checked_name(name)
    hold_still(connection, team)
    taken = connection.scalar(select(team.c.name).where(func.lower(team.c.name) == name.lower()))
    if taken is not None:
        raise AccountsError(f"there is a team {taken} already")
    connection.execute(insert(team).values(name=name, created_at=now()))


def remove_team(connection: Connection, name: str) -> None:
    """Remove a team, with the rules that were for it. Raises `AccountsError`."""
    team_id = demand_team(connection, name)
    with keeping_an_administrator(connection):
        connection.execute(delete(team).where(team.c.id == team_id))


def teams(connection: Connection) -> list[Team]:
    """Return all teams, by name."""
    query = (
        select(team.c.name, account.c.name)
        .outerjoin(team_member, team_member.c.team_id == team.c.id)
        .outerjoin(account, account.c.id == team_member.c.account_id)
        .order_by(team.c.name, account.c.name)
    )
    found: dict[str, list[str]] = {}
    for name, member in connection.execute(query):
        found.setdefault(name, []).extend([member] if member else [])
    return [Team(name, members) for name, members in found.items()]


def join(connection: Connection, team_name: str, names: list[str]) -> None:
    """Put accounts into a team. Raises `AccountsError`."""
    team_id = demand_team(connection, team_name)
    for name in names:
        link = {"team_id": team_id, "account_id": demand(connection, name).id}
        if not connection.scalar(select(func.count()).select_from(team_member).filter_by(**link)):
            connection.execute(insert(team_member).values(**link))
    policy.changed(connection)


def leave(connection: Connection, team_name: str, names: list[str]) -> None:
    """Take accounts out of a team. Raises `AccountsError`."""
    team_id = demand_team(connection, team_name)
    with keeping_an_administrator(connection):
        for name in names:
            link = {"team_id": team_id, "account_id": demand(connection, name).id}
            if not connection.execute(delete(team_member).filter_by(**link)).rowcount:
                raise AccountsError(f"{name} is not in the team {team_name}")


def demand_team(connection: Connection, name: str) -> int:
    """Return the id of a team, or raise `AccountUnknown`."""
    team_id = connection.scalar(select(team.c.id).where(team.c.name == name))
    if team_id is None:
        raise AccountUnknown(f"there is no team {name[:80]}")
    return int(team_id)


def administrators(connection: Connection) -> set[int]:
    """Return the ids of the accounts that may administer everything, and are not disabled."""
    root = select(access_rule.c.account_id, access_rule.c.team_id).where(
        access_rule.c.node == "", access_rule.c.right == "admin"
    )
    rules = connection.execute(root).all()
    through = select(team_member.c.account_id).where(team_member.c.team_id.in_([rule.team_id for rule in rules]))
    named = {rule.account_id for rule in rules} | set(connection.scalars(through))
    return set(connection.scalars(select(account.c.id).where(account.c.id.in_(named), IS_ACTIVE)))


def _account(row: Any) -> Account:
    account_id, name, kind, source, password, is_disabled, created_at, changed_at = row
    is_out = bool(is_disabled) or (source == HTPASSWD and password is None)
    return Account(account_id, name, kind, source, password, is_out, created_at, changed_at)


def _own(connection: Connection, name: str) -> Account:
    found = demand(connection, name)
    if found.source == HTPASSWD:
        raise AccountsError(f"{name} comes from the file accounts.htpasswd: change it there")
    return found


def _change(connection: Connection, account_id: int, **values: object) -> None:
    connection.execute(update(account).where(account.c.id == account_id).values(**values, changed_at=now()))
    policy.changed(connection)


def _forget_logins(connection: Connection, account_id: int) -> None:
    """Personal tokens have a life of their own; what `docker login` keeps has not."""
    kept = and_(access_token.c.account_id == account_id, access_token.c.kind == "refresh")
    connection.execute(delete(access_token).where(kept))


@contextmanager
def keeping_an_administrator(connection: Connection) -> Iterator[None]:
    """Refuse a change, which is undone then, after which nobody could administer. Raises `AccountsError`."""
    # Whoever does the same at the same moment waits here, and then sees what this one did.
    policy.changed(connection)
    before = administrators(connection)
    yield
    if before and not administrators(connection):
        raise AccountsError("nobody could administer the registry then: first hythe grant admin / SOMEBODY")
