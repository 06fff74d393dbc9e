"""What somebody may hand on: rights where he administers, tokens of his own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from registry.errors import AccountsError
from registry.metadata import accounts, audit, policy, rules
from registry.metadata.audit import Event
from tests.conftest import Start
from tests.registry.accounts import HASH, Registry, basic
from tests.registry.talk import Answer, ask


async def change(registry: Registry, method: str, by: str, right: str, subject: str, node: str = "org/team") -> Answer:
    params = {"node": node, "right": right, "subject": subject}
    return await ask(registry.client, method, "/api/v1/rules", params=params, headers=basic(by))


async def get(registry: Registry, by: str, endpoint: str, **params: str) -> Any:
    answer = await ask(registry.client, "GET", f"/api/v1/{endpoint}", params=params, headers=basic(by))
    assert answer.status == 200, answer
    return answer.json[endpoint]


async def make_token(registry: Registry, by: dict[str, str], **params: str) -> Answer:
    return await ask(registry.client, "POST", "/api/v1/tokens", params={"name": "build", **params}, headers=by)


async def events(registry: Registry) -> list[Event]:
    query: dict[str, Any] = {"since": 0, "user": None, "repository": None, "before": None, "limit": 100}
    return [event for _, event in await registry.database.read(audit.find, **query)]


@pytest.fixture
async def team(registry: Registry) -> Registry:
    """`alice` administers `org`, `bob` is anybody."""
    await registry.user("alice", "admin")
    await registry.user("bob")
    return registry


async def test_whoever_administers_a_node_gives_rights_below_it_and_takes_them_back(team: Registry) -> None:
    path = "/v2/org/team/app/blobs/uploads/"
    assert (await ask(team.client, "POST", path, headers=basic("bob"))).status == 403
    for _ in range(2):
        answer = await change(team, "PUT", "alice", "push", "bob")
        assert answer.json == {"node": "org/team", "right": "push", "subject": "bob"}
    assert (await ask(team.client, "POST", path, headers=basic("bob"))).status == 202
    assert [
        (rule["subject"], rule["created_by"]) for rule in await get(team, "alice", "rules", node="org/team/app")
    ] == [
        ("root", ""),
        ("alice", ""),
        ("bob", "alice"),
    ]
    assert (await change(team, "DELETE", "alice", "push", "bob")).status == 200
    assert (await ask(team.client, "POST", path, headers=basic("bob"))).status == 403
    assert (await change(team, "DELETE", "alice", "push", "bob")).status == 404
    done = {(event.actor, event.action, event.repository, event.detail) for event in await events(team)}
    assert {("alice", action, "org/team", "push to bob") for action in ("grant", "revoke")} <= done


@pytest.mark.parametrize("node", ["/", "other", "organic"])
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_elsewhere_he_gives_nothing(team: Registry, node: str, method: str) -> None:
    answer = await change(team, method, "alice", "pull", "users", node)
    assert (answer.status, answer.codes) == (403, ["DENIED"])
    assert answer.json["errors"][0]["message"] == f"alice does not administer {node}"


async def test_who_has_a_right_is_told_with_the_rules_that_give_it(team: Registry) -> None:
    await team.database.write(accounts.add_team, "dev")
    await team.database.write(accounts.join, "dev", ["bob"])
    await change(team, "PUT", "alice", "delete", "team:dev")
    await change(team, "PUT", "alice", "pull", "everybody")
    found = await get(team, "alice", "holders", node="org/team/app", right="pull")
    assert [(each["name"], each["rule"]["subject"], each["rule"]["node"]) for each in found] == [
        ("root", "root", "/"),
        ("alice", "alice", "org"),
        ("bob", "team:dev", "org/team"),
        ("everybody", "everybody", "org/team"),
    ]
    assert [each["name"] for each in await get(team, "alice", "holders", node="org/team", right="push")] == [
        "root",
        "alice",
    ]


@pytest.mark.parametrize(
    ("right", "subject", "node", "status"),
    [
        ("fly", "bob", "org", 400),
        ("pull", "", "org", 400),
        ("pull", "a\x00b", "org", 400),
        ("pull", "nobody", "org", 404),
        ("pull", "team:none", "org", 404),
        ("pull", "bob", "", 400),
        ("pull", "bob", "Org", 400),
        ("pull", "bob", "org/../else", 400),
        ("admin", "everybody", "org", 409),
    ],
)
async def test_a_rule_that_cannot_be_is_refused_and_nothing_is_written(
    team: Registry, right: str, subject: str, node: str, status: int
) -> None:
    before = await team.database.read(rules.everything)
    assert (await change(team, "PUT", "root", right, subject, node)).status == status
    assert await team.database.read(rules.everything) == before


async def test_the_last_administrator_keeps_his_right(team: Registry) -> None:
    answer = await change(team, "DELETE", "root", "admin", "root", "/")
    assert answer.status == 409
    assert "nobody could administer" in answer.json["errors"][0]["message"]
    assert (await change(team, "PUT", "root", "admin", "bob", "/")).status == 200
    assert (await change(team, "DELETE", "root", "admin", "root", "/")).status == 200


async def test_two_administrators_who_remove_each_other_at_once_are_not_both_gone(team: Registry) -> None:
    await team.database.write(rules.grant, "", "admin", "bob", "")
    for _ in range(5):
        both = [team.database.write(rules.revoke, "", "admin", name) for name in ("root", "bob")]
        outcomes = await asyncio.gather(*both, return_exceptions=True)
        assert [isinstance(outcome, AccountsError) for outcome in outcomes].count(True) == 1
        for name in ("root", "bob"):
            await team.database.write(rules.grant, "", "admin", name, "")


async def test_where_there_are_no_accounts_nothing_is_given_to_those_who_will_come(start: Start) -> None:
    client = await start()
    params = {"node": "/", "right": "admin", "subject": "users"}
    assert (await ask(client, "PUT", "/api/v1/rules", params=params)).status == 409


async def test_somebody_makes_tokens_of_his_own_sees_them_and_revokes_them(team: Registry) -> None:
    await change(team, "PUT", "alice", "push", "bob")
    answer = await make_token(team, basic("bob"), scope="pull:org/team", days="7")
    assert answer.status == 201
    assert answer.headers["Cache-Control"] == "no-store"
    token = {"Authorization": f"Bearer {answer.json['token']}"}
    path = "/v2/org/team/app/blobs/uploads/"
    assert (await ask(team.client, "POST", path, headers=token)).status == 403
    assert (await ask(team.client, "GET", "/v2/", headers=token)).status == 200
    (kept,) = await get(team, "bob", "tokens")
    assert (kept["id"], kept["scope"], kept["owner"]) == (answer.json["id"], ["pull:org/team"], "bob")
    assert kept["used_at"]
    assert answer.json["token"] not in str(kept)
    assert await get(team, "alice", "tokens") == []
    params = {"id": str(kept["id"])}
    others = await ask(team.client, "DELETE", "/api/v1/tokens", params=params, headers=basic("alice"))
    assert others.status == 404
    assert (await ask(team.client, "DELETE", "/api/v1/tokens", params=params, headers=basic("bob"))).status == 200
    assert (await ask(team.client, "GET", "/v2/", headers=token)).status == 401


async def test_no_token_begets_another(team: Registry) -> None:
    personal = await team.personal("bob")
    refresh = await ask(team.client, "GET", "/v2/token", params={"offline_token": "true"}, headers=basic("bob"))
    for by in (
        basic("bob", personal),
        {"Authorization": f"Bearer {personal}"},
        {"Authorization": f"Bearer {refresh.json['token']}"},
    ):
        for method in ("GET", "POST", "DELETE"):
            params = {"name": "more", "id": "1"}
            answer = await ask(team.client, method, "/api/v1/tokens", params=params, headers=by)
            assert answer.status == 403, (method, by, answer)
    assert [event.outcome for event in await events(team) if event.action == "token.create"] == []


@pytest.mark.parametrize(
    "params",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"name": "n" * 101},
        {"days": "-1"},
        {"days": "36501"},
        {"days": "²"},
        {"scope": "fly:org"},
        {"scope": "pull:"},
        {"scope": "org"},
    ],
)
async def test_a_token_that_cannot_be_is_not_made(team: Registry, params: dict[str, str]) -> None:
    assert (await make_token(team, basic("bob"), **params)).status == 400
    assert await get(team, "bob", "tokens") == []


async def test_one_account_has_so_many_tokens_and_no_more(team: Registry) -> None:
    for _ in range(200):
        await team.personal("bob")
    answer = await make_token(team, basic("bob"))
    assert answer.status == 409
    assert "revoke some" in answer.json["errors"][0]["message"]


async def test_while_nothing_may_be_written_nothing_is_handed_on(team: Registry) -> None:
    await team.database.write(policy.set_read_only, "moving")
    assert (await change(team, "PUT", "alice", "pull", "bob")).status == 503
    assert (await make_token(team, basic("bob"))).status == 503
    assert await get(team, "bob", "tokens") == []


async def test_users_of_a_file_become_accounts_of_our_own(team: Registry) -> None:
    await team.database.write(accounts.follow, {"dave": "$2y$old"})
    taken, left = await team.database.write(accounts.take_over, {"carol": HASH, "dave": HASH, "Bob": "$2y$x"}, "us")
    assert (taken, left) == (["carol", "dave"], ["bob"])
    for name in ("carol", "dave", "bob"):
        assert (await ask(team.client, "GET", "/v2/", headers=basic(name))).status == 200
    await team.database.write(accounts.follow, {"erin": "$2y$old", "frank": "$2y$old"})
    await team.database.write(accounts.set_disabled, "erin", disabled=True)
    await team.database.write(accounts.follow, {"erin": "$2y$old"})
    await team.database.write(accounts.take_over, {"erin": HASH, "frank": HASH}, "us")
    for name, status in {"erin": 401, "frank": 200}.items():
        assert (await ask(team.client, "GET", "/v2/", headers=basic(name))).status == status
    # What the file says no more is nothing to them now.
    await team.database.write(accounts.follow, {})
    assert (await ask(team.client, "GET", "/v2/", headers=basic("dave"))).status == 200
