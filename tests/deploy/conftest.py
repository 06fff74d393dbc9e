"""The image, which takes half a minute to build, for all who run it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.image import Image, build


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """Hythe's image, in a storage that goes with it."""
    with tempfile.TemporaryDirectory(prefix="hythe-image-") as directory:
        yield build(Path(directory))
