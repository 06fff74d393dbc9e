"""Asks a registry's `/api/v1/`."""

from __future__ import annotations

import base64
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

_PATIENCE: Final = 30.0


class ServerError(Exception):
    """The registry said no, or nothing; the message is for a person."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the API leads nowhere else, and credentials would go along."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_opener: Final = urllib.request.build_opener(_NoRedirects)


def ask(server: str, method: str, endpoint: str, /, **parameters: str | Sequence[str]) -> Any:
    """Return the JSON answer to a request.

    Args:
        server: `http://HOST:PORT`, the scheme may be left out.
        method: of HTTP.
        endpoint: below `/api/v1/`.
        parameters: for the query, once for each of several; empty ones are left out.

    Raises:
        ServerError: no answer, or an error.
    """
    query = urlencode({name: value for name, value in parameters.items() if value}, doseq=True)
    url = f"{_base(server)}/api/v1/{endpoint}" + (f"?{query}" if query else "")
    request = urllib.request.Request(url, method=method, headers=_credentials())  # noqa: S310 - the scheme was checked
    try:
        with _opener.open(request, timeout=_PATIENCE) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise ServerError(_message(error)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        # What answered may be anything, and say anything.
        reason = printable(str(getattr(error, "reason", error)).strip())
        raise ServerError(
            f"no registry answers at {server}: {reason} (start one with: hythe serve; name another with --server, "
            "as https://… where it speaks TLS)"
        ) from None


def pages(server: str, endpoint: str, field: str, /, **parameters: str) -> Iterator[Any]:
    """Yield the entries of a listing, page after page."""
    last = ""
    while True:
        page = ask(server, "GET", endpoint, last=last, **parameters)
        yield from page[field]
        last = page["next"]
        if not last:
            return


def printable(text: str) -> str:
    """Return text that came from elsewhere such that it cannot end a line or steer a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _credentials() -> dict[str, str]:
    """Return who asks: HYTHE_USER, with a password or a token in HYTHE_PASSWORD. Others see command lines."""
    user, password = os.environ.get("HYTHE_USER", ""), os.environ.get("HYTHE_PASSWORD", "")
    if not user:
        return {}
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def _base(server: str) -> str:
    url = server if "://" in server else f"http://{server}"
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ServerError(f"--server must look like http://HOST:PORT, got {server!r}")
    return url.rstrip("/")


def _message(error: urllib.error.HTTPError) -> str:
    try:
        answer = json.load(error)
        return "; ".join(entry["message"] for entry in answer["errors"])
    except (ValueError, KeyError, TypeError):
        return f"the registry answered {error.code} {error.reason}"
