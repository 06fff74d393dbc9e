"""Runs groups of measures, one server after another, round after round."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.accounts import Accounts
from benchmarks.measures import Blob, Image, Manifest, Result, Sizes, Small, Start
from benchmarks.remote import Remote

Group = type[Blob] | type[Small] | type[Manifest] | type[Image] | type[Start] | type[Remote] | type[Accounts]
_ALL: Final[tuple[Group, ...]] = (Blob, Small, Manifest, Image, Start, Remote, Accounts)
GROUPS: Final[dict[str, Group]] = {group.name: group for group in _ALL}


def run(names: list[str], sizes: Sizes, rounds: int, directory: Path) -> Iterator[Result]:
    """Run groups of measures; what they need on the disk goes below `directory`.

    What a server stored stays there to the end, but for large blobs: after thousands of files were deleted ext4 takes
    longer to create some, for minutes, and whoever is next would pay for whoever was before.
    """
    for name in names:
        group = GROUPS[name](sizes, directory)
        for number in range(1, rounds + 1):
            for place, kind in enumerate(group.kinds):
                print(f"{name}, round {number} of {rounds}: {kind.name}", file=sys.stderr)
                where = directory / f"{name}-{number}-{place}"
                yield from group.measure(kind, where)
                if group.is_large:
                    shutil.rmtree(where)
