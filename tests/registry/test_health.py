"""`/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

import shutil
import sqlite3
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from registry.config import Settings
from tests.content import Client, Pusher, digest_of
from tests.registry.talk import stored
from tests.services.processes import HytheServer, hythe_server, wait_until

#: Who watches does not wait for long: a registry that hangs is worse than one that says it is not ready. Seconds.
PATIENCE = 12

#: (name, labels) → value
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0)


async def scrape(client: Client) -> Samples:
    async with client.get("/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        return parse(await response.text())


def scrape_new_connection(url: str) -> Samples:
    """Each connection may reach another worker."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        return parse(response.read().decode())


async def test_a_healthy_registry_says_so(client: Client) -> None:
    async with client.get("/healthz") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    async with client.get("/readyz") as response:
        assert (response.status, await response.json()) == (200, {"database": "ok", "store": "ok"})


def names_below(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*")}


async def test_asking_whether_it_is_ready_leaves_nothing_in_the_store(client: Client, settings: Settings) -> None:
    async with client.get("/readyz") as response:
        assert response.status == 200
    assert not await stored(settings)
    found = names_below(Path(settings.storage.filesystem.root))
    assert {name for name in found if not name.startswith("hythe.db")} <= {"blobs", "uploads"}


def drop_the_store(data: Path) -> None:
    for name in ("blobs", "uploads"):
        shutil.rmtree(data / name)


def move_the_data_away(data: Path) -> None:
    data.rename(data.with_name("elsewhere"))


def drop_the_sessions(data: Path) -> None:
    with closing(sqlite3.connect(data / "hythe.db")) as database:
        database.execute("DROP TABLE upload_session")


def overwrite_the_database(data: Path) -> None:
    with closing(sqlite3.connect(data / "hythe.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (data / "hythe.db").open("r+b") as file:
        file.write(b"\xff" * (data / "hythe.db").stat().st_size)


@pytest.mark.parametrize(
    ("break_it", "part"),
    [
        (move_the_data_away, "store"),
        (drop_the_store, "store"),
        (drop_the_sessions, "database"),
        (overwrite_the_database, "database"),
    ],
)
def test_a_registry_whose_store_or_database_is_gone_lives_and_is_not_ready(
    server: HytheServer, break_it: Callable[[Path], None], part: str
) -> None:
    break_it(server.data)
    response = requests.get(f"{server.url}/readyz", timeout=PATIENCE)
    assert response.status_code == 503
    assert response.json()[part] == "failed: see the log"
    assert "not ready" in server.output.read_text()
    assert requests.get(f"{server.url}/healthz", timeout=PATIENCE).status_code == 200


def test_a_registry_whose_database_is_locked_is_not_ready_until_it_is_free(server: HytheServer) -> None:
    with closing(sqlite3.connect(server.data / "hythe.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        response = requests.get(f"{server.url}/readyz", timeout=PATIENCE)
        assert response.status_code == 503
        assert response.json()["database"].startswith("failed: ")
        assert response.json()["store"] == "ok"
        other.execute("ROLLBACK")
    wait_until(
        lambda: requests.get(f"{server.url}/readyz", timeout=PATIENCE).status_code == 200, "the lock to be seen gone"
    )


async def test_requests_are_counted_by_route_method_and_code(client: Client) -> None:
    await Pusher(client).image("v1")
    for name, times in (("v1", 3), ("nothing", 2)):
        for _ in range(times):
            async with client.get(f"/v2/org/team/app/manifests/{name}"):
                pass
    async with client.post("/v2/org/team/app/manifests/v1"):
        pass
    samples = await scrape(client)
    counted = {
        (labels["route"], labels["method"], labels["code"]): number
        for labels, number in ((dict(k[1]), v) for k, v in samples.items() if k[0] == "hythe_requests_total")
    }
    assert counted == {
        ("uploads", "POST", "201"): 2,
        ("manifest", "PUT", "201"): 1,
        ("manifest", "GET", "200"): 3,
        ("manifest", "GET", "404"): 2,
        ("manifest", "POST", "405"): 1,
    }


async def test_names_and_digests_make_no_series_of_their_own(client: Client) -> None:
    for number in range(20):
        async with client.get(f"/v2/app-{number}/manifests/{digest_of(b'%d' % number)}"):
            pass
        async with client.get(f"/no/such/path/{number}"):
            pass
    samples = await scrape(client)
    routes = {
        dict(labels)["route"]: number for (name, labels), number in samples.items() if name == "hythe_requests_total"
    }
    assert routes == {"manifest": 20, "none": 20}


async def test_bytes_of_bodies_are_counted_in_and_out(client: Client) -> None:
    content = bytes(100_003)
    before = await scrape(client)
    await Pusher(client).blob(content)
    pushed = await scrape(client)
    assert value(pushed, "hythe_received_bytes_total") - value(before, "hythe_received_bytes_total") == len(content)
    path = f"/v2/org/team/app/blobs/{digest_of(content)}"
    async with client.get(path) as response:
        await response.read()
    pulled = await scrape(client)
    async with client.head(path):
        pass
    headed = await scrape(client)
    # The scrape before is an answer with a body too.
    sent = [value(samples, "hythe_sent_bytes_total") for samples in (pushed, pulled, headed)]
    assert len(content) <= sent[1] - sent[0] < len(content) + 20_000
    assert sent[2] - sent[1] < 20_000


async def test_open_uploads_are_counted_and_ended_ones_are_not(client: Client) -> None:
    places = []
    for expected in (1, 2, 3):
        async with client.post("/v2/app/blobs/uploads/") as response:
            places.append(response.headers["Location"])
        assert value(await scrape(client), "hythe_upload_sessions") == expected
    async with client.delete(places[0]) as response:
        assert response.status == 204
    async with client.put(places[1], params={"digest": digest_of(b"")}) as response:
        assert response.status == 201
    assert value(await scrape(client), "hythe_upload_sessions") == 1


async def test_latencies_are_a_histogram_for_each_route(client: Client) -> None:
    for _ in range(5):
        async with client.get("/v2/"):
            pass
    samples = await scrape(client)
    buckets = {
        float(dict(labels)["le"]): number
        for (name, labels), number in samples.items()
        if name == "hythe_request_seconds_bucket" and ("route", "base") in labels
    }
    numbers = [buckets[bound] for bound in sorted(buckets)]
    assert numbers == sorted(numbers)
    assert buckets[float("inf")] == 5 == value(samples, "hythe_request_seconds_count", route="base")
    assert value(samples, "hythe_request_seconds_sum", route="base") > 0


def test_two_workers_tell_one_sum(tmp_path: Path) -> None:
    with hythe_server(tmp_path, "--workers", "2") as server:
        before = scrape_new_connection(server.url)
        start = value(before, "hythe_requests_total", route="discover", method="GET", code="200")
        for _ in range(40):
            requests.get(f"{server.url}/v2/_oci/ext/discover", timeout=10).raise_for_status()
        requests.post(f"{server.url}/v2/app/blobs/uploads/", timeout=10).raise_for_status()

        def total() -> float:
            samples = scrape_new_connection(server.url)
            assert value(samples, "hythe_upload_sessions") == 1
            return value(samples, "hythe_requests_total", route="discover", method="GET", code="200") - start

        # Whichever worker is asked, and more than once so that both are.
        wait_until(lambda: [total() for _ in range(12)] == [40] * 12, "both workers to know of 40 requests")
