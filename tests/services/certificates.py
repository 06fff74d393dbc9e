"""An authority of the tests' own, and certificates that it signs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.services.processes import run

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True)
class Authority:
    """Whom clients are told to trust, or are not."""

    directory: Path

    @property
    def for_clients(self) -> Path:
        """A directory with what clients need to trust it, and nothing else."""
        return self.directory / "clients"

    @property
    def certificate(self) -> Path:
        """Its own certificate."""
        return self.for_clients / "ca.crt"

    def set_up(self) -> None:
        """Make its key and its certificate."""
        self.for_clients.mkdir(parents=True)
        files = ("-keyout", str(self._key), "-out", str(self.certificate))
        run("openssl", "req", "-x509", *_NEW_KEY, "-days", "2", "-subj", "/CN=authority", *files)

    def sign(self, directory: Path, address: str) -> None:
        """Write a new key and a certificate for an IP address, `tls.key` and `tls.crt`."""
        request, extensions = self.directory / "tls.csr", self.directory / "extensions"
        extensions.write_text(f"basicConstraints=critical,CA:FALSE\nsubjectAltName=IP:{address}\n")
        key = ("-keyout", str(directory / "tls.key"), "-out", str(request))
        run("openssl", "req", *_NEW_KEY, "-subj", "/CN=registry", *key)
        by = ("-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial", "-days", "2")
        files = ("-in", str(request), "-extfile", str(extensions), "-out", str(directory / "tls.crt"))
        run("openssl", "x509", "-req", *by, *files)

    @property
    def _key(self) -> Path:
        return self.directory / "ca.key"
