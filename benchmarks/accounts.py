"""What accounts and TLS cost: small requests by every kind of credential, large blobs over TLS, start and memory."""

from __future__ import annotations

import base64
import http.client
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks import content, load, programs
from benchmarks.measures import SETTLING, Level, Result, Sample, Sizes, push_image, timed
from benchmarks.secure import Certificate, SecureBlob
from benchmarks.servers import HYTHE, BenchmarkError, Kind, Server

OPEN: Final = "no accounts"
KEPT: Final = "a token, kept"

_MANIFESTS: Final = "accounts, manifest by tag"
_ACCOUNT: Final = "ci"
_PASSWORD: Final = "correct horse"
_REPOSITORY: Final = "bench/library"
_PUBLIC: Final = "public/library"
_TOKEN_PATH: Final = f"/v2/token?service=hythe&scope=repository:{_REPOSITORY}:pull"
_BASIC: Final = f"Authorization: Basic {base64.b64encode(f'{_ACCOUNT}:{_PASSWORD}'.encode()).decode()}"
_CLIENTS: Final = 32

_WITHOUT: Final = replace(HYTHE, name="hythe, no accounts")
_GUARDED: Final = replace(HYTHE, name="hythe, accounts")


class Accounts:
    """Hythe without accounts, and with them; then the servers of a large blob over TLS."""

    name = "accounts"
    is_large = True

    def __init__(self, sizes: Sizes, directory: Path) -> None:
        self._sizes = sizes
        self._image = content.small_image()
        certificate = Certificate.new(directory / "certificate")
        self._secure_blob = SecureBlob(sizes, directory, certificate)
        self._secure = replace(certificate.hythe(), name="hythe, accounts and TLS")
        self.kinds = (_WITHOUT, _GUARDED, *self._secure_blob.kinds)

    def measure(self, kind: Kind, directory: Path) -> Iterator[Result]:
        """Measure one server once."""
        if kind is _WITHOUT:
            yield from self._without(directory)
        elif kind is _GUARDED:
            yield from self._guarded(directory)
        else:
            yield from self._secure_blob.measure(kind, directory)

    def _without(self, directory: Path) -> Iterator[Result]:
        with _WITHOUT.running(directory) as server:
            push_image(server, _REPOSITORY, self._image)
        with _WITHOUT.started(directory) as server:
            yield from _start_and_memory(server)
            yield self._pulled(server, OPEN, _REPOSITORY)

    def _guarded(self, directory: Path) -> Iterator[Result]:
        with _WITHOUT.running(directory) as server:
            push_image(server, _REPOSITORY, self._image)
            push_image(server, _PUBLIC, self._image)
        _make_accounts(directory / "data")
        with _GUARDED.started(directory) as server:
            bearer = f"Authorization: Bearer {_tokens(server, 1)[0]}"
            yield self._pulled(server, KEPT, _REPOSITORY, bearer)
            yield self._pulled(server, "Basic", _REPOSITORY, _BASIC)
            yield self._pulled_by_new_tokens(server)
            yield self._pulled(server, "nobody, what is public", _PUBLIC)
            yield timed("accounts, a new token", replace(server, name="Basic"), lambda: self._tokens_made(server))
        with self._secure.started(directory) as server:
            yield from _start_and_memory(server)
            _tokens(server, 1)
            yield Level("accounts, memory after the first token", server.name, server.resident())

    def _tokens_made(self, server: Server) -> float:
        return programs.wrk(server, _TOKEN_PATH, self._sizes.wrk_seconds, _BASIC)

    def _pulled(self, server: Server, by: str, repository: str, *headers: str) -> Sample:
        path = f"/v2/{repository}/manifests/latest"

        def pull(seconds: int) -> float:
            return programs.wrk(server, path, seconds, content.ACCEPT, *headers)

        pull(1)
        return timed(_MANIFESTS, replace(server, name=by), lambda: pull(self._sizes.wrk_seconds))

    def _pulled_by_new_tokens(self, server: Server) -> Sample:
        """Pull with tokens that were made beforehand, each of which is used once."""
        path = f"/v2/{_REPOSITORY}/manifests/latest"
        tokens = _tokens(server, self._sizes.tokens)
        requests = [load.request("GET", path, content.ACCEPT, f"Authorization: Bearer {token}") for token in tokens]

        def pull() -> float:
            load.ask_all(server, requests, _CLIENTS)
            return len(requests)

        return timed(_MANIFESTS, replace(server, name="a token, used once"), pull)


def _start_and_memory(server: Server) -> Iterator[Level]:
    yield Level("accounts, start", server.name, server.start_seconds)
    time.sleep(SETTLING)
    yield Level("accounts, memory, idle", server.name, server.resident())


def _make_accounts(data: Path) -> None:
    """Make an administrator, and an account that may pull what is not public."""

    def hythe(*arguments: str, words: str = "") -> None:
        programs.run(sys.executable, "-m", "hythe", *arguments, "--data", str(data), words=words)

    hythe("user", "add", "--admin", "root", "--password-stdin", words=_PASSWORD)
    hythe("user", "add", _ACCOUNT, "--password-stdin", words=_PASSWORD)
    hythe("grant", "pull", "bench", _ACCOUNT)
    hythe("grant", "pull", "public", "everybody")


def _tokens(server: Server, number: int) -> list[str]:
    """Get tokens for requests, as a client does."""
    host, port = server.address
    if server.trust is None:
        connection = http.client.HTTPConnection(host, port)
    else:
        connection = http.client.HTTPSConnection(host, port, context=server.trust)
    name, _, value = _BASIC.partition(": ")
    tokens = []
    for _ in range(number):
        connection.request("GET", _TOKEN_PATH, headers={name: value})
        response = connection.getresponse()
        if response.status != 200:
            raise BenchmarkError(f"no token, but {response.status}: {response.read().decode(errors='replace')}")
        tokens.append(json.loads(response.read())["token"])
    connection.close()
    return tokens
