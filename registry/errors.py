"""Everything the registry can answer a request with beside success: one class per OCI code.

    RegistryError(status, code)
    ├── BlobUnknown  BlobUploadInvalid  BlobUploadUnknown  DigestInvalid  ManifestBlobUnknown
    ├── ManifestInvalid  ManifestUnknown  NameInvalid  NameUnknown  SizeInvalid
    ├── Unauthorized  Denied  Unsupported  TooManyRequests
    │       [distribution-spec: Error Codes, code-1 to code-14]
    └── and the same codes with another status where HTTP has a better one

No web here: `middleware.py` is the only place that renders them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class RegistryError(Exception):
    """An answer that is not a success.

    Attributes:
        status: the HTTP status.
        code: one of the specification's codes; `UNKNOWN` for what is nobody's doing but ours.
        message: what to do about it, for a person.
        detail: anything that helps a program, or None.
        headers: to send along.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    message: ClassVar[str]

    def __init__(self, message: str = "", *, detail: Any = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message or self.message)
        self.detail = detail
        self.headers = dict(headers or {})

    def entries(self) -> list[dict[str, Any]]:
        """Return the elements of the body's `errors`."""
        entry = {"code": self.code, "message": str(self)}
        return [entry | {"detail": self.detail} if self.detail is not None else entry]


class BlobUnknown(RegistryError):
    """[code-1]."""

    status, code, message = 404, "BLOB_UNKNOWN", "blob unknown to this repository"


class BlobUploadInvalid(RegistryError):
    """[code-2]."""

    status, code, message = 400, "BLOB_UPLOAD_INVALID", "blob upload invalid"


class UploadConflict(BlobUploadInvalid):
    """Another request is writing to the same upload."""

    status, message = 409, "another request is writing to this upload: wait for it, then ask for its range"


class ChunkOutOfOrder(BlobUploadInvalid):
    """[end-5] a chunk that does not begin where the last one ended."""

    status, message = 416, "the chunk does not begin where the upload stands"


class BlobUploadUnknown(RegistryError):
    """[code-3]."""

    status, code, message = (
        404,
        "BLOB_UPLOAD_UNKNOWN",
        "no such upload: finished, cancelled, or too long idle",
    )


class DigestInvalid(RegistryError):
    """[code-4]."""

    status, code, message = 400, "DIGEST_INVALID", "the digest is malformed or not that of the content"


class ManifestBlobUnknown(RegistryError):
    """[code-5] one entry for each descriptor whose content is not in the repository."""

    status, code, message = 404, "MANIFEST_BLOB_UNKNOWN", "the manifest points to content that is not here"

    def __init__(self, missing: Sequence[tuple[str, str]]) -> None:
        """Take (digest, media type) of what is missing."""
        super().__init__()
        self.missing = missing

    def entries(self) -> list[dict[str, Any]]:
        return [
            {
                "code": self.code,
                "message": f"{digest} is not in this repository: push it before the manifest",
                "detail": {"digest": digest, "mediaType": media_type},
            }
            for digest, media_type in self.missing
        ]


class ManifestInvalid(RegistryError):
    """[code-6]."""

    status, code, message = 400, "MANIFEST_INVALID", "manifest invalid"


class ManifestTooLarge(ManifestInvalid):
    """Over the configured limit."""

    status, message = 413, "the manifest is too large"


class TooManyTags(ManifestInvalid):
    """[end-7b] more `tag` parameters than one push may have."""

    status, message = 414, "too many tags in one push"


class ManifestUnknown(RegistryError):
    """[code-7]."""

    status, code, message = 404, "MANIFEST_UNKNOWN", "manifest unknown to this repository"


class NameInvalid(RegistryError):
    """[code-8]."""

    status, code, message = 400, "NAME_INVALID", "invalid repository name"


class NameUnknown(RegistryError):
    """[code-9]."""

    status, code, message = 404, "NAME_UNKNOWN", "repository unknown to this registry"


class SizeInvalid(RegistryError):
    """[code-10]."""

    status, code, message = 400, "SIZE_INVALID", "the content is not as long as announced"


class RangeUnsatisfiable(SizeInvalid):
    """[RFC 9110, 15.5.17]."""

    status, message = 416, "the range lies outside the content"


class Unauthorized(RegistryError):
    """[code-11]."""

    # The first two words alone are docker's own for it, and no message to it: then it tries again for a minute.
    status, code, message = 401, "UNAUTHORIZED", "authentication required: log in"


class Hidden(NameUnknown):
    """A repository that is not there, or not for this account: nobody is to know which of the two."""

    message = "there is no such repository, or this account may not pull from it"


class Denied(RegistryError):
    """[code-12]."""

    status, code, message = 403, "DENIED", "access to the resource is denied"


class OutOfRoom(Denied):
    """The disk is full. DENIED, because docker does not retry on it."""

    status, message = (
        507,
        "the registry has no space left on its disk; nothing was lost, try again when there is",
    )


class Unsupported(RegistryError):
    """[code-13]."""

    status, code, message = 405, "UNSUPPORTED", "the operation is not supported here"


class NotFound(Unsupported):
    """A path that no specification gives a meaning to."""

    status, message = 404, "there is nothing at this path"


class BadRequest(Unsupported):
    """A parameter that cannot be read."""

    status, message = 400, "bad request"


class Conflict(Unsupported):
    """[RFC 9110, 15.5.10] it cannot be done as things stand."""

    status, message = 409, "this cannot be done as things stand"


class RequestTimeout(Unsupported):
    """[RFC 9110, 15.5.9] the client stopped sending."""

    status, message = 408, "no bytes arrived for too long; what came before is kept"


class TooManyRequests(RegistryError):
    """[code-14]."""

    status, code, message = 429, "TOOMANYREQUESTS", "too many requests at once: try again later"


class UnsupportedEncoding(Unsupported):
    """[RFC 9110, 15.5.16] a digest is of bytes as they are, so they are not to come in another coding."""

    status, message = 415, "send the content as it is, without Content-Encoding"


class Unavailable(RegistryError):
    """The database or the store does not answer now."""

    status, code, message = 503, "UNKNOWN", "the registry cannot do this right now: try again"

    def __init__(self, message: str = "", *, detail: Any = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, detail=detail, headers={"Retry-After": "5", **(headers or {})})


class ReadOnly(RegistryError):
    """The switch for maintenance is on."""

    status, code, message = 503, "DENIED", "the registry is read-only for now"

    def __init__(self, reason: str) -> None:
        """Take the reason that was given with the switch."""
        super().__init__(f"{self.message}: {reason}", headers={"Retry-After": "60"})


class InternalError(RegistryError):
    """A bug. What it was is in the log, under the request id of the answer."""

    status, code, message = (
        500,
        "UNKNOWN",
        "internal error: its cause is in the registry's log under this request id",
    )


class MetadataError(Exception):
    """The database failed; not yet an answer."""


class MetadataFull(MetadataError):
    """No room on the disk for the database."""


class MetadataUnavailable(MetadataError):
    """The database does not answer, or not now."""


class AccountsError(Exception):
    """What was asked about accounts, teams, tokens or rules cannot be done; the message says why."""


class AccountUnknown(AccountsError):
    """There is no such account, team, token or rule."""


class ConfigurationError(Exception):
    """The configuration cannot be used; the message says which key, and what was expected."""
