"""A personal token that is about to be kept, wherever somebody makes it: what goes into the database, what is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from registry.access.rights import reach
from registry.metadata.access_tokens import new_token, secret_hash
from registry.metadata.tables import DAY, now, rfc3339


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that nobody has yet.

    Attributes:
        owner: name of its account.
        name: what it is for.
        token: itself, which is shown once.
        scope: `RIGHT:NODE` as somebody wrote them; none where it reaches as far as its account.
        bound: the same as it is kept.
        ends_at: microseconds since the epoch; None for one that does not end by itself.
    """

    owner: str
    name: str
    token: str
    scope: Sequence[str]
    bound: str
    ends_at: int | None

    @classmethod
    def of(cls, owner: str, name: str, scope: Sequence[str], days: int) -> Self:
        """Make one that is good for so many days; 0 for one that does not end by itself.

        Raises:
            InvalidName: a scope is none.
        """
        bound = json.dumps([reach(text) for text in scope])
        return cls(owner, name, new_token(), scope, bound, now() + days * DAY if days else None)

    @property
    def secret(self) -> str:
        """What is kept of the token itself."""
        return secret_hash(self.token)

    def detail(self) -> str:
        """Return what the audit says of it."""
        reaches = " ".join(self.scope) or "all that is held"
        return f"{self.name}, for {reaches}, until {rfc3339(self.ends_at) or 'it is revoked'}"

    def described(self, token_id: int) -> dict[str, Any]:
        """Return it as JSON has it, this once with itself."""
        return {
            "id": token_id,
            "owner": self.owner,
            "name": self.name,
            "token": self.token,
            "ends_at": rfc3339(self.ends_at),
        }
