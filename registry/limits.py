"""How often somebody may do something. Each process counts for itself, in memory that is bounded."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from registry.errors import TooManyRequests

#: Keys that are remembered; those that were not seen for longest go first.
_KEYS_LIMIT: Final = 20_000
#: Failures before anybody must wait, and the longest wait, in seconds: for one account, and for one address.
_ACCOUNT_FREE, _ACCOUNT_WAIT = 10, 60.0
_ADDRESS_FREE, _ADDRESS_WAIT = 20, 900.0
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
    count: int = 0
    last: float = 0.0


class LoginLimits:
    """Lets whoever fails to log in wait, longer each time.

    An attempt counts as failed until it is known that it is not: many at once gain nothing.
    """

    def __init__(self) -> None:
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    @contextmanager
    def attempt(self, name: str, address: str) -> Iterator[Attempt]:
        """Be an attempt to log in as `name`, empty where it is not by name; raises `TooManyRequests`."""
        kept = [(f"address {network_of(address)}", _ADDRESS_FREE, _ADDRESS_WAIT)]
        kept += [(f"account {name.lower()}", _ACCOUNT_FREE, _ACCOUNT_WAIT)] if name else []
        now = time.monotonic()
        wait = max(self._wait(key, free, longest, now) for key, free, longest in kept)
        if wait > 0:
            raise TooManyRequests("too many failed logins: wait before you try again", headers=retry_after(wait))
        entries = [self._count(key, now) for key, _, _ in kept]
        attempt = Attempt()
        try:
            yield attempt
        finally:
            if attempt.is_good:
                # The account starts anew; of an address, only this attempt is forgiven: others come from there too.
                entries[0].count -= 1
                for entry in entries[1:]:
                    entry.count = 0

    def _wait(self, key: str, free: int, longest: float, now: float) -> float:
        entry = self._failures.get(key)
        if entry is None or entry.count < free:
            return 0
        pause = min(longest, 2.0 ** min(entry.count - free, 20))
        return entry.last + pause - now

    def _count(self, key: str, now: float) -> _Failures:
        entry = self._failures.pop(key, None)
        if entry is None or now - entry.last > _FORGOTTEN:
            entry = _Failures()
        entry.count += 1
        entry.last = now
        self._failures[key] = entry
        if len(self._failures) > _KEYS_LIMIT:
            self._failures.popitem(last=False)
        return entry


@dataclass(slots=True)
class Attempt:
    """An attempt to log in; good only where it is said so."""

    is_good: bool = False


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
