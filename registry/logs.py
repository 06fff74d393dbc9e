"""What the server says: events by structlog, and one line for each request, gathered and written in batches.

People read text on a terminal, programs read JSON in a pipe. A line a request through a general logger would cost
as much as the request itself; here it is a few microseconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from functools import lru_cache
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final

import msgspec
import structlog
from aiohttp.http_exceptions import HttpProcessingError

from registry.config import LogSettings

_BATCH: Final = 128
#: Batches that may wait to be written.
_QUEUE_LIMIT: Final = 256


class Access(msgspec.Struct):
    """One request, as it is logged. Times in seconds, sizes in bytes."""

    at: float
    method: str
    path: str
    status: int
    bytes_in: int
    bytes_out: int
    duration: float
    remote: str
    request_id: str
    agent: str
    user: str = ""


class _Line(msgspec.Struct):
    """The same as JSON has it."""

    at: str
    level: str
    event: str
    method: str
    path: str
    status: int
    bytes_in: int
    bytes_out: int
    ms: float
    remote: str
    agent: str
    user: str
    request_id: str


class Lines:
    """Writes requests and the audit to standard error; formats them here, lets a thread wait for the pipe."""

    def __init__(self, *, as_json: bool) -> None:
        self._format = _json if as_json else _text
        self._format_event = _event_json if as_json else _event_text
        self._lines: list[bytes] = []
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread = Thread(target=self._write, name="log-lines", daemon=True)
        self._thread.start()

    def add(self, entry: Access) -> None:
        """Take in a request; it is written with the next ones, or by `flush`."""
        self._append(self._format(entry))

    def add_event(self, level: str, event: str, fields: Mapping[str, str]) -> None:
        """Take in an event with what is to be known of it, likewise."""
        self._append(self._format_event(level, event, fields))

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        if len(self._lines) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Hand over what was gathered."""
        if self._lines:
            # Where nobody reads, lines are lost, and not kept until memory is full.
            if self._queue.qsize() < _QUEUE_LIMIT:
                self._queue.put(b"".join(self._lines))
            self._lines.clear()

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._queue.put(None)
        self._thread.join(timeout=2)

    def _write(self) -> None:
        while (block := self._queue.get()) is not None:
            # Full disk or broken pipe: these lines are lost, and the next ones may get through.
            with contextlib.suppress(OSError, ValueError):
                _write_all(sys.stderr.fileno(), block)


def _write_all(descriptor: int, block: bytes) -> None:
    while block:
        block = block[os.write(descriptor, block) :]


def _json(entry: Access) -> bytes:
    line = _Line(
        _timestamp(entry.at),
        "info",
        "request",
        entry.method,
        printable(entry.path),
        entry.status,
        entry.bytes_in,
        entry.bytes_out,
        round(entry.duration * 1000, 2),
        entry.remote,
        printable(entry.agent),
        printable(entry.user),
        entry.request_id,
    )
    return _encoder.encode(line) + b"\n"


def _text(entry: Access) -> bytes:
    clock = time.strftime("%H:%M:%S", time.localtime(entry.at))
    path = printable(entry.path)
    size = entry.bytes_in or entry.bytes_out
    who = f"  {printable(entry.user)}" if entry.user else ""
    spent = f"{entry.duration * 1000:.1f} ms"
    return f"{clock} {entry.status} {entry.method:<6} {path}  {size} B  {spent}{who}\n".encode()


def _event_json(level: str, event: str, fields: Mapping[str, str]) -> bytes:
    shown = {name: printable(value) for name, value in fields.items()}
    return _encoder.encode({"at": _timestamp(time.time()), "level": level, "event": event, **shown}) + b"\n"


def _event_text(level: str, event: str, fields: Mapping[str, str]) -> bytes:
    clock = time.strftime("%H:%M:%S")
    shown = "  ".join(f"{name}={printable(value)}" for name, value in fields.items())
    return f"{clock} {level} {event}  {shown}\n".encode()


def printable(text: str) -> str:
    """Return `text` such that it cannot end a line or steer a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _make_printable(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: printable(value) if isinstance(value, str) else value for name, value in event.items()}


class _Forward(logging.Handler):
    """Takes what libraries log into our log: as one line, and what is only a broken client's doing as debug."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        log = structlog.get_logger()
        if isinstance(error, HttpProcessingError | ConnectionError):
            log.debug(record.getMessage(), logger=record.name, error=repr(error))
        else:
            log.log(record.levelno, record.getMessage(), logger=record.name, exc_info=error)


_encoder: Final = msgspec.json.Encoder()


def _timestamp(at: float) -> str:
    second = int(at)
    return f"{_second(second)}.{int((at - second) * 1000):03}Z"


@lru_cache(maxsize=2)
def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def is_json(settings: LogSettings) -> bool:
    """Return whether to log JSON."""
    return settings.format == "json" or (settings.format == "auto" and not sys.stderr.isatty())


def configure(settings: LogSettings) -> None:
    """Set up the events' log for this process; it goes to standard error."""
    # Tracebacks without the values of variables: a secret may be among them.
    rendering: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if is_json(settings)
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            _make_printable,
            *rendering,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.ERROR, handlers=[_Forward()], force=True)
