"""Who may do what.

A rule gives a right on a node of the tree and on all below it. Rules only add up, so what somebody may is the union of
the rules for his account, its teams, all who are logged in, and everybody. A credential may reach less far than its
account: a personal token has a bound, a tree like the rules; a token for requests names repositories one by one. A
request may do what all of them allow.

What was allowed is answered again from memory until the next epoch (`answers.py`), which every change of a rule begins,
or until the credential ends, whichever is first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from storage.errors import InvalidName
from storage.names import parse_repository

#: The node above all others.
ROOT: Final = ""

#: [distribution: Token Scope Documentation] `repository:org/app:pull,push`; the class in brackets means nothing here.
_RESOURCE: Final = re.compile(r"(?P<kind>[a-z]+)(?:\([a-z]+\))?:(?P<name>[^:\s]+):(?P<actions>[a-z*,]*)")


class Right(StrEnum):
    """What can be done with a repository."""

    PULL = "pull"
    PUSH = "push"
    DELETE = "delete"
    ADMIN = "admin"

    @property
    def included(self) -> frozenset[Right]:
        """What comes with it: nobody can push without looking at what is there."""
        return _INCLUDED[self]

    @property
    def given_by(self) -> list[Right]:
        """The rights that come with this one."""
        return [right for right in Right if self in right.included]


_INCLUDED: Final = {
    Right.PULL: frozenset([Right.PULL]),
    Right.PUSH: frozenset([Right.PULL, Right.PUSH]),
    Right.DELETE: frozenset([Right.PULL, Right.DELETE]),
    Right.ADMIN: frozenset(Right),
}
_NO_RIGHTS: Final[frozenset[Right]] = frozenset()


def nodes_above(name: str) -> list[str]:
    """Return the nodes whose rules hold for `name`: itself, and all above it up to the root."""
    nodes = [name]
    while name:
        name = name.rpartition("/")[0]
        nodes.append(name)
    return nodes


def parse_node(text: str) -> str:
    """Return a node of the tree; `/` is its root. Raises `InvalidName`."""
    return ROOT if text == "/" else str(parse_repository(text.strip("/")))


def reach(text: str) -> tuple[str, str]:
    """Read `RIGHT:NODE`, as tokens are bounded by. Raises `InvalidName`."""
    right, colon, node = text.partition(":")
    if not colon or right not in list(Right):
        raise InvalidName(f"a scope must look like pull:org/team, got {text[:100]!r}")
    return parse_node(node), right


class Held:
    """Rights on nodes, and so on all below them."""

    def __init__(self, rules: Iterable[tuple[str, str]]) -> None:
        """Add up rules: a node, and the name of a right."""
        self._rights: dict[str, frozenset[Right]] = {}
        for node, right in rules:
            self._rights[node] = self._rights.get(node, _NO_RIGHTS) | Right(right).included

    def has(self, name: str, right: Right) -> bool:
        """Return whether `right` is held on `name`."""
        rights = self._rights
        while right not in rights.get(name, _NO_RIGHTS):
            if not name:
                return False
            name = name.rpartition("/")[0]
        return True

    def nodes(self, right: Right) -> list[str]:
        """Return the nodes below which `right` is held, without those that lie below another one."""
        return [
            node
            for node, rights in self._rights.items()
            if right in rights and not (node and self.has(node.rpartition("/")[0], right))
        ]


@dataclass(frozen=True, slots=True)
class Scope:
    """What a token for requests is for: repositories, one by one, and perhaps the catalog."""

    repositories: Mapping[str, frozenset[Right]] = field(default_factory=dict)
    catalog: bool = False

    def has(self, name: str, right: Right) -> bool:
        """Return whether it is for `right` on `name`."""
        return right in self.repositories.get(name, _NO_RIGHTS)

    def as_claim(self) -> list[dict[str, Any]]:
        """Return it as tokens carry it. [distribution: Token Authentication Implementation, access]"""
        claim = [
            {"type": "repository", "name": name, "actions": sorted(rights)}
            for name, rights in self.repositories.items()
        ]
        return [*claim, {"type": "registry", "name": "catalog", "actions": ["*"]}] if self.catalog else claim

    @classmethod
    def of_claim(cls, claim: Iterable[Mapping[str, Any]]) -> Scope:
        """Return what a token that we signed says."""
        entries = list(claim)
        repositories = {
            entry["name"]: frozenset(map(Right, entry["actions"])) for entry in entries if entry["type"] == "repository"
        }
        return cls(repositories, any(entry["type"] == "registry" for entry in entries))


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sends a request, and by what right.

    Attributes:
        name: of the account; empty for nobody's.
        account: its id, 0 for nobody's.
        held: what the account holds, or everybody.
        bound: how far a personal token reaches; None where it is none, or has no bound.
        scope: what a token for requests is for; None where it is none.
        credential: what came with the request, for the audit.
        token: id of the personal or refresh token behind it, or 0.
        changed_at: when the account had last been changed; what is signed or kept for it is void after the next time.
        until: when it must be looked at anew, in seconds since the epoch.
        ends_at: when the credential ends, likewise: nothing that is given for it lasts longer.
        is_known: it said who it is, if only by a token for nobody.
        is_ended: its time is over: it may finish what it began, and nothing else.
    """

    name: str = ""
    account: int = 0
    held: Held = field(default_factory=lambda: Held(()))
    bound: Held | None = None
    scope: Scope | None = None
    credential: str = ""
    token: int = 0
    changed_at: int = 0
    until: float = math.inf
    ends_at: float = math.inf
    is_known: bool = True
    is_ended: bool = False

    def holds(self, node: str, right: Right) -> bool:
        """Return whether it could get a token for `right` on `node`."""
        return self.held.has(node, right) and (self.bound is None or self.bound.has(node, right))

    def may(self, name: str, right: Right) -> bool:
        """Return whether this request may do what takes `right` on `name`."""
        return self.holds(name, right) and (self.scope is None or self.scope.has(name, right))

    def readable(self) -> list[str]:
        """Return the nodes below which everything may be listed."""
        nodes = self.held.nodes(Right.PULL)
        if self.bound is None:
            return nodes
        reached = [node for node in nodes if self.bound.has(node, Right.PULL)]
        return reached + [
            node for node in self.bound.nodes(Right.PULL) if node not in reached and self.held.has(node, Right.PULL)
        ]

    def granted(self, asked: Iterable[str]) -> Scope:
        """Return what a token may be for, of all that was asked: each part of `asked` is a scope as clients write it.

        What cannot be read, or means nothing here, is left out: it grants nothing.
        """
        repositories: dict[str, frozenset[Right]] = {}
        catalog = False
        for text in " ".join(asked).split():
            resource = _RESOURCE.fullmatch(text)
            if resource is None:
                continue
            if resource["kind"] == "registry" and resource["name"] == "catalog":
                catalog = True
            elif resource["kind"] == "repository" and _is_repository(name := resource["name"]):
                found = frozenset(right for right in _actions(resource["actions"]) if self.holds(name, right))
                repositories[name] = repositories.get(name, _NO_RIGHTS) | found
        return Scope({name: rights for name, rights in repositories.items() if rights}, catalog)


def _is_repository(text: str) -> bool:
    """Return whether `text` can be the name of a repository."""
    try:
        parse_repository(text)
    except InvalidName:
        return False
    return True


def _actions(text: str) -> list[Right]:
    wanted = text.split(",")
    return [right for right in (Right.PULL, Right.PUSH, Right.DELETE) if right in wanted or "*" in wanted]


#: Whoever comes to a registry without accounts.
OPEN: Final = Identity(held=Held([(ROOT, Right.ADMIN)]))
