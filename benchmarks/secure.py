"""A large blob in and out over TLS: one certificate for all servers, and one client that offers them the same."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Self

from benchmarks import content, load
from benchmarks.measures import Result, Sizes, timed, write_alone
from benchmarks.servers import DOCKER_REGISTRY, HYTHE, NGINX, Kind, Server, nginx_command, place
from tests.services.certificates import Authority, Pair

_REPOSITORY: Final = "bench/secure"
_PULLS: Final = 3
_CLIENTS: Final = 4


@dataclass(frozen=True)
class Certificate:
    """A certificate for loopback with its key, and the context of clients that trust it."""

    pair: Pair
    trust: ssl.SSLContext

    @classmethod
    def new(cls, directory: Path) -> Self:
        """Make one in a directory, which is made."""
        authority = Authority(directory)
        trust = ssl.create_default_context(cafile=str(authority.certificate))
        trust.minimum_version = ssl.TLSVersion.TLSv1_3
        return cls(authority.sign(directory), trust)

    def hythe(self) -> Kind:
        """Return Hythe with it."""
        return replace(HYTHE, environment=self._environment("HYTHE_TLS__"), trust=self.trust)

    def docker_registry(self) -> Kind:
        """Return docker-registry with it."""
        return replace(DOCKER_REGISTRY, environment=self._environment("REGISTRY_HTTP_TLS_"), trust=self.trust)

    def nginx(self) -> Kind:
        """Return nginx with it."""
        files = f"ssl_certificate {self.pair.certificate}; ssl_certificate_key {self.pair.key}"
        listen = f" ssl; ssl_protocols TLSv1.2 TLSv1.3; {files}"
        return replace(NGINX, command=partial(nginx_command, listen=listen), trust=self.trust)

    def _environment(self, prefix: str) -> dict[str, str]:
        return {f"{prefix}CERTIFICATE": str(self.pair.certificate), f"{prefix}KEY": str(self.pair.key)}


class SecureBlob:
    """A large blob pushed by one client, and pulled by one and by several."""

    def __init__(self, sizes: Sizes, directory: Path, certificate: Certificate) -> None:
        self._blob = content.large_blob(sizes.blob, directory / "secure-blob")
        #: Each table begins with what the others are compared to.
        self.kinds = (certificate.nginx(), certificate.docker_registry(), certificate.hythe())

    def measure(self, kind: Kind, directory: Path) -> Iterator[Result]:
        """Measure one server once."""
        path = f"/v2/{_REPOSITORY}/blobs/{self._blob.digest}"
        with kind.running(directory) as server:
            client = load.Client(server)
            if kind.takes_pushes:
                # As without TLS: free memory that is there, and a disk at rest.
                write_alone(self._blob, directory / "written")
                os.sync()
                yield timed("accounts, blob push over TLS", server, lambda: self._push(client))
            else:
                place(directory, path, self._blob.file)
            os.sync()
            yield timed("accounts, blob pull over TLS", server, lambda: sum(client.pull(path) for _ in range(_PULLS)))
            client.close()
            many = f"accounts, blob pull over TLS by {_CLIENTS} clients"
            yield timed(many, server, lambda: _pull_at_once(server, path))

    def _push(self, client: load.Client) -> float:
        client.push_blob(_REPOSITORY, self._blob.digest, self._blob.framed())
        return self._blob.size


def _pull_at_once(server: Server, path: str) -> float:
    clients = [load.Client(server) for _ in range(_CLIENTS)]
    with ThreadPoolExecutor(_CLIENTS) as threads:
        received = sum(threads.map(load.Client.pull, clients, [path] * _CLIENTS))
    for client in clients:
        client.close()
    return received
