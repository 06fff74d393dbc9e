"""An issuer of tokens, as a CI system is one: it says who it is, by which keys it signs, and signs for its jobs."""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import jwt
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.services.certificates import Pair

DESCRIPTION, KEYS = "/.well-known/openid-configuration", "/keys"
AUDIENCE = "hythe"

Answer = Callable[[], web.Response]


class Issuer:
    """Signs by its newest key; what it answers can be changed to what no good issuer says."""

    def __init__(self) -> None:
        self.url = ""
        self.keys: dict[str, Any] = {}
        #: Paths that it was asked for, in turn.
        self.asked: list[str] = []
        #: What it answers at a path instead of the truth.
        self.instead: dict[str, Answer] = {}
        #: Keys that it shows beside those that it signs by.
        self.others: list[dict[str, Any]] = []

    def new_key(self, algorithm: str = "ES256") -> str:
        """Sign by a new key from now on; return its id."""
        key_id = secrets.token_hex(8)
        self.keys[key_id] = make_key(algorithm)
        return key_id

    def token(self, **claims: Any) -> str:
        """Return the token of a job on a protected branch; `claims` change what it says, None takes one away."""
        key_id, key = next(reversed(self.keys.items()))
        return jwt.encode(self.claims(**claims), key, algorithm_of(key), {"kid": key_id})

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Return what a token says."""
        at = int(time.time())
        usual = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "project_path:work/app:ref_type:branch:ref:main",
            "iat": at,
            "nbf": at,
            "exp": at + 7200,
            "project_path": "work/app",
            "ref_protected": "true",
        }
        return {name: value for name, value in {**usual, **changes}.items() if value is not None}

    def shown_keys(self) -> list[dict[str, Any]]:
        """Return the public halves of its keys. [RFC 7517]"""
        return [*self.others, *(public_half(key) | {"kid": key_id, "use": "sig"} for key_id, key in self.keys.items())]

    async def answer(self, request: web.Request) -> web.Response:
        """Answer a request."""
        self.asked.append(request.path)
        if request.path in self.instead:
            return self.instead[request.path]()
        if request.path == DESCRIPTION:
            return web.json_response({"issuer": self.url, "jwks_uri": self.url + KEYS})
        return web.json_response({"keys": self.shown_keys()})


def make_key(algorithm: str) -> Any:
    """Return a new private key for an algorithm."""
    if algorithm == "RS256":
        return rsa.generate_private_key(65537, 2048)
    return ed25519.Ed25519PrivateKey.generate() if algorithm == "EdDSA" else ec.generate_private_key(ec.SECP256R1())


def algorithm_of(key: Any) -> str:
    """Return the algorithm that a key signs by."""
    if isinstance(key, rsa.RSAPrivateKey):
        return "RS256"
    return "EdDSA" if isinstance(key, ed25519.Ed25519PrivateKey) else "ES256"


def public_half(key: Any) -> dict[str, Any]:
    """Return the public half of a private key as JSON has it."""
    algorithm: Any = jwt.get_algorithm_by_name(algorithm_of(key))
    found: dict[str, Any] = json.loads(algorithm.to_jwk(key.public_key()))
    return found


@asynccontextmanager
async def issuer(tls: Pair | None = None) -> AsyncIterator[Issuer]:
    """Run an issuer on loopback while the block lasts, over TLS where it has a certificate."""
    made = Issuer()
    made.new_key()
    app = web.Application()
    app.router.add_get("/{path:.*}", made.answer)
    server = TestServer(app, host="127.0.0.1")
    await server.start_server(ssl=tls and tls.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    made.url = str(server.make_url("")).rstrip("/")
    try:
        yield made
    finally:
        await server.close()
