"""Tokens that stand for an account: personal ones, and those that `docker login` keeps instead of a password.

A token is 256 random bits, so its plain SHA-256 tells nothing of it, and finding it by that takes no longer for one
that is nearly right.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, and_, bindparam, delete, func, insert, or_, select, update

from registry.errors import AccountsError, AccountUnknown
from registry.metadata import accounts, policy
from registry.metadata.prepared import Prepared
from registry.metadata.tables import access_token, account, now, rfc3339
from storage.digest import Digest

PERSONAL: Final = "personal"
REFRESH: Final = "refresh"

#: What personal and refresh tokens begin with, so that people and scanners know them where they should not be.
PREFIX: Final = "hythe_"
#: Personal tokens that one account may have.
_PERSONAL_LIMIT: Final = 200
NAME_LIMIT: Final = 100
#: Microseconds between two notes of when a token was used.
_USE_NOTED: Final = 60_000_000

_columns: Final = (
    access_token.c.id,
    access_token.c.account_id,
    access_token.c.kind,
    access_token.c.name,
    access_token.c.scope,
    access_token.c.created_at,
    access_token.c.ends_at,
    access_token.c.used_at,
)
_by_secret: Final = Prepared(select(*_columns).where(access_token.c.secret == bindparam("secret")))
_by_id: Final = Prepared(select(*_columns).where(access_token.c.id == bindparam("token_id")))


@dataclass(frozen=True, slots=True)
class Token:
    """A token, but for itself. Times are microseconds since the epoch; `scope` is JSON."""

    id: int
    account_id: int
    kind: str
    name: str
    scope: str
    created_at: int
    ends_at: int | None
    used_at: int | None

    def is_over(self) -> bool:
        """Return whether its time is over."""
        return self.ends_at is not None and self.ends_at <= now()

    def described(self) -> dict[str, Any]:
        """Return it as JSON has it, for people and programs."""
        return {
            "id": self.id,
            "name": self.name,
            "scope": [f"{right}:{node or '/'}" for node, right in json.loads(self.scope)],
            "created_at": rfc3339(self.created_at),
            "ends_at": rfc3339(self.ends_at),
            "used_at": rfc3339(self.used_at),
        }


def new_token() -> str:
    """Return a token that nobody has."""
    return PREFIX + secrets.token_urlsafe(32)


def secret_hash(token: str) -> str:
    """Return what is kept of a token."""
    return Digest.of(token.encode(errors="surrogateescape")).hex


def add(
    connection: Connection, account_id: int, kind: str, name: str, secret: str, scope: str, ends_at: int | None
) -> int:
    """Keep a new token by its hash, `secret`, and return its id."""
    values = {"account_id": account_id, "kind": kind, "name": name, "secret": secret, "scope": scope}
    result = connection.execute(insert(access_token).values(**values, created_at=now(), ends_at=ends_at))
    assert result.inserted_primary_key is not None
    return int(result.inserted_primary_key[0])


def add_refresh(
    connection: Connection, account_id: int, changed_at: int, name: str, secret: str, ends_at: int | None
) -> int:
    """Keep a new refresh token of an account that is still as it was; raises `AccountsError` where it is not."""
    accounts.demand_unchanged(connection, account_id, changed_at)
    return add(connection, account_id, REFRESH, name, secret, "[]", ends_at)


def add_personal(
    connection: Connection,
    owner: str,
    name: str,
    secret: str,
    scope: str,
    ends_at: int | None,
    changed_at: int | None = None,
) -> int:
    """Keep a new personal token of the account called `owner`, which is still as it was if that is given.

    Raises `AccountsError`.
    """
    if not 0 < len(name) <= NAME_LIMIT or not name.isprintable():
        raise AccountsError(f"the name of a token has up to {NAME_LIMIT} characters, all of them printable")
    account_id = accounts.demand(connection, owner).id
    if changed_at is not None:
        accounts.demand_unchanged(connection, account_id, changed_at)
    kept = select(func.count()).select_from(access_token).filter_by(account_id=account_id, kind=PERSONAL)
    kept = kept.where(or_(access_token.c.ends_at.is_(None), access_token.c.ends_at > now()))
    if (connection.scalar(kept) or 0) >= _PERSONAL_LIMIT:
        raise AccountsError(f"{owner} has {_PERSONAL_LIMIT} tokens already: revoke some")
    return add(connection, account_id, PERSONAL, name, secret, scope, ends_at)


def find(connection: Connection, secret: str) -> Token | None:
    """Return the token with a hash."""
    row = _by_secret.first(connection, secret=secret)
    return Token(*row) if row else None


def get(connection: Connection, token_id: int) -> Token | None:
    """Return the token with an id."""
    row = _by_id.first(connection, token_id=token_id)
    return Token(*row) if row else None


def of(connection: Connection, owner: str | None, *, refresh: bool = False) -> list[tuple[str, Token]]:
    """Return tokens with their owners' names: of one account, or of all. Raises `AccountsError`."""
    query: Any = select(account.c.name, *_columns).join(account, account.c.id == access_token.c.account_id)
    if owner is not None:
        query = query.where(account.c.id == accounts.demand(connection, owner).id)
    if not refresh:
        query = query.where(access_token.c.kind == PERSONAL)
    return [(name, Token(*row)) for name, *row in connection.execute(query.order_by(access_token.c.id))]


def revoke(connection: Connection, token_id: int, owner: str | None = None) -> tuple[str, Token]:
    """Let a token be good for nothing, nor what was signed for it; return whose it was, and what.

    With `owner`, only where it is a personal token of that account. Raises `AccountUnknown`.
    """
    token = get(connection, token_id)
    found = accounts.get(connection, token.account_id) if token else None
    if token is None or found is None or (owner is not None and (found.name, token.kind) != (owner, PERSONAL)):
        raise AccountUnknown(f"there is no token {token_id}")
    connection.execute(delete(access_token).where(access_token.c.id == token_id))
    policy.changed(connection)
    return found.name, token


def note_use(connection: Connection, token_id: int) -> None:
    """Remember that a token is used now. Nobody's rights change."""
    at = now()
    stale = or_(access_token.c.used_at.is_(None), access_token.c.used_at < at - _USE_NOTED)
    connection.execute(update(access_token).where(and_(access_token.c.id == token_id, stale)).values(used_at=at))


def forget_ended(connection: Connection, kind: str) -> int:
    """Delete tokens of a kind whose time is over; return how many."""
    return connection.execute(
        delete(access_token).where(access_token.c.kind == kind, access_token.c.ends_at <= now())
    ).rowcount
