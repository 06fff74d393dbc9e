"""Who may do what: the one place that is asked.

There are no accounts yet, so everybody may do everything, which is why the configuration refuses addresses that
other machines reach. Handlers ask nothing themselves, but for what a request reaches beside its own repository:
the source of a mount, and the names in a listing.

What was allowed is answered again from memory until the next epoch (`answers.py`), without asking here: a decision may
depend on the request's head and on what is in the database, or must begin a new epoch when it changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from storage.names import RepositoryName


class Right(StrEnum):
    """What can be done with a repository."""

    PULL = "pull"
    PUSH = "push"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sends a request. The empty name is somebody without an account."""

    name: str = ""


class Access(Protocol):
    """Decides. `None` for a repository asks about the registry itself."""

    def may(self, identity: Identity, repository: RepositoryName | None, right: Right) -> bool:
        """Return whether `identity` has `right` on `repository`."""


class OpenAccess:
    """Everybody may do everything."""

    def may(self, identity: Identity, repository: RepositoryName | None, right: Right) -> bool:  # noqa: ARG002
        return True
