"""`/api/v1/`: the registry for people. Described in `openapi.json`, which a test holds against the routes.

Names travel in the query, not in the path: a proxy may rewrite an encoded slash, never a parameter.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, Final

import msgspec
from aiohttp import web

from registry.access.audit import Auditor
from registry.access.gate import Gate
from registry.access.rights import Identity, Right
from registry.contents import Contents
from registry.errors import BadRequest, ManifestInvalid, ManifestUnknown, Unsupported
from registry.listings import page
from registry.metadata import repositories, tags
from registry.metadata.engine import Database
from registry.metadata.repositories import Node
from registry.metadata.tables import rfc3339
from registry.metadata.tags import TagDetail
from registry.responses import json_response
from storage.digest import Digest
from storage.errors import InvalidName
from storage.names import Reference, RepositoryName, parse_reference, parse_repository
from storage.oci import INDEXES, Descriptor, parse_manifest

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Gated = Callable[[web.Request, Identity], Awaitable[web.StreamResponse]]
_PAGE_LIMIT: Final = 1000


class Browse:
    """Looks around in the tree, and removes from it."""

    def __init__(self, database: Database, contents: Contents, gate: Gate, auditor: Auditor, *, delete: bool) -> None:
        """Show what is in `database` and `gate` lets see; `delete` says whether anything may be removed."""
        self._database = database
        self._contents = contents
        self._gate = gate
        self._auditor = auditor
        self._delete = delete

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this API."""
        return [
            web.get("/api/v1/openapi.json", self.describe, allow_head=False),
            web.get("/api/v1/repositories", self._gated(self.repositories), allow_head=False),
            web.get("/api/v1/tags", self._gated(self.tags), allow_head=False),
            web.get("/api/v1/manifest", self._gated(self.manifest), allow_head=False),
            web.delete("/api/v1/manifest", self._gated(self.remove)),
        ]

    def _gated(self, handler: _Gated) -> _Handler:
        """Let a request in when it is known who sends it; about what it names, the handler asks."""

        async def handle(request: web.Request) -> web.StreamResponse:
            identity = await self._gate.identify(request)
            self._gate.demand_valid(request, identity)
            if not identity.account and not identity.readable():
                self._gate.demand_known(request, identity)
            return await handler(request, identity)

        return handle

    async def describe(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002
        """GET `openapi.json`: this API's description."""
        content = resources.files("registry").joinpath("openapi.json").read_bytes()
        return web.Response(body=content, content_type="application/json")

    async def repositories(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """GET `repositories`: what lies right below `path`."""
        path = request.query.get("path", "")
        if path:
            path = parse_repository(path)
        limit, last = _page(request)
        if identity.scope is not None:
            self._gate.demand_catalog(request, identity)
        nodes = await self._database.read(repositories.children, path, identity.readable(), last, limit + 1)
        return json_response({"repositories": [_node(node) for node in nodes[:limit]], "next": _next(nodes, limit)})

    async def tags(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """GET `tags`: the tags of `repository`, with what they point to."""
        name = self._repository(request, identity, Right.PULL)
        limit, last = _page(request)
        details = await self._database.read(tags.details, name, last, limit + 1)
        found = [_tag(detail, has_account=identity.account > 0) for detail in details[:limit]]
        return json_response({"tags": found, "next": _next(details, limit)})

    async def manifest(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """GET `manifest`: what `reference` of `repository` is made of."""
        name = self._repository(request, identity, Right.PULL)
        stored = await self._contents.manifest(name, _reference(request))
        facts = parse_manifest(stored.content, stored.media_type)
        described = {
            "repository": name,
            "digest": str(stored.digest),
            "media_type": stored.media_type,
            "size": len(stored.content),
            "tags": await self._database.read(tags.pointing_to, name, stored.digest),
            "artifact_type": facts.artifact_type,
            "subject": str(facts.subject) if facts.subject else None,
            "annotations": facts.annotations,
            "is_index": stored.media_type in INDEXES,
            "content": [{"relation": str(link.relation), **_descriptor(link.descriptor)} for link in facts.links],
        }
        return json_response(described)

    async def remove(self, request: web.Request, identity: Identity) -> web.StreamResponse:
        """DELETE `manifest`: a tag, or by digest a manifest with all its tags."""
        if not self._delete:
            raise Unsupported("deleting is switched off: registry.delete = false", headers={"Allow": "GET"})
        name = self._repository(request, identity, Right.DELETE)
        self._gate.demand_writable()
        reference = _reference(request)
        action = "manifest.delete" if isinstance(reference, Digest) else "tag.delete"
        event = self._auditor.event(request, identity, action, repository=name, target=str(reference))
        if isinstance(reference, Digest):
            removed = await self._database.read(tags.pointing_to, name, reference)
            await self._contents.delete_manifest(name, reference, event)
        else:
            removed = [reference]
            await self._contents.delete_tag(name, reference, event)
        self._auditor.tell(event)
        return json_response({"repository": name, "reference": str(reference), "tags": removed})

    def _repository(self, request: web.Request, identity: Identity, right: Right) -> RepositoryName:
        text = request.query.get("repository")
        if text is None:
            raise BadRequest("the parameter 'repository' is missing")
        name = parse_repository(text)
        self._gate.demand(request, identity, name, right)
        return name


def _reference(request: web.Request) -> Reference:
    text = request.query.get("reference")
    if text is None:
        raise BadRequest("the parameter 'reference' is missing: a tag or a digest")
    try:
        return parse_reference(text)
    except InvalidName as error:
        raise (ManifestUnknown if request.method == "GET" else ManifestInvalid)(str(error)) from None


def _page(request: web.Request) -> tuple[int, str]:
    limit, last = page(request)
    if limit == 0:
        raise BadRequest("n must be at least 1")
    return min(limit, _PAGE_LIMIT), last


def _next(entries: list[Node] | list[TagDetail], limit: int) -> str | None:
    return entries[limit - 1].name if len(entries) > limit else None


def _node(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "is_repository": node.is_repository,
        "has_children": node.has_children,
        "tags": node.tags,
        "manifests": node.manifests,
        "updated_at": rfc3339(node.updated_at),
    }


def _tag(detail: TagDetail, *, has_account: bool) -> dict[str, Any]:
    return {
        "name": detail.name,
        "digest": detail.digest,
        "media_type": detail.media_type,
        "image_size": detail.image_size,
        "platforms": msgspec.json.decode(detail.platforms),
        "updated_at": rfc3339(detail.updated_at),
        # Whom there is, nobody else is told.
        "updated_by": detail.updated_by if has_account else "",
    }


def _descriptor(descriptor: Descriptor) -> dict[str, Any]:
    return {
        "media_type": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
        "platform": str(descriptor.platform) if descriptor.platform else None,
        "annotations": descriptor.annotations or {},
    }
