"""Whoever a credential stands for: the account, its rules, the token, on one snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from registry.metadata import access_tokens, accounts, rules
from registry.metadata.access_tokens import Token
from registry.metadata.accounts import Account


@dataclass(frozen=True, slots=True)
class Principal:
    """An account with what it may: (node, right) of all rules, and the token by which it came, if any."""

    account: Account
    rules: list[tuple[str, str]]
    token: Token | None = None


def by_name(connection: Connection, name: str) -> Principal | None:
    """Return the account called `name`."""
    found = accounts.find(connection, name)
    return Principal(found, rules.held(connection, found.id)) if found else None


def by_secret(connection: Connection, secret: str) -> Principal | None:
    """Return the account that the token with this hash stands for, if its time is not over."""
    token = access_tokens.find(connection, secret)
    if token is None or token.is_over():
        return None
    found = accounts.get(connection, token.account_id)
    return Principal(found, rules.held(connection, found.id), token) if found else None


def by_id(connection: Connection, account_id: int, token_id: int) -> Principal | None:
    """Return the account with an id; None too where it came by a token (not 0) that is not there any more, or over."""
    found = accounts.get(connection, account_id)
    token = access_tokens.get(connection, token_id) if token_id else None
    if found is None or (token_id and (token is None or token.is_over())):
        return None
    return Principal(found, rules.held(connection, found.id), token)
