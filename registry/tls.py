"""TLS by files, which may be replaced while the server runs.

A certificate is renewed every few weeks, and that must not cost a connection. So a listener has one context for ever,
and each handshake is handed the newest, which is made as a whole from the files, or not at all: a certificate whose key
has not been written yet changes nothing.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

import structlog

from registry.config import TlsSettings
from registry.errors import ConfigurationError

#: [RFC 9325, 4.2.1] forward secrecy and authenticated encryption; TLS 1.3 has nothing else.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"

#: What OpenSSL says, in words that help.
_WORDS: Final = {
    "KEY_VALUES_MISMATCH": "key and certificate do not belong together",
    "NO_CERTIFICATE_ASSIGNED": "key and certificate do not belong together",
    "NO_CERTIFICATE_OR_CRL_FOUND": "there is no certificate in it",
}

log = structlog.get_logger()


class Certificates:
    """The certificate of the server, and whose certificates clients may show."""

    def __init__(self, settings: TlsSettings) -> None:
        """Read the files that `settings` name. Raises `ConfigurationError`."""
        self._settings = settings
        self._files = [Path(name) for name in (settings.certificate, settings.key, settings.client_ca) if name]
        self._seen = self._state()
        self._newest = _load(settings)
        #: For listeners.
        self.context: Final = _load(settings)
        self.context.sni_callback = self._hand_newest

    def look(self) -> None:
        """Read the files again if one of them changed; what cannot be used is logged, and the old one stays."""
        state = self._state()
        if state == self._seen:
            return
        try:
            self._newest = _load(self._settings)
        except ConfigurationError as error:
            log.error("the certificate stays as it was", error=str(error))
        else:
            log.info("the certificate was read again")
        self._seen = state

    def _state(self) -> list[tuple[int, int, int]]:
        found = []
        for path in self._files:
            try:
                status = path.stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return found

    def _hand_newest(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._newest


def _load(settings: TlsSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a way to ask for one: a key with a passphrase is refused, not waited for.
        context.load_cert_chain(settings.certificate, settings.key, password=_refuse)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigurationError(f"tls.certificate, tls.key: {_say(error)}") from None
    if settings.client_ca:
        try:
            context.load_verify_locations(cafile=settings.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(f"tls.client_ca: {_say(error)}") from None
        context.verify_mode = ssl.CERT_REQUIRED if settings.client_required else ssl.CERT_OPTIONAL
        # A session that is taken up again is let in without a look at who signs certificates now. By TLS 1.3 that takes
        # a ticket; by 1.2 OpenSSL remembers sessions itself, and Python has no way to tell it not to.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
    return context


def _refuse() -> str:
    raise ValueError("the key has a passphrase, for which there is nobody to ask")


def _say(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return _WORDS.get(error.reason, error.reason or "there is no certificate, or no key, in its file")
    return str(getattr(error, "strerror", None) or error)
