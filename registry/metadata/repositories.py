"""The tree of repositories: `org/team/app` is a row below `org/team`, that one below `org`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, and_, bindparam, func, insert, select, true, update
from sqlalchemy.sql.elements import ColumnElement

from registry.metadata.prepared import Prepared
from registry.metadata.tables import now, repository, repository_manifest, tag
from storage.names import RepositoryName

#: The id of the repository called `name`, if it has, or had, content.
ID: Final = select(repository.c.id).where(repository.c.name == bindparam("name"), repository.c.has_content)
_find: Final = Prepared(ID)


@dataclass(frozen=True, slots=True)
class Node:
    """One entry below a path of the tree. Counts are of the repository itself, not of what lies below it."""

    name: str
    is_repository: bool
    has_children: bool
    tags: int
    manifests: int
    updated_at: int | None


def find(connection: Connection, name: RepositoryName) -> int | None:
    """Return the id of a repository that has, or had, content."""
    found: int | None = _find.scalar(connection, name=name)
    return found


def ensure(connection: Connection, name: RepositoryName) -> int:
    """Return the id of the repository, made with its path where absent."""
    return find(connection, name) or _make(connection, name, has_content=True)


def _make(connection: Connection, name: str, *, has_content: bool) -> int:
    row = connection.execute(select(repository.c.id, repository.c.has_content).where(repository.c.name == name)).first()
    if row is not None:
        if has_content and not row.has_content:
            connection.execute(update(repository).where(repository.c.id == row.id).values(has_content=True))
        return int(row.id)
    parent, _, _ = name.rpartition("/")
    parent_id = _make(connection, parent, has_content=False) if parent else None
    result = connection.execute(
        insert(repository).values(parent_id=parent_id, name=name, has_content=has_content, created_at=now())
    )
    assert result.inserted_primary_key is not None
    return int(result.inserted_primary_key[0])


def below(path: str) -> ColumnElement[bool]:
    """Return the condition for `path` itself and all under it."""
    return (repository.c.name == path) | beneath(repository.c.name, path)


def beneath(name: ColumnElement[str], path: str) -> ColumnElement[bool]:
    """Return the condition for a column of names to lie under `path`: `/` sorts right before `0`."""
    return and_(name > f"{path}/", name < f"{path}0")


def names(connection: Connection, nodes: Iterable[str], last: str, limit: int) -> list[str]:
    """Return up to `limit` names of repositories after `last` in ASCII order, of those at or below one of `nodes`.

    None of the nodes lies below another one; the empty one is the root.
    """
    found: list[str] = []
    for span in _spans(nodes):
        if len(found) < limit:
            query = select(repository.c.name).where(repository.c.has_content, repository.c.name > last, span)
            found += connection.scalars(query.order_by(repository.c.name).limit(limit - len(found)))
    return found


def _spans(nodes: Iterable[str]) -> list[ColumnElement[bool]]:
    """Return conditions for the names at or below nodes, so that what one finds comes before what the next one does.

    A node and what lies below it need not stand together: `a` < `a-b` < `a/c`.
    """
    spans: dict[str, ColumnElement[bool]] = {}
    for node in nodes:
        if not node:
            return [true()]
        spans[node] = repository.c.name == node
        spans[f"{node}/"] = beneath(repository.c.name, node)
    return [spans[start] for start in sorted(spans)]


def children(connection: Connection, path: str, nodes: Collection[str], last: str, limit: int) -> list[Node]:
    """Return up to `limit` entries right below `path` (empty: the root) after `last`, in order of name.

    Only what leads to repositories at or below one of `nodes`; of folders on the way to them no more is told than that.
    """
    if any(not node or path == node or path.startswith(f"{node}/") for node in nodes):
        return _children(connection, path, last, limit)
    start = f"{path}/" if path else ""
    leading: defaultdict[str, list[str]] = defaultdict(list)
    for node in nodes:
        if node.startswith(start):
            leading[start + node.removeprefix(start).partition("/")[0]].append(node)
    found: list[Node] = []
    for name in sorted(leading):
        if name > last and len(found) < limit:
            found += _child(connection, path, name, leading[name])
    return found


def _child(connection: Connection, path: str, name: str, nodes: list[str]) -> list[Node]:
    """Return one entry, if it or anything below `nodes` is there."""
    if name in nodes:
        return [node for node in _children(connection, path, name, 1, is_first=True) if node.name == name]
    is_there = bool(names(connection, nodes, "", 1))
    return (
        [Node(name, is_repository=False, has_children=True, tags=0, manifests=0, updated_at=None)] if is_there else []
    )


def _children(connection: Connection, path: str, last: str, limit: int, *, is_first: bool = False) -> list[Node]:
    """Return all entries right below `path` after `last`, or from it on if `is_first`."""
    parent = select(repository.c.id).where(repository.c.name == path).scalar_subquery()
    above = repository.c.parent_id == parent if path else repository.c.parent_id.is_(None)
    other = repository.alias()
    has_children = select(other.c.id).where(other.c.parent_id == repository.c.id).exists()
    tags = select(func.count()).where(tag.c.repository_id == repository.c.id).scalar_subquery()
    manifests = select(func.count()).where(repository_manifest.c.repository_id == repository.c.id).scalar_subquery()
    updated = (
        select(func.max(repository_manifest.c.pushed_at))
        .where(repository_manifest.c.repository_id == repository.c.id)
        .scalar_subquery()
    )
    query = (
        select(repository.c.name, repository.c.has_content, has_children, tags, manifests, updated)
        .where(above, repository.c.name >= last if is_first else repository.c.name > last)
        .order_by(repository.c.name)
        .limit(limit)
    )
    return [Node(*row) for row in connection.execute(query)]
