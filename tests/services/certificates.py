"""An authority of the tests' own, and certificates that it signs: of servers, and of their clients."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and of its key."""

    certificate: Path
    key: Path

    def load_into(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """Let a context show this certificate, and return it."""
        context.load_cert_chain(self.certificate, self.key)
        return context


class Authority:
    """Whom clients are told to trust, or are not.

    Attributes:
        for_clients: a directory with what clients need to trust it, and nothing else.
        certificate: its own.
    """

    def __init__(self, directory: Path, name: str = "authority") -> None:
        """Make its key and its certificate."""
        self.for_clients = directory / "clients"
        self.certificate = self.for_clients / "ca.crt"
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.for_clients.mkdir(parents=True)
        self.certificate.write_bytes(self._made(name, self._key, is_authority=True))

    def sign(self, directory: Path, address: str = "127.0.0.1", name: str = "tls", passphrase: str = "") -> Pair:
        """Write a new key and a certificate for an IP address, `tls.key` and `tls.crt`, or by another name."""
        pair = Pair(directory / f"{name}.crt", directory / f"{name}.key")
        key = ec.generate_private_key(ec.SECP256R1())
        hidden: KeySerializationEncryption = NoEncryption()
        if passphrase:
            hidden = BestAvailableEncryption(passphrase.encode())
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
        pair.certificate.write_bytes(self._made(name, key, address))
        return pair

    def _made(
        self, name: str, key: ec.EllipticCurvePrivateKey, address: str = "", *, is_authority: bool = False
    ) -> bytes:
        at = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self._name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(at - timedelta(hours=1))
            .not_valid_after(at + timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if address:
            host = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
            builder = builder.add_extension(host, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
