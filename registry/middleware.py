"""Around every request: its id, its errors as JSON, its numbers, its line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from aiohttp import hdrs, web

from registry.access.clients import Clients
from registry.errors import (
    AccountsError,
    AccountUnknown,
    BadRequest,
    BlobUnknown,
    BlobUploadUnknown,
    Conflict,
    DigestInvalid,
    InternalError,
    ManifestInvalid,
    MetadataFull,
    MetadataUnavailable,
    NameInvalid,
    NotFound,
    OutOfRoom,
    RegistryError,
    SizeInvalid,
    Unavailable,
    Unsupported,
    UploadConflict,
)
from registry.logs import Access
from registry.record import Recorder, logged_path
from registry.responses import BYTES_IN, REQUEST_ID, ROUTE, WHO, json_response, sign
from registry.transfer import begin, is_waiting, leave_body
from storage import errors as storage_errors

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")

#: What an error from below the registry means to a client.
_MEANING: Final[dict[type[Exception], type[RegistryError]]] = {
    storage_errors.InvalidDigest: DigestInvalid,
    storage_errors.InvalidName: NameInvalid,
    storage_errors.InvalidManifest: ManifestInvalid,
    storage_errors.DigestMismatch: DigestInvalid,
    storage_errors.UploadBusy: UploadConflict,
    storage_errors.UploadLost: BlobUploadUnknown,
    storage_errors.ContentMissing: BlobUnknown,
    storage_errors.OutOfSpace: OutOfRoom,
    storage_errors.StoreUnavailable: Unavailable,
    AccountUnknown: NotFound,
    AccountsError: Conflict,
    MetadataFull: OutOfRoom,
    MetadataUnavailable: Unavailable,
}

log = structlog.get_logger()


class Observer:
    """The only middleware."""

    def __init__(self, recorder: Recorder, clients: Clients) -> None:
        """Let `recorder` keep what is to be kept of requests; `clients` tells where they come from."""
        self._recorder = recorder
        self._clients = clients
        self._in_flight = 0
        self._is_draining = False
        self._idle = asyncio.Event()

    def middleware(self) -> Any:
        """Return what `web.Application` takes."""

        @web.middleware
        async def observe(request: web.Request, handler: _Handler) -> web.StreamResponse:
            began = time.perf_counter()
            self._in_flight += 1
            begin(request)
            request_id = request[REQUEST_ID] = self._request_id(request)
            try:
                response = await handler(request)
            except Exception as error:
                response = _render(request, error, request_id)
            finally:
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.set()
            leave_body(request)
            if not response.prepared:
                sign(request, response)
            if self._is_draining:
                response.force_close()
            self._record(request, response, time.perf_counter() - began, request_id)
            return response

        return observe

    async def drain(self, seconds: float) -> None:
        """Wait until no request is in flight, at most so many seconds; connections end with their answers.

        aiohttp's own way would drop the rest of a body that is still on its way in.
        """
        self._is_draining = True
        self._idle.clear()
        if self._in_flight:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)

    def _request_id(self, request: web.Request) -> str:
        sent = request.headers.get("X-Request-Id")
        return sent if sent and _REQUEST_ID.fullmatch(sent) else self._recorder.next_id()

    def _record(self, request: web.Request, response: web.StreamResponse, duration: float, request_id: str) -> None:
        is_empty = request.method == hdrs.METH_HEAD or response.status in (204, 304)
        self._recorder.record(
            request.get(ROUTE) or _route(request),
            Access(
                at=time.time(),
                method=request.method,
                path=logged_path(request),
                status=response.status,
                bytes_in=request.get(BYTES_IN, 0),
                bytes_out=0 if is_empty else response.content_length or 0,
                duration=duration,
                remote=self._clients.address(request),
                request_id=request_id,
                agent=request.headers.get(hdrs.USER_AGENT, ""),
                user=request[WHO].name if WHO in request else "",
            ),
        )


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "none"


def _render(request: web.Request, error: Exception, request_id: str) -> web.StreamResponse:
    """Turn an error into an answer; after the first byte of a body there is none to give but the end."""
    if request.writer.output_size > 0:
        log.warning("answer cut short", path=request.path, error=repr(error), request_id=request_id)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the answer was cut short") from error
    known = _meaning(error)
    if known.status >= 500:
        _report(request, error, known, request_id)
    body = {"errors": known.entries(), "request_id": request_id}
    response = json_response(body, status=known.status, headers=known.headers)
    if is_waiting(request) or known.headers.get(hdrs.CONNECTION) == "close":
        # The body that was announced will not come, or not end: the connection cannot go on after it.
        response.force_close()
    return response


def _meaning(error: Exception) -> RegistryError:
    if isinstance(error, RegistryError):
        return error
    if isinstance(error, web.HTTPMethodNotAllowed):
        return Unsupported(
            f"{error.method} is not supported here",
            headers={"Allow": ", ".join(sorted(error.allowed_methods))},
        )
    if isinstance(error, web.HTTPNotFound):
        return NotFound()
    if isinstance(error, web.HTTPException):
        return BadRequest(error.reason)
    if isinstance(error, ConnectionError | web.RequestPayloadError):
        return SizeInvalid(f"the connection broke: {error}")
    for kind, meaning in _MEANING.items():
        if isinstance(error, kind):
            return meaning(_say(error, meaning))
    return InternalError()


def _say(error: Exception, meaning: type[RegistryError]) -> str:
    """Tell clients what they did; what the disk or the database said is for the log."""
    return "" if meaning.status >= 500 else str(error)


def _report(request: web.Request, error: Exception, known: RegistryError, request_id: str) -> None:
    details = {"method": request.method, "path": request.path, "request_id": request_id}
    if isinstance(known, InternalError):
        log.error("internal error", exc_info=error, **details)
    else:
        log.error("request failed", error=str(error), **details)
