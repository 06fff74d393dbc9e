"""Tokens for requests: signed by a key that is made here, used for some weeks, and honoured a while longer.

[RFC 7519] with ES256 and nothing else: what another algorithm or another key signed is no token.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

from registry.config import AccountSettings
from registry.errors import MetadataError
from registry.metadata import keys
from registry.metadata.engine import Database
from registry.metadata.keys import Key

_ALGORITHM: Final = "ES256"
_SECOND: Final = 1_000_000
#: An upload that a token began may be finished after its end, for at most so long. Seconds.
GRACE: Final = 86400
#: Clocks of replicas may differ by so much. Seconds.
_LEEWAY: Final = 30
#: Seconds between two looks for a key that is not known.
_PATIENCE: Final = 1.0
_CLAIMS: Final = ("iss", "sub", "aud", "exp", "nbf", "iat", "jti")


class InvalidToken(Exception):
    """It was not signed here, not for here, or it says something that cannot be read."""


class Signer:
    """Signs tokens, and tells those that were signed by any process of this registry."""

    def __init__(self, database: Database, settings: AccountSettings) -> None:
        """Keep keys in `database`."""
        self._database = database
        self._service = settings.service
        self._age = settings.key_days * 86400 * _SECOND
        self._kept = (settings.token_seconds + GRACE + _LEEWAY) * _SECOND
        self._public: dict[str, Any] = {}
        self._newest: tuple[str, Any, int] | None = None
        self._looking = asyncio.Lock()
        self._looked_at = -_PATIENCE

    async def sign(self, subject: str, seconds: int, claims: Mapping[str, Any]) -> str:
        """Return a token for `subject` that is good for so many seconds."""
        import jwt

        key_id, private, _ = await self._current()
        at = time.time()
        standard = {
            "iss": self._service,
            "aud": self._service,
            "sub": subject,
            "iat": int(at),
            "nbf": int(at),
            "exp": int(at) + seconds,
            "jti": uuid.uuid4().hex,
        }
        return jwt.encode({**claims, **standard}, private, _ALGORITHM, {"kid": key_id})

    async def read(self, token: str) -> dict[str, Any]:
        """Return the claims of a token that was signed here; its end is not looked at. Raises `InvalidToken`."""
        import jwt

        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") != _ALGORITHM:
                raise InvalidToken(f"it is signed by {str(header.get('alg'))[:20]!r}")
            public = await self._find(str(header.get("kid")))
            claims: dict[str, Any] = jwt.decode(
                token,
                public,
                algorithms=[_ALGORITHM],
                audience=self._service,
                issuer=self._service,
                leeway=_LEEWAY,
                options={"require": list(_CLAIMS), "verify_exp": False},
            )
        except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError) as error:
            raise InvalidToken(str(error)) from None
        return claims

    async def _find(self, key_id: str) -> Any:
        """Return the public half of a key; another process may have made it a moment ago."""
        if key_id not in self._public:
            # Whoever else has a token of it waits for the same look.
            async with self._looking:
                now = time.monotonic()
                if key_id not in self._public and now - self._looked_at >= _PATIENCE:
                    self._looked_at = now
                    self._learn(await self._database.read(keys.everything))
        if key_id not in self._public:
            raise InvalidToken("it was signed by a key that is not known here")
        return self._public[key_id]

    async def _current(self) -> tuple[str, Any, int]:
        """Return the key to sign by: a new one where the last is too old."""
        if self._newest is None or self._newest[2] <= time.time_ns() // 1000 - self._age:
            try:
                self._learn(await self._database.write(keys.renew, uuid.uuid4().hex, _make(), self._age, self._kept))
            except MetadataError:
                # On a full disk an older key does as well.
                self._learn(await self._database.read(keys.everything))
                if self._newest is None:
                    raise
        assert self._newest is not None
        return self._newest

    def _learn(self, found: list[Key]) -> None:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        private = {key.id: load_pem_private_key(key.private.encode(), None) for key in found}
        self._public = {key_id: key.public_key() for key_id, key in private.items()}
        self._newest = (found[0].id, private[found[0].id], found[0].created_at) if found else None


def _make() -> str:
    """Return a new private key as PEM."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
