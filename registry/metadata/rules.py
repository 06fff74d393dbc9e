"""Who may do what below a node of the tree. Rules only add up: none takes away what another gives."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Select, bindparam, delete, insert, or_, select

from registry.errors import AccountsError, AccountUnknown
from registry.metadata import accounts, policy
from registry.metadata.prepared import Prepared
from registry.metadata.tables import access_rule, account, now, rfc3339, team, team_member

#: Whoever is logged in, and whoever there is.
USERS: Final = "users"
EVERYBODY: Final = "everybody"
_TEAM: Final = "team:"
_AUDIENCES: Final = (USERS, EVERYBODY)

_of_teams: Final = select(team_member.c.team_id).where(team_member.c.account_id == bindparam("account_id"))
_held: Final = Prepared(
    select(access_rule.c.node, access_rule.c.right).where(
        or_(
            access_rule.c.account_id == bindparam("account_id"),
            access_rule.c.team_id.in_(_of_teams),
            access_rule.c.audience.is_not(None),
        )
    )
)
_public: Final = Prepared(select(access_rule.c.node, access_rule.c.right).where(access_rule.c.audience == EVERYBODY))


class Rule(NamedTuple):
    """A right on a node and all below it.

    Attributes:
        node: of the tree; empty is its root.
        right: `pull`, `push`, `delete` or `admin`.
        subject: `NAME` of an account, `team:NAME`, `users` or `everybody`.
        created_at: microseconds since the epoch.
        created_by: name of who made it.
    """

    node: str
    right: str
    subject: str
    created_at: int
    created_by: str

    def described(self) -> dict[str, Any]:
        """Return it as JSON has it, for people and programs."""
        return {**self._asdict(), "node": self.node or "/", "created_at": rfc3339(self.created_at)}


class Holder(NamedTuple):
    """Somebody who may do something, and the rule by which."""

    name: str
    rule: Rule


def held(connection: Connection, account_id: int | None) -> list[tuple[str, str]]:
    """Return (node, right) of all rules that hold for an account; for None, of those for everybody."""
    if account_id is None:
        return list(_public.all(connection))
    return list(_held.all(connection, account_id=account_id))


def grant(connection: Connection, node: str, right: str, subject: str, by: str) -> bool:
    """Make a rule; False where it was there already. Raises `AccountsError`."""
    columns = _subject(connection, subject)
    if subject == EVERYBODY and right == "admin":
        raise AccountsError("everybody cannot be an administrator")
    rule = {"node": node, "right": right, **columns}
    # First, so that two who give the same at once make one rule.
    policy.changed(connection)
    if connection.scalar(select(access_rule.c.id).filter_by(**rule)) is not None:
        return False
    connection.execute(insert(access_rule).values(**rule, created_at=now(), created_by=by))
    return True


def revoke(connection: Connection, node: str, right: str, subject: str) -> None:
    """Take a rule back. Raises `AccountUnknown` where there is none, `AccountsError` where it may not be missing."""
    rule = {"node": node, "right": right, **_subject(connection, subject)}
    with accounts.keeping_an_administrator(connection):
        if not connection.execute(delete(access_rule).filter_by(**rule)).rowcount:
            shown = f"{right} on {node or '/'} to {subject}"
            raise AccountUnknown(f"there is no rule that gives {shown}")


def everything(connection: Connection, nodes: list[str] | None = None) -> list[Rule]:
    """Return the rules of these nodes, or of all, in the order of the tree."""
    query = _rules().order_by(access_rule.c.node, access_rule.c.id)
    if nodes is not None:
        query = query.where(access_rule.c.node.in_(nodes))
    return [_rule(row) for row in connection.execute(query)]


def holders(connection: Connection, nodes: list[str], rights: list[str]) -> list[Holder]:
    """Return who has one of `rights` by a rule of one of `nodes`: accounts with each rule that makes it so.

    Rules for an audience stand for themselves: they are named by it.
    """
    query = _rules().where(access_rule.c.node.in_(nodes), access_rule.c.right.in_(rights))
    found = []
    for row in connection.execute(query.order_by(access_rule.c.node, access_rule.c.id)):
        rule = _rule(row)
        found += [Holder(name, rule) for name in _members(connection, row, rule)]
    return found


def _members(connection: Connection, row: Row[Any], rule: Rule) -> list[str]:
    if row.audience:
        return [rule.subject]
    active = select(account.c.name).where(accounts.IS_ACTIVE).order_by(account.c.name)
    return list(connection.scalars(active.where(_is_member(row))))


def _is_member(row: Row[Any]) -> ColumnElement[bool]:
    if row.team_id is None:
        return account.c.id == int(row.account_id)
    return account.c.id.in_(select(team_member.c.account_id).where(team_member.c.team_id == row.team_id))


def _rules() -> Select[Any]:
    return (
        select(access_rule, account.c.name.label("account_name"), team.c.name.label("team_name"))
        .outerjoin(account, account.c.id == access_rule.c.account_id)
        .outerjoin(team, team.c.id == access_rule.c.team_id)
    )


def _rule(row: Row[Any]) -> Rule:
    subject = row.audience or row.account_name or f"{_TEAM}{row.team_name}"
    return Rule(row.node, row.right, subject, row.created_at, row.created_by)


def _subject(connection: Connection, subject: str) -> dict[str, Any]:
    if subject in _AUDIENCES:
        return {"account_id": None, "team_id": None, "audience": subject}
    if subject.startswith(_TEAM):
        team_id = accounts.demand_team(connection, subject.removeprefix(_TEAM))
        return {"account_id": None, "team_id": team_id, "audience": None}
    return {"account_id": accounts.demand(connection, subject).id, "team_id": None, "audience": None}
