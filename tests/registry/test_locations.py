"""Addresses in answers can be followed as they are, behind any proxy. [RFC 9110, 10.2.2; RFC 8288]"""

from collections.abc import Mapping
from urllib.parse import urlsplit

import pytest

from storage.oci import OCI_INDEX
from tests.content import Client, Pusher, digest_of
from tests.registry.talk import Answer, ask
from tests.registry.test_tags import next_page

CONTENT = b"a layer"
DIGEST = digest_of(CONTENT)
INDEX = b'{"schemaVersion": 2, "manifests": []}'
APP = "/v2/org/team/app"
BEHIND_A_PREFIX = {"X-Forwarded-Prefix": "/some/registry.1"}

PROXIES: dict[str, dict[str, str]] = {
    "none": {},
    "of another host": {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "registry.test:8443"},
    "of another port": {"X-Forwarded-Port": "8443", "Host": "registry.test:8443"},
    "by the standard": {"Forwarded": 'for=192.0.2.1;proto=https;host="registry.test"'},
    "of a hostile client": {"X-Forwarded-Host": "evil.test/\\@x", "Forwarded": "host=evil.test", "Host": "evil.test"},
}


async def addresses(client: Client, headers: Mapping[str, str]) -> list[str]:
    """Return an address of each kind that the registry gives."""
    opened = await ask(client, "POST", f"{APP}/blobs/uploads/", headers=headers)
    given = [opened]
    upload = urlsplit(opened.headers["Location"]).path
    upload = upload[upload.index("/v2/") :]
    given.append(await ask(client, "PATCH", upload, data=CONTENT, headers=headers))
    given.append(await ask(client, "GET", upload, headers=headers))
    bad = {"Content-Range": "99-99", **headers}
    given.append(await ask(client, "PATCH", upload, data=b"x", headers=bad))
    given.append(await ask(client, "PUT", f"{upload}?digest={DIGEST}", headers=headers))
    given.append(await ask(client, "POST", f"{APP}/blobs/uploads/?mount={DIGEST}", headers=headers))
    for tag in ("a", "b"):
        typed = {"Content-Type": OCI_INDEX, **headers}
        given.append(await ask(client, "PUT", f"{APP}/manifests/{tag}", data=INDEX, headers=typed))
    locations = [answer.headers["Location"] for answer in given]
    await Pusher(client, "z").blob(CONTENT)
    listed = [await ask(client, "GET", f"{path}?n=1", headers=headers) for path in (f"{APP}/tags/list", "/v2/_catalog")]
    return locations + [next_page(answer) for answer in listed]


@pytest.mark.parametrize("headers", PROXIES.values(), ids=PROXIES)
async def test_addresses_are_paths_that_any_client_puts_against_the_host_it_knows(
    client: Client, headers: dict[str, str]
) -> None:
    for address in await addresses(client, headers):
        parts = urlsplit(address)
        assert (parts.scheme, parts.netloc) == ("", "")
        assert address.startswith("/v2/")
        assert "evil" not in address


async def test_a_prefix_that_a_proxy_takes_away_is_put_back(client: Client) -> None:
    for address in await addresses(client, BEHIND_A_PREFIX):
        assert address.startswith("/some/registry.1/v2/")


@pytest.mark.parametrize("prefix", ["/p", "/p/", "/p/q/"])
async def test_a_prefix_may_end_with_a_slash(client: Client, prefix: str) -> None:
    answer = await ask(client, "POST", f"{APP}/blobs/uploads/", headers={"X-Forwarded-Prefix": prefix})
    assert answer.headers["Location"].startswith(f"{prefix.rstrip('/')}/v2/org/team/app/blobs/uploads/")


@pytest.mark.parametrize(
    "prefix",
    [
        "//evil.test",
        "/p//evil.test",
        "https://evil.test",
        "evil.test",
        "/a b",
        "/a?b",
        "/a#b",
        "/a\\b",
        "/\\evil.test",
        "/a%0d%0aSet-Cookie:x",
        "/a>; rel=x, <",
        "/a,/b",
        "/",
        "",
    ],
)
async def test_a_prefix_that_is_no_path_is_ignored(client: Client, prefix: str) -> None:
    for address in await addresses(client, {"X-Forwarded-Prefix": prefix}):
        assert address.startswith("/v2/")
        assert "evil" not in address


async def test_every_address_can_be_followed(client: Client) -> None:
    for address in await addresses(client, {}):
        answer = await ask(client, "GET", address)
        # The upload has been finished meanwhile.
        assert answer.status == (404 if "/uploads/" in address else 200), (address, answer)


async def test_an_upload_is_pushed_by_following_each_address(client: Client) -> None:
    answer: Answer = await ask(client, "POST", f"{APP}/blobs/uploads/")
    for position in range(len(CONTENT)):
        headers = {"Content-Range": f"{position}-{position}"}
        data = CONTENT[position : position + 1]
        answer = await ask(client, "PATCH", answer.headers["Location"], data=data, headers=headers)
        assert answer.status == 202
    answer = await ask(client, "PUT", f"{answer.headers['Location']}?digest={DIGEST}")
    assert (await ask(client, "GET", answer.headers["Location"])).body == CONTENT
