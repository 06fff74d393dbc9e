"""`/healthz`, `/readyz` and `/metrics`: for those who watch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog
from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from registry.access.gate import Gate
from registry.errors import MetadataError
from registry.fresh import FreshSessions
from registry.metadata import sessions
from registry.metadata.engine import Database
from registry.metrics import Metrics
from registry.responses import json_response
from storage.base import Store
from storage.errors import StorageError

_PATIENCE: Final = 5.0

log = structlog.get_logger()


class Health:
    """Says whether the registry lives, works, and how much."""

    def __init__(self, database: Database, store: Store, metrics: Metrics, fresh: FreshSessions, gate: Gate) -> None:
        """Ask `database` and `store`; tell `metrics`, with the sessions that are too `fresh` for a row.

        Numbers are for whoever is logged in, as `gate` says; that it lives and works, for everybody.
        """
        self._gate = gate
        self._database = database
        self._store = store
        self._metrics = metrics
        self._fresh = fresh
        self._asked: dict[str, asyncio.Task[None]] = {}

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
        answers = {
            "database": await self._ask("database", lambda: self._database.note(sessions.probe)),
            "store": await self._ask("store", self._store.probe),
        }
        is_ready = set(answers.values()) == {"ok"}
        return json_response(answers, status=200 if is_ready else 503)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Numbers in Prometheus' text format."""
        identity = await self._gate.identify(request)
        self._gate.demand_valid(request, identity)
        self._gate.demand_account(request, identity)
        open_sessions = await self._database.read(sessions.count)
        body = await asyncio.to_thread(self._metrics.render, open_sessions + len(self._fresh))
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _ask(self, name: str, probe: Callable[[], Coroutine[Any, Any, None]]) -> str:
        """Return what a probe says in time. One that hangs is asked again only when it has ended."""
        if name not in self._asked:
            self._asked[name] = asyncio.create_task(probe())
        task = self._asked[name]
        if not (await asyncio.wait({task}, timeout=_PATIENCE))[0]:
            return "failed: no answer"
        self._asked.pop(name, None)
        error = task.exception()
        if error is None:
            return "ok"
        if isinstance(error, MetadataError | StorageError):
            # What it is may name what is behind us, and anybody may ask.
            log.warning("not ready", part=name, error=str(error))
            return "failed: see the log"
        raise error
