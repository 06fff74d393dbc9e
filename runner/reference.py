"""Names of images as people type them: `HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`.

Without a host it is Docker Hub's, as everywhere else: the first part is a host where it has a dot or a colon, or is
`localhost`. [distribution/reference: Parse, ParseNormalizedNamed]
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Self

from runner.errors import RunnerError
from storage.digest import Digest
from storage.errors import InvalidDigest, InvalidName
from storage.names import RepositoryName, Tag, parse_repository, parse_tag

HUB: Final = "docker.io"
_HUB_NAMES: Final = (HUB, "index.docker.io", "registry-1.docker.io")
_OFFICIAL: Final = "library/"
_LATEST: Final = "latest"
_HOST: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image in a registry.

    Attributes:
        host: of the registry, perhaps with a port.
        repository: its name there.
        tag: None where only a digest was given.
        digest: which wins over the tag; None where there is none.
    """

    host: str
    repository: RepositoryName
    tag: Tag | None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what somebody typed. Raises `RunnerError`."""
        name, at, digest = text.partition("@")
        before, colon, tag = name.rpartition(":")
        if not colon or "/" in tag:
            before, tag = name, ""
        try:
            host, repository = _split(before)
            return cls(
                host,
                parse_repository(repository),
                parse_tag(tag) if tag else None if at else Tag(_LATEST),
                Digest.parse(digest) if at else None,
            )
        except (InvalidName, InvalidDigest) as error:
            raise RunnerError(f"{text[:300]!r} is no image: {error}") from None

    @property
    def target(self) -> str:
        """What its manifest is asked for by: the digest, or the tag."""
        return str(self.digest or self.tag)

    @property
    def is_local(self) -> bool:
        """Whether its registry is on this host, where plain HTTP is no risk."""
        return is_loopback(self.host)

    def at(self, digest: Digest) -> ImageReference:
        """Return the image of the same repository with a digest."""
        return ImageReference(self.host, self.repository, None, digest)

    def __str__(self) -> str:
        """Return it as people write it, so that `parse` gives the same again."""
        if self.host != HUB:
            name = f"{self.host}/{self.repository}"
        else:
            name = self.repository.removeprefix(_OFFICIAL)
            name = name if "/" not in name or name == self.repository else self.repository
        return name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def is_loopback(host: str) -> bool:
    """Return whether `HOST[:PORT]` is this host by a name that nobody can take over."""
    bare = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def _split(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        return HUB, name if slash else f"{_OFFICIAL}{name}"
    if not _HOST.fullmatch(first):
        raise InvalidName(f"{first[:100]!r} is no host")
    if first in _HUB_NAMES:
        return HUB, rest if "/" in rest else f"{_OFFICIAL}{rest}"
    return first, rest
