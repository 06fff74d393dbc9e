"""What a handler is given: a request whose path was understood and whose sender may do what it asks for."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from registry.access.rights import Identity
from registry.errors import BlobUploadUnknown, ManifestInvalid, ManifestUnknown
from storage.digest import Digest
from storage.errors import InvalidName
from storage.names import Reference, RepositoryName, parse_reference

#: [RFC 9562, 4] as `str(uuid.uuid4())` writes it.
_UPLOAD: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Call:
    """A request below `/v2/`.

    Attributes:
        request: as aiohttp has it.
        identity: who sends it.
        repository: the name in the path; meaningless where the path has none.
        argument: the last part of the path: a digest, a tag, an upload's id. Not checked yet.
    """

    request: web.Request
    identity: Identity
    repository: RepositoryName
    argument: str

    def digest(self) -> Digest:
        """Return the digest in the path; raises `InvalidDigest`."""
        return Digest.parse(self.argument)

    def upload(self) -> str:
        """Return the id of the upload in the path; raises `BlobUploadUnknown` for what cannot be one of ours."""
        if not _UPLOAD.fullmatch(self.argument):
            raise BlobUploadUnknown
        return self.argument

    def reference(self) -> Reference:
        """Return the tag or digest in the path.

        Raises:
            InvalidDigest: it is a malformed digest.
            ManifestInvalid: it is no tag, and something is to be pushed under it.
            ManifestUnknown: it is no tag, so nothing can be there.
        """
        try:
            return parse_reference(self.argument)
        except InvalidName as error:
            problem = ManifestInvalid if self.request.method == "PUT" else ManifestUnknown
            raise problem(str(error)) from None

    def parameter(self, name: str) -> str | None:
        """Return a query parameter, None where it is absent."""
        return self.request.query.get(name)


Handler = Callable[[Call], Awaitable[web.StreamResponse]]
