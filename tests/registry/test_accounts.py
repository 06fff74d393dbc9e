"""Who gets in, and who does not: every endpoint, by every kind of credential."""

from __future__ import annotations

import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from registry.access.passwords import hash_password
from registry.access.rights import Held, Identity, Right
from registry.config import Settings
from registry.dispatch import Dispatcher
from registry.metadata import access_tokens, accounts, audit, keys, policy, rules
from registry.metadata.engine import open_database
from registry.metadata.tables import now
from tests.conftest import Start
from tests.content import Client, Image, digest_of
from tests.registry.accounts import EVERYTHING, HASH, NAME, PASSWORD, Registry, basic, put_manifest
from tests.registry.talk import Answer, ask

# --- every endpoint by every credential ----------------------------------------------------------------------

#: What a request must bring: nothing, a name, an account, or a right.
FREE, KNOWN, ACCOUNT = "free", "known", "account"
#: Endpoint and method, what it takes, and what it answers to whoever may.
TABLE: dict[tuple[str, str], tuple[str, int]] = {
    ("BASE", "GET"): (KNOWN, 200),
    ("BASE", "HEAD"): (KNOWN, 200),
    ("TOKEN", "GET"): (FREE, 0),
    ("TOKEN", "POST"): (FREE, 0),
    ("CATALOG", "GET"): (KNOWN, 200),
    ("DISCOVER", "GET"): ("pull", 200),
    ("TAGS", "GET"): ("pull", 200),
    ("REFERRERS", "GET"): ("pull", 200),
    ("MANIFEST", "GET"): ("pull", 200),
    ("MANIFEST", "HEAD"): ("pull", 200),
    ("MANIFEST", "PUT"): ("push", 201),
    ("BLOB", "GET"): ("pull", 200),
    ("BLOB", "HEAD"): ("pull", 200),
    ("UPLOADS", "POST"): ("push", 202),
    ("UPLOAD", "GET"): ("push", 404),
    ("UPLOAD", "PATCH"): ("push", 404),
    ("UPLOAD", "PUT"): ("push", 404),
    ("UPLOAD", "DELETE"): ("push", 404),
    ("/api/v1/openapi.json", "GET"): (FREE, 200),
    ("/api/v1/repositories", "GET"): (ACCOUNT, 200),
    ("/api/v1/tags", "GET"): ("pull", 200),
    ("/api/v1/manifest", "GET"): ("pull", 200),
    ("/healthz", "GET"): (FREE, 200),
    ("/readyz", "GET"): (FREE, 200),
    ("/metrics", "GET"): (ACCOUNT, 200),
    ("/v2", "GET"): (FREE, 301),
    ("/api/v1/rules", "GET"): ("admin", 200),
    ("/api/v1/rules", "PUT"): ("admin", 200),
    ("/api/v1/rules", "DELETE"): ("admin", 200),
    ("/api/v1/holders", "GET"): ("admin", 200),
    ("/api/v1/tokens", "GET"): (ACCOUNT, 200),
    ("/api/v1/tokens", "POST"): (ACCOUNT, 201),
    ("/api/v1/tokens", "DELETE"): (ACCOUNT, 404),
    ("BLOB", "DELETE"): ("delete", 202),
    ("/api/v1/manifest", "DELETE"): ("delete", 404),
    ("MANIFEST", "DELETE"): ("delete", 202),
}
GRANTED = {"pull": "pull", "push": "pull push", "delete": "pull delete", "admin": "pull push delete admin"}
GOOD = ["anonymous", "nothing", *GRANTED]
BAD = ["revoked", "ended", "disabled", "signature", "audience", "other key", "none", "issuer", "password"]


def endpoints(client: Client) -> set[tuple[str, str]]:
    """Return every endpoint and method there is, from the routes themselves."""
    found = set()
    for route in client.app.router.routes():
        owner = getattr(route.handler, "__self__", None)
        if isinstance(owner, Dispatcher):
            found |= {(endpoint.name, method) for endpoint, methods in owner._table.items() for method in methods}
        else:
            assert route.resource is not None
            found.add((route.resource.canonical, route.method))
    return {(path, method) for path, method in found if not (path.startswith("/") and method == "HEAD")}


def address(endpoint: str, image: Image) -> str:
    spare = "sha256:" + "0" * 64
    upload = "00000000-0000-4000-8000-000000000000"
    paths = {
        "BASE": "/v2/",
        "TOKEN": "/v2/token",
        "CATALOG": "/v2/_catalog",
        "DISCOVER": f"/v2/{NAME}/_oci/ext/discover",
        "TAGS": f"/v2/{NAME}/tags/list",
        "REFERRERS": f"/v2/{NAME}/referrers/{image.digest}",
        "MANIFEST": f"/v2/{NAME}/manifests/latest",
        "BLOB": f"/v2/{NAME}/blobs/{digest_of(image.layers[0])}",
        "UPLOADS": f"/v2/{NAME}/blobs/uploads/",
        "UPLOAD": f"/v2/{NAME}/blobs/uploads/{upload}?digest={spare}",
        "/api/v1/tags": f"/api/v1/tags?repository={NAME}",
        "/api/v1/manifest": f"/api/v1/manifest?repository={NAME}&reference=latest",
        "/api/v1/rules": f"/api/v1/rules?node={NAME}&right=pull&subject=users",
        "/api/v1/holders": f"/api/v1/holders?node={NAME}&right=pull",
        "/api/v1/tokens": "/api/v1/tokens?name=more&id=999",
    }
    return paths.get(endpoint, endpoint)


async def call(registry: Registry, endpoint: str, method: str, image: Image, headers: dict[str, str]) -> Answer:
    path = address(endpoint, image)
    if (endpoint, method) == ("/api/v1/manifest", "DELETE"):
        path = path.replace("latest", "absent")
    if (endpoint, method) == ("MANIFEST", "PUT"):
        return await put_manifest(registry.client, image, headers)
    return await ask(registry.client, method, path, headers=headers)


def expected(need: str, success: int, credential: str) -> int:
    if need == FREE:
        return success
    if credential == "anonymous":
        return 401
    if need in (KNOWN, ACCOUNT) or need in GRANTED.get(credential, "").split():
        return success
    return 404 if need == "pull" else 403


async def test_every_endpoint_is_in_the_table(registry: Registry) -> None:
    assert endpoints(registry.client) == set(TABLE)


@pytest.mark.parametrize("credential", GOOD)
async def test_an_account_may_do_what_it_holds_and_nothing_else(registry: Registry, credential: str) -> None:
    image = await registry.image()
    bearer, password = {}, {}
    if credential != "anonymous":
        await registry.user("alice", credential if credential in GRANTED else "")
        # Tokens for requests are for what is below /v2/; they neither administer nor beget others.
        bearer, password = await registry.bearer("alice"), basic("alice")
    wrong = []
    for (endpoint, method), (need, success) in TABLE.items():
        if endpoint == "TOKEN":
            continue
        headers = password if endpoint.startswith("/api/") else bearer
        status = (await call(registry, endpoint, method, image, headers)).status
        # What was removed by this very list is gone for the administrator too.
        if status != expected(need, success, credential):
            wrong.append((endpoint, method, status, expected(need, success, credential)))
    assert not wrong


@pytest.mark.parametrize("credential", BAD)
async def test_a_credential_that_is_not_good_opens_nothing(registry: Registry, credential: str) -> None:
    image = await registry.image()
    await registry.user("alice", "admin")
    headers = await spoilt(registry, credential)
    for (endpoint, method), (need, success) in TABLE.items():
        answer = await call(registry, endpoint, method, image, headers)
        is_free = need == FREE and endpoint != "TOKEN"
        # Whoever guesses passwords is soon told to wait.
        refused = (401, 429) if credential == "password" else (401,)
        if (endpoint, method, credential) == ("TOKEN", "POST", "ended"):
            # Credentials are in its form, and this one has none.
            refused = (400,)
        assert answer.status in ((success,) if is_free else refused), (endpoint, method, answer)


async def spoilt(registry: Registry, kind: str) -> dict[str, str]:
    """Return credentials of an administrator that are not good any more, or never were."""
    if kind == "password":
        return basic("alice", "wrong password")
    if kind == "revoked":
        personal = await registry.personal("alice")
        headers = await registry.bearer("alice", personal)
        assert (await ask(registry.client, "GET", "/v2/", headers=headers)).status == 200
        ((_, kept),) = await registry.database.read(access_tokens.of, "alice")
        await registry.database.write(access_tokens.revoke, kept.id)
        return headers
    headers = await registry.bearer("alice")
    assert (await ask(registry.client, "GET", "/v2/", headers=headers)).status == 200
    if kind == "disabled":
        await registry.database.write(accounts.set_disabled, "alice", disabled=True)
        return headers
    token = headers["Authorization"].removeprefix("Bearer ")
    key, *_ = await registry.database.read(keys.everything)
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    head = {"kid": key.id}
    private: Any = key.private
    algorithm = "ES256"
    if kind == "ended":
        claims["exp"] = int(time.time()) - 5
    elif kind == "audience":
        claims["aud"] = "elsewhere"
    elif kind == "issuer":
        claims["iss"] = "elsewhere"
    elif kind == "other key":
        private = ec.generate_private_key(ec.SECP256R1())
    elif kind == "none":
        private, algorithm = "", "none"
    made = jwt.encode(claims, private, algorithm, head)
    if kind == "signature":
        body, _, signature = made.rpartition(".")
        made = f"{body}.{signature[:-4]}AAAA"
    return {"Authorization": f"Bearer {made}"}


# --- one by one ---------------------------------------------------------------------------------------------


async def test_without_accounts_everybody_may_do_everything_and_the_first_one_ends_that(
    start: Start, settings: Settings
) -> None:
    client = await start()
    assert (await ask(client, "GET", "/v2/")).status == 200
    database = open_database(settings.database.url)
    await database.write(accounts.add, "root", accounts.USER, HASH, admin=True)
    await database.close()
    answer = await ask(client, "GET", "/v2/")
    assert answer.status == 401
    challenge = answer.headers["WWW-Authenticate"]
    assert challenge.startswith(f'Bearer realm="http://{client.host}:{client.port}/v2/token",service="hythe"')
    assert "basic" not in challenge.lower()
    assert answer.codes == ["UNAUTHORIZED"]


async def test_a_right_holds_at_once_and_so_does_its_end(registry: Registry) -> None:
    image = await registry.image()
    await registry.user("alice")
    path = f"/v2/{NAME}/manifests/{image.digest}"
    headers = basic("alice")
    token = await registry.bearer("alice")
    for by in (headers, token) * 2:
        assert (await ask(registry.client, "GET", path, headers=by)).status == 404
    await registry.database.write(rules.grant, "org/team", "pull", "users", "")
    for _ in range(3):
        assert (await ask(registry.client, "GET", path, headers=headers)).status == 200
    fresh = await registry.bearer("alice")
    for _ in range(4):
        assert (await ask(registry.client, "GET", path, headers=fresh)).status == 200
    await registry.database.write(rules.revoke, "org/team", "pull", "users")
    for by in (headers, fresh) * 2:
        assert (await ask(registry.client, "GET", path, headers=by)).status == 404


async def test_a_repository_that_is_private_is_as_one_that_is_not_there(registry: Registry) -> None:
    await registry.image("secret/app")
    await registry.user("alice", "push")

    async def answers(name: str) -> list[tuple[int, str]]:
        found = []
        for by in ({}, basic("alice"), await registry.bearer("alice")):
            for path in (f"/v2/{name}/tags/list", f"/v2/{name}/manifests/latest", f"/api/v1/tags?repository={name}"):
                answer = await ask(registry.client, "GET", path, headers=by)
                body = json.dumps(answer.json["errors"]).replace(name, "NAME")
                found.append((answer.status, body))
            pushed = await ask(registry.client, "POST", f"/v2/{name}/blobs/uploads/", headers=by)
            found.append((pushed.status, json.dumps(pushed.json["errors"]).replace(name, "NAME")))
        return found

    assert await answers("secret/app") == await answers("secret/none")


async def test_who_pushed_is_told_to_whoever_is_logged_in(registry: Registry) -> None:
    await registry.image()
    await registry.user("alice", "pull")
    await registry.database.write(rules.grant, "org", "pull", "everybody", "")
    path = f"/api/v1/tags?repository={NAME}"
    told = [(await ask(registry.client, "GET", path, headers=by)).json for by in (basic("alice"), {})]
    assert [answer["tags"][0]["updated_by"] for answer in told] == ["root", ""]


async def test_listings_show_only_what_may_be_read(registry: Registry) -> None:
    for name in ("a", "a-b", "a/c", "b/deep/one", "b/deep/two", "b/other", "public/x"):
        await registry.image(name)
    await registry.user("alice", "pull", "a")
    await registry.database.write(rules.grant, "b/deep/two", "pull", "alice", "")
    await registry.database.write(rules.grant, "public", "pull", "everybody", "")

    async def listed(headers: dict[str, str]) -> list[str]:
        names: list[str] = []
        path = "/v2/_catalog?n=1"
        while path:
            answer = await ask(registry.client, "GET", path, headers=headers)
            assert answer.status == 200, answer
            names += answer.json["repositories"]
            link = answer.headers.get("Link", "")
            path = link.partition("<")[2].partition(">")[0]
        return names

    async def children(path: str, headers: dict[str, str]) -> list[str]:
        answer = await ask(registry.client, "GET", f"/api/v1/repositories?path={path}", headers=headers)
        return [node["name"] for node in answer.json["repositories"]]

    alice = basic("alice")
    assert await listed(alice) == ["a", "a/c", "b/deep/two", "public/x"]
    assert await listed(await registry.bearer("")) == ["public/x"]
    assert await listed(basic("root")) == ["a", "a-b", "a/c", "b/deep/one", "b/deep/two", "b/other", "public/x"]
    assert await children("", alice) == ["a", "b", "public"]
    assert await children("b", alice) == ["b/deep"]
    assert await children("b/deep", alice) == ["b/deep/two"]
    assert await children("", {}) == ["public"]


async def test_a_token_for_one_repository_is_good_for_no_other(registry: Registry) -> None:
    await registry.image()
    await registry.image("org/other")
    await registry.user("alice", "push")
    headers = await registry.bearer("alice", scope=f"repository:{NAME}:pull")
    assert (await ask(registry.client, "GET", f"/v2/{NAME}/tags/list", headers=headers)).status == 200
    for method, path in (("GET", "/v2/org/other/tags/list"), ("POST", f"/v2/{NAME}/blobs/uploads/")):
        answer = await ask(registry.client, method, path, headers=headers)
        assert answer.status == 401
        assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]
    assert (await ask(registry.client, "GET", "/v2/_catalog", headers=headers)).status == 401


@pytest.mark.parametrize(
    "scope",
    [
        "repository:secret/app:pull",
        "repository:secret/app:*",
        f"repository:{NAME}:pull repository:secret/app:pull,push",
        "repository:org/../secret/app:pull",
        "repository:/secret/app:pull",
        "repository:secret/app:pull:pull",
        'repository:secret/app:pull","x":"',
        "repository:secret/app:admin",
        "registry:*:*",
    ],
)
async def test_a_scope_gives_nothing_that_is_not_held(registry: Registry, scope: str) -> None:
    await registry.image("secret/app")
    await registry.user("alice", "push")
    headers = await registry.bearer("alice", scope=scope)
    assert (await ask(registry.client, "GET", "/v2/secret/app/tags/list", headers=headers)).status == 404
    claims = jwt.decode(headers["Authorization"][7:], options={"verify_signature": False})
    assert not [entry for entry in claims["access"] if not entry["name"].startswith("org/team")]


async def test_a_blob_is_mounted_from_where_the_client_may_pull_and_from_nowhere_else(registry: Registry) -> None:
    image = await registry.image("secret/app")
    digest = digest_of(image.layers[0])
    await registry.user("alice", "push")
    alice = basic("alice")
    for query in (f"mount={digest}&from=secret/app", f"mount={digest}"):
        answer = await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/?{query}", headers=alice)
        assert answer.status == 202, answer
    assert (await ask(registry.client, "HEAD", f"/v2/{NAME}/blobs/{digest}", headers=alice)).status == 404
    await registry.database.write(rules.grant, "secret", "pull", "alice", "")
    narrow = await registry.bearer("alice")
    path = f"/v2/{NAME}/blobs/uploads/?mount={digest}&from=secret/app"
    answer = await ask(registry.client, "POST", path, headers=narrow)
    assert answer.status == 401
    assert f'scope="repository:{NAME}:pull,push repository:secret/app:pull"' in answer.headers["WWW-Authenticate"]
    assert (await ask(registry.client, "POST", path, headers=alice)).status == 201


async def test_a_push_that_was_begun_in_time_is_finished_after_its_token(registry: Registry) -> None:
    await registry.user("alice", "push")
    await registry.user("bob", "push")
    begun = await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=await registry.bearer("alice"))
    ended = await spoilt(registry, "ended")
    location = begun.headers["Location"]
    assert (await ask(registry.client, "PATCH", location, data=b"layer", headers=ended)).status == 202
    others = await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=await registry.bearer("bob"))
    assert (await ask(registry.client, "PATCH", others.headers["Location"], data=b"x", headers=ended)).status == 401
    assert (await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=ended)).status == 401
    digest = digest_of(b"layer")
    assert (await ask(registry.client, "PUT", f"{location}?digest={digest}", headers=ended)).status == 201


async def test_a_refresh_token_stands_for_its_account_until_the_password_changes(registry: Registry) -> None:
    await registry.user("alice", "push")
    query = [("scope", EVERYTHING), ("offline_token", "true"), ("service", "hythe")]
    first = await ask(registry.client, "GET", "/v2/token", params=query, headers=basic("alice"))
    form = {"grant_type": "refresh_token", "refresh_token": first.json["refresh_token"], "scope": EVERYTHING}
    second = await ask(registry.client, "POST", "/v2/token", data=form)
    assert second.status == 200
    headers = {"Authorization": f"Bearer {second.json['access_token']}"}
    assert (await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=headers)).status == 202
    await registry.database.write(accounts.set_password, "alice", hash_password("another one"))
    assert (await ask(registry.client, "POST", "/v2/token", data=form)).status == 401
    assert (await ask(registry.client, "GET", "/v2/", headers=headers)).status == 401


async def test_a_personal_token_reaches_no_further_than_its_scope_and_its_end(registry: Registry) -> None:
    await registry.image()
    await registry.user("alice", "push")
    reading = await registry.personal("alice", [("org/team", "pull")])
    by = basic("alice", reading)
    assert (await ask(registry.client, "GET", f"/v2/{NAME}/tags/list", headers=by)).status == 200
    assert (await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=by)).status == 403
    assert (await ask(registry.client, "GET", "/v2/org/x/tags/list", headers=by)).status == 404
    bare = {"Authorization": f"Bearer {reading}"}
    assert (await ask(registry.client, "GET", f"/v2/{NAME}/tags/list", headers=bare)).status == 200
    assert (await ask(registry.client, "GET", "/v2/", headers=basic("bob", reading))).status == 401
    over = await registry.personal("alice", ends_at=now() - 1)
    assert (await ask(registry.client, "GET", "/v2/", headers=basic("alice", over))).status == 401


async def test_while_nothing_may_be_written_pulls_go_on(registry: Registry) -> None:
    await registry.image()
    by = basic("root")
    await registry.database.write(policy.set_read_only, "the disk is being moved")
    assert (await ask(registry.client, "GET", f"/v2/{NAME}/manifests/latest", headers=by)).status == 200
    answer = await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=by)
    assert (answer.status, answer.codes) == (503, ["DENIED"])
    assert "the disk is being moved" in answer.json["errors"][0]["message"]
    assert "Retry-After" in answer.headers
    await registry.database.write(policy.set_read_only, None)
    assert (await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=by)).status == 202


async def test_the_audit_says_who_did_what_and_what_was_refused(registry: Registry) -> None:
    await registry.image()
    await registry.user("alice", "pull")
    await ask(registry.client, "POST", f"/v2/{NAME}/blobs/uploads/", headers=basic("alice"))
    await ask(registry.client, "GET", "/v2/", headers=basic("alice", "wrong password"))
    await registry.client.close()
    found = await registry.database.read(audit.find, since=0, user=None, repository=None, before=None, limit=100)
    events = {(event.actor, event.action, event.outcome, event.repository) for _, event in found}
    assert ("root", "manifest.push", "done", NAME) in events
    assert ("root", "blob.push", "done", NAME) in events
    assert ("alice", "push", "refused", NAME) in events
    assert ("", "login", "refused", "") in events
    assert PASSWORD not in str(found)
    assert "wrong password" not in str([event for _, event in found if event.action != "login"])


async def test_whoever_fails_to_log_in_often_must_wait(registry: Registry) -> None:
    await registry.user("alice", "pull")
    statuses = []
    for number in range(11):
        answer = await ask(registry.client, "GET", "/v2/", headers=basic("alice", f"guess {number}"))
        statuses.append(answer.status)
    assert statuses == [401] * 10 + [429]
    assert int(answer.headers["Retry-After"]) >= 1
    # Not the right password either, for now; a token is not guessed, so it is let in.
    assert (await ask(registry.client, "GET", "/v2/", headers=basic("alice"))).status == 429
    token = await registry.personal("alice")
    assert (await ask(registry.client, "GET", "/v2/", headers=basic("alice", token))).status == 200


def test_rights_only_add_up() -> None:
    held = Held([("", "pull"), ("org", "push"), ("org/team", "pull"), ("x", "delete")])
    assert held.has("org/team/app", Right.PUSH)
    assert not held.has("organ/app", Right.PUSH)
    assert not held.has("x", Right.PUSH)
    assert held.has("x/y", Right.DELETE)
    assert held.nodes(Right.PULL) == [""]
    assert held.nodes(Right.PUSH) == ["org"]
    who = Identity(held=held, bound=Held([("org/team", "pull")]))
    assert (who.may("org/team/app", Right.PULL), who.may("org/app", Right.PULL)) == (True, False)
    assert who.readable() == ["org/team"]
