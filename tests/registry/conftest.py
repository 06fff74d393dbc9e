"""Which tests run on which backend: what the protocol promises, and what the facts are, must not depend on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import pytest

from registry.config import Settings
from registry.metadata import accounts
from registry.metadata.engine import open_database
from tests.conftest import Start
from tests.registry.accounts import HASH, Registry
from tests.services.postgres import needs_postgres
from tests.services.s3 import needs_ceph

#: Modules whose tests look into files, processes or memory of one host, or come no further than what is before both.
LOCAL: Final = frozenset(
    [
        *(
            "affinity",
            "answers",
            "app",
            "attacks",
            "cache",
            "chunks",
            "clients",
            "config",
            "fresh",
            "full_disk",
            "issuers",
        ),
        *("limits", "postgres", "schema", "server", "sqlite", "tls"),
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


@pytest.fixture
async def registry(start: Start, settings: Settings) -> AsyncIterator[Registry]:
    client = await start()
    database = open_database(settings.database.url)
    await database.write(accounts.add, "root", accounts.USER, HASH, admin=True)
    yield Registry(client, database)
    await database.close()
