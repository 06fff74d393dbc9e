"""Answers that are given again.

A fleet asks for the same few manifests, each client in the same words. As long as nothing was written, the same bytes
asked get the same bytes answered, whatever stands in them: path, Accept, token, conditions. So the whole head of a
request is the key, and an answer found under it needs no parsing, no routing and no look-up; only its date and its
request id are new. A handler says which of its answers depend on nothing but the head and the epoch of `cache.py`. Who
may ask depends on the head and the epoch too, which every change of anybody's rights ends; and on the clock, so an
answer is given no longer than the token lasts by which it was asked for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache
from typing import Final, NamedTuple

from aiohttp import hdrs, web

from registry.access.clients import Clients
from registry.access.limits import Rate, network_of
from registry.access.rights import OPEN
from registry.cache import ENTRY_SIZE, Cache
from registry.logs import Access
from registry.record import Recorder, logged_path
from registry.responses import COUNTED, REPEATABLE, ROUTE, WHO

#: A head that is understood by us as by any parser, and that no body follows. [RFC 9112, 2 to 6]
_PLAIN: Final = re.compile(
    rb"(?:GET|HEAD) [!-~]+ HTTP/1\.1\r\n(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)+\r\n"
)
_BEGINNINGS: Final = (b"GET /", b"HEAD /")
#: Passwords, and what is as good as one, are not kept in memory, as long as it can be helped.
_UNPLAIN: Final = re.compile(
    rb"\r\n(?:content-length:|transfer-encoding:|upgrade:|expect:|x-request-id:"
    rb"|authorization:[ \t]*(?:basic|bearer[ \t]+hythe_))",
    re.IGNORECASE,
)
#: Larger bodies are not worth their memory: what counts for them is the way through the socket.
_BODY_LIMIT: Final = 16 << 10
#: How many heads that were asked once are told from those that were not.
_MARKS_LIMIT: Final = 4096
_FAILURE: Final = 400
#: What is new in each answer.
_OWN: Final = frozenset(["date", "x-request-id"])


class Answer(NamedTuple):
    """An answer as it goes out, but for its own lines, and what the log says of it.

    `address` is that of the client, `peer` the one that its connection came from; `client` is whom limits count it for.
    `until` is when who asked must say anew who he is, in seconds since the epoch.
    """

    start: bytes
    end: bytes
    method: str
    path: str
    route: str
    status: int
    size: int
    agent: str
    user: str
    address: str
    peer: str
    client: str
    until: float


def is_plain(data: bytes) -> bool:
    """Return whether `data` is the head of one request without a body, all of it and nothing else."""
    return _PLAIN.fullmatch(data) is not None and _UNPLAIN.search(data) is None


class Answers:
    """What was answered lately."""

    def __init__(
        self, cache: Cache, recorder: Recorder, rate: Rate | None = None, clients: Clients | None = None
    ) -> None:
        """Remember in `cache`; let `recorder` count and log what is given again.

        `clients` tells whom an answer is for, `rate` whether he asks too often; without them it is for all.
        """
        self._cache = cache
        self._recorder = recorder
        self._rate = rate
        self._clients = clients
        self._marks: set[int] = set()
        self._is_ended = False
        self.epoch: Callable[[], int] = cache.epoch

    def end(self) -> None:
        """Give nothing again from now on: connections shall end with their next answers."""
        self._is_ended = True

    def find(self, head: bytes, peer: str) -> Answer | None:
        """Return what these bytes, coming from an address, are answered now, as far as it is known."""
        if self._is_ended or not head.startswith(_BEGINNINGS):
            return None
        found = self._cache.get(head)
        if not isinstance(found, Answer) or found.until <= time.time():
            return None
        is_forwarded = found.address != found.peer
        if is_forwarded and found.peer != peer:
            # Its head says where it comes from: another proxy must be believed anew.
            return None
        client = found.client or network_of(found.address if is_forwarded else peer)
        if self._rate and self._rate.is_on and self._rate.take(client):
            return None
        return found

    def give(self, answer: Answer, remote: str) -> bytes:
        """Return the bytes to send to `remote`, and count and log them."""
        began = time.perf_counter()
        request_id = self._recorder.next_id()
        own = f"Date: {_date(int(time.time()))}\r\nX-Request-Id: {request_id}\r\n\r\n".encode()
        data = b"".join((answer.start, own, answer.end))
        self._recorder.record(
            answer.route,
            Access(
                at=time.time(),
                method=answer.method,
                path=answer.path,
                status=answer.status,
                bytes_in=0,
                bytes_out=answer.size,
                duration=time.perf_counter() - began,
                remote=answer.address if answer.address != answer.peer else remote,
                request_id=request_id,
                agent=answer.agent,
                user=answer.user,
            ),
        )
        return data

    def remember(self, head: bytes, epoch: int, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Keep what was answered to `head`, which came in `epoch`, if its handler said that it can be repeated."""
        if (
            REPEATABLE not in request
            or COUNTED in request
            or not isinstance(response, web.Response)
            or not response.keep_alive
        ):
            return
        if response.status >= _FAILURE:
            # Something went wrong after the handler had said so.
            return
        is_head = request.method == hdrs.METH_HEAD
        body = b"" if is_head else response.body or b""
        if not isinstance(body, bytes) or len(body) > _BODY_LIMIT:
            return
        if not self._is_asked_again(head):
            return
        lines = [f"{name}: {value}\r\n" for name, value in response.headers.items() if name.lower() not in _OWN]
        start = f"HTTP/1.1 {response.status} {response.reason}\r\n{''.join(lines)}".encode()
        who = request.get(WHO, OPEN)
        peer = request.remote or ""
        answer = Answer(
            start,
            body,
            request.method,
            logged_path(request),
            request[ROUTE],
            response.status,
            len(body),
            request.headers.get(hdrs.USER_AGENT, ""),
            who.name,
            self._clients.address(request) if self._clients else peer,
            peer,
            f"account {who.account}" if who.account else "",
            who.until,
        )
        size = len(head) + len(start) + len(body) + len(answer.path) + len(answer.agent)
        self._cache.put(head, answer, epoch, ENTRY_SIZE + size)

    def _is_asked_again(self, head: bytes) -> bool:
        """Tell what is asked twice from what is asked once, which would only push out the rest."""
        mark = hash(head)
        if mark in self._marks:
            return True
        if len(self._marks) >= _MARKS_LIMIT:
            self._marks.clear()
        self._marks.add(mark)
        return False


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    """Return a `Date`, made once a second. [RFC 9110, 5.6.7]"""
    return formatdate(second, usegmt=True)
