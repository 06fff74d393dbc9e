"""Listing tags and repositories, and the history of tags. [distribution-spec: end-8a, end-8b]"""

import re

import pytest

from registry.config import Settings
from storage.digest import HEX_LENGTH
from storage.oci import OCI_INDEX
from tests.content import Client, Pusher, digest_of
from tests.facts import query
from tests.registry.talk import Answer, ask, wire

TAGS = "/v2/org/team/app/tags/list"
# Upper case before the underscore before lower case.
IN_ORDER = ["0", "10", "9", "A", "Z", "_x", "a", "a-b", "a.b", "a_b", "aa", "z"]


async def push_tags(client: Client, *tags: str, name: str = "org/team/app") -> str:
    """Push one manifest under many tags; return its digest."""
    content = b'{"schemaVersion": 2, "manifests": []}'
    for tag in tags:
        await Pusher(client, name).manifest(content, tag, OCI_INDEX)
    return digest_of(content)


async def pages(client: Client, path: str, field: str) -> list[list[str]]:
    """Follow Link to the end."""
    found = []
    while path:
        answer = await ask(client, "GET", path)
        assert answer.status == 200, answer
        found.append(answer.json[field])
        path = next_page(answer)
    return found


def next_page(answer: Answer) -> str:
    link = answer.headers.get("Link")
    if link is None:
        return ""
    match = re.fullmatch(r'<([^<> ]+)>; rel="next"', link)
    assert match, link
    return match[1]


async def test_tags_come_in_ascii_order(client: Client) -> None:
    await push_tags(client, *reversed(IN_ORDER))
    answer = await ask(client, "GET", TAGS)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.json == {"name": "org/team/app", "tags": IN_ORDER}
    assert "Link" not in answer.headers


@pytest.mark.parametrize("size", [1, 5, 11, 12, 13, 100_000])
async def test_tags_can_be_read_page_by_page(client: Client, size: int) -> None:
    await push_tags(client, *IN_ORDER)
    found = await pages(client, f"{TAGS}?n={size}", "tags")
    assert found == [IN_ORDER[start : start + size] for start in range(0, len(IN_ORDER), size)]


@pytest.mark.parametrize(
    ("last", "first"), [("a", "a-b"), ("a0", "a_b"), ("zz", ""), ("", "0"), ("b", "z"), ("%2e", "0"), ("a%2db", "a.b")]
)
async def test_a_list_goes_on_after_the_last_even_if_that_is_gone(client: Client, last: str, first: str) -> None:
    await push_tags(client, *IN_ORDER)
    answer = await ask(client, "GET", f"{TAGS}?last={last}")
    assert answer.json["tags"] == (IN_ORDER[IN_ORDER.index(first) :] if first else [])


async def test_a_tag_deleted_between_two_pages_does_not_disturb(client: Client) -> None:
    await push_tags(client, *IN_ORDER)
    first = await ask(client, "GET", f"{TAGS}?n=3")
    await ask(client, "DELETE", f"/v2/org/team/app/manifests/{first.json['tags'][-1]}")
    assert (await ask(client, "GET", next_page(first))).json["tags"] == IN_ORDER[3:6]


async def test_a_page_of_none_is_empty_and_leads_nowhere(client: Client) -> None:
    await push_tags(client, "a", "b")
    answer = await ask(client, "GET", f"{TAGS}?n=0")
    assert (answer.status, answer.json["tags"]) == (200, [])
    assert "Link" not in answer.headers


@pytest.mark.parametrize("path", [TAGS, "/v2/_catalog"])
@pytest.mark.parametrize("n", ["-1", "x", "", "1.5", "%d9%a1"])
async def test_a_page_size_that_is_no_number_is_refused(client: Client, path: str, n: str) -> None:
    await push_tags(client, "a")
    answer = await ask(client, "GET", f"{path}?n={n}")
    assert (answer.status, answer.codes) == (400, ["UNSUPPORTED"])


@pytest.mark.parametrize("path", [TAGS, "/v2/_catalog"])
@pytest.mark.parametrize("n", ["99999999999999999999", "00000000000000001"])
async def test_a_page_size_may_be_written_in_many_digits(client: Client, path: str, n: str) -> None:
    await push_tags(client, "a")
    answer = await ask(client, "GET", f"{path}?n={n}")
    assert answer.json.get("tags") == ["a"] or answer.json.get("repositories") == ["org/team/app"]


@pytest.mark.parametrize("path", [TAGS, "/v2/_catalog"])
@pytest.mark.parametrize("last", ["%ff", "%00", "%ed%a0%80", "%f0%9f%90%b3"])
async def test_a_last_that_no_name_can_be_is_no_failure(client: Client, path: str, last: str) -> None:
    await push_tags(client, "a")
    async with wire(client) as connection:
        await connection.request("GET", f"{path}?last={last}")
        assert (await connection.answer()).status in (200, 400)


async def test_a_repository_with_no_tags_has_an_empty_list(client: Client) -> None:
    await Pusher(client).blob(b"a layer")
    assert (await ask(client, "GET", TAGS)).json == {"name": "org/team/app", "tags": []}


async def test_when_the_last_tag_is_deleted_the_list_is_empty(client: Client) -> None:
    await push_tags(client, "only")
    await ask(client, "DELETE", "/v2/org/team/app/manifests/only")
    assert (await ask(client, "GET", TAGS)).json["tags"] == []


@pytest.mark.parametrize("name", ["no/such", "org/team", "org", "org/team/app/deeper"])
async def test_tags_of_an_unknown_repository_are_not_found(client: Client, name: str) -> None:
    await push_tags(client, "a")
    answer = await ask(client, "GET", f"/v2/{name}/tags/list")
    assert (answer.status, answer.codes) == (404, ["NAME_UNKNOWN"])


async def test_an_upload_that_was_only_begun_makes_no_repository(client: Client) -> None:
    await ask(client, "POST", "/v2/org/team/app/blobs/uploads/")
    assert (await ask(client, "GET", TAGS)).codes == ["NAME_UNKNOWN"]
    assert (await ask(client, "GET", "/v2/_catalog")).json == {"repositories": []}


NAMES = ["a", "a-b", "a/b", "a/b/c", "a0", "org/team/app", "org/team2", "z"]


@pytest.mark.parametrize("size", [1, 3, 8, 9])
async def test_the_catalog_can_be_read_page_by_page(client: Client, size: int) -> None:
    for name in reversed(NAMES):
        await push_tags(client, "a", name=name)
    assert (await ask(client, "GET", "/v2/_catalog")).json == {"repositories": NAMES}
    found = await pages(client, f"/v2/_catalog?n={size}", "repositories")
    assert found == [NAMES[start : start + size] for start in range(0, len(NAMES), size)]


async def test_the_catalog_goes_on_after_a_name_that_is_gone(client: Client) -> None:
    for name in NAMES:
        await push_tags(client, "a", name=name)
    assert (await ask(client, "GET", "/v2/_catalog?last=a/b/bb&n=2")).json == {"repositories": ["a/b/c", "a0"]}
    empty = await ask(client, "GET", "/v2/_catalog?n=0")
    assert (empty.json, empty.headers.get("Link")) == ({"repositories": []}, None)


@pytest.mark.parametrize("path", ["/v2/_oci/ext/discover", "/v2/org/team/app/_oci/ext/discover"])
async def test_extensions_can_be_discovered(client: Client, path: str) -> None:
    answer = await ask(client, "GET", path)
    assert (answer.status, answer.json) == (200, {"extensions": []})


# --- history --------------------------------------------------------------------------------------------


HISTORY = 'SELECT name, digest FROM tag_event ORDER BY "at", id'


def history(settings: Settings) -> list[tuple[str, str | None]]:
    """Return what happened to the tags, in order."""
    return [(name, digest) for name, digest in query(settings.database.url, HISTORY)]


async def test_the_history_of_a_tag_tells_where_it_pointed(client: Client, settings: Settings) -> None:
    push = Pusher(client)
    first, second = await push.image("latest"), await push.image("latest")
    await push.manifest(first.manifest, "latest")
    await ask(client, "DELETE", "/v2/org/team/app/manifests/latest")
    await push.manifest(second.manifest, "latest")
    assert history(settings) == [
        ("latest", first.digest),
        ("latest", second.digest),
        ("latest", first.digest),
        ("latest", None),
        ("latest", second.digest),
    ]


async def test_a_push_of_what_the_tag_points_to_is_no_event(client: Client, settings: Settings) -> None:
    image = await Pusher(client).image("latest")
    await Pusher(client).manifest(image.manifest, "latest")
    assert history(settings) == [("latest", image.digest)]


@pytest.mark.parametrize("algorithm", sorted(HEX_LENGTH))
async def test_tags_of_one_push_are_events_each(client: Client, settings: Settings, algorithm: str) -> None:
    content = b'{"schemaVersion": 2, "manifests": []}'
    digest = digest_of(content, algorithm)
    path = f"/v2/org/team/app/manifests/{digest}?tag=a&tag=b"
    await ask(client, "PUT", path, data=content, headers={"Content-Type": OCI_INDEX})
    assert history(settings) == [("a", digest), ("b", digest)]


async def test_a_deleted_manifest_is_an_event_of_each_of_its_tags(client: Client, settings: Settings) -> None:
    digest = await push_tags(client, "a", "b")
    await ask(client, "DELETE", f"/v2/org/team/app/manifests/{digest}")
    assert sorted(history(settings), key=str) == sorted(
        [("a", digest), ("b", digest), ("a", None), ("b", None)], key=str
    )


async def test_what_was_refused_is_no_event(client: Client, settings: Settings) -> None:
    await ask(client, "PUT", "/v2/org/team/app/manifests/latest", data=b"{")
    await ask(client, "DELETE", "/v2/org/team/app/manifests/latest")
    assert history(settings) == []
