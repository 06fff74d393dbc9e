"""Serving, one process or several.

The start is a straight line: lock (`lock.py`), migrate, bind (`listeners.py`), serve, or start workers (`workers.py`).
"""

from __future__ import annotations

import asyncio
import gc
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from registry.access.accounts import make_accounts
from registry.affinity import Affinity
from registry.app import ANSWERS, OBSERVER, Process, build, open_facts, open_store
from registry.config import Settings, check_open
from registry.connections import Connections
from registry.errors import ConfigurationError, MetadataError
from registry.listeners import BACKLOG, address_of, bind
from registry.lock import Trace, check_local, serving
from registry.logs import configure
from registry.metadata import identity, leftovers, sessions
from registry.metadata.engine import Database, is_shared
from registry.metadata.schema import upgrade
from registry.metadata.sqlite import sqlite_path
from registry.secure import Secure
from registry.sweeper import Doubt
from registry.tls import Certificates
from registry.wire import accept
from registry.workers import STOPPING, supervise
from storage.base import Store
from storage.errors import OutOfSpace, StorageError
from storage.threads import run_anywhere

#: Objects made since the last look for garbage, before the next one; Python's own limit is 700.
_GARBAGE: Final = 20_000
#: Seconds after which no request can be about a file any more that has no row.
_LONG: Final = 86400.0
#: For answers on their way out, when the time to drain is over.
_LAST_SECONDS: Final = 1.0
#: Seconds between two looks for a new certificate.
_CERTIFICATE_PAUSE: Final = 2.0

log = structlog.get_logger()


def serve(settings: Settings, announce: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    Args:
        settings: the configuration.
        announce: called once with the address, when requests are answered.

    Raises:
        ConfigurationError: the data is in use, the address is not to be had, the database is not ours.
    """
    configure(settings.log)
    if settings.storage.driver == "filesystem":
        _check_directory(Path(settings.storage.filesystem.root))
    with serving(_lock_files(settings)) as trace:
        # Before any worker publishes a file: what is older belongs to the last run.
        doubt = _doubt(settings, trace)
        copy = upgrade(settings.database.url)
        if copy:
            log.info("database upgraded", copy=copy)
        has_accounts = asyncio.run(_prepare(settings))
        check_open(settings, has_accounts=has_accounts)
        certificates = Certificates(settings.tls) if settings.tls.certificate else None
        sockets = bind(settings)

        def ready() -> None:
            announce(address_of(sockets[0][0], settings))

        if settings.server.workers == 1:
            is_alone = not is_shared(settings.database.url)
            process = Process(alone=is_alone, doubt=doubt, affinity=_affinity(settings))
            return _run(_serve(settings, sockets[0], process, certificates, ready))
        with tempfile.TemporaryDirectory(prefix="hythe-") as shared:

            def work(index: int, is_first: bool, alive: int) -> int:
                process = Process(
                    alone=False,
                    is_first=index == 0,
                    doubt=doubt if is_first else None,
                    shared=Path(shared),
                    affinity=_affinity(settings, index),
                )
                return _run(_serve(settings, sockets[index], process, certificates, lambda: None, alive))

            return supervise(sockets, work, ready, trace.doubt)


def _check_directory(root: Path) -> None:
    try:
        root.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"storage.filesystem.root: {root}: {error.strerror}") from None


def _lock_files(settings: Settings) -> list[Path]:
    """Return what only one server may hold: all of it where the facts are a file, nothing where they are shared."""
    database = sqlite_path(settings.database.url)
    if database is None:
        return []
    check_local(database)
    directories = [database.resolve().parent]
    if settings.storage.driver == "filesystem":
        directories.append(Path(settings.storage.filesystem.root).resolve())
    return [directory / "hythe.lock" for directory in dict.fromkeys(directories)]


def _doubt(settings: Settings, trace: Trace) -> Doubt | None:
    """Return what may lie in the store without a row, None where there can be nothing."""
    is_local = settings.storage.driver == "filesystem"
    if not is_shared(settings.database.url):
        pause = 0 if is_local else leftovers.GRACE / 1_000_000
        return Doubt(time.time(), pause, trace.settle) if trace.is_unclear else None
    # Nobody knows whether another server died, so files are looked through at every start, and only what no request
    # can be about any more is taken. An object store need not be: `registry.metadata.leftovers`.
    return Doubt(time.time() - _LONG) if is_local else None


async def _prepare(settings: Settings) -> bool:
    """Make sure that the store is this registry's, and end the claims of a run that is over.

    Returns:
        Whether there are accounts; those that the configuration names are made here.
    """
    database = open_facts(settings, Affinity(enabled=False))
    store = open_store(settings, Affinity(enabled=False))
    try:
        await _release(settings, database, store)
        return await make_accounts(database, settings.accounts)
    except StorageError as error:
        raise ConfigurationError(f"storage.{settings.storage.driver}: {error}") from None
    except MetadataError as error:
        raise ConfigurationError(f"database.url: {error}") from None
    finally:
        await store.close()
        await database.close()


async def _release(settings: Settings, database: Database, store: Store) -> None:
    try:
        await _check_owner(store, await database.read(identity.find))
        if not is_shared(settings.database.url):
            await database.note(sessions.release_all)
    except MetadataError as error:
        # On a full disk pulls are worth more: claims end by themselves after a while.
        log.warning("claims of the last run are not released", error=str(error))


async def _check_owner(store: Store, name: str) -> None:
    try:
        owner = await store.owner(name)
    except OutOfSpace:
        return
    if owner != name:
        raise ConfigurationError(
            f"storage: these blobs belong to another registry ({owner}), whose database this is not ({name}): "
            "two registries cannot share a store, and servers that share one need the same PostgreSQL database"
        )


def _affinity(settings: Settings, index: int = 0) -> Affinity:
    return Affinity(index, enabled=settings.server.affinity)


def _calm_collector() -> None:
    """Let Python look for cyclic garbage less often: what requests leave behind has next to none.

    What was loaded so far stays for good and is not looked at again.
    """
    gc.freeze()
    gc.set_threshold(_GARBAGE, 20, 50)


def _run(main: object) -> int:
    """Run `main` on uvloop where it is installed: small requests are answered half as fast again."""
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)  # type: ignore[arg-type]


async def _serve(
    settings: Settings,
    sockets: list[socket.socket],
    process: Process,
    certificates: Certificates | None,
    ready: Callable[[], None],
    parent: int = -1,
) -> int:
    """Serve on the sockets until told to stop, then drain.

    Args:
        settings: the configuration.
        sockets: which listen.
        process: which of the server's processes this is.
        certificates: for TLS, or None.
        ready: called when requests are answered.
        parent: a pipe whose end tells that the watching process is gone, or -1.
    """
    app = build(settings, process=process)
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=_LAST_SECONDS,
        keepalive_timeout=75,
        # A push by digest may bring a hundred tags in its query.
        max_line_size=32768,
        max_field_size=16384,
        # A digest is of bytes as they came; and what is small on the wire must not be large in memory.
        auto_decompress=False,
    )
    await runner.setup()
    loop = asyncio.get_running_loop()
    # What others run in threads must not keep to the loop's processor.
    loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix="default", initializer=run_anywhere))
    http = runner.server
    assert http is not None
    connections = Connections(settings.server.connections, settings.server.head_seconds)

    def protocol() -> asyncio.Protocol:
        connection = accept(http, app[ANSWERS], connections)
        return (
            Secure(connection, certificates.context, connections, settings.server.head_seconds)
            if certificates
            else connection
        )

    listeners = [await loop.create_server(protocol, sock=sock, backlog=BACKLOG) for sock in sockets]
    watching = asyncio.create_task(_watch(certificates)) if certificates else None
    stop = asyncio.Event()
    for number in STOPPING:
        loop.add_signal_handler(number, stop.set)
    if parent >= 0:
        loop.add_reader(parent, stop.set)
    process.affinity.join()
    _calm_collector()
    ready()
    await stop.wait()
    for listener in listeners:
        listener.close()
    app[ANSWERS].end()
    await app[OBSERVER].drain(settings.server.drain_seconds)
    await runner.cleanup()
    await connections.close()
    if watching is not None:
        watching.cancel()
    return 0


async def _watch(certificates: Certificates) -> None:
    """Look for new certificates, until cancelled."""
    while True:
        await asyncio.sleep(_CERTIFICATE_PAUSE)
        await asyncio.to_thread(certificates.look)
