"""The composition root: the one place where the registry is put together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from aiohttp import web

from registry.access.accounts import Follower
from registry.access.audit import Auditor
from registry.access.challenges import Challenges
from registry.access.clients import Clients
from registry.access.credentials import Credentials
from registry.access.gate import Gate
from registry.access.granting import Granting
from registry.access.issuers import Issuers
from registry.access.limits import LoginLimits, Rate
from registry.access.logins import Logins
from registry.access.passwords import Passwords
from registry.access.rights import Right
from registry.access.signing import Signer
from registry.access.tokens import Tokens
from registry.affinity import Affinity
from registry.answers import Answers
from registry.blobs import Blobs
from registry.browse import Browse
from registry.config import Settings
from registry.contents import Contents
from registry.dispatch import Dispatcher, Table
from registry.fresh import FreshSessions
from registry.health import Health
from registry.listings import Listings
from registry.logs import Lines, is_json
from registry.manifests import Manifests
from registry.metadata.engine import Database, open_database
from registry.metrics import Metrics
from registry.middleware import Observer
from registry.record import Recorder
from registry.referrers import Referrers
from registry.routes import Endpoint
from registry.sessions import Sessions
from registry.sweeper import Doubt, Sweeper
from registry.transfer import Receiver, Sender
from registry.uploads import Uploads
from storage.base import Store
from storage.filesystem import FilesystemStore

OBSERVER: Final = web.AppKey("observer", Observer)
ANSWERS: Final = web.AppKey("answers", Answers)

#: For requests that were cancelled at the end of a drain.
_CANCELLED_SECONDS: Final = 5.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Process:
    """What one process of a server is, beside its settings.

    Attributes:
        alone: no other process writes to the database.
        is_first: it also does what one process must do for all: sweeping.
        doubt: what the last run may have left, where it did not end well.
        shared: a directory for what the processes tell each other.
        affinity: which processor its threads keep to.
    """

    alone: bool = True
    is_first: bool = True
    doubt: Doubt | None = None
    shared: Path | None = None
    affinity: Affinity = field(default_factory=lambda: Affinity(enabled=False))


def open_store(settings: Settings, affinity: Affinity, driver: str = "") -> Store:
    """Return the store that the settings name; its threads for small jobs keep to the processor of `affinity`.

    With `driver`, the store that they would name if it were theirs.
    """
    if (driver or settings.storage.driver) == "s3":
        # Imported only where it is used: its library takes half a second and 40 MB.
        from storage.s3 import S3Store

        return S3Store(**msgspec.structs.asdict(settings.storage.s3))
    files = settings.storage.filesystem
    return FilesystemStore(Path(files.root), sync=files.sync, begin=affinity.join)


def open_facts(settings: Settings, affinity: Affinity) -> Database:
    """Return the database that the settings name, which must have been migrated."""
    facts = settings.database
    return open_database(facts.url, sync=facts.sync, connections=facts.connections, begin=affinity.join)


def build(settings: Settings, *, process: Process | None = None, store: Store | None = None) -> web.Application:
    """Return the registry as an application.

    Args:
        settings: its configuration; the database must have been migrated.
        process: which process of the server this is; the only one where absent.
        store: another store than the settings name, for tests.
    """
    process = process or Process()
    store = store or open_store(settings, process.affinity)
    database = open_facts(settings, process.affinity)
    rights = database.watch_rights()
    contents = Contents(database, settings.cache.bytes, alone=process.alone, rights=rights)
    fresh = FreshSessions(store, database, enabled=process.alone)
    receiver = Receiver(settings.uploads.concurrent, settings.uploads.buffer_bytes, settings.uploads.stall_seconds)
    sender = Sender(settings.uploads.stall_seconds, begin=process.affinity.join)
    metrics = Metrics(process.shared, store.requests)
    lines = Lines(as_json=is_json(settings.log))
    clients = Clients(settings.server)
    auditor = Auditor(database, clients, lines)
    signer = Signer(database, settings.accounts)
    passwords = Passwords()
    logins = Logins(database, passwords, Issuers(settings.issuers), LoginLimits())
    challenges = Challenges(clients, settings.accounts.service)
    rate = Rate(settings.limits.requests_per_second, 1)
    credentials = Credentials(database, rights, signer, logins, clients, auditor, challenges, rate)
    gate = Gate(credentials, challenges, clients, auditor, rate, settings.limits)
    sweeper = Sweeper(
        store,
        database,
        settings.uploads.idle_seconds,
        settings.uploads.sweep_seconds,
        audit_days=settings.audit.days,
    )

    table = _table(
        settings,
        Tokens(database, credentials, signer, auditor, receiver, settings.accounts),
        Blobs(store, contents, sender, auditor),
        Uploads(database, Sessions(store, database, contents, fresh), receiver, gate, auditor),
        Manifests(store, contents, receiver, gate, auditor, settings.registry),
        Listings(database),
        Referrers(database, contents),
    )
    recorder = Recorder(metrics, lines if settings.log.access else None)
    observer = Observer(recorder, clients)
    app = web.Application(middlewares=[observer.middleware()])
    app[OBSERVER] = observer
    app[ANSWERS] = Answers(contents.cache, recorder, rate, clients)
    app.router.add_route("*", "/v2/{path:.*}", Dispatcher(table, gate).handle, expect_handler=_uninvited)
    app.router.add_get("/v2", _to_base)
    app.router.add_routes(Browse(database, contents, gate, auditor, delete=settings.registry.delete).routes())
    app.router.add_routes(Granting(database, gate, auditor).routes())
    app.router.add_routes(Health(database, store, metrics, fresh, gate).routes())

    async def life(_: web.Application) -> AsyncIterator[None]:
        # Each is closed whatever becomes of the others, the last one opened first.
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(lines.close)
            stack.push_async_callback(store.close)
            stack.callback(contents.close)
            if rights is not None:
                stack.callback(rights.close)
            stack.push_async_callback(database.close)
            stack.push_async_callback(passwords.close)
            stack.push_async_callback(receiver.close)
            stack.push_async_callback(sender.close)
            stack.push_async_callback(fresh.close)
            stack.push_async_callback(sweeper.stop)
            await sweeper.start(first=process.is_first, doubt=process.doubt)
            stack.push_async_callback(auditor.flush)
            for always in _always(settings, process, database, metrics, lines, auditor):
                stack.push_async_callback(_end, asyncio.create_task(always))
            # Handlers that were cancelled still keep what they received, and need all of the above for it.
            stack.push_async_callback(observer.drain, _CANCELLED_SECONDS)
            yield

    app.cleanup_ctx.append(life)
    return app


def _table(
    settings: Settings,
    tokens: Tokens,
    blobs: Blobs,
    uploads: Uploads,
    manifests: Manifests,
    listings: Listings,
    referrers: Referrers,
) -> Table:
    table: Table = {
        Endpoint.BASE: {"GET": (listings.check, Right.PULL), "HEAD": (listings.check, Right.PULL)},
        Endpoint.TOKEN: {"GET": (tokens.get, Right.PULL), "POST": (tokens.post, Right.PULL)},
        Endpoint.CATALOG: {"GET": (listings.catalog, Right.PULL)},
        Endpoint.DISCOVER: {"GET": (listings.discover, Right.PULL)},
        Endpoint.TAGS: {"GET": (listings.tags, Right.PULL)},
        Endpoint.REFERRERS: {"GET": (referrers.find, Right.PULL)},
        Endpoint.MANIFEST: {
            "GET": (manifests.get, Right.PULL),
            "HEAD": (manifests.head, Right.PULL),
            "PUT": (manifests.put, Right.PUSH),
        },
        Endpoint.BLOB: {"GET": (blobs.get, Right.PULL), "HEAD": (blobs.head, Right.PULL)},
        Endpoint.UPLOADS: {"POST": (uploads.start, Right.PUSH)},
        Endpoint.UPLOAD: {
            "GET": (uploads.status, Right.PUSH),
            "PATCH": (uploads.append, Right.PUSH),
            "PUT": (uploads.finish, Right.PUSH),
            "DELETE": (uploads.cancel, Right.PUSH),
        },
    }
    if settings.registry.delete:
        table[Endpoint.MANIFEST]["DELETE"] = (manifests.delete, Right.DELETE)
        table[Endpoint.BLOB]["DELETE"] = (blobs.delete, Right.DELETE)
    return table


async def _uninvited(_: web.Request) -> None:
    """Invite no body yet: whoever reads it does so, when nothing stands against it."""


async def _to_base(_: web.Request) -> web.StreamResponse:
    return web.Response(status=301, headers={"Location": "/v2/"})


def _always(
    settings: Settings, process: Process, database: Database, metrics: Metrics, lines: Lines, auditor: Auditor
) -> list[Coroutine[Any, Any, None]]:
    """Return what runs beside requests until the end."""
    running = [_tick(metrics, lines, process.affinity), auditor.keep_writing()]
    if settings.accounts.htpasswd and process.is_first:
        running.append(Follower(database, Path(settings.accounts.htpasswd)).keep_looking())
    return running


async def _tick(metrics: Metrics, lines: Lines, affinity: Affinity) -> None:
    """Write what was logged, tell the other processes what was counted, look at the processors, twice a second."""
    while True:
        await asyncio.sleep(0.5)
        lines.flush()
        try:
            await asyncio.to_thread(metrics.share)
            await asyncio.to_thread(affinity.look)
        except OSError as error:
            # A full disk, or no descriptors left: the next time may be better.
            log.warning("metrics are not shared", error=str(error))


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
