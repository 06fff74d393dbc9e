"""Taking blobs over from other repositories. [distribution-spec: end-11]"""

import pytest

from storage.digest import HEX_LENGTH
from tests.content import Client, Pusher, digest_of
from tests.registry.talk import Answer, ask

CONTENT = b"a layer that several images have"
UPLOADS = "/v2/org/team/app/blobs/uploads/"
UNKNOWN = digest_of(b"never pushed")


async def mount(client: Client, digest: str, source: str = "") -> Answer:
    return await ask(client, "POST", f"{UPLOADS}?mount={digest}" + (f"&from={source}" if source else ""))


async def check_session(client: Client, answer: Answer) -> None:
    """What cannot be mounted can be pushed, by the session that was opened instead."""
    assert answer.status == 202, answer
    assert answer.headers["Range"] == "0-0"
    closed = await ask(client, "PUT", f"{answer.headers['Location']}?digest={digest_of(CONTENT)}", data=CONTENT)
    assert closed.status == 201, closed


@pytest.mark.parametrize("algorithm", sorted(HEX_LENGTH))
@pytest.mark.parametrize("source", ["elsewhere/base", ""])
async def test_a_mounted_blob_is_there_without_its_bytes_being_sent(
    client: Client, source: str, algorithm: str
) -> None:
    digest = await Pusher(client, "elsewhere/base").blob(CONTENT, algorithm)
    mounted = await mount(client, digest, source)
    assert mounted.status == 201, mounted
    assert mounted.headers["Docker-Content-Digest"] == digest
    assert mounted.headers["Location"] == f"/v2/org/team/app/blobs/{digest}"
    assert (await ask(client, "GET", mounted.headers["Location"])).body == CONTENT


async def test_a_mount_of_what_is_there_already_changes_nothing(client: Client) -> None:
    digest = await Pusher(client).blob(CONTENT)
    for source in ("org/team/app", ""):
        assert (await mount(client, digest, source)).status == 201
    assert (await ask(client, "GET", f"/v2/org/team/app/blobs/{digest}")).body == CONTENT


async def test_a_mount_from_a_repository_without_the_blob_becomes_an_upload(client: Client) -> None:
    digest = await Pusher(client, "elsewhere/base").blob(CONTENT)
    await Pusher(client, "elsewhere/other").blob(b"something else")
    await check_session(client, await mount(client, digest, "elsewhere/other"))


@pytest.mark.parametrize("source", ["not/there", ""])
async def test_a_mount_of_what_nobody_has_becomes_an_upload(client: Client, source: str) -> None:
    await check_session(client, await mount(client, UNKNOWN, source))


async def test_a_mount_from_what_is_no_repository_name_becomes_an_upload(client: Client) -> None:
    digest = await Pusher(client, "elsewhere/base").blob(CONTENT)
    await check_session(client, await mount(client, digest, "NOT/A-NAME"))


@pytest.mark.parametrize("digest", ["sha256:abc", "md5:" + "0" * 32, "nothing", ""])
async def test_a_mount_of_a_malformed_digest_is_refused(client: Client, digest: str) -> None:
    answer = await mount(client, digest, "elsewhere/base")
    assert (answer.status, answer.codes) == (400, ["DIGEST_INVALID"])


async def test_a_mounted_blob_outlives_its_source(client: Client) -> None:
    digest = await Pusher(client, "elsewhere/base").blob(CONTENT)
    await mount(client, digest, "elsewhere/base")
    assert (await ask(client, "DELETE", f"/v2/elsewhere/base/blobs/{digest}")).status == 202
    assert (await ask(client, "GET", f"/v2/org/team/app/blobs/{digest}")).body == CONTENT


@pytest.mark.parametrize("source", ["elsewhere/base", ""])
async def test_a_blob_that_no_repository_holds_any_more_is_not_mounted(client: Client, source: str) -> None:
    digest = await Pusher(client, "elsewhere/base").blob(CONTENT)
    await ask(client, "DELETE", f"/v2/elsewhere/base/blobs/{digest}")
    await check_session(client, await mount(client, digest, source))


async def test_a_mount_that_failed_may_bring_the_blob_itself(client: Client) -> None:
    digest = digest_of(CONTENT)
    path = f"{UPLOADS}?mount={digest}&from=not/there&digest={digest}"
    assert (await ask(client, "POST", path, data=CONTENT)).status == 201
