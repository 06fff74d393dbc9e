"""What can go wrong with stored bytes. No HTTP here: the registry decides how to say it.

StorageError
├── InvalidDigest      not a digest, or of an algorithm we do not know
├── InvalidName        not a repository name, or not a tag
├── InvalidManifest    not a manifest; says where
├── DigestMismatch     the bytes are not what the digest promised
├── UploadBusy         somebody else is writing to this upload
├── UploadLost         the bytes of this upload are gone
├── ContentMissing     no bytes under this key
├── StoreUnavailable   the store does not answer, or not now
└── OutOfSpace         the disk, or the quota, is full
"""


class StorageError(Exception):
    """The root of this tree."""


class InvalidDigest(StorageError):
    """Not a digest, or of an algorithm we do not know."""


class InvalidName(StorageError):
    """Not a repository name, or not a tag."""


class InvalidManifest(StorageError):
    """Not a manifest; the message says where."""


class DigestMismatch(StorageError):
    """The bytes are not what the digest promised."""

    def __init__(self, expected: object, actual: object) -> None:
        super().__init__(f"expected {expected}, the bytes received are {actual}")


class UploadBusy(StorageError):
    """Somebody else is writing to this upload."""


class UploadLost(StorageError):
    """The bytes of this upload are gone, or fewer than were counted."""


class ContentMissing(StorageError):
    """No bytes under this key."""


class StoreUnavailable(StorageError):
    """The store does not answer, or not now."""


class OutOfSpace(StorageError):
    """The disk, or the quota, is full."""
