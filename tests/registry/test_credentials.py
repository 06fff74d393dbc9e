"""Credentials that nobody means: they are refused as others are, and disturb nothing."""

from __future__ import annotations

import asyncio
import base64

import pytest

from registry.metadata import access_tokens, audit
from tests.registry.accounts import PASSWORD, Registry, basic
from tests.registry.talk import ask, wire

#: What is no name, no password and no token, as it stands in the header.
STRANGE = {
    "zero in a name": b"Basic " + base64.b64encode(b"al\0ice:correct horse"),
    "zero in the name of a token": b"Basic " + base64.b64encode(b"al\0ice:hythe_x"),
    "zero in a password": b"Basic " + base64.b64encode(b"root:correct\0horse"),
    "zero in a token": b"Basic " + base64.b64encode(b"root:hythe_\0"),
    "zero in a signed token": b"Basic " + base64.b64encode(b"root:eyJ\0.a.b"),
    "no text": b"Basic " + base64.b64encode(b"\xff\xfe:\xff"),
    "half a character": b"Basic " + base64.b64encode(b"\xed\xa0\x80:correct horse"),
    "no base64": b"Basic \xff",
    "personal token of any bytes": b"Bearer hythe_\xff\x80",
    "token of any bytes": b"Bearer eyJ\xff.\x80.a",
    "another kind": b"Digest \xff",
    "nothing": b"",
}


async def test_credentials_of_any_bytes_are_refused_and_the_audit_has_them_all(registry: Registry) -> None:
    async def send(credential: bytes) -> tuple[int, list[str]]:
        async with wire(registry.client) as connection:
            await connection.send(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nAuthorization: " + credential + b"\r\n\r\n")
            answer = await connection.answer()
            return answer.status, answer.codes

    answers = await asyncio.gather(*map(send, STRANGE.values()))
    wrong = [each for each in zip(STRANGE, answers, strict=True) if each[1] != (401, ["UNAUTHORIZED"])]
    assert not wrong
    await registry.client.close()
    found = await registry.database.read(audit.find, since=0, user=None, repository=None, before=None, limit=100)
    events = [event for _, event in found]
    assert [event.action for event in events] == ["login"] * len(STRANGE)
    assert "al\\x00ice" in {event.target for event in events}


async def test_a_form_of_any_bytes_is_refused_likewise(registry: Registry) -> None:
    for form in (
        {"grant_type": "password", "username": "al\0ice", "password": "correct horse"},
        {"grant_type": "refresh_token", "refresh_token": "\0"},
    ):
        answer = await ask(registry.client, "POST", "/v2/token", data=form)
        assert (answer.status, answer.codes) == (401, ["UNAUTHORIZED"]), form


@pytest.mark.parametrize("how", ["query", "form"])
async def test_a_client_may_call_itself_anything(registry: Registry, how: str) -> None:
    if how == "query":
        query = {"offline_token": "true", "client_id": "doc\0ker"}
        answer = await ask(registry.client, "GET", "/v2/token", params=query, headers=basic("root"))
    else:
        login = {"grant_type": "password", "username": "root", "password": PASSWORD, "access_type": "offline"}
        answer = await ask(registry.client, "POST", "/v2/token", data={**login, "client_id": "doc\0ker"})
    assert answer.status == 200
    ((_, kept),) = await registry.database.read(access_tokens.of, "root", refresh=True)
    assert kept.name == "doc\\x00ker"
