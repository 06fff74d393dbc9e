"""What lies in `deploy/`, read as those read it who use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def read_yaml(path: Path) -> Any:
    """Return the one document of a file."""
    return yaml.safe_load(path.read_text())


def read_variables(path: Path) -> dict[str, str]:
    """Return what stands in a file of variables, such as `.env`."""
    return {name: value for name, _, value in (line.partition("=") for line in path.read_text().splitlines())}


def substitute(path: Path, changes: dict[str, str]) -> str:
    """Return a file with its placeholders changed into what a test has; each of them must be there."""
    text = path.read_text()
    for old, new in changes.items():
        assert old in text, f"{path.name} says nothing of {old!r}"
        text = text.replace(old, new)
    return text


def seconds(text: str) -> int:
    """Return what `45s` means."""
    assert text.endswith("s")
    return int(text[:-1])
