"""`hythe ls`, `tags`, `inspect` and `rm`: what the API says, as data and as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from hythe.client import ServerError, ask, pages, printable

#: The beginning of a digest, long enough to be meant as one.
_ABBREVIATED: Final = re.compile(r"sha256:[0-9a-f]{6,63}|sha512:[0-9a-f]{6,127}")


@dataclass(frozen=True, slots=True)
class Result:
    """What a command found: `data` for programs, `text` for people."""

    data: Any
    text: str


def list_repositories(server: str, path: str, *, recursive: bool) -> Result:
    """List the tree below `path`."""
    nodes = list(_walk(server, path.strip("/"), recursive=recursive))
    if path.strip("/") and not nodes:
        # A repository below which there is nothing is an answer; a name that nobody knows is a slip.
        ask(server, "GET", "tags", repository=path.strip("/"))
    rows = [
        (
            node["name"] + ("/" if not node["is_repository"] else ""),
            str(node["tags"]) if node["is_repository"] else "",
            node["updated_at"] or "",
        )
        for node in nodes
    ]
    return Result(nodes, table(("REPOSITORY", "TAGS", "PUSHED"), rows))


def _walk(server: str, path: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
    for node in pages(server, "repositories", "repositories", path=path):
        yield node
        if recursive and node["has_children"]:
            yield from _walk(server, node["name"], recursive=True)


def list_tags(server: str, repository: str) -> Result:
    """List the tags of a repository."""
    found = list(pages(server, "tags", "tags", repository=_local(server, repository)))
    rows = [
        (
            tag["name"],
            _short(tag["digest"]),
            human_size(tag["image_size"]),
            ", ".join(tag["platforms"]) or "-",
            tag["updated_at"],
        )
        for tag in found
    ]
    return Result(found, table(("TAG", "DIGEST", "SIZE", "PLATFORMS", "PUSHED"), rows))


def inspect_manifest(server: str, reference: str) -> Result:
    """Show what a manifest is made of."""
    repository, part = _resolve(server, reference)
    found = ask(server, "GET", "manifest", repository=repository, reference=part or "latest")
    facts = [
        ("Repository", found["repository"]),
        ("Digest", found["digest"]),
        ("Media type", printable(found["media_type"])),
        ("Tags", ", ".join(found["tags"]) or "-"),
    ]
    facts += [("Subject", found["subject"])] if found["subject"] else []
    facts += [(printable(f"Annotation {name}"), printable(value)) for name, value in found["annotations"].items()]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name + ':':<{width + 2}}{value}" for name, value in facts]
    rows = [
        (
            entry["relation"],
            entry["digest"],
            human_size(entry["size"]),
            entry["platform"] or entry["media_type"],
        )
        for entry in found["content"]
    ]
    text = "\n".join(lines) + "\n\n" + table(("CONTENT", "DIGEST", "SIZE", "TYPE"), rows)
    return Result(found, text)


def remove_manifest(server: str, reference: str) -> Result:
    """Remove a tag, or a manifest with all its tags."""
    repository, part = _resolve(server, reference)
    if not part:
        raise ServerError(f"say which: {repository}:TAG, or {repository}@DIGEST with all its tags")
    removed = ask(server, "DELETE", "manifest", repository=repository, reference=part)
    lines = [f"untagged {repository}:{tag}" for tag in removed["tags"]]
    lines += [f"deleted {repository}@{part}"] if ":" in part else []
    return Result(removed, "\n".join(lines))


def _resolve(server: str, reference: str) -> tuple[str, str]:
    """Split a reference, and complete a digest that is written as `hythe tags` shows it."""
    repository, part = split_reference(_local(server, reference))
    if not _ABBREVIATED.fullmatch(part):
        return repository, part
    tags = pages(server, "tags", "tags", repository=repository)
    found = {tag["digest"] for tag in tags if tag["digest"].startswith(part)}
    if len(found) != 1:
        many = "several manifests begin" if found else "no tagged manifest begins"
        raise ServerError(f"{many} with {part} in {repository}: give the whole digest (hythe tags --json shows it)")
    return repository, found.pop()


def split_reference(reference: str) -> tuple[str, str]:
    """Split `REPOSITORY[:TAG]` or `REPOSITORY[:TAG]@DIGEST`; the second part may be empty."""
    name, at, digest = reference.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, ""
    return repository, digest if at else tag


def _local(server: str, reference: str) -> str:
    """Take the registry's own address off a reference, as docker writes it."""
    host = urlsplit(server if "://" in server else f"http://{server}").netloc
    return reference.removeprefix(f"{host}/")


def _short(digest: str) -> str:
    algorithm, _, hexadecimal = digest.partition(":")
    return f"{algorithm}:{hexadecimal[:12]}"


def human_size(size: int) -> str:
    """Return bytes as people read them, in decimal units as docker does."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out columns of text, each cell as `printable` has it; only the head where there are no rows."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    return "\n".join(lines)
