"""Which tests run on which backend: what the protocol promises, and what the facts are, must not depend on it."""

from __future__ import annotations

from typing import Final

import pytest

from tests.services.postgres import needs_postgres
from tests.services.s3 import needs_ceph

#: Modules whose tests look into files, processes or memory of one host.
LOCAL: Final = frozenset(
    [
        *("affinity", "answers", "app", "cache", "chunks", "config", "fresh", "full_disk", "postgres", "schema"),
        *("server", "sqlite"),
    ]
)


#: Modules whose tests need what only the other one has.
REMOTE: Final = frozenset(["faults", "replicas"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every other test on both."""
    name = metafunc.module.__name__.rpartition("test_")[2]
    if "backend" in metafunc.fixturenames and name not in LOCAL:
        remote = pytest.param("remote", marks=[needs_postgres, needs_ceph])
        metafunc.parametrize("backend", [remote] if name in REMOTE else ["local", remote], indirect=True)
