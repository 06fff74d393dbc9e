"""`/healthz`, `/readyz` and `/metrics`: for those who watch."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from registry.errors import MetadataError
from registry.metadata import sessions
from registry.metadata.engine import Database
from registry.metrics import Metrics
from registry.responses import json_response
from storage.base import Store
from storage.errors import StorageError

_PATIENCE: Final = 5.0


class Health:
    """Says whether the registry lives, works, and how much."""

    def __init__(self, database: Database, store: Store, metrics: Metrics) -> None:
        """Ask `database` and `store`; tell `metrics`."""
        self._database = database
        self._store = store
        self._metrics = metrics

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/healthz", self.alive),
            web.get("/readyz", self.ready),
            web.get("/metrics", self.metrics),
        ]

    async def alive(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002
        """The process answers."""
        return json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002
        """The database and the store answer too: 503 and which one, where not."""
        answers = {"database": await self._ask_database(), "store": await self._ask_store()}
        is_ready = set(answers.values()) == {"ok"}
        return json_response(answers, status=200 if is_ready else 503)

    async def metrics(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002
        """Numbers in Prometheus' text format."""
        open_sessions = await self._database.read(sessions.count)
        body = await asyncio.to_thread(self._metrics.render, open_sessions)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _ask_database(self) -> str:
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._database.note(sessions.probe)
        except (MetadataError, TimeoutError) as error:
            return f"failed: {error or 'no answer'}"
        return "ok"

    async def _ask_store(self) -> str:
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._store.probe()
        except (StorageError, TimeoutError) as error:
            return f"failed: {error or 'no answer'}"
        return "ok"
