"""`/v2/<name>/referrers/<digest>`. [distribution-spec: end-12a, end-12b]"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, Final

import msgspec
from aiohttp import web

from registry import locations
from registry.calls import Call
from registry.contents import Contents
from registry.errors import ManifestUnknown
from registry.listings import page
from registry.metadata import referrers
from registry.metadata.engine import Database
from registry.metadata.referrers import Referrer
from registry.responses import json_response
from storage.digest import Digest
from storage.errors import InvalidDigest
from storage.names import RepositoryName, referrers_tag
from storage.oci import OCI_INDEX

_Descriptor = dict[str, Any]
#: Clients want an answer that they can read as a manifest, so it must not be larger than one. In it are the annotations
#: of each, which may be as large as that one's manifest.
_PAGE_LIMIT: Final = 1000
_PAGE_BYTES: Final = 4 << 20


class Referrers:
    """Who points to a manifest as their subject."""

    def __init__(self, database: Database, contents: Contents) -> None:
        """Merge what `database` knows with the tags of older clients, by `contents`."""
        self._database = database
        self._contents = contents

    async def find(self, call: Call) -> web.StreamResponse:
        """GET: an index of referrers; an empty one where there are none, never 404."""
        subject = call.digest()
        found = {row.digest: row for row in await self._database.read(referrers.find, call.repository, subject)}
        descriptors = {digest: _descriptor(row) for digest, row in found.items()}
        for tagged in await self._tagged(call.repository, subject):
            descriptors.setdefault(str(tagged["digest"]), tagged)
        headers: dict[str, str] = {}
        if wanted := call.parameter("artifactType"):
            descriptors = {
                digest: entry for digest, entry in descriptors.items() if entry.get("artifactType") == wanted
            }
            headers["OCI-Filters-Applied"] = "artifactType"
        asked, last = page(call.request)
        limit = min(asked, _PAGE_LIMIT)
        digests = [digest for digest in sorted(descriptors) if digest > last]
        shown = _page(digests[:limit], {digest: row.size for digest, row in found.items()})
        if len(digests) > len(shown) > 0:
            parameters: dict[str, str | int] = {"n": limit, "last": shown[-1]}
            if wanted:
                parameters["artifactType"] = wanted
            headers["Link"] = locations.next_page(call.request, **parameters)
        await self._annotate([descriptors[digest] for digest in shown if digest in found])
        index = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [descriptors[digest] for digest in shown],
        }
        return json_response(index, headers=headers, content_type=OCI_INDEX)

    async def _annotate(self, entries: list[_Descriptor]) -> None:
        """Add their annotations to what the database knows of."""
        found = await self._database.read(referrers.annotations_of, [entry["digest"] for entry in entries])
        for entry in entries:
            if annotations := msgspec.json.decode(found.get(entry["digest"], "{}")):
                entry["annotations"] = annotations

    async def _tagged(self, name: RepositoryName, subject: Digest) -> list[_Descriptor]:
        """Return what clients listed under the referrers tag schema, before this registry did it for them."""
        try:
            listed = await self._contents.manifest(name, referrers_tag(subject))
        except ManifestUnknown:
            return []
        manifests = msgspec.json.decode(listed.content).get("manifests")
        entries = [entry for entry in manifests if isinstance(entry, dict)] if isinstance(manifests, list) else []
        digests = [digest for entry in entries if (digest := _digest(entry))]
        present = await self._database.read(referrers.present, name, digests)
        return [entry for entry in entries if str(entry.get("digest")) in present]


def _digest(entry: _Descriptor) -> str:
    """Return the digest of an entry that a client wrote, empty where it is none."""
    try:
        return str(Digest.parse(str(entry.get("digest"))))
    except InvalidDigest:
        return ""


def _page(digests: list[str], sizes: Mapping[str, int]) -> list[str]:
    """Return as many of `digests` as have room in a page, but one in any case."""
    total = list(accumulate(sizes.get(digest, 0) for digest in digests))
    return digests[: max(1, bisect_right(total, _PAGE_BYTES))]


def _descriptor(row: Referrer) -> _Descriptor:
    entry: _Descriptor = {"mediaType": row.media_type, "digest": row.digest, "size": row.size}
    if row.artifact_type:
        entry["artifactType"] = row.artifact_type
    return entry
