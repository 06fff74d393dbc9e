"""Repository names, tags and references, parsed once at the edge. [distribution-spec: Pulling manifests]"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NewType

from storage.digest import Digest
from storage.errors import InvalidName

RepositoryName = NewType("RepositoryName", str)
Tag = NewType("Tag", str)
#: What a manifest is asked for by.
Reference = Tag | Digest

#: "The total length of a repository name, including slashes, MUST be less than 256", host included by clients.
NAME_LIMIT: Final = 255
TAG_LIMIT: Final = 128

_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG: Final = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")


@lru_cache(maxsize=16384)
def parse_repository(text: str) -> RepositoryName:
    """Return `text` as a repository name, or raise `InvalidName` with what is wrong."""
    if len(text) > NAME_LIMIT:
        raise InvalidName(f"a repository name has at most {NAME_LIMIT} characters, this one {len(text)}")
    if not _NAME.fullmatch(text):
        raise InvalidName(
            f"{text!r} is not a repository name: components of a-z and 0-9, "
            "separated inside by one '.', one or two '_' or any number of '-', joined by '/'"
        )
    return RepositoryName(text)


@lru_cache(maxsize=16384)
def parse_tag(text: str) -> Tag:
    """Return `text` as a tag, or raise `InvalidName` with what is wrong."""
    if not _TAG.fullmatch(text):
        raise InvalidName(
            f"{text[: TAG_LIMIT + 1]!r} is not a tag: at most {TAG_LIMIT} letters, digits, '_', '.' and '-', "
            "the first of them not '.' or '-'"
        )
    return Tag(text)


def parse_reference(text: str) -> Reference:
    """Return a digest where `text` has a colon, else a tag.

    Raises:
        InvalidDigest: it has a colon and is no digest.
        InvalidName: it has none and is no tag.
    """
    return Digest.parse(text) if ":" in text else parse_tag(text)


def referrers_tag(digest: Digest) -> Tag:
    """Return the tag under which clients without the referrers API list referrers.

    [distribution-spec: Referrers Tag Schema]
    """
    return Tag(f"{digest.algorithm[:32]}-{digest.hex[:64]}")
