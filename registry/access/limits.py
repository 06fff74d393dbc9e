"""How often somebody may do something. Each process counts for itself, in memory that is bounded."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from registry.errors import TooManyRequests

#: Keys that are remembered; those that were not seen for longest go first.
_KEYS_LIMIT: Final = 20_000
#: Failures before anybody must wait, and the longest wait, in seconds: for one account, and for one address.
_ACCOUNT_FREE, _ACCOUNT_WAIT = 10, 60.0
_ADDRESS_FREE, _ADDRESS_WAIT = 20, 900.0
#: Attempts at one account, or from one address, that are looked at at once.
_AT_ONCE: Final = 4
#: Names of accounts are no longer; what is longer need not be told apart.
_NAME_LIMIT: Final = 64
#: Seconds after which failures are forgotten.
_FORGOTTEN: Final = 900.0


class Rate:
    """Allows each client so many steps a period, evenly: what was not used adds up, to one period's worth."""

    def __init__(self, amount: int, seconds: float) -> None:
        """Allow `amount` in so many seconds; 0 allows any."""
        self._amount = float(amount)
        self._pace = amount / seconds
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    @property
    def is_on(self) -> bool:
        """Whether there is a limit at all."""
        return self._amount > 0

    def take(self, client: str) -> float:
        """Take one step; return 0, or the seconds until there is one to take."""
        if not self._amount:
            return 0
        now = time.monotonic()
        left, at = self._left.pop(client, (self._amount, now))
        left = min(self._amount, left + (now - at) * self._pace)
        wait = 0.0 if left >= 1 else (1 - left) / self._pace
        self._left[client] = (left if wait else left - 1, now)
        if len(self._left) > _KEYS_LIMIT:
            self._left.popitem(last=False)
        return wait

    def demand(self, client: str, message: str) -> None:
        """Take one step, or raise `TooManyRequests`."""
        if wait := self.take(client):
            raise TooManyRequests(message, headers=retry_after(wait))


@dataclass(slots=True)
class _Failures:
    """Of one account, or from one address: how many are free, and how long one must wait after more, in seconds."""

    free: int
    longest: float
    count: int = 0
    last: float = 0.0
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    def add(self) -> None:
        """Count one more."""
        self.count += 1
        self.last = time.monotonic()

    def wait(self) -> float:
        """Return the seconds until there may be another attempt."""
        since = time.monotonic() - self.last
        if since > _FORGOTTEN:
            self.count = 0
        if self.count < self.free:
            return 0
        return min(self.longest, 2.0 ** min(self.count - self.free, 20)) - since


class LoginLimits:
    """Lets whoever fails to log in wait, longer each time.

    Attempts at one account, or from one address, take turns. So those that come at once gain nothing by it if they are
    guesses, and are not taken for guesses if they are good.
    """

    def __init__(self) -> None:
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    @asynccontextmanager
    async def attempt(self, name: str, address: str) -> AsyncIterator[Attempt]:
        """Be an attempt to log in as `name`, empty where it is not by name; raises `TooManyRequests`."""
        entries = [self._entry(f"address {network_of(address)}", _ADDRESS_FREE, _ADDRESS_WAIT)]
        entries += [self._entry(f"account {name[:_NAME_LIMIT].lower()}", _ACCOUNT_FREE, _ACCOUNT_WAIT)] if name else []
        async with AsyncExitStack() as turns:
            for entry in entries:
                await turns.enter_async_context(entry.turn)
            if (wait := max(entry.wait() for entry in entries)) > 0:
                raise TooManyRequests("too many failed logins: wait before you try again", headers=retry_after(wait))
            attempt = Attempt()
            try:
                yield attempt
            finally:
                if attempt.is_good is False:
                    for entry in entries:
                        entry.add()
                elif attempt.is_good:
                    # The account starts anew; the address does not: others come from there too.
                    for entry in entries[1:]:
                        entry.count = 0

    def _entry(self, key: str, free: int, longest: float) -> _Failures:
        entry = self._failures.pop(key, None) or _Failures(free, longest)
        self._failures[key] = entry
        if len(self._failures) > _KEYS_LIMIT:
            self._failures.popitem(last=False)
        return entry


@dataclass(slots=True)
class Attempt:
    """An attempt to log in: good, bad, or None where nobody knows, as when the database did not answer."""

    is_good: bool | None = None


def retry_after(seconds: float) -> dict[str, str]:
    """Return the header that tells when to try again. [RFC 9110, 10.2.3]"""
    return {"Retry-After": str(max(1, round(seconds + 0.5)))}


def network_of(address: str) -> str:
    """Return whom an address stands for: of IPv6, everybody has a whole network of them."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
