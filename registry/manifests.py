"""`/v2/<name>/manifests/<reference>`. [distribution-spec: end-3, end-7a, end-7b, end-9]"""

from __future__ import annotations

import re
from typing import Final

from aiohttp import hdrs, web
from multidict import CIMultiDict

from registry import locations
from registry.access.audit import Auditor
from registry.access.gate import Gate
from registry.access.rights import Right
from registry.calls import Call
from registry.config import RegistrySettings
from registry.contents import Contents
from registry.errors import (
    BlobUnknown,
    DigestInvalid,
    ManifestInvalid,
    ManifestTooLarge,
    TooManyTags,
)
from registry.metadata.audit import Event
from registry.metadata.manifests import PushedManifest, StoredManifest
from registry.responses import BYTES_IN, REPEATABLE, is_known
from registry.transfer import Receiver, read_limited
from storage.base import Store
from storage.digest import Digest
from storage.errors import ContentMissing, InvalidName
from storage.names import RepositoryName, Tag, parse_tag
from storage.oci import Manifest, Relation, parse_manifest, read_platform

#: [end-7b] a registry must take at least 10.
_TAGS_LIMIT: Final = 100
#: Some clients read at most 100 headers; more tags than this share one. [RFC 9110, 5.3]
_TAG_HEADERS: Final = 50
#: [distribution-spec: Referrers Tag Schema] longer digests are cut.
_REFERRERS_TAG: Final = re.compile(r"sha(?:256|512)-[0-9a-f]{64}")
#: Configurations are small; one that is larger is not read for its platform.
_CONFIG_LIMIT: Final = 4 << 20


class Manifests:
    """Manifests and the tags that point to them."""

    def __init__(
        self,
        store: Store,
        contents: Contents,
        receiver: Receiver,
        gate: Gate,
        auditor: Auditor,
        settings: RegistrySettings,
    ) -> None:
        """Serve `contents` as `gate` lets; `store` is read for the configurations of images only."""
        self._store = store
        self._contents = contents
        self._receiver = receiver
        self._gate = gate
        self._auditor = auditor
        self._settings = settings

    async def get(self, call: Call) -> web.StreamResponse:
        """GET: the exact bytes that were pushed."""
        stored = await self._contents.manifest(call.repository, call.reference())
        call.request[REPEATABLE] = True
        headers = _headers(stored)
        if is_known(call.request, headers[hdrs.ETAG]):
            return web.Response(status=304, headers=headers)
        return web.Response(body=stored.content, headers=headers)

    async def head(self, call: Call) -> web.StreamResponse:
        """HEAD: the headers of a GET."""
        stored = await self._contents.manifest(call.repository, call.reference())
        call.request[REPEATABLE] = True
        headers = _headers(stored)
        if is_known(call.request, headers[hdrs.ETAG]):
            return web.Response(status=304, headers=headers)
        headers[hdrs.CONTENT_LENGTH] = str(len(stored.content))
        return web.Response(headers=headers)

    async def put(self, call: Call) -> web.StreamResponse:
        """PUT: keep a manifest, and point tags to it."""
        reference = call.reference()
        moved = [reference] if isinstance(reference, str) else []
        moved += _more_tags(call)
        content_type = call.request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip()
        async with self._receiver.slot():
            body = await read_limited(call.request, self._receiver, self._settings.manifest_bytes)
        if body is None:
            raise ManifestTooLarge(f"a manifest may have {self._settings.manifest_bytes} bytes here")
        call.request[BYTES_IN] = len(body)
        await self._gate.demand_still(call.request, call.repository, Right.PUSH)
        digest = _digest_of(body, reference)
        facts = parse_manifest(body, content_type)
        pushed = PushedManifest(facts, digest, body, await self._platforms(call.repository, facts))
        event = self._event(call, "manifest.push", str(digest), f"tags: {', '.join(moved)}" if moved else "")
        await self._contents.put_manifest(call.repository, pushed, moved, event, sparse=self._settings.sparse_manifests)
        self._auditor.tell(event)
        return web.Response(status=201, headers=_created(call, pushed, reference, moved))

    async def delete(self, call: Call) -> web.StreamResponse:
        """DELETE: a tag alone, or by digest a manifest with all its tags."""
        reference = call.reference()
        if isinstance(reference, Digest):
            event = self._event(call, "manifest.delete", str(reference))
            await self._contents.delete_manifest(call.repository, reference, event)
        else:
            event = self._event(call, "tag.delete", reference)
            await self._contents.delete_tag(call.repository, reference, event)
        self._auditor.tell(event)
        return web.Response(status=202)

    def _event(self, call: Call, action: str, target: str, detail: str = "") -> Event | None:
        return self._auditor.event(
            call.request, call.identity, action, repository=call.repository, target=target, detail=detail
        )

    async def _platforms(self, name: RepositoryName, facts: Manifest) -> list[str]:
        """Read from an image's configuration what it is for; nothing where that cannot be told."""
        config = next((link for link in facts.links if link.relation is Relation.CONFIG), None)
        if config is None or not config.descriptor.media_type.endswith("+json"):
            return []
        try:
            blob = await self._contents.blob(name, config.digest)
            if blob.size > _CONFIG_LIMIT:
                return []
            content = b"".join([piece async for piece in self._store.open(blob.key).read(0, blob.size)])
        except (BlobUnknown, ContentMissing):
            return []
        platform = read_platform(content)
        return [platform] if platform else []


def _headers(stored: StoredManifest) -> CIMultiDict[str]:
    digest = str(stored.digest)
    return CIMultiDict(
        {
            hdrs.CONTENT_TYPE: stored.media_type,
            "Docker-Content-Digest": digest,
            hdrs.ETAG: f'"{digest}"',
        }
    )


def _more_tags(call: Call) -> list[Tag]:
    """[end-7b] `?tag=` on a push by digest, any number of times."""
    texts = list(dict.fromkeys(call.request.query.getall("tag", [])))
    if not texts:
        return []
    if ":" not in call.argument:
        raise ManifestInvalid("tag parameters go with a push by digest")
    if len(texts) > _TAGS_LIMIT:
        raise TooManyTags(f"at most {_TAGS_LIMIT} tags in one push, got {len(texts)}")
    try:
        return [parse_tag(text) for text in texts]
    except InvalidName as error:
        raise ManifestInvalid(str(error)) from None


def _digest_of(body: bytes, reference: Tag | Digest) -> Digest:
    if not isinstance(reference, Digest):
        return Digest.of(body)
    digest = Digest.of(body, reference.algorithm)
    if digest != reference:
        raise DigestInvalid(f"the manifest is {digest}, the request says {reference}")
    return digest


def _created(call: Call, pushed: PushedManifest, reference: Tag | Digest, moved: list[Tag]) -> CIMultiDict[str]:
    headers = CIMultiDict(
        {
            hdrs.LOCATION: locations.manifest(call.request, call.repository, pushed.digest),
            "Docker-Content-Digest": str(pushed.digest),
        }
    )
    if isinstance(reference, Digest):
        for tag in moved[:_TAG_HEADERS]:
            headers.add("OCI-Tag", tag)
        if rest := moved[_TAG_HEADERS:]:
            headers.add("OCI-Tag", ", ".join(rest))
    if pushed.facts.subject:
        headers["OCI-Subject"] = str(pushed.facts.subject)
    if _is_referrers_tag(reference):
        headers["Warning"] = (
            '299 - "this registry lists referrers by itself: the tag is merged in, and no longer needed"'
        )
    return headers


def _is_referrers_tag(reference: Tag | Digest) -> bool:
    if isinstance(reference, Digest):
        return False
    return _REFERRERS_TAG.fullmatch(reference) is not None
