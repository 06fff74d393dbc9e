"""What somebody tries who means harm, kind by kind, and that nothing comes of it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import argon2
import jwt
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from registry.access import passwords
from registry.app import ANSWERS
from registry.config import Settings
from registry.dispatch import Dispatcher
from registry.metadata import access_tokens, accounts, audit, keys, policy, rules
from registry.metadata.engine import open_database
from registry.metadata.schema import upgrade
from storage.oci import DOCKER_LIST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from tests.conftest import Start
from tests.content import Client, Image, descriptor, digest_of
from tests.registry.accounts import HASH, NAME, PASSWORD, Registry, basic
from tests.registry.raw import exchange
from tests.registry.talk import Answer, Wire, ask, wire
from tests.services.processes import HytheServer, hythe_server, run, wait_until

#: Where the one who attacks may push.
OWN = "mallory/app"
ABSENT = "sha256:" + "0" * 64
#: For what must come in the end, however slow the machine; nothing is measured by it.
PATIENCE = 30.0


@pytest.fixture
async def target(registry: Registry) -> Image:
    """An image that root has pushed to NAME, where mallory may do nothing."""
    await registry.user("mallory", "push", "mallory")
    return await registry.image()


async def push_blob(client: Client, name: str, content: bytes, by: dict[str, str]) -> str:
    digest = digest_of(content)
    answer = await ask(client, "POST", f"/v2/{name}/blobs/uploads/?digest={digest}", data=content, headers=by)
    assert answer.status == 201, answer
    return digest


async def push_manifest(
    client: Client, name: str, content: bytes, by: dict[str, str], media_type: str = OCI_MANIFEST, reference: str = "t"
) -> Answer:
    headers = {**by, "Content-Type": media_type}
    return await ask(client, "PUT", f"/v2/{name}/manifests/{reference}", data=content, headers=headers)


def index_of(*descriptors: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": descriptors}).encode()


async def token_of(registry: Registry, name: str, scope: str) -> str:
    return (await registry.bearer(name, scope=scope))["Authorization"].removeprefix("Bearer ")


def told(answer: Answer, *names: str) -> tuple[int, list[str], str]:
    """Return all of an answer that could tell something, but for what was asked for by name, and when."""
    body = answer.body.decode()
    if '"request_id"' in body:
        body = json.dumps(answer.json["errors"])
    for name in names:
        body = body.replace(name, "NAME")
    return answer.status, sorted(answer.headers), re.sub(r'"updated_at":"[^"]*"', "", body)


@asynccontextmanager
async def guarded(start: Start, settings: Settings, **options: Any) -> AsyncIterator[Registry]:
    """A registry with accounts, started in another way than most."""
    client = await start(**options)
    database = open_database(settings.database.url)
    await database.write(accounts.add, "root", accounts.USER, HASH, admin=True)
    try:
        yield Registry(client, database)
    finally:
        await database.close()


async def eventually(look: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(PATIENCE):
        while not await look():  # noqa: ASYNC110 - it is another process or a database that is looked at
            await asyncio.sleep(0.05)


# --- names ----------------------------------------------------------------------------------------------------------

PATHS = [
    "/v2/mallory/../org/team/app/manifests/latest",
    "/v2/mallory/%2e%2e/org/team/app/manifests/latest",
    "/v2/mallory%2f..%2forg%2fteam%2fapp/manifests/latest",
    "/v2/mallory/app/manifests/..%2f..%2f..%2forg/team/app/manifests/latest",
    "/v2/mallory/app/tags/list/../../../../org/team/app/manifests/latest",
    "/v2/mallory/app/../../../v2/org/team/app/manifests/latest",
    "/v2/mallory/app;/org/team/app/manifests/latest",
    "/v2/./org/team/app/manifests/latest",
    "/v2//org/team/app/manifests/latest",
    "//v2/org/team/app/manifests/latest",
    "/v2/org%2fteam%2fapp/manifests/latest",
    "/v2/org/team/app%00/manifests/latest",
    "/v2/mallory/app%00/../../org/team/app/manifests/latest",
    "/v2/ORG/TEAM/APP/manifests/latest",
    "/V2/org/team/app/manifests/latest",
    "/v2/%EF%BD%8Frg/team/app/manifests/latest",
    "/v2/org/team/%61pp/manifests/latest",
    "/v2/org/team/app/manifests/latest?repository=mallory/app&name=mallory/app&from=mallory/app",
    "http://mallory/app/v2/org/team/app/manifests/latest",
    "/v2/org\\team\\app/manifests/latest",
    "/api/v1/manifest?repository=mallory/app&repository=org/team/app&reference=latest",
    "/api/v1/manifest?repository=org/team/app&repository=mallory/app&reference=latest",
    "/api/v1/manifest?repository=mallory/../org/team/app&reference=latest",
    "/api/v1/manifest?repository=/org/team/app&reference=latest",
    "/api/v1/tags?repository=org/team/app%00",
    "/api/v1/repositories?path=org/team",
    "/api/v1/repositories?path=mallory/../org/team",
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
async def test_no_way_of_writing_a_name_leads_past_its_rights(registry: Registry, target: Image, method: str) -> None:
    by = f"Authorization: {basic('mallory')['Authorization']}"
    async with AsyncExitStack() as stack:
        for path in PATHS:
            talk = await stack.enter_async_context(wire(registry.client))
            await talk.request(method, path, [by, "Connection: close"])
            received = await talk.rest()
            status = int(received.split(b" ", 2)[1])
            is_empty = status == 200 and received.endswith(b'{"repositories":[],"next":null}')
            assert is_empty or status in (400, 403, 404, 405), (path, received)
            assert target.digest.encode() not in received, path
    answer = await ask(registry.client, "GET", f"/v2/{NAME}/manifests/latest", headers=basic("root"))
    assert answer.body == target.manifest


# --- tokens ---------------------------------------------------------------------------------------------------------

SCOPES = [
    f"repository:{NAME}:pull",
    f"repository:{OWN}:pull repository:{NAME}:push",
    f"repository:{OWN}:pull\trepository:{NAME}:pull",
    f"repository:{OWN}:pull,repository:{NAME}:pull",
    f"repository:{OWN},{NAME}:pull",
    f"repository:{OWN}:pull\0repository:{NAME}:pull",
    f"repository:{OWN}/../../{NAME}:pull",
    f"repository:{OWN}:admin",
    f"repository:{OWN}:pull:{NAME}:pull",
    f"repository(plugin):{NAME}:*",
    f"registry:{NAME}:*",
    "repository:*:pull",
    "repository:org/*:*",
    "repository::*",
    "repository:/:*",
    "repository:ORG/TEAM/APP:pull",
    f"Repository:{NAME}:pull",
    f'repository:{OWN}:pull"}},{{"type":"repository","name":"{NAME}","actions":["pull"]',
]


@pytest.mark.parametrize("how", ["query", "form"])
async def test_no_way_of_writing_a_scope_gives_more_than_is_held(registry: Registry, target: Image, how: str) -> None:
    for scope in SCOPES:
        if how == "query":
            options: dict[str, Any] = {"params": [("scope", scope)], "headers": basic("mallory")}
            answer = await ask(registry.client, "GET", "/v2/token", **options)
        else:
            login = {"grant_type": "password", "username": "mallory", "password": PASSWORD}
            answer = await ask(registry.client, "POST", "/v2/token", data={**login, "scope": scope})
        assert answer.status == 200, (scope, answer)
        claims = jwt.decode(answer.json["token"], options={"verify_signature": False})
        held = [entry for entry in claims["access"] if (entry["type"], entry["name"]) == ("repository", OWN)]
        assert claims["access"] == held, scope
        assert {action for entry in held for action in entry["actions"]} <= {"pull", "push"}, scope
        headers = {"Authorization": f"Bearer {answer.json['token']}"}
        answer = await ask(registry.client, "GET", f"/v2/{NAME}/manifests/latest", headers=headers)
        assert answer.codes == ["NAME_UNKNOWN"], scope


async def test_a_token_for_one_repository_is_refused_on_another(registry: Registry, target: Image) -> None:
    other = await registry.image("mallory/other")
    by = await registry.bearer("mallory", scope=f"repository:{OWN}:pull,push")
    blob = digest_of(other.layers[0])
    asked = [
        ("GET", "/v2/mallory/other/manifests/latest"),
        ("HEAD", f"/v2/mallory/other/blobs/{blob}"),
        ("GET", "/v2/mallory/other/tags/list"),
        ("GET", f"/v2/mallory/other/referrers/{other.digest}"),
        ("POST", "/v2/mallory/other/blobs/uploads/"),
        ("GET", "/api/v1/tags?repository=mallory/other"),
        ("GET", "/api/v1/repositories"),
        ("GET", "/v2/_catalog"),
        ("GET", "/api/v1/tokens"),
        ("POST", f"/v2/{OWN}/blobs/uploads/?mount={blob}&from=mallory/other"),
    ]
    for method, path in asked:
        answer = await ask(registry.client, method, path, headers=by)
        assert answer.status == (403 if path == "/api/v1/tokens" else 401), (path, answer)
    answer = await ask(registry.client, "POST", f"/v2/{OWN}/blobs/uploads/?mount={blob}", headers=by)
    assert answer.status == 202


FORGED = ["none", "public key as a secret", "own key in the head", "key from elsewhere", "path as a key", "no key"]


@pytest.mark.parametrize("kind", [*FORGED, "not yet", "two audiences"])
async def test_a_token_that_was_not_signed_here_and_for_now_opens_nothing(
    registry: Registry, target: Image, kind: str
) -> None:
    token = await token_of(registry, "root", f"repository:{NAME}:pull")
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    (key, *_) = await registry.database.read(keys.everything)
    private: Any = load_pem_private_key(key.private.encode(), None)
    made = forged(kind, claims, key.id, private)
    answer = await ask(
        registry.client, "GET", f"/v2/{NAME}/manifests/latest", headers={"Authorization": f"Bearer {made}"}
    )
    if kind == "two audiences":
        # [RFC 7519, 4.1.3] one of them is us.
        assert answer.status == 200
        return
    assert answer.codes == ["UNAUTHORIZED"]
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


def forged(kind: str, claims: dict[str, Any], key_id: str, private: Any) -> str:
    own = ec.generate_private_key(ec.SECP256R1())
    public = own.public_key()
    if kind == "none":
        return f"{segment({'alg': 'none', 'kid': key_id})}.{segment(claims)}."
    if kind == "public key as a secret":
        # By hand: PyJWT refuses to make one.
        signed = f"{segment({'alg': 'HS256', 'kid': key_id})}.{segment(claims)}"
        secret = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return f"{signed}.{encoded(hmac.digest(secret, signed.encode(), hashlib.sha256))}"
    if kind == "not yet":
        later = int(time.time()) + 3600
        return jwt.encode({**claims, "nbf": later, "exp": later + 3600}, private, "ES256", {"kid": key_id})
    if kind == "two audiences":
        return jwt.encode({**claims, "aud": ["elsewhere", claims["aud"]]}, private, "ES256", {"kid": key_id})
    heads: dict[str, dict[str, Any]] = {
        "own key in the head": {"kid": key_id, "jwk": jwt.algorithms.ECAlgorithm.to_jwk(public, as_dict=True)},
        "key from elsewhere": {"kid": key_id, "jku": "http://127.0.0.1:1/keys", "x5u": "http://127.0.0.1:1/keys"},
        "path as a key": {"kid": "../../../../dev/null"},
        "no key": {},
    }
    return jwt.encode(claims, own, "ES256", heads[kind])


def segment(content: Any) -> str:
    return encoded(json.dumps(content).encode())


def encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


# --- what lies where one may not look -------------------------------------------------------------------------------


async def test_a_blob_of_a_private_repository_is_not_mounted_and_not_told_from_none(
    registry: Registry, target: Image
) -> None:
    by = basic("mallory")
    there = digest_of(target.layers[0])
    for query in ("", f"&from={NAME}", "&from=org/none", "&from=..%2forg", "&from="):
        answers = [
            await ask(registry.client, "POST", f"/v2/{OWN}/blobs/uploads/?mount={digest}{query}", headers=by)
            for digest in (there, ABSENT)
        ]
        assert [answer.status for answer in answers] == [202, 202]
        assert told(answers[0]) == told(answers[1])
    answer = await ask(registry.client, "HEAD", f"/v2/{OWN}/blobs/{there}", headers=by)
    assert answer.status == 404


def referring(digest: str, how: str) -> tuple[bytes, str]:
    """Return a manifest that points to content by nothing but its digest, and its type."""
    named = {"mediaType": OCI_MANIFEST, "digest": digest, "size": 7}
    if how == "subject":
        config = {"mediaType": OCI_CONFIG, "digest": ABSENT, "size": 2, "urls": ["http://127.0.0.1"]}
        image = {"schemaVersion": 2, "config": config, "layers": [], "subject": named}
        return json.dumps(image).encode(), OCI_MANIFEST
    if how in ("config", "layer"):
        here = {"mediaType": OCI_CONFIG, "digest": digest, "size": 7}
        foreign = {**here, "digest": ABSENT, "urls": ["http://127.0.0.1"]}
        config, layer = (here, foreign) if how == "config" else (foreign, here)
        return json.dumps({"schemaVersion": 2, "config": config, "layers": [layer]}).encode(), OCI_MANIFEST
    content = index_of({**named, "urls": ["http://127.0.0.1"]} if how == "foreign child" else named)
    return content.replace(OCI_INDEX.encode(), DOCKER_LIST.encode()) if how == "list" else content, (
        DOCKER_LIST if how == "list" else OCI_INDEX
    )


@pytest.mark.parametrize("sparse", [False, True])
async def test_a_manifest_tells_nothing_of_what_it_points_to_elsewhere(
    start: Start, settings: Settings, sparse: bool
) -> None:
    async with guarded(start, settings, registry={"sparse_manifests": sparse}) as registry:
        await registry.user("mallory", "push", "mallory")
        image = await registry.image()
    blobs = {"config": digest_of(image.config), "layer": digest_of(image.layers[0])}
    for how in ("child", "foreign child", "list", "config", "layer", "subject"):
        # What is there, and what is nowhere.
        digests = (blobs.get(how, image.digest), ABSENT[:-1] + "1")
        answers = [await told_of(registry.client, digest, how) for digest in digests]
        assert answers[0] == answers[1], how


async def told_of(client: Client, digest: str, how: str) -> list[tuple[int, list[str], str]]:
    """Return all that mallory hears who pushes a manifest that points there."""
    by = basic("mallory")
    content, media_type = referring(digest, how)
    pushed = await push_manifest(client, OWN, content, by, media_type)
    own = digest_of(content)
    found = [
        pushed,
        await ask(client, "GET", f"/api/v1/tags?repository={OWN}", headers=by),
        await ask(client, "GET", f"/api/v1/manifest?repository={OWN}&reference={own}", headers=by),
        await ask(client, "GET", f"/v2/{OWN}/referrers/{digest}", headers=by),
        await ask(client, "GET", f"/v2/{OWN}/manifests/{digest}", headers=by),
        await ask(client, "HEAD", f"/v2/{OWN}/blobs/{digest}", headers=by),
    ]
    if pushed.status == 201:
        removed = await ask(client, "DELETE", f"/v2/{OWN}/manifests/{own}", headers=basic("root"))
        assert removed.status == 202
    return [told(each, digest, own) for each in found]


async def test_what_an_upload_may_become_does_not_depend_on_what_others_hold(registry: Registry, target: Image) -> None:
    """Whoever does not have the bytes does not get at them by their digest."""
    by = basic("mallory")
    answers = []
    for digest in (digest_of(target.layers[0]), ABSENT):
        started = await ask(registry.client, "POST", f"/v2/{OWN}/blobs/uploads/", headers=by)
        location = started.headers["Location"]
        closed = await ask(registry.client, "PUT", f"{location}?digest={digest}", headers=by)
        at_once = await ask(
            registry.client, "POST", f"/v2/{OWN}/blobs/uploads/?digest={digest}", data=b"other", headers=by
        )
        answers.append([told(closed, digest), told(at_once, digest)])
    assert answers[0] == answers[1]
    assert {status for status, *_ in answers[0]} == {400}


async def test_the_session_of_an_upload_is_of_no_use_in_another_repository(registry: Registry, target: Image) -> None:
    by = basic("root")
    started = await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=by)
    session = started.headers["Docker-Upload-UUID"]
    sent = await ask(registry.client, "PATCH", started.headers["Location"], data=b"secret", headers=by)
    assert sent.status == 202
    path = f"/v2/{OWN}/blobs/uploads/{session}"
    for method, query in (("GET", ""), ("PATCH", ""), ("PUT", f"?digest={digest_of(b'secret')}"), ("DELETE", "")):
        answer = await ask(registry.client, method, path + query, headers=basic("mallory"))
        assert answer.codes == ["BLOB_UPLOAD_UNKNOWN"], method
    finished = await ask(
        registry.client, "PUT", f"{started.headers['Location']}?digest={digest_of(b'secret')}", headers=by
    )
    assert finished.status == 201


# --- answers from memory --------------------------------------------------------------------------------------------


def head(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: registry.test", *headers, "", ""]).encode()


async def asked(talk: Wire, data: bytes) -> int:
    await talk.send(data)
    return (await talk.answer(has_body=not data.startswith(b"HEAD"))).status


async def test_an_answer_from_memory_is_for_the_credentials_that_it_was_made_for(
    registry: Registry, target: Image
) -> None:
    scope = f"repository:{NAME}:pull"
    good = f"Authorization: Bearer {await token_of(registry, 'root', scope)}"
    paths = [f"/v2/{NAME}/manifests/latest", f"/v2/{NAME}/blobs/{digest_of(target.layers[0])}"]
    others = [
        "",
        f"Authorization: Bearer {await token_of(registry, 'mallory', scope)}",
        f"Authorization: {basic('mallory')['Authorization']}",
        good[:-1],
        good + "A",
        good.replace("Authorization", "X-Authorization"),
    ]
    async with wire(registry.client) as first, wire(registry.client) as second:
        for path in paths:
            for method in ("GET", "HEAD"):
                for _ in range(4):
                    assert await asked(first, head(path, good, method=method)) == 200
                for other in filter(None, others):
                    for talk in (first, second):
                        status = await asked(talk, head(path, other, method=method))
                        assert status in (401, 404), other
                        assert await asked(talk, head(path, good, method=method)) == 200
                assert await asked(second, head(path, method=method)) == 401


@pytest.mark.parametrize("change", ["rule", "disabled", "password", "removed"])
async def test_an_answer_from_memory_ends_with_the_right_to_it(registry: Registry, target: Image, change: str) -> None:
    await registry.user("alice", "pull", "org")
    by = f"Authorization: Bearer {await token_of(registry, 'alice', f'repository:{NAME}:pull')}"
    data = head(f"/v2/{NAME}/manifests/latest", by)
    async with wire(registry.client) as first, wire(registry.client) as second:
        for _ in range(4):
            for talk in (first, second):
                assert await asked(talk, data) == 200
        if change == "rule":
            await registry.database.write(rules.revoke, "org", "pull", "alice")
        elif change == "disabled":
            await registry.database.write(accounts.set_disabled, "alice", disabled=True)
        elif change == "password":
            await registry.database.write(accounts.set_password, "alice", HASH)
        else:
            await registry.database.write(accounts.remove, "alice")
        for talk in (first, second):
            assert await asked(talk, data) == (404 if change == "rule" else 401)


async def test_an_answer_from_memory_ends_with_its_token(registry: Registry, target: Image) -> None:
    token = await token_of(registry, "root", f"repository:{NAME}:pull")
    (key, *_) = await registry.database.read(keys.everything)
    claims = jwt.decode(token, options={"verify_signature": False})
    ends_at = int(time.time()) + 2
    short = jwt.encode({**claims, "exp": ends_at}, key.private, "ES256", {"kid": key.id})
    data = head(f"/v2/{NAME}/manifests/latest", f"Authorization: Bearer {short}")
    async with wire(registry.client) as talk:
        while (status := await asked(talk, data)) == 200:
            assert time.time() < ends_at + 1
        assert status == 401
    assert time.time() >= ends_at


@pytest.mark.parametrize("kind", ["password", "personal token"])
async def test_what_is_as_good_as_a_password_is_not_kept_in_memory(
    registry: Registry, target: Image, kind: str
) -> None:
    by = basic("root")["Authorization"] if kind == "password" else f"Bearer {await registry.personal('root')}"
    data = head(f"/v2/{NAME}/manifests/latest", f"Authorization: {by}")
    async with wire(registry.client) as talk:
        for _ in range(4):
            assert await asked(talk, data) == 200
    assert registry.client.app is not None
    assert registry.client.app[ANSWERS].find(data, "127.0.0.1") is None


# --- where a request ends -------------------------------------------------------------------------------------------

#: What a front could take for one end, and we for another: nothing of it is to be a request of its own.
SHAPES = {
    "length and chunks": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 43\r\n\r\n",
    "the same length twice": b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "a list of lengths": b"Content-Length: 0, 0\r\n\r\n",
    "a length with a sign": b"Content-Length: +0\r\n\r\n",
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "a length in hexadecimal": b"Content-Length: 0x0\r\n\r\n",
    "a length with a line in it": b"Content-Length: 1_0\r\n\r\n0123456789",
    "a length in other digits": "Content-Length: \u0660\r\n\r\n".encode(),
    "a space before the colon": b"Content-Length : 0\r\n\r\n",
    "a space before the colon of a coding": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a zero byte": b"Transfer-Encoding: chunked\x00\r\n\r\n0\r\n\r\n",
    "two codings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunks that are not the last coding": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a folded line": b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "bare line feeds": b"A: b\n\n",
    "a bare carriage return": b"A: b\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "line feeds around a chunk": b"Transfer-Encoding: chunked\r\n\r\n0\n\n",
    "a negative chunk": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "a chunk of 0x0": b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n",
    "a chunk too large to count": b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\n0\r\n\r\n",
    "a chunk with a line in its size": b"Transfer-Encoding: chunked\r\n\r\n1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "a line feed in an extension": b"Transfer-Encoding: chunked\r\n\r\n1;a\nb\r\nX\r\n0\r\n\r\n",
    "a chunk longer than it says": b"Transfer-Encoding: chunked\r\n\r\n1\r\nXX\r\n0\r\n\r\n",
}
HIDDEN = b"GET /v2/hidden-request/tags/list HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_a_request_whose_end_is_in_doubt_is_the_last_one(start: Start, settings: Settings) -> None:
    # Such a connection is listened to for a while, for the client to read why; not long here.
    async with guarded(start, settings, lingering_time=0.1) as registry:
        started = await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=basic("root"))
    by = f"Authorization: {basic('root')['Authorization']}\r\n".encode()
    lines = [
        b"POST /v2/token",
        b"GET /healthz",
        f"PATCH {started.headers['Location']}".encode(),
        f"PUT /v2/{NAME}/manifests/t".encode(),
    ]

    async def received(line: bytes, shape: bytes, *, together: bool) -> bytes:
        sent = line + b" HTTP/1.1\r\nHost: x\r\n" + by + shape
        async with wire(registry.client) as talk:
            # Where bytes come together must make no difference. It may be over by then.
            with suppress(ConnectionError):
                for part in [sent + HIDDEN] if together else [sent, HIDDEN]:
                    await talk.send(part)
            return await talk.rest()

    for name, shape in SHAPES.items():
        for together in (True, False):
            for answer in await asyncio.gather(*[received(line, shape, together=together) for line in lines]):
                assert re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer) == [b"400"], (name, answer)


async def test_what_is_sent_behind_a_body_that_nobody_wants_is_read_as_that_body(
    registry: Registry, target: Image
) -> None:
    """Without credentials nobody takes the body of an upload; what looks like a request in it is none."""
    upload = "00000000-0000-4000-8000-000000000000"
    async with wire(registry.client) as talk:
        await talk.request("PATCH", f"/v2/{NAME}/blobs/uploads/{upload}", ["Transfer-Encoding: chunked"])
        assert (await talk.answer()).status == 401
        await talk.send(b"%x\r\n" % len(HIDDEN) + HIDDEN)
        await talk.send(b"\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await talk.answer()).json == {"status": "ok"}


async def test_two_who_share_a_connection_do_not_share_their_rights(registry: Registry, target: Image) -> None:
    """As behind a proxy, which sends one request after the other, or all at once."""
    good = f"Authorization: {basic('root')['Authorization']}"
    bad = f"Authorization: {basic('mallory')['Authorization']}"
    path = f"/v2/{NAME}/manifests/latest"
    asked_for = [head(path, good), head(path, bad), head(path), head(path, good), head(path, bad)]
    async with wire(registry.client) as talk:
        await talk.send(b"".join(asked_for))
        assert [(await talk.answer()).status for _ in asked_for] == [200, 404, 401, 200, 404]


def test_a_long_line_keeps_nobody_waiting(tmp_path: Path) -> None:
    """To see that it is none of ours must not take the square of its length."""
    lines = [b"PATCH " + b"/blobs/uploads/" * 17_000, b"PUT " + b"/blobs/uploads/a" * 16_000]
    with hythe_server(tmp_path) as server, ExitStack() as stack:
        for line in lines * 4:
            talk = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            # It may be cut off before the end.
            with suppress(OSError):
                talk.sendall(line)
        answer = exchange(server.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", end=False)
        assert answer.startswith(b"HTTP/1.1 200 ")


# --- those who take their time --------------------------------------------------------------------------------------


async def test_a_form_that_comes_byte_by_byte_is_not_waited_for(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.access.tokens._FORM_SECONDS", 0.5)
    async with wire(registry.client) as talk:
        form = ["Content-Type: application/x-www-form-urlencoded", "Content-Length: 60000"]
        await talk.request("POST", "/v2/token", form)

        async def drip() -> None:
            with suppress(ConnectionError):
                while True:
                    await talk.send(b"a")
                    await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        try:
            answer = await talk.answer()
        finally:
            dripping.cancel()
        assert answer.status == 408
        assert answer.headers["Connection"] == "close"


def test_a_client_that_takes_nothing_of_its_answers_keeps_no_place(tmp_path: Path) -> None:
    with (
        hythe_server(tmp_path, environment={"HYTHE_UPLOADS__STALL_SECONDS": "1"}) as server,
        socket.create_connection(("127.0.0.1", server.port)) as greedy,
    ):
        own = greedy.getsockname()[1]
        greedy.settimeout(2)
        # It may be cut off by then.
        with suppress(OSError):
            while True:
                greedy.sendall(b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)

        def is_kept() -> bool:
            found = psutil.Process(server.pid).net_connections("tcp4")
            return any(each.raddr and each.raddr.port == own for each in found)

        wait_until(lambda: not is_kept(), "the end of the connection", PATIENCE)


# --- what is small on the wire and large in memory ------------------------------------------------------------------


async def test_what_comes_compressed_is_not_unpacked(registry: Registry, target: Image) -> None:
    bomb = gzip.compress(bytes(50 << 20))
    by = {**basic("mallory"), "Content-Encoding": "gzip"}
    location = (await ask(registry.client, "POST", f"/v2/{OWN}/blobs/uploads/", headers=basic("mallory"))).headers[
        "Location"
    ]
    for coding in ("gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip"):
        headers = {**by, "Content-Encoding": coding}
        for method, path in (
            ("PUT", f"/v2/{OWN}/manifests/t"),
            ("PATCH", location),
            ("PUT", f"{location}?digest={ABSENT}"),
            ("POST", f"/v2/{OWN}/blobs/uploads/?digest={ABSENT}"),
        ):
            answer = await ask(registry.client, method, path, data=bomb, headers=headers)
            assert answer.status == 415, (coding, method, path)
    form = {"Content-Type": "application/x-www-form-urlencoded", "Content-Encoding": "gzip"}
    packed = gzip.compress(f"grant_type=password&username=mallory&password={PASSWORD}".encode())
    answer = await ask(registry.client, "POST", "/v2/token", data=packed, headers=form)
    assert answer.status == 400
    status = await ask(registry.client, "GET", location, headers=basic("mallory"))
    assert status.headers["Range"] == "0-0"


DEEP = b"[" * 100_000 + b"]" * 100_000
DIGITS = b"9" * 100_000
DOCUMENTS = {
    "nested lists": DEEP,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested inside": b'{"schemaVersion":2,"config":' + DEEP + b',"layers":[]}',
    "nested annotations": b'{"schemaVersion":2,"annotations":{"a":' + DEEP + b"}}",
    "a long integer": b'{"schemaVersion":' + DIGITS + b"}",
    "a long size": b'{"schemaVersion":2,"config":{"mediaType":"a/b","digest":"x","size":' + DIGITS + b'},"layers":[]}',
    "a large exponent": b'{"schemaVersion":2,"config":{"mediaType":"a/b","digest":"x","size":1e' + DIGITS + b"}}",
    "a surrogate": b'{"schemaVersion":2,"config":{"mediaType":"\\ud800","digest":"x","size":1},"layers":[]}',
    "many keys": b"{" + b",".join(b'"%d":1' % number for number in range(100_000)) + b"}",
    "one key often": b'{"schemaVersion":2' + b',"config":1' * 50_000 + b"}",
    "another encoding": '{"schemaVersion":2}'.encode("utf-16"),
    "not a number": b'{"schemaVersion":NaN}',
}


async def test_a_manifest_that_is_hard_to_read_is_refused(registry: Registry, target: Image) -> None:
    for kind, content in DOCUMENTS.items():
        for media_type in (OCI_MANIFEST, OCI_INDEX):
            answer = await push_manifest(registry.client, OWN, content, basic("mallory"), media_type)
            assert answer.codes == ["MANIFEST_INVALID"], kind


async def test_a_configuration_that_is_hard_to_read_tells_no_platform(registry: Registry, target: Image) -> None:
    by = basic("mallory")
    for config in DOCUMENTS.values():
        await push_blob(registry.client, OWN, config, by)
        content = {"schemaVersion": 2, "config": descriptor(config, OCI_CONFIG), "layers": []}
        tag = digest_of(config).partition(":")[2]
        answer = await push_manifest(registry.client, OWN, json.dumps(content).encode(), by, reference=tag)
        assert answer.status == 201, answer
    tags = (await ask(registry.client, "GET", f"/api/v1/tags?repository={OWN}", headers=by)).json["tags"]
    assert [tag["platforms"] for tag in tags] == [[]] * len(DOCUMENTS)


#: As much as fits into a header.
HARD_PARTS = {
    "nested lists": b"[" * 4000 + b"]" * 4000,
    "nested objects": b'{"a":' * 1500 + b"1" + b"}" * 1500,
    "a long integer": b'{"alg":"ES256","kid":"a","exp":' + b"9" * 8000 + b"}",
    "a surrogate": b'{"alg":"ES256","kid":"\\ud800","iss":"\\ud800"}',
    "not a number": b'{"alg":"ES256","kid":"a","exp":NaN}',
}


@pytest.mark.parametrize("kind", HARD_PARTS)
async def test_a_token_that_is_hard_to_read_is_none(registry: Registry, kind: str) -> None:
    asked = []
    for parts in ((HARD_PARTS[kind], b"{}"), (b'{"alg":"ES256","kid":"a"}', HARD_PARTS[kind])):
        token = ".".join(map(encoded, (*parts, bytes(64))))
        # Once as ours, once as another issuer's in place of a password, and in a form.
        sent = [{"Authorization": f"Bearer {token}"}, basic("root", token)]
        forms = [
            {"grant_type": "urn:ietf:params:oauth:grant-type:token-exchange", "subject_token": token},
            {"grant_type": "refresh_token", "refresh_token": token},
        ]
        asked += [ask(registry.client, "GET", "/v2/", headers=headers) for headers in sent]
        asked += [ask(registry.client, "POST", "/v2/token", data=form) for form in forms]
    assert [answer.codes for answer in await asyncio.gather(*asked)] == [["UNAUTHORIZED"]] * len(asked)


async def test_what_is_listed_with_each_tag_is_small(registry: Registry, target: Image) -> None:
    """A thousand tags are one answer, and each of them could tell again what one manifest says of its platforms."""
    by = basic("mallory")
    child = await push_blob(registry.client, OWN, b"child", by)
    named = {"mediaType": OCI_MANIFEST, "digest": child, "size": 5}
    large = [
        index_of({**named, "platform": {"os": "a" * 100_000, "architecture": "b"}}),
        index_of(*[{**named, "platform": {"os": "linux", "architecture": f"cpu{number}"}} for number in range(1000)]),
    ]
    config = json.dumps({"os": "linux", "architecture": "c" * 100_000}).encode()
    await push_blob(registry.client, OWN, config, by)
    image = json.dumps({"schemaVersion": 2, "config": descriptor(config, OCI_CONFIG), "layers": []}).encode()
    for number, content in enumerate([*large, image]):
        media_type = OCI_MANIFEST if content is image else OCI_INDEX
        answer = await push_manifest(registry.client, OWN, content, by, media_type, f"t{number}")
        assert answer.status == 201, answer
    answer = await ask(registry.client, "GET", f"/api/v1/tags?repository={OWN}", headers=by)
    assert len(answer.json["tags"]) == 3
    assert len(answer.body) < 10_000


async def test_referrers_with_much_to_say_come_in_small_pages(registry: Registry, target: Image) -> None:
    by = basic("mallory")
    config = await push_blob(registry.client, OWN, b"{}", by)
    subject = {"mediaType": OCI_MANIFEST, "digest": ABSENT, "size": 7}
    pushed = set()
    for number in range(9):
        content = {
            "schemaVersion": 2,
            "config": {"mediaType": "application/x", "digest": config, "size": 2},
            "layers": [],
            "subject": subject,
            "annotations": {"number": str(number), "text": "a" * 1_000_000},
        }
        answer = await push_manifest(registry.client, OWN, json.dumps(content).encode(), by)
        assert answer.status == 201, answer
        pushed.add(answer.headers["Docker-Content-Digest"])
    path, found = f"/v2/{OWN}/referrers/{ABSENT}", []
    while path:
        answer = await ask(registry.client, "GET", path, headers=by)
        assert len(answer.body) < 5 << 20
        for entry in answer.json["manifests"]:
            assert len(entry["annotations"]["text"]) == 1_000_000
            found.append(entry["digest"])
        link = answer.headers.get("Link", "")
        path = link[1 : link.index(">")] if link else ""
    assert sorted(found) == sorted(pushed)


async def test_the_type_of_an_artifact_is_no_place_for_more(registry: Registry, target: Image) -> None:
    """Whoever asks for referrers of one type has all of their types read."""
    by = basic("mallory")
    config = await push_blob(registry.client, OWN, b"{}", by)
    content = {
        "schemaVersion": 2,
        "artifactType": "a/" + "b" * 300,
        "config": {"mediaType": OCI_CONFIG, "digest": config, "size": 2},
        "layers": [],
    }
    answer = await push_manifest(registry.client, OWN, json.dumps(content).encode(), by)
    assert answer.codes == ["MANIFEST_INVALID"]


async def test_tokens_for_very_many_repositories_are_not_remembered(registry: Registry, target: Image) -> None:
    """Anybody may have as many as he likes, where anything is public, and each of them would take its room."""
    owners = {getattr(route.handler, "__self__", None) for route in registry.client.app.router.routes()}
    (dispatcher,) = [each for each in owners if isinstance(each, Dispatcher)]
    known = dispatcher._gate._credentials._known
    for number, remembered in ((3, 1), (100, 0)):
        scope = " ".join(f"repository:mallory/{each}:pull" for each in range(number))
        by = await registry.bearer("mallory", scope=scope)
        before = len(known)
        answer = await ask(registry.client, "GET", "/v2/mallory/1/tags/list", headers=by)
        assert answer.codes == ["NAME_UNKNOWN"]
        assert len(known) - before == remembered


# --- floods ---------------------------------------------------------------------------------------------------------

FLOODS = {
    "many headers": b"a: b\r\n" * 100_000,
    "many names of headers": b"".join(b"h%d: b\r\n" % number for number in range(100_000)),
    "a long header": b"a: " + b"b" * 1_000_000 + b"\r\n",
    "a long name of a header": b"a" * 1_000_000 + b": b\r\n",
    "many folded lines": b"a: b\r\n" + b" c\r\n" * 100_000,
    "many trailers": b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 100_000,
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_of_headers_is_cut_off(registry: Registry, kind: str) -> None:
    async with wire(registry.client) as talk:
        # Whoever is cut off while he sends may not get to see why.
        with suppress(ConnectionError):
            await talk.send(b"POST /v2/token HTTP/1.1\r\nHost: x\r\n" + FLOODS[kind])
        assert (await talk.rest())[:12] in (b"HTTP/1.0 400", b"HTTP/1.1 400", b"")
    assert (await ask(registry.client, "GET", "/healthz")).status == 200


# --- what is written down -------------------------------------------------------------------------------------------


async def events(registry: Registry) -> list[audit.Event]:
    found = await registry.database.read(audit.find, since=0, user=None, repository=None, before=None, limit=10_000)
    return [event for _, event in found]


FORGED_NAMES = [
    "root\nroot",
    "root\r\n12:00:00 info audit  actor=root",
    "\x1b[2J\x1b[1;1Hroot",
    "root\x9b2J",
    "root\u2028root",
    "root\u202etoor",
    "root\0",
    '"}\n{"event":"audit"',
    "\ufeffroot",
]


async def test_a_name_that_nobody_can_have_is_in_the_audit_and_so_is_the_next(registry: Registry) -> None:
    """No database may stumble over it, or all that was refused in the same second would be forgotten."""
    asked = [ask(registry.client, "GET", "/v2/", headers=basic(name)) for name in FORGED_NAMES]
    assert {answer.status for answer in await asyncio.gather(*asked)} == {401}
    assert (await ask(registry.client, "GET", "/v2/", headers=basic("bob"))).status == 401

    async def is_written() -> bool:
        return len(await events(registry)) > len(FORGED_NAMES)

    await eventually(is_written)
    found = [event.target for event in await events(registry)]
    assert found[0] == "bob"
    assert all(name.isprintable() for name in found)


@pytest.fixture(params=["json", "text"])
def logging_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HytheServer]:
    environment = {"HYTHE_LOG__FORMAT": request.param, "HYTHE_ACCOUNTS__ADMIN_PASSWORD": PASSWORD}
    environment |= {"HYTHE_SERVER__BEHIND_PROXY": "true"}
    with hythe_server(tmp_path, environment=environment) as server:
        yield server


#: But line feeds, by which lines end.
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\ufeff]")


def test_nobody_writes_a_line_of_the_log_or_of_the_audit_by_a_name(logging_server: HytheServer) -> None:
    sent = [basic(name)["Authorization"].encode() for name in FORGED_NAMES]
    sent += [b"Bearer " + segment({"alg": f"ES256\n{name}"}).encode() + b".e30.e30" for name in FORGED_NAMES]

    def answered(credentials: bytes) -> bytes:
        lines = [
            b"GET /v2/ HTTP/1.1",
            b"Host: x",
            b"Connection: close",
            b"Authorization: " + credentials,
            b"X-Forwarded-For: fe80::1%\xc2\x9b2J\xe2\x80\xa8",
            b"User-Agent: \xc2\x9b2J\xe2\x80\xa8",
        ]
        return exchange(logging_server.port, b"\r\n".join(lines) + b"\r\n\r\n", end=False)

    with ThreadPoolExecutor(6) as threads:
        assert {answer[:13] for answer in threads.map(answered, sent)} == {b"HTTP/1.1 401 "}
    assert logging_server.stop() == 0
    text = logging_server.output.read_text(encoding="utf-8")
    # One line is for people: where the server listens.
    lines = [line for line in text.rstrip("\n").split("\n") if not line.startswith("Hythe listens on ")]
    refusals = [line for line in lines if "audit" in line]
    assert len(refusals) >= len(FORGED_NAMES)
    assert not _CONTROLS.search(text)
    if logging_server.environment["HYTHE_LOG__FORMAT"] == "json":
        entries = [json.loads(line) for line in lines]
        assert {entry["outcome"] for entry in entries if entry["event"] == "audit"} == {"refused"}
    else:
        assert all(re.match(r"\d\d:\d\d:\d\d warning audit  ", line) for line in refusals)
    data = str(logging_server.data)
    shown = run(sys.executable, "-m", "hythe", "audit", "--data", data)
    told_as_json = json.loads(run(sys.executable, "-m", "hythe", "audit", "--json", "--data", data))
    assert not _CONTROLS.search(shown)
    # One line for each, and that of the columns' names.
    assert len(shown.rstrip("\n").split("\n")) == len(told_as_json) + 1


def test_only_its_owner_and_his_group_can_read_the_database(tmp_path: Path) -> None:
    """In it are hashes of passwords, and the keys by which tokens are signed. Its directory may be an open one."""
    path = tmp_path / "hythe.db"
    upgrade(f"sqlite:///{path}")
    assert path.stat().st_mode & 0o007 == 0


async def test_whoever_is_refused_all_the_time_does_not_fill_the_audit(registry: Registry, target: Image) -> None:
    for number in range(300):
        headers = {"Authorization": f"Bearer no.good.{number}"}
        assert (await ask(registry.client, "GET", "/v2/", headers=headers)).status == 401

    async def is_counted() -> bool:
        return any(event.action == "refusals" for event in await events(registry))

    await eventually(is_counted)
    logins = [event for event in await events(registry) if event.action == "login"]
    # As many as a minute may have, and those of the seconds that this takes.
    assert 60 <= len(logins) < 200


# --- who there is ---------------------------------------------------------------------------------------------------


async def test_who_there_is_is_told_neither_by_words_nor_by_the_work_that_is_done(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("alice", "disabled"):
        await registry.user(name)
    await registry.database.write(accounts.set_disabled, "disabled", disabled=True)
    await registry.database.write(accounts.add, "robot", accounts.ROBOT, None)
    hashed: list[str] = []
    verify = argon2.PasswordHasher.verify

    def counting(hasher: argon2.PasswordHasher, known: str, password: str) -> bool:
        hashed.append(known)
        return verify(hasher, known, password)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", counting)
    names = ["alice", "disabled", "robot", "nobody", "a" * 5000, "users", "everybody", "team:dev", "", "alice\0"]
    asked = []
    for name in names:
        password = PASSWORD if name == "disabled" else "wrong password"
        form = {"grant_type": "password", "username": name, "password": password}
        asked.append(ask(registry.client, "GET", "/v2/", headers=basic(name, password)))
        asked.append(ask(registry.client, "POST", "/v2/token", data=form))
    answers = [told(answer) for answer in await asyncio.gather(*asked)]
    assert answers[0][0] == 401
    assert answers == [answers[0], answers[1]] * len(names)
    # One hash for each, as costly as any.
    assert len(hashed) == len(asked)
    assert all(argon2.extract_parameters(known) == argon2.extract_parameters(HASH) for known in hashed)


# --- those who are quick --------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """Holds passwords up while they are checked, until it is told to go on."""

    begun: threading.Event
    go_on: threading.Event


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Held]:
    held = _Held(threading.Event(), threading.Event())
    check = passwords._check

    def checked(hashed: str | None, password: str) -> bool:
        held.begun.set()
        held.go_on.wait(PATIENCE)
        return check(hashed, password)

    monkeypatch.setattr("registry.access.passwords._check", checked)
    yield held
    held.go_on.set()


@pytest.mark.parametrize("asked_by", ["query", "form", "api"])
async def test_a_login_that_a_new_password_overtakes_gives_nothing_that_lasts(
    registry: Registry, target: Image, checking: _Held, asked_by: str
) -> None:
    """Whoever has the old password, and is logging in all the time, is out when it is changed."""
    if asked_by == "query":
        query = {"offline_token": "true", "scope": f"repository:{OWN}:pull"}
        request = ask(registry.client, "GET", "/v2/token", params=query, headers=basic("mallory"))
    elif asked_by == "form":
        form = {"grant_type": "password", "username": "mallory", "password": PASSWORD, "access_type": "offline"}
        request = ask(registry.client, "POST", "/v2/token", data=form)
    else:
        request = ask(registry.client, "POST", "/api/v1/tokens?name=mine&days=0", headers=basic("mallory"))
    logging_in = asyncio.create_task(request)
    assert await asyncio.to_thread(checking.begun.wait, PATIENCE)
    await registry.database.write(accounts.set_password, "mallory", passwords.hash_password("another one"))
    checking.go_on.set()
    answer = await logging_in
    assert answer.status == 409, answer
    assert await registry.database.read(access_tokens.of, "mallory", refresh=True) == []


async def test_a_token_that_was_asked_for_by_a_password_that_is_changed_meanwhile_is_void(
    registry: Registry, target: Image, checking: _Held
) -> None:
    query = {"scope": f"repository:{OWN}:pull"}
    request = ask(registry.client, "GET", "/v2/token", params=query, headers=basic("mallory"))
    logging_in = asyncio.create_task(request)
    assert await asyncio.to_thread(checking.begun.wait, PATIENCE)
    await registry.database.write(accounts.set_password, "mallory", passwords.hash_password("another one"))
    checking.go_on.set()
    answer = await logging_in
    if answer.status == 200:
        headers = {"Authorization": f"Bearer {answer.json['token']}"}
        answer = await ask(registry.client, "GET", "/v2/", headers=headers)
    assert answer.codes == ["UNAUTHORIZED"]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("manifest", "rule"),
        ("manifest", "read-only"),
        ("blob", "rule"),
        ("blob in chunks", "disabled"),
    ],
)
async def test_a_body_that_outlasts_the_right_to_send_it_is_not_kept(
    registry: Registry, target: Image, what: str, change: str
) -> None:
    """Whoever is about to lose his rights could begin a push, and end it when he likes."""
    by = f"Authorization: {basic('mallory')['Authorization']}"
    await push_blob(registry.client, OWN, target.config, basic("mallory"))
    content = json.dumps({"schemaVersion": 2, "config": descriptor(target.config, OCI_CONFIG), "layers": []}).encode()
    digest = digest_of(content)
    if what == "manifest":
        start = ("PUT", f"/v2/{OWN}/manifests/{digest}")
        found = f"/v2/{OWN}/manifests/{digest}"
    else:
        begun = await ask(registry.client, "POST", f"/v2/{OWN}/blobs/uploads/", headers=basic("mallory"))
        start = ("PUT", f"{begun.headers['Location']}?digest={digest}")
        found = f"/v2/{OWN}/blobs/{digest}"
    is_chunked = what == "blob in chunks"
    length = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(content)}"
    parts = [content[:10], content[10:]]
    if is_chunked:
        parts = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
        parts[1] += b"0\r\n\r\n"
    async with wire(registry.client) as talk:
        await talk.request(*start, [by, length, "Expect: 100-continue", f"Content-Type: {OCI_MANIFEST}"])
        # It is let in when it is invited.
        assert (await talk.answer()).status == 100
        await talk.send(parts[0])
        if change == "rule":
            await registry.database.write(rules.revoke, "mallory", "push", "mallory")
        elif change == "disabled":
            await registry.database.write(accounts.set_disabled, "mallory", disabled=True)
        else:
            await registry.database.write(policy.set_read_only, "the disk is being moved")
        await talk.send(parts[1])
        answer = await talk.answer()
    assert answer.status == {"rule": 403, "disabled": 401, "read-only": 503}[change], answer
    assert (await ask(registry.client, "GET", found, headers=basic("root"))).status == 404
