"""Tokens of others: a CI job proves who it is by a token of its own issuer. [OpenID Connect Discovery 1.0]

An issuer's keys are fetched where its own description says, kept, and fetched anew when it signs by one that is not
known. What may be fetched, and whose tokens stand for which account, is in the configuration alone: nothing that a
client sends leads anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import re
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec
import structlog

from registry.config import IssuerRule, IssuerSettings

_ALGORITHMS: Final = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]
_WELL_KNOWN: Final = "/.well-known/openid-configuration"
_PATIENCE: Final = 10.0
_ANSWER_LIMIT: Final = 1 << 20
#: Seconds between two fetches of the same issuer's keys, whatever is asked; and after which they are fetched anew.
_PAUSE: Final = 10.0
_AGE: Final = 3600.0
_LEEWAY: Final = 30
_TOKEN_LIMIT: Final = 16 << 10
_OK: Final = 200
#: What `fnmatch` takes for more than itself beside `*`.
_OTHER_WILDCARDS: Final = re.compile(r"[?\[]")

log = structlog.get_logger()


class _Failed(Exception):
    """A token is not good, or that cannot be known."""


@dataclass(frozen=True, slots=True)
class Vouched:
    """What a token of another issuer came to.

    Attributes:
        account: name of the account that it stands for; empty where for none.
        reason: why for none.
        credential: for the audit.
        ends_at: when it ends, in seconds since the epoch.
    """

    account: str = ""
    reason: str = ""
    credential: str = ""
    ends_at: float = 0.0


def looks_like_one(text: str) -> bool:
    """Return whether `text` looks like a signed token. [RFC 7519, 3.1]"""
    return text.startswith("eyJ") and text.count(".") == 2


class Issuers:
    """The issuers of the configuration."""

    def __init__(self, settings: tuple[IssuerSettings, ...]) -> None:
        """Believe the issuers that `settings` name."""
        self._issuers = {each.issuer: _Issuer(each) for each in settings}

    async def read(self, token: str) -> Vouched:
        """Return the account that a token stands for, or why for none."""
        import jwt

        if len(token) > _TOKEN_LIMIT:
            return Vouched(reason="it is too long")
        try:
            unverified = jwt.decode(token, options={"verify_signature": False})
            issuer = self._issuers.get(str(unverified.get("iss")))
            if issuer is None:
                return Vouched(reason="its issuer is not in the configuration")
            return await issuer.read(token)
        except (jwt.PyJWTError, _Failed, ValueError, TypeError, RecursionError) as error:
            return Vouched(reason=str(error))


class _Issuer:
    def __init__(self, settings: IssuerSettings) -> None:
        self._settings = settings
        self._keys: dict[str, Any] = {}
        self._fetched_at = -_AGE
        self._trouble = ""
        self._fetching = asyncio.Lock()

    async def read(self, token: str) -> Vouched:
        import jwt

        header = jwt.get_unverified_header(token)
        if header.get("alg") not in _ALGORITHMS:
            raise _Failed(f"it is signed by {str(header.get('alg'))[:20]!r}")
        key = await self._key(str(header.get("kid", "")))
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[header["alg"]],
            audience=self._settings.audience,
            issuer=self._settings.issuer,
            leeway=_LEEWAY,
            options={"require": ["exp", "iat", "sub"]},
        )
        ends_at = float(claims["exp"])
        if ends_at <= time.time():
            # Clocks may differ where it begins; what is given for it could not be used any more.
            raise _Failed("it has ended")
        credential = f"token of {self._settings.issuer} for {claims['sub']}"[:256]
        for rule in self._settings.rules:
            if _matches(rule, claims):
                return Vouched(rule.account, credential=credential, ends_at=ends_at)
        return Vouched(reason="no rule of the configuration matches its claims", credential=credential)

    async def _key(self, key_id: str) -> Any:
        async with self._fetching:
            age = time.monotonic() - self._fetched_at
            if age >= _AGE or (key_id not in self._keys and age >= _PAUSE):
                self._trouble = await self._fetch()
        if key_id not in self._keys:
            raise _Failed(self._trouble or "its issuer has no such key")
        return self._keys[key_id].key

    async def _fetch(self) -> str:
        """Fetch the keys anew; return what went wrong: then those that are known go on being good."""
        self._fetched_at = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=_PATIENCE)
        try:
            trust = ssl.create_default_context(cafile=self._settings.ca_file or None)
            async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=trust)) as session:
                described = await _get(session, self._settings.issuer.rstrip("/") + _WELL_KNOWN)
                if described.get("issuer") != self._settings.issuer:
                    return "its issuer describes itself as another one"
                place = str(described.get("jwks_uri"))
                if not place.startswith("https://") and self._settings.issuer.startswith("https://"):
                    return "its keys lie where anybody on the way could change them"
                found = await _get(session, place)
            self._keys = dict(_usable(found.get("keys", [])))
        except (aiohttp.ClientError, OSError, ValueError, TypeError) as error:
            log.error("the keys of an issuer cannot be had", issuer=self._settings.issuer, error=repr(error))
            return "the keys of its issuer cannot be had"
        return ""


async def _get(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    body = bytearray()
    async with session.get(url, allow_redirects=False) as response:
        if response.status != _OK:
            raise ValueError(f"{url} is answered {response.status}")
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > _ANSWER_LIMIT:
                raise ValueError(f"the answer of {url} is too large")
    return msgspec.json.decode(body, type=dict[str, Any])


def _usable(keys: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys that signatures can be checked by, with their ids; others do not spoil them. [RFC 7517, 5]"""
    import jwt

    for key in keys:
        if isinstance(key, dict) and key.get("use", "sig") == "sig" and key.get("kty") != "oct":
            with contextlib.suppress(jwt.PyJWTError):
                yield str(key.get("kid", "")), jwt.PyJWK(key)


def _matches(rule: IssuerRule, claims: Mapping[str, Any]) -> bool:
    """Return whether every claim that the rule names is as it says; `*` stands for any text."""
    return all(
        name in claims and fnmatch.fnmatchcase(_text(claims[name]), _OTHER_WILDCARDS.sub(r"[\g<0>]", pattern))
        for name, pattern in rule.claims.items()
    )


def _text(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
