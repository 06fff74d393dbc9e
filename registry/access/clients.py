"""Where requests come from, and under which address clients know us: as a proxy says, if it is trusted."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from aiohttp import web

from registry import locations
from registry.config import ServerSettings

#: A host as it may stand in a URL, perhaps with its port.
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9a-fA-F:.]+\](:[0-9]{1,5})?")


class Clients:
    """Tells clients' addresses."""

    def __init__(self, settings: ServerSettings) -> None:
        """Believe the proxies that `settings` name; whoever connects, where a proxy is there and none is named."""
        self._believes_all = settings.behind_proxy and not settings.trusted_proxies
        self._trusted = [ipaddress.ip_network(network, strict=False) for network in settings.trusted_proxies]
        self._public_url = settings.public_url.rstrip("/")

    def address(self, request: web.BaseRequest) -> str:
        """Return the address of the client: what the last trusted proxy says, else the other end of the connection."""
        address = request.remote or ""
        if not self._believes(address):
            return address
        # The proxies that are trusted have each put the one before them at the end.
        named = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
        for text in reversed([each.strip() for each in named if each.strip()]):
            if not _is_address(text):
                break
            address = text
            if self._believes_all or not self._believes(text):
                break
        return address

    def origin(self, request: web.BaseRequest) -> str:
        """Return `SCHEME://HOST[/PREFIX]`, as the client knows us."""
        if self._public_url:
            return self._public_url
        scheme, host = request.scheme, request.host
        if self._believes(request.remote or ""):
            scheme = _last(request, "X-Forwarded-Proto") or scheme
            host = _last(request, "X-Forwarded-Host") or host
        if scheme not in ("http", "https") or not _HOST.fullmatch(host):
            scheme, host = "http", "localhost"
        return f"{scheme}://{host}{locations.prefix(request)}"

    def _believes(self, address: str) -> bool:
        if self._believes_all or not self._trusted:
            return self._believes_all
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        return any(parsed in network for network in self._trusted)


def _is_address(text: str) -> bool:
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return False
    # A zone means nothing on another host, and can be any text.
    return getattr(parsed, "scope_id", None) is None


def _last(request: web.BaseRequest, header: str) -> str:
    """Return what the last proxy says, be it in a header of its own or at the end of one that came to it."""
    return ",".join(request.headers.getall(header, [])).rpartition(",")[2].strip()
