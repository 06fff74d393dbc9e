"""TLS: what is refused at the start, whose certificates clients may show, and certificates that are renewed."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from registry.config import TlsSettings
from registry.errors import ConfigurationError
from registry.tls import Certificates
from tests.registry.test_server import refused
from tests.services.certificates import Authority, Pair
from tests.services.processes import Program, free_port, is_open, wait_until

#: How a client notices that its certificate, or the lack of one, is not taken: in the handshake, or by its first read.
Refused = (ssl.SSLError, ConnectionError)


class Server(Program):
    """A `hythe serve` over TLS on a port of loopback."""

    port: int

    def ask(self, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
        """Ask whether it lives by a new connection, and check the answer; return what goes on with the session."""
        with self.connect(context, session) as connection:
            check_life(connection)
            return connection.session

    def connect(self, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        try:
            return context.wrap_socket(plain, server_hostname="127.0.0.1", session=session)
        except OSError:
            plain.close()
            raise

    def shown(self) -> str:
        """Return the certificate that a new connection is shown."""
        return ssl.get_server_certificate(("127.0.0.1", self.port), timeout=20)

    def has_said(self, text: str) -> bool:
        return text in self.output.read_text()


def check_life(connection: ssl.SSLSocket) -> None:
    """Check that the server answers on a connection."""
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = connection.recv(1000)
    if not answer:
        raise ConnectionResetError("nothing came")
    assert answer.startswith(b"HTTP/1.1 200")


@contextlib.contextmanager
def serving(directory: Path, pair: Pair, *arguments: str, **tls: str) -> Iterator[Server]:
    """Run a server that shows `pair`; `tls` are more settings of that table."""
    port = free_port()
    settings = {"certificate": str(pair.certificate), "key": str(pair.key), **tls}
    environment = {f"HYTHE_TLS__{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "hythe", "serve", "--listen", f"127.0.0.1:{port}", *arguments]
    # What several processes share lies in a temporary directory: in the test's own, so that it goes with it.
    environment["TMPDIR"] = str(directory)
    server = Server([*command, "--data", str(directory / "data")], directory / "hythe.log", environment)
    server.port = port
    server.start()
    try:
        wait_until(lambda: is_open(port), "the server")
        yield server
    finally:
        assert server.stop() == 0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def pair(tmp_path: Path, authority: Authority) -> Pair:
    """The certificate of the server."""
    return authority.sign(tmp_path)


@pytest.fixture
def clients(tmp_path: Path) -> Authority:
    """Who signs certificates of clients."""
    return Authority(tmp_path / "known", "clients")


def client(authority: Authority, pair: Pair | None = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """Return how a client connects that trusts an authority, and shows a certificate or none."""
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if version:
        context.minimum_version = context.maximum_version = version
    return pair.load_into(context) if pair else context


# --- what is refused at the start ----------------------------------------------------------------------------


def of_another_kind(key: Path) -> None:
    made = rsa.generate_private_key(65537, 2048)
    key.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda pair, authority: authority.sign(pair.key.parent, name="other").key.replace(pair.key), "together"),
        (lambda pair, _: of_another_kind(pair.key), "together"),
        (
            lambda pair, authority: authority.sign(pair.key.parent, passphrase="secret words"),
            "the key has a passphrase",
        ),
        (lambda pair, _: pair.key.unlink(), "No such file"),
        (lambda pair, _: pair.certificate.unlink(), "No such file"),
        (lambda pair, _: pair.key.write_text("not a key"), "there is no certificate, or no key, in its file"),
        (lambda pair, _: pair.certificate.write_text("not one"), "there is no certificate, or no key, in its file"),
    ],
    ids=["another key", "another kind of key", "passphrase", "no key", "no certificate", "bad key", "bad certificate"],
)
def test_a_certificate_that_cannot_be_used_is_refused_with_a_reason(
    authority: Authority, pair: Pair, spoil: Callable[[Pair, Authority], object], said: str
) -> None:
    spoil(pair, authority)
    with pytest.raises(ConfigurationError, match=r"^tls\.certificate, tls\.key: ") as error:
        Certificates(TlsSettings(str(pair.certificate), str(pair.key)))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), ("not one", "no certificate in it"), ("", "no certificate in it")]
)
def test_an_authority_of_clients_that_cannot_be_used_is_refused_with_a_reason(
    tmp_path: Path, pair: Pair, content: str | None, said: str
) -> None:
    path = tmp_path / "authorities"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"^tls\.client_ca: ") as error:
        Certificates(TlsSettings(str(pair.certificate), str(pair.key), str(path)))
    assert said in str(error.value)


def test_a_server_does_not_start_with_a_key_that_it_cannot_use(tmp_path: Path, authority: Authority) -> None:
    pair = authority.sign(tmp_path, passphrase="secret words")
    said = refused(
        tmp_path, "--listen", "127.0.0.1:0", HYTHE_TLS__CERTIFICATE=str(pair.certificate), HYTHE_TLS__KEY=str(pair.key)
    )
    assert said == "hythe: tls.certificate, tls.key: the key has a passphrase, for which there is nobody to ask\n"


# --- whose certificates clients may show ---------------------------------------------------------------------


@pytest.fixture
def others(tmp_path: Path) -> Authority:
    """An authority that the server does not know, though it has the same name."""
    return Authority(tmp_path / "unknown", "clients")


def test_with_an_authority_clients_may_show_certificates_of_it_and_of_no_other(
    tmp_path: Path, authority: Authority, pair: Pair, clients: Authority, others: Authority
) -> None:
    with serving(tmp_path, pair, client_ca=str(clients.certificate)) as running:
        running.ask(client(authority, None))
        running.ask(client(authority, clients.sign(tmp_path, name="alice")))
        with pytest.raises(Refused):
            running.ask(client(authority, others.sign(tmp_path, name="alice")))


def test_where_it_is_required_nobody_gets_in_without_a_certificate(
    tmp_path: Path, authority: Authority, pair: Pair, clients: Authority, others: Authority
) -> None:
    settings = {"client_ca": str(clients.certificate), "client_required": "true"}
    with serving(tmp_path, pair, **settings) as running:
        for shown in (None, others.sign(tmp_path, name="bob"), authority.sign(tmp_path, name="carol")):
            with pytest.raises(Refused):
                running.ask(client(authority, shown))
        running.ask(client(authority, clients.sign(tmp_path, name="alice")))


def test_with_an_authority_the_version_is_spoken_by_which_no_session_outlives_it(
    tmp_path: Path, authority: Authority, pair: Pair, clients: Authority
) -> None:
    shown = clients.sign(tmp_path, name="alice")
    with serving(tmp_path, pair, client_ca=str(clients.certificate)) as running, pytest.raises(Refused):
        running.ask(client(authority, shown, ssl.TLSVersion.TLSv1_2))


# --- certificates that are renewed ---------------------------------------------------------------------------


def test_all_processes_show_a_new_certificate_and_no_connection_is_lost(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    context = client(authority)
    with serving(tmp_path, pair, "--workers", "2") as running, contextlib.ExitStack() as stack:
        old = running.shown()
        # So many that each process has some of them.
        connections = [stack.enter_context(running.connect(context)) for _ in range(16)]
        for connection in connections:
            check_life(connection)
        authority.sign(tmp_path)

        def are_renewed() -> bool:
            # Silent ones would be ended, as they should be.
            for connection in connections:
                check_life(connection)
            return old not in {running.shown() for _ in range(16)}

        wait_until(are_renewed, "the new certificate")
        running.ask(context)


def test_an_authority_of_clients_that_changes_is_followed(
    tmp_path: Path, authority: Authority, pair: Pair, clients: Authority, others: Authority
) -> None:
    settings = {"client_ca": str(clients.certificate), "client_required": "true"}
    with serving(tmp_path, pair, **settings) as running:
        before, after = (client(authority, each.sign(tmp_path, name="alice")) for each in (clients, others))
        session = running.ask(before)
        clients.certificate.write_bytes(others.certificate.read_bytes())
        wait_until(lambda: running.has_said("the certificate was read again"), "the look at the files")
        running.ask(after)
        # Nor where the client takes up again what was begun under the old one.
        for known in (None, session):
            with pytest.raises(Refused):
                running.ask(before, known)


def test_people_are_told_an_address_that_works(tmp_path: Path, pair: Pair) -> None:
    with serving(tmp_path, pair) as running:
        wait_until(lambda: running.has_said(f"listens on https://127.0.0.1:{running.port} "), "its first word")
