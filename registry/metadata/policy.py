"""One row that tells that anybody's rights may have changed, and whether anything may be written now.

Whoever keeps in memory what somebody may looks at the version first: on SQLite in the process itself
(`sqlite.RightsVersion`), else by one statement for each request.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sqlalchemy import Connection, select, update

from registry.metadata.prepared import Prepared
from registry.metadata.tables import account, policy

VERSION: Final = "SELECT version FROM policy"

_find: Final = Prepared(select(policy.c.version, policy.c.read_only, select(account.c.id).exists()))


class Policy(NamedTuple):
    """What holds for all requests.

    Attributes:
        version: another one whenever anybody's rights may have changed.
        read_only: why nothing may be written; None where all may be.
        has_accounts: False where everybody may do everything.
    """

    version: int
    read_only: str | None
    has_accounts: bool


def find(connection: Connection) -> Policy:
    """Return what holds now."""
    version, read_only, has_accounts = _find.first(connection)
    return Policy(version, read_only, bool(has_accounts))


def changed(connection: Connection) -> None:
    """Let whoever remembers what somebody may forget it; part of each transaction that changes that."""
    connection.execute(update(policy).values(version=policy.c.version + 1))


def set_read_only(connection: Connection, reason: str | None) -> None:
    """Let nothing be written from now on, for a reason; or, with None, let all be written again."""
    connection.execute(update(policy).values(read_only=reason, version=policy.c.version + 1))
