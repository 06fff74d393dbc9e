"""The servers that other tests lean on: each starts, does a little, and leaves nothing over."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import psycopg
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, HTTPClientError

from tests.services.faults import FaultyProxy
from tests.services.postgres import Postgres, needs_postgres, postgres
from tests.services.processes import free_port
from tests.services.s3 import S3, ceph, juicefs, needs_ceph, needs_juicefs

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: Where these programs write by themselves, if nobody tells them not to.
OUTSIDE = [Path(name).expanduser() for name in ("/etc/ceph", "/var/lib/ceph", "/var/log/ceph", "/run/ceph", "~/.minio")]


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left_over() -> Iterator[None]:
    before = children(), outside()
    yield
    assert (children(), outside()) == before


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def outside() -> set[Path]:
    return {path for root in OUTSIDE for path in [root, *root.rglob("*")] if path.exists()}


@pytest.fixture(scope="module")
def database_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        cluster = Path(server.command[2])
        assert cluster.exists()
        yield server
    assert not cluster.parent.exists()


@needs_postgres
def test_a_database_is_made_copied_and_dropped(database_server: Postgres) -> None:
    url = database_server.create()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE tag (name text)")
        connection.execute("INSERT INTO tag VALUES ('b'), ('A'), ('a')")
    copy = database_server.create(template=url.rpartition("/")[2])
    with psycopg.connect(copy) as connection:
        assert connection.execute("SELECT name FROM tag ORDER BY name").fetchall() == [("a",), ("A",), ("b",)]
        database_server.drop(copy)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    database_server.drop(url)
    left = database_server.execute("SELECT count(*) FROM pg_database WHERE datname LIKE 'hythe%'")
    assert left == [(0,)]


@needs_postgres
def test_a_database_is_emptied_of_what_others_wrote_and_were_about_to_write(database_server: Postgres) -> None:
    url = database_server.create()
    with psycopg.connect(url) as first:
        first.execute("CREATE TABLE image (id int PRIMARY KEY)")
        first.execute("CREATE TABLE tag (image int REFERENCES image)")
        first.execute("INSERT INTO image VALUES (1)")
    with psycopg.connect(url) as other:
        other.execute("INSERT INTO tag VALUES (1)")
        database_server.empty(url, ["tag", "image"])
        with pytest.raises(psycopg.OperationalError):
            other.execute("SELECT 1")
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT FROM image").fetchall() == []
        assert connection.execute("SELECT FROM tag").fetchall() == []
    database_server.drop(url)


@needs_postgres
def test_a_database_outlives_a_restart_and_a_crash(database_server: Postgres) -> None:
    url = database_server.create()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept ()")
    database_server.restart()
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO kept DEFAULT VALUES")
    database_server.kill()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)
    database_server.start()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchall() == [(1,)]


@needs_postgres
def test_the_role_of_hythe_is_let_in_by_its_password_alone_and_is_no_superuser(database_server: Postgres) -> None:
    url = database_server.create()
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(url.replace(database_server.password, "other"))
    with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("CREATE ROLE another")


SERVERS = {"ceph": ceph, "juicefs": juicefs}


@pytest.fixture(
    scope="module", params=[pytest.param("ceph", marks=needs_ceph), pytest.param("juicefs", marks=needs_juicefs)]
)
def s3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with SERVERS[request.param](tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint) as running:
        yield running


@dataclass(frozen=True)
class Bucket:
    """A bucket behind the proxy, by a client that does not try twice."""

    name: str
    client: S3Client

    def put(self, key: str, content: bytes = b"content") -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def exists(self, key: str) -> bool:
        return key in [found["Key"] for found in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])]

    def url(self, method: str, key: str, **parameters: object) -> str:
        return self.client.generate_presigned_url(method, Params={"Bucket": self.name, "Key": key, **parameters})


@pytest.fixture
def bucket(s3: S3, proxy: FaultyProxy) -> Iterator[Bucket]:
    there = replace(s3, endpoint=proxy.endpoint)
    with closing(there.client(attempts=1)) as client:
        yield Bucket(there.new_bucket(), client)


def test_an_s3_server_keeps_what_it_is_given_and_refuses_strangers(s3: S3) -> None:
    bucket = s3.new_bucket()
    with closing(s3.client()) as client, closing(replace(s3, secret_key="other").client()) as stranger:
        client.put_object(Bucket=bucket, Key="a/b", Body=b"content")
        assert client.get_object(Bucket=bucket, Key="a/b")["Body"].read() == b"content"
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            stranger.get_object(Bucket=bucket, Key="a/b")
    assert s3.new_bucket() != bucket


def test_the_proxy_passes_on_what_boto_signs(proxy: FaultyProxy, bucket: Bucket) -> None:
    where: Any = {"Bucket": bucket.name, "Key": "a/b"}
    client = bucket.client
    part = 5 << 20
    upload = client.create_multipart_upload(**where)["UploadId"]
    client.list_multipart_uploads(Bucket=bucket.name, Prefix="a/", MaxUploads=10)
    parts: list[Any] = []
    for number, size in ((1, part + 1), (2, part), (3, 1)):
        answer = client.upload_part(**where, UploadId=upload, PartNumber=number, Body=bytes(size))
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})
    client.abort_multipart_upload(**where, UploadId=client.create_multipart_upload(**where)["UploadId"])
    assert client.head_object(**where)["ContentLength"] == 2 * part + 2
    bucket.put("c")
    assert client.get_object(Bucket=bucket.name, Key="c", Range="bytes=1-3")["Body"].read() == b"ont"
    assert bucket.exists("c")
    client.delete_object(Bucket=bucket.name, Key="c")
    assert not bucket.exists("c")
    assert [(seen.method, seen.kind) for seen in proxy.requests] == [
        ("PUT", "other"),
        ("POST", "CreateMultipartUpload"),
        ("GET", "ListMultipartUploads"),
        *[("PUT", "UploadPart")] * 3,
        ("POST", "CompleteMultipartUpload"),
        ("POST", "CreateMultipartUpload"),
        ("DELETE", "AbortMultipartUpload"),
        ("HEAD", "HeadObject"),
        ("PUT", "PutObject"),
        ("GET", "GetObject"),
        ("GET", "ListObjects"),
        ("DELETE", "DeleteObject"),
        ("GET", "ListObjects"),
    ]


async def test_the_proxy_passes_on_presigned_requests(proxy: FaultyProxy, bucket: Bucket) -> None:
    content = bytes(range(256)) * 4096
    async with aiohttp.ClientSession() as http:
        for expect in (False, True):
            async with http.put(bucket.url("put_object", "a"), data=content, expect100=expect) as answer:
                assert answer.status == 200
        async with http.get(bucket.url("get_object", "a"), headers={"Range": "bytes=256-511"}) as answer:
            assert answer.status == 206
            assert await answer.read() == bytes(range(256))
        async with http.put(bucket.url("put_object", "a").replace("Signature=", "Signature=0"), data=content) as answer:
            assert answer.status == 403
        # Who sends chunks is told that S3 wants to know the length, and told in time.
        async with http.put(bucket.url("put_object", "a"), data=_pieces(content)) as answer:
            assert answer.status == 411
    assert [seen.kind for seen in proxy.requests[1:]] == ["PutObject"] * 2 + ["GetObject"] + ["PutObject"] * 2
    assert "X-Amz-Signature" in proxy.requests[1].query


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 1000):
        yield content[start : start + 1000]


@pytest.mark.parametrize("read_body", [True, False])
def test_the_proxy_refuses_as_often_as_it_is_told(proxy: FaultyProxy, bucket: Bucket, read_body: bool) -> None:
    proxy.fail("PutObject", times=2, read_body=read_body)
    for _ in range(2):
        with pytest.raises(ClientError, match="SlowDown") as error:
            bucket.put("a", bytes(1 << 20))
        assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
    assert not bucket.exists("a")
    bucket.put("a")
    proxy.fail("HeadObject", status=500, code="InternalError")
    with pytest.raises(ClientError, match="500"):
        bucket.client.head_object(Bucket=bucket.name, Key="a")
    assert bucket.get("a") == b"content"


def test_the_proxy_hangs_for_a_time_or_until_it_is_closed(s3: S3, bucket: Bucket, proxy: FaultyProxy) -> None:
    bucket.put("a")
    proxy.hang("GetObject", seconds=0.1)
    with pytest.raises(ConnectionClosedError):
        bucket.get("a")
    assert bucket.get("a") == b"content"
    with FaultyProxy(s3.endpoint) as other:
        other.hang("HeadObject")
        with socket.create_connection(("127.0.0.1", urlsplit(other.endpoint).port or 0)) as connection:
            connection.sendall(b"HEAD /a/b HTTP/1.1\r\nHost: a\r\n\r\n")
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(1)


def test_the_proxy_cuts_requests(proxy: FaultyProxy, bucket: Bucket) -> None:
    for after in (0, 100_000):
        proxy.cut_request("PutObject", after=after)
        with pytest.raises(HTTPClientError):
            bucket.put("a", bytes(1 << 20))
    assert not bucket.exists("a")
    bucket.put("a")
    assert bucket.get("a") == b"content"


async def test_the_proxy_cuts_answers(proxy: FaultyProxy, bucket: Bucket) -> None:
    bucket.put("a", bytes(1 << 20))
    proxy.cut_response("GetObject", after=300_000)
    got = bytearray()
    async with aiohttp.ClientSession() as http, http.get(bucket.url("get_object", "a")) as answer:
        assert answer.status == 200
        assert answer.content_length == 1 << 20
        with pytest.raises(aiohttp.ClientPayloadError):
            await _read_into(got, answer)
    assert len(got) == 300_000
    assert len(bucket.get("a")) == 1 << 20


async def _read_into(got: bytearray, answer: aiohttp.ClientResponse) -> None:
    async for piece in answer.content.iter_any():
        got += piece


def test_the_proxy_loses_answers_to_what_was_done(proxy: FaultyProxy, bucket: Bucket) -> None:
    proxy.lose_answer("PutObject")
    with pytest.raises(ConnectionClosedError):
        bucket.put("a")
    assert bucket.get("a") == b"content"


def test_the_proxy_is_slow_until_it_is_cleared(proxy: FaultyProxy, bucket: Bucket) -> None:
    proxy.slow("GetObject", bytes_per_second=100_000)
    proxy.fail("HeadObject", times=100)
    bucket.put("a", bytes(50_000))
    begin = time.monotonic()
    assert bucket.get("a") == bytes(50_000)
    assert time.monotonic() - begin > 0.4
    proxy.slow("GetObject", bytes_per_second=1)
    proxy.clear()
    assert bucket.client.head_object(Bucket=bucket.name, Key="a")["ContentLength"] == len(bucket.get("a"))


def test_the_proxy_closes_like_a_server_that_is_gone() -> None:
    with FaultyProxy(f"http://127.0.0.1:{free_port()}") as proxy, pytest.raises(OSError):
        urllib.request.urlopen(f"{proxy.endpoint}/a/b", timeout=5)
