"""A client of any registry. [distribution-spec]

Calls block: whoever wants several things at once uses several threads. Each gets a connection of its own, and gives it
back for the next one.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode, urljoin, urlsplit

from runner.errors import Broken, NotAllowed, NotThere, RunnerError, Unreachable
from runner.logins import Login, Logins
from runner.reference import HUB, is_loopback
from storage.digest import Digest
from storage.names import RepositoryName
from storage.oci import IMAGES, INDEXES, Descriptor

#: Where the hub's registry is.
_HUB_HOST: Final = "registry-1.docker.io"
_AGENT: Final = "hythe"
#: Seconds that a registry may be silent.
_PATIENCE: Final = 60.0
#: How often something is tried that may work the next time, and the seconds before the second try; doubled each time.
_TRIES: Final = 5
_PAUSE: Final = 0.25
_REDIRECTS: Final = 5
_PIECE: Final = 1 << 20
#: [distribution-spec: Pulling manifests] a limit that registries keep too.
_MANIFEST_LIMIT: Final = 4 << 20
_ERROR_LIMIT: Final = 64 << 10
#: Seconds before its end at which a token is not used any more.
_MARGIN: Final = 10.0
_ACCEPT: Final = ", ".join(sorted(IMAGES | INDEXES))
_TRANSIENT: Final = frozenset([408, 429, 500, 502, 503, 504])
_PARAMETER: Final = re.compile(r'([a-z_]+)="([^"]*)"')


class _Again(Exception):
    """It may work the next time."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Fetched:
    """A manifest as it came."""

    content: bytes
    media_type: str
    digest: Digest


@dataclass(slots=True)
class _Token:
    value: str
    until: float


class Answer:
    """An answer of which the body may still be on its way. Use it in a `with`: its connection is for the next one."""

    def __init__(self, registry: Registry, connection: http.client.HTTPConnection, url: str) -> None:
        self._registry = registry
        self._connection = connection
        self._response = connection.getresponse()
        self.url = url
        self.status = self._response.status
        self.headers = self._response.headers

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._response.isclosed() and not self._response.will_close:
            self._registry.give_back(self.url, self._connection)
        else:
            self._response.close()
            self._connection.close()

    def read(self, limit: int) -> bytes:
        """Return the body; raises `Broken` for one of more than `limit` bytes."""
        body = self._response.read(limit + 1)
        if len(body) > limit:
            raise Broken(f"{self.url} answers with more than {limit} bytes")
        if not self._response.isclosed():
            self._response.read()
        return body

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes."""
        while piece := self._response.read1(_PIECE):
            yield piece


class Registry:
    """One registry. May be used by many threads."""

    def __init__(self, host: str, logins: Logins, *, ca_file: str | None = None, login: Login | None = None) -> None:
        """Speak to `HOST[:PORT]`: by TLS, or on this host by whichever it speaks.

        Args:
            host: as in names of images.
            logins: who to be there.
            ca_file: whose certificates to believe, instead of what the system believes.
            login: who to be instead of what `logins` say.
        """
        self.host = host
        self._address = _HUB_HOST if host == HUB else host
        self._logins = logins
        self._login = login
        self._is_login_known = login is not None
        self._trust = ssl.create_default_context(cafile=ca_file)
        self._trust.set_alpn_protocols(["http/1.1"])
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._tokens: dict[str, _Token] = {}
        self._basic = ""
        self._scheme = ""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of all connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    # --- what it has ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Make sure that it is a registry, and that it takes who we are. [end-1]"""
        with self._ask("GET", "/v2/", "") as answer:
            answer.read(_ERROR_LIMIT)

    def manifest(self, repository: RepositoryName, target: str) -> Fetched:
        """Return a manifest by tag or digest; one by digest is what the digest says. [end-3]"""
        path = f"/v2/{repository}/manifests/{target}"
        with self._ask("GET", path, _pull(repository), {"Accept": _ACCEPT}) as answer:
            content = answer.read(_MANIFEST_LIMIT)
            media_type = (answer.headers.get_content_type() if "Content-Type" in answer.headers else "") or ""
        digest = Digest.of(content)
        if ":" in target:
            wanted = Digest.parse(target)
            digest = Digest.of(content, wanted.algorithm)
            if digest != wanted:
                raise Broken(f"{self.host} answered for {target} with something else ({digest})")
        return Fetched(content, media_type, digest)

    def blob(self, repository: RepositoryName, descriptor: Descriptor, start: int = 0) -> Iterator[bytes]:
        """Yield a blob's bytes from `start` on as they come; a connection that breaks is taken up where it broke.

        Whether they are what the digest says, the caller finds out: he hashes them anyway.

        Raises:
            Broken: there are more or fewer of them than the descriptor says.
        """
        position, failures = start, 0
        while position < descriptor.size:
            before = position
            try:
                for piece in self._blob_from(repository, descriptor, position):
                    position += len(piece)
                    if position > descriptor.size:
                        raise Broken(
                            f"{descriptor.digest} is longer than its descriptor says ({descriptor.size} bytes)"
                        )
                    yield piece
            except (OSError, http.client.HTTPException) as error:
                reason = f"it broke off: {error or type(error).__name__}"
            else:
                reason = "it ended early"
            if position < descriptor.size:
                # Whoever gets on, however slowly, is not given up.
                failures = failures + 1 if position == before else 1
                if failures >= _TRIES:
                    raise Unreachable(f"{descriptor.digest} from {self.host}: {reason}, {_TRIES} times in a row")
                time.sleep(_PAUSE * 2 ** (failures - 1))

    def _blob_from(self, repository: RepositoryName, descriptor: Descriptor, start: int) -> Iterator[bytes]:
        """Yield a blob from a byte on, by one request; bytes that were sent again are left out. [end-2]"""
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._ask("GET", f"/v2/{repository}/blobs/{descriptor.digest}", _pull(repository), headers) as answer:
            skip = start if answer.status == http.client.OK else 0
            for piece in answer.pieces():
                if skip >= len(piece):
                    skip -= len(piece)
                    continue
                yield piece[skip:]
                skip = 0

    # --- what it is given -------------------------------------------------------------------------------------

    def has_blob(self, repository: RepositoryName, digest: Digest) -> bool:
        """Return whether a repository has a blob. [end-2]"""
        try:
            with self._ask("HEAD", f"/v2/{repository}/blobs/{digest}", _push(repository)) as answer:
                answer.read(_ERROR_LIMIT)
        except NotThere:
            return False
        return True

    def push_blob(self, repository: RepositoryName, digest: Digest, size: int, content: Iterator[bytes]) -> None:
        """Give a repository a blob, in one piece. [end-4a, end-6]"""
        scope = _push(repository)
        with self._ask("POST", f"/v2/{repository}/blobs/uploads/", scope, {"Content-Length": "0"}) as answer:
            answer.read(_ERROR_LIMIT)
            place = urljoin(answer.url, answer.headers.get("Location", ""))
        mark = "&" if urlsplit(place).query else "?"
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        url = f"{place}{mark}{urlencode({'digest': str(digest)})}"
        try:
            with self._demand(self._send("PUT", url, {**headers, **self._authorization(scope)}, content)) as answer:
                answer.read(_ERROR_LIMIT)
        except _Again as error:
            # What was sent is gone; whoever has it sends it once more, if he likes.
            raise Unreachable(f"{self.host} did not take {digest}: {error}") from None

    def mount_blob(self, repository: RepositoryName, digest: Digest, source: RepositoryName) -> bool:
        """Let a repository have a blob of another one; False where its bytes must be sent after all. [end-11]"""
        query = urlencode({"mount": str(digest), "from": source})
        scope = f"{_push(repository)} {_pull(source)}"
        path = f"/v2/{repository}/blobs/uploads/?{query}"
        with self._ask("POST", path, scope, {"Content-Length": "0"}) as answer:
            answer.read(_ERROR_LIMIT)
            is_mounted = answer.status == http.client.CREATED
            place = urljoin(answer.url, answer.headers.get("Location", ""))
        if not is_mounted:
            with contextlib.suppress(RunnerError), self._send("DELETE", place, self._authorization(scope)) as answer:
                answer.read(_ERROR_LIMIT)
        return is_mounted

    def push_manifest(self, repository: RepositoryName, target: str, content: bytes, media_type: str) -> Digest:
        """Give a repository a manifest, by a tag or its digest. [end-7]"""
        headers = {"Content-Type": media_type, "Content-Length": str(len(content))}
        with self._ask("PUT", f"/v2/{repository}/manifests/{target}", _push(repository), headers, content) as answer:
            answer.read(_ERROR_LIMIT)
        return Digest.of(content)

    # --- who we are -------------------------------------------------------------------------------------------

    def log_in(self) -> Login:
        """Make sure that the login is good; return what to keep of it: a refresh token where there is one."""
        with self._open("GET", self._url("/v2/"), {}) as answer:
            answer.read(_ERROR_LIMIT)
            challenge = answer.headers.get("WWW-Authenticate", "")
        login = self._who()
        assert login is not None
        if challenge.lower().startswith("bearer "):
            token = self._fetch_token(dict(_PARAMETER.findall(challenge)), "", keep=True)
            if refresh := token.get("refresh_token"):
                return Login(login.user, "", str(refresh))
        self.check()
        return login

    def _who(self) -> Login | None:
        with self._lock:
            if not self._is_login_known:
                self._login, self._is_login_known = self._logins.find(self.host), True
            return self._login

    def _authorization(self, scope: str) -> dict[str, str]:
        if self._basic:
            return {"Authorization": self._basic}
        token = self._tokens.get(scope)
        if token is not None and token.until > time.monotonic():
            return {"Authorization": f"Bearer {token.value}"}
        return {}

    def _answer_challenge(self, challenge: str, scope: str) -> bool:
        """Get what a registry asks for; False where there is nothing that was not tried."""
        kind, _, rest = challenge.partition(" ")
        login = self._who()
        if kind.lower() == "basic" and login is not None and login.user and not self._basic:
            self._basic = _basic(login)
            return True
        if kind.lower() != "bearer":
            return False
        parameters = dict(_PARAMETER.findall(rest))
        token = self._fetch_token(parameters, scope)
        value = token.get("token") or token.get("access_token")
        if not isinstance(value, str) or not value:
            raise Broken(f"{parameters.get('realm')} gives no token")
        seconds = token.get("expires_in")
        good = float(seconds) if isinstance(seconds, int | float) else 60.0
        self._tokens[scope] = _Token(value, time.monotonic() + max(1.0, good - _MARGIN))
        return True

    def _fetch_token(self, parameters: Mapping[str, str], scope: str, *, keep: bool = False) -> dict[str, Any]:
        """Get a token for a scope. [distribution: Token Authentication, OAuth2 Token Authentication]"""
        realm = parameters.get("realm", "")
        if urlsplit(realm).scheme not in ("http", "https"):
            raise Broken(f"{self.host} names no place to get a token: {realm[:200]!r}")
        self._demand_private(realm)
        login = self._who()
        scopes = scope.split() or parameters.get("scope", "").split()
        query = [("service", parameters.get("service", "")), *(("scope", each) for each in scopes)]
        if login is not None and login.refresh_token:
            form = [("grant_type", "refresh_token"), ("refresh_token", login.refresh_token), ("client_id", _AGENT)]
            body = urlencode([*form, query[0], ("scope", " ".join(scopes))]).encode()
            kind = {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": str(len(body))}
            asked = self._send("POST", realm, kind, body)
        else:
            query += [("offline_token", "true"), ("client_id", _AGENT)] if keep else []
            who = {"Authorization": _basic(login)} if login is not None else {}
            mark = "&" if urlsplit(realm).query else "?"
            asked = self._send("GET", f"{realm}{mark}{urlencode(query)}", who)
        with self._demand(asked) as answer:
            try:
                found = json.loads(answer.read(1 << 20))
            except ValueError:
                raise Broken(f"{realm} gives no token") from None
        return found if isinstance(found, dict) else {}

    def _demand_private(self, realm: str) -> None:
        """Let no registry that is spoken to by TLS have its secrets sent in the clear."""
        parts = urlsplit(realm)
        if parts.scheme == "http" and self._scheme == "https" and not is_loopback(parts.netloc):
            raise Broken(f"{self.host} wants its tokens fetched without encryption, at {realm[:200]}")

    # --- requests ---------------------------------------------------------------------------------------------

    def _ask(
        self, method: str, path: str, scope: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """Send a request as who we are, again where that may help; return its answer, which is a success.

        Raises:
            NotAllowed: not by who we are.
            NotThere: what it asks for is not there.
            Unreachable: no answer, again and again.
            Broken: something else answers, or it asks for what cannot be.
        """
        url = self._url(path)
        for number in range(_TRIES):
            try:
                return self._ask_once(method, url, scope, dict(headers or {}), body)
            except _Again as error:
                reason, wait = str(error), error.wait
            if number < _TRIES - 1:
                time.sleep(max(wait, _PAUSE * 2**number))
        raise Unreachable(f"{self.host} does not answer as it should: {reason}")

    def _ask_once(self, method: str, url: str, scope: str, headers: dict[str, str], body: bytes | None) -> Answer:
        tried = False
        while True:
            answer = self._send(method, url, {**headers, **self._authorization(scope)}, body)
            if answer.status != http.client.UNAUTHORIZED or tried:
                return self._demand(answer)
            with answer:
                said = _said(answer.read(_ERROR_LIMIT))
            tried = True
            self._tokens.pop(scope, None)
            if not self._answer_challenge(answer.headers.get("WWW-Authenticate", ""), scope):
                raise self._not_allowed(said)

    def _demand(self, answer: Answer) -> Answer:
        """Return an answer that is a success; raise what another one means."""
        if answer.status < http.client.MULTIPLE_CHOICES:
            return answer
        with answer:
            said = _said(answer.read(_ERROR_LIMIT)) or f"{answer.status} {http.client.responses.get(answer.status, '')}"
        if answer.status in _TRANSIENT:
            wait = answer.headers.get("Retry-After", "")
            raise _Again(said, min(30.0, float(wait)) if wait.isdigit() else 0.0)
        if answer.status == http.client.NOT_FOUND:
            raise NotThere(f"{self.host}: {said}")
        if answer.status == http.client.UNAUTHORIZED:
            raise self._not_allowed(said)
        if answer.status == http.client.FORBIDDEN:
            raise NotAllowed(f"{self.host}: {said}")
        raise RunnerError(f"{self.host}: {said}")

    def _not_allowed(self, said: str) -> NotAllowed:
        """Return what to say to whoever is not let in; most often he has not said who he is."""
        hint = "" if self._who() else f" (hythe login {self.host})"
        return NotAllowed(f"{self.host}: {said or 'it does not let us in'}{hint}")

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | Iterator[bytes] | None = None
    ) -> Answer:
        """Send a request, follow where it leads, and return the answer, whatever it is."""
        host = urlsplit(url).netloc
        sent = dict(headers)
        for _ in range(_REDIRECTS):
            answer = self._open(method, url, sent, body)
            if answer.status not in (301, 302, 303, 307, 308) or method not in ("GET", "HEAD"):
                return answer
            with answer:
                answer.read(_ERROR_LIMIT)
            url = urljoin(url, answer.headers.get("Location", ""))
            if urlsplit(url).scheme not in ("http", "https"):
                raise Broken(f"{self.host} leads to {url[:200]!r}")
            if urlsplit(url).netloc != host:
                # What it leads to, such as an object store, is signed by itself, and not to know who we are.
                sent.pop("Authorization", None)
        raise Broken(f"{self.host} leads from one place to another without an end")

    def _open(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | Iterator[bytes] | None = None
    ) -> Answer:
        """Send one request on a connection of its own, perhaps one that was used before."""
        parts = urlsplit(url)
        target = quote(parts.path, safe="/:@%") + (f"?{parts.query}" if parts.query else "")
        while True:
            connection, is_used = self._take(parts.scheme, parts.netloc)
            try:
                connection.request(method, target or "/", body, {"User-Agent": _AGENT, **headers})
                return Answer(self, connection, url)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # The other end may have closed it a moment ago; a body that is gone cannot be sent again.
                if not is_used or not isinstance(body, bytes | None):
                    raise _Again(f"{parts.netloc}: {error or type(error).__name__}") from None

    def _take(self, scheme: str, address: str) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            idle = self._idle.get((scheme, address))
            if idle:
                return idle.pop(), True
        if scheme == "https":
            return http.client.HTTPSConnection(address, timeout=_PATIENCE, context=self._trust), False
        return http.client.HTTPConnection(address, timeout=_PATIENCE), False

    def give_back(self, url: str, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose answer was read to its end, for the next request there."""
        parts = urlsplit(url)
        with self._lock:
            self._idle.setdefault((parts.scheme, parts.netloc), []).append(connection)

    def _url(self, path: str) -> str:
        if not self._scheme:
            self._scheme = self._find_scheme()
        return f"{self._scheme}://{self._address}{path}"

    def _find_scheme(self) -> str:
        """Return `https`; on this host what the registry speaks. [moby: insecure registries, 127.0.0.0/8]"""
        if not is_loopback(self._address):
            return "https"
        parts = urlsplit(f"//{self._address}")
        try:
            with socket.create_connection((parts.hostname or "", parts.port or 443), _PATIENCE) as plain:
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                with context.wrap_socket(plain, server_hostname=parts.hostname):
                    return "https"
        except ssl.SSLError:
            return "http"
        except OSError as error:
            raise Unreachable(f"no registry answers at {self._address}: {error.strerror or error}") from None


def _pull(repository: str) -> str:
    return f"repository:{repository}:pull"


def _push(repository: str) -> str:
    return f"repository:{repository}:pull,push"


def _basic(login: Login) -> str:
    return f"Basic {base64.b64encode(f'{login.user}:{login.password}'.encode()).decode()}"


def _said(body: bytes) -> str:
    """Return what an error says, on one line that steers no terminal; empty where nothing can be read of it."""
    try:
        entries = json.loads(body)["errors"]
        text = "; ".join(str(entry.get("message") or entry.get("code")) for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    return "".join(character if character.isprintable() else " " for character in text)[:500]
