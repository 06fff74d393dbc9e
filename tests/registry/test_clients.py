"""Where requests come from, and how clients know the registry: as proxies say, as far as they are trusted."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from aiohttp import ClientSession, TCPConnector, web

from registry.access.clients import Clients
from registry.config import ServerSettings, Settings
from registry.metadata import accounts, audit
from registry.metadata.engine import open_database
from tests.conftest import Start
from tests.registry.accounts import HASH, basic
from tests.registry.talk import ask

#: The proxy that connects, those before it, the client, and whoever he says that he is.
PROXY, BEFORE, CLIENT, SPOOFED = "127.0.0.1", "10.1.2.3", "192.0.2.7", "198.51.100.1"
TRUSTED = ServerSettings(trusted_proxies=(PROXY, "10.0.0.0/8"))
ANYBODY = ServerSettings(behind_proxy=True)
FOR, PROTO, HOST = "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"

Headers = Sequence[tuple[str, str]]


@contextlib.asynccontextmanager
async def listening(settings: ServerSettings, host: str) -> AsyncIterator[int]:
    """Run a server that says what it takes a request for; yield its port."""
    clients = Clients(settings)

    async def tell(request: web.Request) -> web.Response:
        return web.json_response([clients.address(request), clients.origin(request)])

    app = web.Application()
    app.router.add_get("/", tell)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    try:
        yield sock.getsockname()[1]
    finally:
        await runner.cleanup()


async def told(
    settings: ServerSettings, headers: Headers, source: str = PROXY, host: str = "127.0.0.1"
) -> tuple[str, str]:
    """Return address and origin of a request with `headers` that comes from `source`."""
    async with (
        listening(settings, host) as port,
        ClientSession(connector=TCPConnector(local_addr=(source, 0))) as session,
        session.get(f"http://127.0.0.1:{port}/", headers=[("Host", "registry.test"), *headers]) as response,
    ):
        address, origin = await response.json()
        return address, origin


async def address(settings: ServerSettings, *forwarded: str, **more: Any) -> str:
    return (await told(settings, [(FOR, each) for each in forwarded], **more))[0]


async def origin(settings: ServerSettings, *headers: tuple[str, str], **more: Any) -> str:
    return (await told(settings, headers, **more))[1]


# --- where requests come from --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forwarded", "expected"),
    [
        ([], PROXY),
        ([CLIENT], CLIENT),
        ([f"{SPOOFED}, {CLIENT}"], CLIENT),
        ([f"{SPOOFED},{CLIENT},{BEFORE}"], CLIENT),
        ([f"10.9.9.9, {CLIENT}, {BEFORE}"], CLIENT),
        ([f"10.9.9.9, {BEFORE}"], "10.9.9.9"),
        ([SPOOFED, f"{CLIENT}, {BEFORE}"], CLIENT),
        ([f"{SPOOFED}, {CLIENT}", BEFORE], CLIENT),
        ([f"{SPOOFED}, {CLIENT},, ,{BEFORE},"], CLIENT),
        ([f"{CLIENT}, ::ffff:{BEFORE}"], CLIENT),
        ([f"{SPOOFED}, 2001:db8::7, {BEFORE}"], "2001:db8::7"),
        (["nonsense"], PROXY),
        ([""], PROXY),
        ([f"{CLIENT}, nonsense, {BEFORE}"], BEFORE),
        ([f"{CLIENT}:1234"], PROXY),
        (["[2001:db8::7]"], PROXY),
        (["fe80::1%anything at all"], PROXY),
        ([f"{CLIENT}\xff"], PROXY),
    ],
)
async def test_the_last_one_who_is_no_trusted_proxy_is_the_client(forwarded: list[str], expected: str) -> None:
    assert await address(TRUSTED, *forwarded) == expected


async def test_nobody_else_is_believed_about_where_he_comes_from() -> None:
    assert await address(TRUSTED, CLIENT, source="127.0.0.2") == "127.0.0.2"
    assert await address(TRUSTED, f"{CLIENT}, {BEFORE}", source="127.0.0.2") == "127.0.0.2"
    assert await address(ServerSettings(), CLIENT) == PROXY


async def test_behind_a_proxy_that_is_not_named_whoever_connects_is_believed_about_one_before_him() -> None:
    for source in (PROXY, "127.0.0.2"):
        assert await address(ANYBODY, f"{SPOOFED}, {CLIENT}", source=source) == CLIENT
        assert await address(ANYBODY, f"{SPOOFED}, {BEFORE}", source=source) == BEFORE
        assert await address(ANYBODY, source=source) == source


async def test_where_proxies_are_named_only_those_are_believed_behind_one() -> None:
    settings = ServerSettings(behind_proxy=True, trusted_proxies=(PROXY,))
    assert await address(settings, CLIENT) == CLIENT
    assert await address(settings, f"{CLIENT}, {BEFORE}") == BEFORE
    assert await address(settings, CLIENT, source="127.0.0.2") == "127.0.0.2"


async def test_a_proxy_is_known_by_its_address_in_ipv6_clothes_too() -> None:
    clothed = "::ffff:127.0.0.1"
    assert await address(ServerSettings(), host=clothed) == clothed
    assert await address(TRUSTED, CLIENT, host=clothed) == CLIENT


# --- how clients know us -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], "http://registry.test"),
        ([(PROTO, "https")], "https://registry.test"),
        ([(PROTO, "http, https")], "https://registry.test"),
        ([(PROTO, "http"), (PROTO, "https")], "https://registry.test"),
        ([(HOST, "hub.test:8443")], "http://hub.test:8443"),
        ([(HOST, "[2001:db8::7]:5000"), (PROTO, "https")], "https://[2001:db8::7]:5000"),
        ([(HOST, "evil.test, hub.test"), (PROTO, "https")], "https://hub.test"),
        ([(HOST, "evil.test"), (HOST, "hub.test")], "http://hub.test"),
        ([(PROTO, "https"), ("X-Forwarded-Prefix", "/hub")], "https://registry.test/hub"),
        ([(HOST, 'evil.test",realm="x')], "http://localhost"),
        ([(HOST, "evil.test/\\@x")], "http://localhost"),
        ([(PROTO, "gopher")], "http://localhost"),
    ],
)
async def test_clients_are_told_the_address_by_which_a_trusted_proxy_is_known(headers: Headers, expected: str) -> None:
    for settings in (TRUSTED, ANYBODY):
        assert await origin(settings, *headers) == expected


async def test_nobody_else_is_believed_about_our_address() -> None:
    said = [(PROTO, "https"), (HOST, "evil.test")]
    assert await origin(TRUSTED, *said, source="127.0.0.2") == "http://registry.test"
    assert await origin(ServerSettings(), *said) == "http://registry.test"


@pytest.mark.parametrize("public_url", ["https://hub.test:8443", "https://hub.test:8443/", "https://hub.test/below/it"])
async def test_the_address_of_the_configuration_is_that_whatever_anybody_says(public_url: str) -> None:
    for trusted in ((), (PROXY,)):
        settings = ServerSettings(public_url=public_url, trusted_proxies=trusted)
        said = [(PROTO, "http"), (HOST, "evil.test"), ("X-Forwarded-Prefix", "/else")]
        assert await origin(settings, *said) == public_url.rstrip("/")


# --- what comes of it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "realm"),
    [
        ({}, "http://registry.test/v2/token"),
        ({"behind_proxy": True}, "https://hub.test/v2/token"),
        ({"trusted_proxies": [PROXY]}, "https://hub.test/v2/token"),
        ({"trusted_proxies": [BEFORE]}, "http://registry.test/v2/token"),
        ({"public_url": "https://hub.test/below"}, "https://hub.test/below/v2/token"),
    ],
)
async def test_tokens_are_to_be_got_at_that_address_and_the_audit_names_the_client(
    start: Start, settings: Settings, server: dict[str, object], realm: str
) -> None:
    database = open_database(settings.database.url)
    try:
        await database.write(accounts.add, "root", accounts.USER, HASH, admin=True)
        client = await start(server=server)
        headers = {"Host": "registry.test", HOST: "hub.test", PROTO: "https", FOR: CLIENT}
        answer = await ask(client, "GET", "/v2/", headers={**headers, **basic("root", "wrong")})
        assert answer.headers["WWW-Authenticate"] == f'Bearer realm="{realm}",service="hythe"'
        await client.close()
        found = await database.read(audit.find, since=0, user=None, repository=None, before=None, limit=1)
    finally:
        await database.close()
    is_believed = server.get("behind_proxy") or server.get("trusted_proxies") == [PROXY]
    assert [event.address for _, event in found] == [CLIENT if is_believed else PROXY]
