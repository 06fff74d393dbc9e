"""A job logs in by the token that its own issuer signed: which tokens stand for which account, and which for none."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from registry.config import IssuerRule, IssuerSettings, Settings
from registry.metadata import accounts, audit, rules
from tests.registry.accounts import EVERYTHING, NAME, Registry, basic
from tests.registry.talk import Answer, ask
from tests.services.certificates import Authority
from tests.services.clock import Clock
from tests.services.issuer import AUDIENCE, DESCRIPTION, KEYS, Issuer, issuer

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ELSEWHERE = "/elsewhere"
RULES = (
    IssuerRule("ci", {"project_path": "work/*", "ref_protected": "true"}),
    IssuerRule("special", {"project_path": "lab/[a]?"}),
    IssuerRule("reader", {"project_path": "*"}),
    IssuerRule("numbered", {"runner": "12"}),
    IssuerRule("nobody", {"sub": "of nobody"}),
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
async def ci(request: pytest.FixtureRequest, tmp_path: Path, authority: Authority) -> AsyncIterator[Issuer]:
    """The issuer; over TLS where a test says "https"."""
    is_https = getattr(request, "param", "http") == "https"
    async with issuer(authority.sign(tmp_path) if is_https else None) as running:
        yield running


@pytest.fixture
def trusted(authority: Authority) -> str:
    """`issuers.ca_file`."""
    return str(authority.certificate)


@pytest.fixture
def settings(settings: Settings, ci: Issuer, trusted: str) -> Settings:
    believed = IssuerSettings(ci.url, AUDIENCE, RULES, trusted)
    return msgspec.structs.replace(settings, issuers=(believed,))


@pytest.fixture
async def registry(registry: Registry) -> Registry:
    for name in ("ci", "special", "reader", "numbered"):
        await registry.database.write(accounts.add, name, accounts.ROBOT, None)
    await registry.database.write(rules.grant, "org", "push", "ci", "")
    return registry


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, "registry.access.issuers")


async def log_in(registry: Registry, token: str) -> Answer:
    query = [("scope", EVERYTHING)]
    return await ask(registry.client, "GET", "/v2/token", params=query, headers=basic("job", token))


async def exchange(registry: Registry, token: str) -> Answer:
    form = {"grant_type": EXCHANGE, "subject_token": token, "scope": EVERYTHING}
    return await ask(registry.client, "POST", "/v2/token", data=form)


def claims_of(answer: Answer) -> dict[str, Any]:
    """Return what the token says that was given out."""
    assert answer.status == 200, answer
    claims: dict[str, Any] = jwt.decode(answer.json["token"], options={"verify_signature": False})
    return claims


async def refusal(registry: Registry, token: str) -> str:
    """Return what the audit says why a token is refused, by any way; this is the end of the registry."""
    for answer in await asyncio.gather(log_in(registry, token), exchange(registry, token)):
        assert (answer.status, answer.codes) == (401, ["UNAUTHORIZED"])
        assert "issuer" not in answer.body.decode()
    await registry.client.close()
    found = await registry.database.read(audit.find, since=0, user=None, repository=None, before=None, limit=2)
    events = [event for _, event in found]
    assert {(event.action, event.outcome, event.target) for event in events} == {
        ("login", "refused", "job"),
        ("login", "refused", ""),
    }
    (reason,) = {event.detail for event in events}
    assert token not in reason
    return reason


# --- whom it stands for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_the_token_of_a_job_is_good_in_place_of_a_password(
    registry: Registry, ci: Issuer, algorithm: str
) -> None:
    ci.new_key(algorithm)
    token = ci.token()
    path = f"/v2/{NAME}/blobs/uploads/"
    assert (await ask(registry.client, "POST", path, headers=basic("job", token))).status == 202
    for answer in (await log_in(registry, token), await exchange(registry, token)):
        assert claims_of(answer)["sub"] == "ci"
        by = {"Authorization": f"Bearer {answer.json['access_token']}"}
        assert (await ask(registry.client, "POST", path, headers=by)).status == 202
        assert (await ask(registry.client, "POST", "/v2/other/blobs/uploads/", headers=by)).status == 403
    assert ci.asked == [DESCRIPTION, KEYS]


async def test_an_exchange_is_answered_as_other_clients_expect_it(registry: Registry, ci: Issuer) -> None:
    answer = await exchange(registry, ci.token())
    assert answer.json["issued_token_type"] == "urn:ietf:params:oauth:token-type:access_token"
    assert answer.json["token_type"] == "Bearer"


@pytest.mark.parametrize(
    ("claims", "account"),
    [
        ({}, "ci"),
        ({"project_path": "work/a/b\nc"}, "ci"),
        ({"ref_protected": True}, "ci"),
        ({"ref_protected": False}, "reader"),
        ({"ref_protected": "TRUE"}, "reader"),
        ({"ref_protected": None}, "reader"),
        ({"project_path": "workshop/app"}, "reader"),
        ({"project_path": "other/work/app"}, "reader"),
        ({"project_path": "lab/[a]?"}, "special"),
        ({"project_path": "lab/ab"}, "reader"),
        ({"project_path": None, "runner": 12}, "numbered"),
    ],
)
async def test_a_token_stands_for_the_account_of_the_first_rule_that_matches(
    registry: Registry, ci: Issuer, claims: dict[str, Any], account: str
) -> None:
    assert claims_of(await log_in(registry, ci.token(**claims)))["sub"] == account


async def test_what_is_granted_ends_no_later_than_the_token_of_the_issuer(registry: Registry, ci: Issuer) -> None:
    end = int(time.time()) + 100
    for answer in (await log_in(registry, ci.token(exp=end)), await exchange(registry, ci.token(exp=end))):
        assert claims_of(answer)["exp"] <= end
        assert answer.json["expires_in"] <= 100
    assert (await log_in(registry, ci.token())).json["expires_in"] == 300


async def test_an_account_that_is_disabled_gets_nothing_by_it(registry: Registry, ci: Issuer) -> None:
    token = ci.token()
    path = f"/v2/{NAME}/blobs/uploads/"
    assert (await ask(registry.client, "POST", path, headers=basic("job", token))).status == 202
    await registry.database.write(accounts.set_disabled, "ci", disabled=True)
    assert (await ask(registry.client, "POST", path, headers=basic("job", token))).status == 401
    assert "there is no account ci, or it is disabled" in await refusal(registry, token)


async def test_a_rule_for_an_account_that_is_not_there_gives_nothing(registry: Registry, ci: Issuer) -> None:
    assert "no account nobody" in await refusal(registry, ci.token(project_path=None, sub="of nobody"))


# --- tokens that are not good --------------------------------------------------------------------------------


def unsigned(ci: Issuer) -> str:
    return jwt.encode(ci.claims(), "", "none", {"kid": next(iter(ci.keys))})


def signed_by_the_public_key(ci: Issuer) -> str:
    """Sign as if the public key were a secret that both sides know."""
    ((key_id, key),) = ci.keys.items()
    secret = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    parts = [{"alg": "HS256", "typ": "JWT", "kid": key_id}, ci.claims()]
    body = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts)
    signature = base64.urlsafe_b64encode(hmac.digest(secret, body.encode(), "sha256")).rstrip(b"=").decode()
    return f"{body}.{signature}"


def signed(ci: Issuer, key: Any, algorithm: str = "ES256", key_id: str = "") -> str:
    return jwt.encode(ci.claims(), key, algorithm, {"kid": key_id or next(iter(ci.keys))})


def spoilt(token: str) -> str:
    body, _, signature = token.rpartition(".")
    return f"{body}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"


NOT_GOOD: dict[str, tuple[Callable[[Issuer], str], str]] = {
    "no rule": (lambda ci: ci.token(project_path=None), "no rule of the configuration matches"),
    "for somebody else": (lambda ci: ci.token(aud="elsewhere"), "Audience"),
    "for nobody": (lambda ci: ci.token(aud=None), "aud"),
    "of another issuer": (lambda ci: ci.token(iss="https://elsewhere.test"), "not in the configuration"),
    "of no issuer": (lambda ci: ci.token(iss=None), "not in the configuration"),
    "ended": (lambda ci: ci.token(exp=int(time.time()) - 60), "expired"),
    "ended just now": (lambda ci: ci.token(exp=int(time.time()) - 2), "ended"),
    "without an end": (lambda ci: ci.token(exp=None), "exp"),
    "without a subject": (lambda ci: ci.token(sub=None), "sub"),
    "not valid yet": (lambda ci: ci.token(nbf=int(time.time()) + 300), "not yet valid"),
    "unsigned": (unsigned, "signed by 'none'"),
    "public key as a secret": (signed_by_the_public_key, "signed by 'HS256'"),
    "spoilt": (lambda ci: spoilt(ci.token()), "Signature"),
    "another key": (lambda ci: signed(ci, ec.generate_private_key(ec.SECP256R1())), "Signature"),
    "another curve": (lambda ci: signed(ci, ec.generate_private_key(ec.SECP384R1()), "ES384"), "curve"),
    "unknown key": (lambda ci: signed(ci, ci.keys[next(iter(ci.keys))], key_id="x"), "no such key"),
    "nonsense": (lambda _: "eyJ.a.b", "token of another issuer"),
}


@pytest.mark.parametrize("kind", NOT_GOOD)
async def test_a_token_that_is_not_good_opens_nothing_and_the_audit_says_why(
    registry: Registry, ci: Issuer, kind: str
) -> None:
    make, reason = NOT_GOOD[kind]
    assert reason in await refusal(registry, make(ci))


async def test_a_token_that_is_far_too_long_is_not_looked_at(registry: Registry, ci: Issuer) -> None:
    assert (await exchange(registry, ci.token(more="x" * 16_000))).status == 401
    assert ci.asked == []


# --- issuers that are not good -------------------------------------------------------------------------------


def text(body: str) -> web.Response:
    return web.Response(text=body, content_type="application/json")


def redirected() -> web.Response:
    return web.Response(status=302, headers={"Location": ELSEWHERE})


def keys_at(ci: Issuer, url: str) -> web.Response:
    return text(json.dumps({"issuer": ci.url, "jwks_uri": url}))


WRONG_ANSWERS: dict[str, tuple[str, Callable[[Issuer], web.Response], str]] = {
    "another issuer": (DESCRIPTION, lambda _: text('{"issuer": "https://elsewhere.test"}'), "describes itself"),
    "no description": (DESCRIPTION, lambda _: web.Response(status=404), "cannot be had"),
    "description elsewhere": (DESCRIPTION, lambda _: redirected(), "cannot be had"),
    "keys where nobody listens": (DESCRIPTION, lambda ci: keys_at(ci, "http://127.0.0.1:1/keys"), "cannot be had"),
    "keys in a file": (DESCRIPTION, lambda ci: keys_at(ci, "file:///etc/passwd"), "cannot be had"),
    "keys nowhere": (DESCRIPTION, lambda ci: text(json.dumps({"issuer": ci.url})), "cannot be had"),
    "description is a list": (DESCRIPTION, lambda _: text("[]"), "cannot be had"),
    "keys fail": (KEYS, lambda _: web.Response(status=500), "cannot be had"),
    "keys elsewhere": (KEYS, lambda _: redirected(), "cannot be had"),
    "keys too large": (KEYS, lambda _: text('{"keys": []' + " " * (1 << 20) + "}"), "cannot be had"),
    "keys not JSON": (KEYS, lambda _: text("<html>"), "cannot be had"),
    "keys are no list": (KEYS, lambda _: text('{"keys": null}'), "cannot be had"),
    "no keys": (KEYS, lambda _: text("{}"), "no such key"),
}


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
async def test_an_issuer_that_answers_wrongly_vouches_for_nobody(registry: Registry, ci: Issuer, kind: str) -> None:
    path, answer, reason = WRONG_ANSWERS[kind]
    ci.instead[path] = lambda: answer(ci)
    assert reason in await refusal(registry, ci.token())
    assert ELSEWHERE not in ci.asked


async def test_keys_that_cannot_be_used_here_do_not_spoil_the_others(registry: Registry, ci: Issuer) -> None:
    ci.others = [{"kty": "new", "kid": "a"}, {"kty": "RSA", "kid": "b", "alg": "RSA-OAEP", "n": "AQAB", "e": "AQAB"}]
    assert claims_of(await log_in(registry, ci.token()))["sub"] == "ci"


async def test_a_secret_among_the_keys_is_none(registry: Registry, ci: Issuer) -> None:
    secret = base64.urlsafe_b64encode(b"x" * 32).decode()
    ci.others = [{"kty": "oct", "kid": "secret", "k": secret, "alg": "HS256"}]
    assert "HS256" in await refusal(registry, signed(ci, b"x" * 32, "HS256", "secret"))


async def test_keys_that_come_in_many_pieces_are_read_to_the_end(registry: Registry, ci: Issuer) -> None:
    ci.instead[KEYS] = lambda: text(json.dumps({"padding": "x" * 900_000, "keys": ci.shown_keys()}))
    assert claims_of(await log_in(registry, ci.token()))["sub"] == "ci"


# --- when keys are fetched -----------------------------------------------------------------------------------


async def test_a_flood_of_unknown_keys_makes_no_flood_of_fetches(registry: Registry, ci: Issuer, clock: Clock) -> None:
    key = ec.generate_private_key(ec.SECP256R1())

    async def flood(name: str) -> None:
        tokens = [signed(ci, key, key_id=f"{name} {number}") for number in range(5)]
        answers = await asyncio.gather(*[exchange(registry, token) for token in tokens])
        assert {answer.status for answer in answers} == {401}

    await flood("first")
    assert ci.asked.count(KEYS) == 1
    await flood("second")
    assert ci.asked.count(KEYS) == 1
    clock.advance(11)
    await flood("third")
    assert ci.asked.count(KEYS) == 2


async def test_a_new_key_of_the_issuer_is_found_and_one_that_it_took_back_is_forgotten(
    registry: Registry, ci: Issuer, clock: Clock
) -> None:
    old = ci.token()
    assert (await log_in(registry, old)).status == 200
    ci.keys.clear()
    ci.new_key()
    clock.advance(11)
    assert (await log_in(registry, ci.token())).status == 200
    assert (await exchange(registry, old)).status == 401


async def test_keys_are_fetched_anew_now_and_then_though_all_are_known(
    registry: Registry, ci: Issuer, clock: Clock
) -> None:
    token = ci.token()
    assert (await exchange(registry, token)).status == 200
    ci.keys.clear()
    ci.new_key()
    clock.advance(3601)
    assert (await exchange(registry, token)).status == 401


async def test_an_issuer_that_is_down_vouches_for_nobody_until_it_is_back(
    registry: Registry, ci: Issuer, clock: Clock
) -> None:
    ci.instead[DESCRIPTION] = lambda: web.Response(status=503)
    assert (await log_in(registry, ci.token())).status == 401
    ci.instead.clear()
    clock.advance(11)
    assert (await log_in(registry, ci.token())).status == 200


async def test_an_issuer_that_is_down_stops_no_job_whose_key_is_known(
    registry: Registry, ci: Issuer, clock: Clock
) -> None:
    assert (await exchange(registry, ci.token())).status == 200
    ci.instead[DESCRIPTION] = lambda: web.Response(status=503)
    clock.advance(3601)
    assert (await exchange(registry, ci.token())).status == 200
    assert ci.asked.count(DESCRIPTION) == 2


# --- over TLS ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ci", ["https"], indirect=True)
async def test_an_issuer_is_believed_over_tls_by_the_authority_that_is_named(registry: Registry, ci: Issuer) -> None:
    assert ci.url.startswith("https://")
    assert (await log_in(registry, ci.token())).status == 200


@pytest.mark.parametrize("ci", ["https"], indirect=True)
@pytest.mark.parametrize("trusted", ["", "/nowhere/authority.crt"])
async def test_an_issuer_whose_certificate_cannot_be_checked_vouches_for_nobody(
    registry: Registry, ci: Issuer, trusted: str
) -> None:
    assert "cannot be had" in await refusal(registry, ci.token())
    assert ci.asked == []
