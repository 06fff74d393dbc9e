"""How often somebody may ask, pull and fail to log in: who is counted for whom, and what he is told."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

import pytest
from aiohttp import ClientSession, TCPConnector

from registry.access.limits import LoginLimits, Rate, network_of, retry_after
from registry.errors import TooManyRequests
from registry.metadata import rules
from tests.conftest import Start
from tests.registry.accounts import MANIFEST_TYPE, NAME, Registry, basic
from tests.registry.talk import Answer, Wire, ask, wire
from tests.services.clock import Clock

MANIFEST = f"/v2/{NAME}/manifests/latest"
TAGS = f"/v2/{NAME}/tags/list"
#: Where requests come from.
HERE, THERE, ELSEWHERE = "127.0.0.1", "127.0.0.2", "127.0.0.3"

Begin = Callable[..., Awaitable[Registry]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, "registry.access.limits")


@pytest.fixture
async def begin(start: Start, registry: Registry) -> Begin:
    """Start a registry with limits on the data of one without, where there is an image that everybody may pull."""
    await registry.image()
    await registry.database.write(rules.grant, "", "pull", "everybody", "")
    for name in ("alice", "bob"):
        await registry.user(name, "push")

    async def begin_one(server: Mapping[str, object] | None = None, **limits: int) -> Registry:
        return Registry(await start(limits=limits, server=dict(server or {})), registry.database)

    return begin_one


async def ask_from(
    source: str, registry: Registry, path: str, headers: Mapping[str, str] | None = None, method: str = "GET"
) -> int:
    """Send a request from an address of this host, and return how it was answered."""
    url = registry.client.make_url(path)
    async with (
        ClientSession(connector=TCPConnector(local_addr=(source, 0))) as session,
        session.request(method, url, headers=headers) as response,
    ):
        return response.status


def check_refusal(answer: Answer) -> int:
    """Check what somebody is told who asks too often; return the seconds that he is to wait."""
    assert (answer.status, answer.codes) == (429, ["TOOMANYREQUESTS"])
    seconds = int(answer.headers["Retry-After"])
    assert seconds >= 1
    return seconds


# --- rates ---------------------------------------------------------------------------------------------------


def test_what_was_not_used_adds_up_to_what_one_period_allows(clock: Clock) -> None:
    rate = Rate(4, 2)
    for _ in range(3):
        assert [rate.take("a") for _ in range(4)] == [0] * 4
        assert rate.take("a") == pytest.approx(0.5)
        # Whoever is refused has taken nothing.
        clock.advance(0.3)
        assert rate.take("a") == pytest.approx(0.2)
        clock.advance(0.21)
        assert rate.take("a") == 0
        assert rate.take("a") > 0
        assert rate.take("b") == 0
        clock.advance(1000)


def test_a_rate_of_nothing_is_no_limit() -> None:
    rate = Rate(0, 1)
    assert not rate.is_on
    assert {rate.take("a") for _ in range(1000)} == {0}


def test_those_who_were_not_seen_for_longest_are_forgotten_first(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.access.limits._KEYS_LIMIT", 2)
    rate = Rate(1, 1)
    assert [rate.take(client) for client in ("a", "b")] == [0, 0]
    assert rate.take("a") > 0
    assert rate.take("c") == 0
    assert rate.take("a") > 0
    assert rate.take("b") == 0


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_of_ipv6_somebody_is_a_whole_network(address: str, network: str) -> None:
    assert network_of(address) == network


@pytest.mark.parametrize("seconds", [0.001, 0.5, 1.0, 1.5, 2.0, 59.2, 3599.99])
def test_the_time_to_wait_is_told_in_whole_seconds_that_suffice(seconds: float) -> None:
    told = retry_after(seconds)["Retry-After"]
    assert told.isdecimal()
    assert max(1, seconds) <= int(told) <= seconds + 1.5


# --- requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v2/", "/v2/_catalog", TAGS, MANIFEST, "/v2/token", "/api/v1/repositories", "/api/v1/tokens", "/metrics"]
)
async def test_a_request_more_than_is_allowed_is_refused_until_time_has_passed(
    begin: Begin, clock: Clock, path: str
) -> None:
    registry = await begin(requests_per_second=3)
    for _ in range(2):
        for _ in range(3):
            assert (await ask(registry.client, "GET", path, headers=basic("alice"))).status == 200
        check_refusal(await ask(registry.client, "GET", path, headers=basic("alice")))
        clock.advance(1)


async def test_who_only_asks_whether_we_live_is_not_counted(begin: Begin, clock: Clock) -> None:
    registry = await begin(requests_per_second=1)
    for path in ("/healthz", "/readyz", "/api/v1/openapi.json"):
        for _ in range(3):
            assert (await ask(registry.client, "GET", path)).status == 200


async def test_requests_of_an_account_are_counted_together_wherever_and_however_it_comes(
    begin: Begin, clock: Clock
) -> None:
    registry = await begin(requests_per_second=3)
    personal = await registry.personal("alice")
    bearer = await registry.bearer("alice")
    assert await ask_from(THERE, registry, TAGS, bearer) == 200
    assert await ask_from(ELSEWHERE, registry, TAGS, basic("alice", personal)) == 200
    for headers in (bearer, basic("alice"), basic("alice", personal)):
        assert await ask_from(HERE, registry, TAGS, headers) == 429
    # Another account is another one, and nobody at the same address too.
    assert await ask_from(HERE, registry, TAGS, basic("bob")) == 200
    assert await ask_from(HERE, registry, TAGS) == 200


async def test_requests_without_an_account_are_counted_by_address(begin: Begin, clock: Clock) -> None:
    registry = await begin(requests_per_second=2)
    for source in (THERE, ELSEWHERE):
        assert [await ask_from(source, registry, path) for path in (TAGS, "/v2/token", TAGS)] == [200, 200, 429]
    token = await registry.bearer("")
    assert await ask_from(THERE, registry, TAGS, token) == 429


async def test_credentials_that_are_not_good_are_counted_by_address(begin: Begin, clock: Clock) -> None:
    registry = await begin(requests_per_second=2)
    wrong = {"Authorization": "Bearer nonsense"}
    statuses = [(await ask(registry.client, "GET", TAGS, headers=wrong)) for _ in range(3)]
    assert [answer.status for answer in statuses] == [401, 401, 429]
    check_refusal(statuses[-1])
    assert await ask_from(HERE, registry, TAGS, basic("alice")) == 200


async def test_requests_are_counted_where_there_are_no_accounts(start: Start, clock: Clock) -> None:
    client = await start(limits={"requests_per_second": 2})
    answers = [await ask(client, "GET", "/v2/") for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]


async def repeated(talk: Wire, times: int, *headers: str) -> Counter[int]:
    """Ask the same in the same words, as what is answered from memory; return how often what was answered."""
    statuses: Counter[int] = Counter()
    for _ in range(times):
        await talk.request("GET", MANIFEST, headers)
        statuses[(await talk.answer()).status] += 1
    return statuses


async def test_what_is_answered_from_memory_is_counted_too(begin: Begin, clock: Clock) -> None:
    registry = await begin(requests_per_second=8)
    token = (await registry.bearer("alice"))["Authorization"]
    clock.advance(1)
    async with wire(registry.client) as talk, wire(registry.client) as other:
        assert await repeated(talk, 12) == {200: 8, 429: 4}
        assert await repeated(talk, 12, f"Authorization: {token}") == {200: 8, 429: 4}
        assert await repeated(other, 2, f"Authorization: {token}") == {429: 2}
        clock.advance(1)
        assert await repeated(other, 12) == {200: 8, 429: 4}


async def test_what_is_answered_from_memory_is_counted_for_the_client_of_a_proxy(begin: Begin, clock: Clock) -> None:
    registry = await begin({"behind_proxy": True}, requests_per_second=8)
    async with wire(registry.client) as talk:
        for client in ("192.0.2.7", "192.0.2.8"):
            assert await repeated(talk, 12, f"X-Forwarded-For: {client}") == {200: 8, 429: 4}


# --- pulls without an account --------------------------------------------------------------------------------


async def test_pulls_of_nobody_are_counted_by_address(begin: Begin, clock: Clock) -> None:
    registry = await begin(anonymous_pulls_per_hour=2)
    token = await registry.bearer("")
    # By nobody's token too, and in the same words, which are not answered from memory then.
    async with wire(registry.client) as talk:
        assert await repeated(talk, 2, f"Authorization: {token['Authorization']}") == {200: 2}
        assert await repeated(talk, 2, f"Authorization: {token['Authorization']}") == {429: 2}
    assert 1700 < check_refusal(await ask(registry.client, "GET", MANIFEST)) <= 1801
    assert [await ask_from(THERE, registry, MANIFEST) for _ in range(3)] == [200, 200, 429]
    clock.advance(1801)
    assert [await ask_from(THERE, registry, MANIFEST) for _ in range(2)] == [200, 429]


async def test_what_is_no_pull_or_has_an_account_is_not_counted(begin: Begin, clock: Clock) -> None:
    registry = await begin(anonymous_pulls_per_hour=1)
    pulled = await ask(registry.client, "GET", MANIFEST)
    digest = pulled.headers["Docker-Content-Digest"]
    blob = pulled.json["layers"][0]["digest"]
    check_refusal(await ask(registry.client, "GET", f"/v2/{NAME}/manifests/{digest}"))
    for _ in range(3):
        assert (await ask(registry.client, "HEAD", MANIFEST)).status == 200
        assert (await ask(registry.client, "GET", TAGS)).status == 200
        assert (await ask(registry.client, "GET", f"/v2/{NAME}/blobs/{blob}")).status == 200
        assert (await ask(registry.client, "GET", MANIFEST, headers=basic("alice"))).status == 200


async def test_who_is_refused_has_not_pulled(begin: Begin, clock: Clock) -> None:
    registry = await begin(anonymous_pulls_per_hour=1)
    await registry.database.write(rules.revoke, "", "pull", "everybody")
    for _ in range(3):
        assert (await ask(registry.client, "GET", MANIFEST)).status == 401
    await registry.database.write(rules.grant, "", "pull", "everybody", "")
    assert (await ask(registry.client, "GET", MANIFEST)).status == 200


# --- logins --------------------------------------------------------------------------------------------------


def at(number: int) -> str:
    """Return one of many addresses."""
    return f"192.0.2.{number}"


async def fail(limits: LoginLimits, name: str, address: str) -> int:
    """Try a wrong password; return the seconds that are to pass before one is looked at, 0 where it was."""
    try:
        async with limits.attempt(name, address) as attempt:
            attempt.is_good = False
    except TooManyRequests as error:
        return int(error.headers["Retry-After"])
    return 0


async def pause(limits: LoginLimits, clock: Clock, name: str, address: str) -> int:
    """Try a wrong password as soon as one is looked at; return the seconds until then."""
    seconds = await fail(limits, name, address)
    clock.advance(seconds)
    assert await fail(limits, name, address) == 0
    return seconds


async def test_an_account_waits_longer_each_time_wherever_the_guesses_come_from(clock: Clock) -> None:
    limits = LoginLimits()
    assert [await fail(limits, "alice", at(number)) for number in range(10)] == [0] * 10
    waited = [await pause(limits, clock, "alice", at(number)) for number in range(8)]
    assert waited == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60], abs=1)
    assert await fail(limits, "Alice", at(50)) > 0
    assert await fail(limits, "bob", at(0)) == 0


async def test_an_address_waits_longer_each_time_whomever_the_guesses_are_about(clock: Clock) -> None:
    limits = LoginLimits()
    assert [await fail(limits, f"user{number}", at(1)) for number in range(20)] == [0] * 20
    waited = [await pause(limits, clock, f"other{number}", at(1)) for number in range(11)]
    assert waited == pytest.approx([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900], abs=1)
    assert await fail(limits, "alice", at(2)) == 0


async def test_an_address_of_ipv6_stands_for_its_network(clock: Clock) -> None:
    limits = LoginLimits()
    for number in range(20):
        assert await fail(limits, "", f"2001:db8::{number}") == 0
    assert await fail(limits, "", "2001:db8::ffff") > 0
    assert await fail(limits, "", "2001:db8:0:1::") == 0


async def test_failures_are_forgotten_after_a_while(clock: Clock) -> None:
    limits = LoginLimits()
    for number in range(20):
        await fail(limits, "alice", at(number))
    assert await fail(limits, "alice", at(50)) > 0
    clock.advance(901)
    assert [await fail(limits, "alice", at(number)) for number in range(10)] == [0] * 10


async def test_who_gets_in_starts_anew_but_not_his_address(clock: Clock) -> None:
    limits = LoginLimits()
    for number in range(20):
        if number % 5 == 0:
            async with limits.attempt("alice", at(1)) as attempt:
                attempt.is_good = True
        assert await fail(limits, "alice", at(1)) == 0
    assert await fail(limits, "bob", at(1)) > 0


async def test_an_attempt_of_which_nobody_knows_what_it_was_does_not_count(clock: Clock) -> None:
    limits = LoginLimits()
    for _ in range(50):
        with pytest.raises(ConnectionError):
            async with limits.attempt("alice", at(1)):
                raise ConnectionError("the database does not answer")
    assert await fail(limits, "alice", at(1)) == 0


@pytest.mark.parametrize("name", ["alice", "x" * 60_000])
async def test_guesses_that_come_at_once_gain_nothing_by_it(clock: Clock, name: str) -> None:
    limits = LoginLimits()
    looked_at = 0

    async def guess(number: int) -> None:
        nonlocal looked_at
        # Of a name that no account has, only the beginning is kept.
        async with limits.attempt(f"{name}{number if len(name) > 64 else ''}", at(number % 100)) as attempt:
            await asyncio.sleep(0)
            looked_at += 1
            attempt.is_good = False

    await asyncio.gather(*[guess(number) for number in range(1000)], return_exceptions=True)
    assert 10 <= looked_at < 15


async def test_logins_that_are_good_are_not_taken_for_guesses_because_they_come_at_once(registry: Registry) -> None:
    await registry.user("alice")
    tokens = [await registry.personal("alice") for _ in range(40)]
    headers = [basic("alice", token) for token in tokens] + [basic("alice")] * 40
    answers = await asyncio.gather(*[ask(registry.client, "GET", "/v2/token", headers=each) for each in headers])
    assert {answer.status for answer in answers} == {200}


async def test_a_token_that_is_good_waits_for_no_guesses_at_its_account_or_from_its_address(registry: Registry) -> None:
    await registry.user("alice")
    token = await registry.personal("alice")
    wrong = [basic("alice", f"guess {number}") for number in range(30)]
    wrong += [basic("alice", f"hythe_{number}") for number in range(30)]
    answers = await asyncio.gather(*[ask(registry.client, "GET", "/v2/", headers=each) for each in wrong])
    assert {answer.status for answer in answers} == {401, 429}
    check_refusal(await ask(registry.client, "GET", "/v2/", headers=basic("root")))
    check_refusal(await ask(registry.client, "GET", "/v2/", headers=basic("alice", "hythe_x")))
    for headers in (basic("alice", token), {"Authorization": f"Bearer {token}"}):
        assert (await ask(registry.client, "GET", "/v2/", headers=headers)).status == 200


# --- sizes ---------------------------------------------------------------------------------------------------


async def test_credentials_that_are_too_long_are_refused(registry: Registry) -> None:
    for size, status in ((12_000, 401), (17_000, 400)):
        for headers in ({"Authorization": f"Bearer {'x' * size}"}, {"Authorization": f"Basic {'eHh4' * (size // 4)}"}):
            answer = await ask(registry.client, "GET", "/v2/", headers=headers)
            assert (answer.status, bool(answer.codes)) == (status, True)


async def test_a_form_that_is_too_long_or_has_too_many_fields_is_refused(registry: Registry) -> None:
    for body in ("grant_type=password&x=" + "x" * 65536, "grant_type=password" + "&x=1" * 1000):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = await ask(registry.client, "POST", "/v2/token", data=body, headers=headers)
        assert (answer.status, answer.codes) == (400, ["UNSUPPORTED"])


async def test_a_manifest_that_is_too_large_is_refused_to_whoever_might_push_it(
    start: Start, registry: Registry
) -> None:
    for name, right in (("alice", "push"), ("bob", "pull")):
        await registry.user(name, right)
    client = await start(registry={"manifest_bytes": 65536})
    for who, status in ((basic("alice"), 413), (basic("bob"), 403), ({}, 401)):
        headers = {"Content-Type": MANIFEST_TYPE, **who}
        answer = await ask(client, "PUT", MANIFEST, data=b"x" * 65537, headers=headers)
        assert (answer.status, bool(answer.codes)) == (status, True)
