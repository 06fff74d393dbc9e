"""Who did what, and what was refused to whom: a row, and a line in the log.

What is done is written in the transaction that does it (`metadata.audit.audited`). What is refused changes nothing, so
it is written a moment later, together with what else was: somebody who is refused a thousand times a second must not be
able to keep the database busy, nor fill it. Being asked for credentials is no refusal.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from typing import Final

import structlog
from aiohttp import web

from registry.access.clients import Clients
from registry.access.limits import Rate, network_of
from registry.access.rights import OPEN, Identity
from registry.errors import MetadataError
from registry.logs import Lines, printable
from registry.metadata import audit
from registry.metadata.audit import REFUSED, Event
from registry.metadata.engine import Database
from registry.responses import REQUEST_ID

#: Refusals that wait to be written; more are counted, and that is written.
_WAITING_LIMIT: Final = 500
_PAUSE: Final = 1.0
#: Refusals from one address that are written in a minute: who is refused all day long shall not fill the disk either.
_PER_MINUTE: Final = 60

log = structlog.get_logger()


class Auditor:
    """Keeps the audit."""

    def __init__(self, database: Database, clients: Clients, lines: Lines) -> None:
        """Write to `database` and `lines`; `clients` tells addresses."""
        self._database = database
        self._clients = clients
        self._lines = lines
        self._waiting: list[Event] = []
        self._dropped = 0
        self._rate = Rate(_PER_MINUTE, 60)

    def event(
        self,
        request: web.Request,
        identity: Identity,
        action: str,
        *,
        repository: str = "",
        target: str = "",
        detail: str = "",
    ) -> Event | None:
        """Return the event of something that is about to be done; None where there are no accounts, and so no audit."""
        return None if identity is OPEN else self._event(request, identity, action, repository, target, detail)

    def tell(self, event: Event | None) -> None:
        """Write a line for what was done, or refused."""
        if event is not None:
            told = {name: str(value) for name, value in asdict(event).items() if value and name != "at"}
            self._lines.add_event("warning" if event.outcome == REFUSED else "info", "audit", told)

    def _event(
        self, request: web.Request, identity: Identity, action: str, repository: str, target: str, detail: str
    ) -> Event:
        return Event(
            actor=identity.name,
            credential=printable(identity.credential),
            address=self._clients.address(request),
            action=action,
            repository=repository,
            target=printable(target[:256]),
            detail=printable(detail[:1000]),
            request_id=request.get(REQUEST_ID, ""),
        )

    def refused(
        self,
        request: web.Request,
        identity: Identity,
        action: str,
        detail: str,
        *,
        repository: str = "",
        target: str = "",
    ) -> None:
        """Note that something was not allowed."""
        event = self._event(request, identity, action, repository, target, detail)
        event = replace(event, outcome=REFUSED)
        self.tell(event)
        if len(self._waiting) < _WAITING_LIMIT and not self._rate.take(network_of(event.address)):
            self._waiting.append(event)
        else:
            self._dropped += 1

    async def keep_writing(self) -> None:
        """Write refusals now and then, until cancelled."""
        while True:
            await asyncio.sleep(_PAUSE)
            await self.flush()

    async def flush(self) -> None:
        """Write the refusals that wait."""
        events, self._waiting = self._waiting, []
        dropped, self._dropped = self._dropped, 0
        if dropped:
            text = f"{dropped} more refusals are not listed"
            events.append(Event("", "", "", "refusals", outcome=REFUSED, detail=text))
        if not events:
            return
        try:
            await self._database.note(audit.add_all, events)
        except MetadataError as error:
            log.error("refusals are not in the audit", count=len(events), error=str(error))
