"""The registry of these tests runs in this process, on connections as `hythe serve` makes them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web_runner import AppRunner, BaseRunner

from registry.app import build
from registry.config import Settings
from registry.metadata.schema import upgrade
from registry.wire import accept
from storage.base import Store
from tests.conftest import Start
from tests.content import Client


class _Runner(AppRunner):
    @property
    def server(self) -> Any:
        http = super().server
        return None if http is None else lambda: accept(http)


class _Server(TestServer):
    async def _make_runner(self, **kwargs: Any) -> BaseRunner:
        # aiohttp's test server cancels the handlers of cut connections; ours lets them keep what arrived.
        kwargs["handler_cancellation"] = False
        return _Runner(self.app, access_log=None, shutdown_timeout=5, max_field_size=16384, **kwargs)


@pytest.fixture
async def start(settings: Settings) -> AsyncIterator[Start]:
    """Start registries: `client = await start(registry={"delete": False})`, perhaps with `store=`."""
    clients: list[Client] = []

    async def start_one(store: Store | None = None, **tables: dict[str, object]) -> Client:
        tree = msgspec.to_builtins(settings)
        for name, values in tables.items():
            tree[name] |= values
        changed = msgspec.convert(tree, Settings)
        upgrade(changed.database.url)
        client = TestClient(_Server(build(changed, store=store)))
        await client.start_server()
        clients.append(client)
        return client

    yield start_one
    for client in clients:
        await client.close()
