"""One bucket of an object store that speaks S3: requests, repeated where they fail, counted by kind.

Control goes by boto3 in threads, which signs, repeats and knows every dialect. Bytes go by the event loop's own client
to addresses that boto3 has signed: that takes half of the processor. Nothing here relies on conditional writes, on
checksums in headers or trailers, or on a listing in a request's path: servers differ in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import ssl
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NoReturn, TypeVar

import aiohttp
import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from yarl import URL

from storage.errors import ContentMissing, OutOfSpace, StorageError, StoreUnavailable, UploadLost
from storage.threads import Threads

T = TypeVar("T")

_CONTROLLERS: Final = 8
_CONNECT_SECONDS: Final = 5
_READ_SIZE: Final = 1 << 20
#: How often one request is made at most, and the seconds before the second time.
_TRIES: Final = 5
_PAUSE: Final = 0.1
#: For how long a signed address is good: ours at once; a client's may wait in a queue of layers.
_SIGNED_SECONDS: Final = 900
_PUBLIC_SECONDS: Final = 1200
_ERROR_SIZE: Final = 16 << 10

_CODE: Final = re.compile(rb"<Code>([^<]{1,100})</Code>")
#: [S3: List of error codes], and what other servers say.
_PASSING: Final = frozenset(
    [
        *("InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "TooManyRequests"),
        *("SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException"),
        "XMinioServerNotInitialized",
    ]
)
_FULL: Final = frozenset(
    ["InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull"],
)
_FAILURES: Final = (aiohttp.ClientError, TimeoutError, ConnectionError)


class _Again(Exception):
    """A request failed in a way that another one may not."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An object, or an upload in parts that is not complete: then `upload_id` says which. `modified` as of `time`."""

    key: str
    size: int
    modified: float
    upload_id: str = ""


class Bucket:
    """Objects under keys.

    Every method raises `StoreUnavailable` where the server does not answer or refuses to, after several tries, and
    `OutOfSpace` where it has no room.

    Attributes:
        requests: how many were made, by the names that S3 gives them, repeated ones too.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        *,
        region: str,
        endpoint: str,
        public_endpoint: str,
        addressing: str,
        access_key: str,
        secret_key: str,
        session_token: str,
        ca_file: str,
        timeout_seconds: float,
    ) -> None:
        """Use the bucket `name`, with `prefix` before every key. config.example.toml has the rest."""
        self._name = name
        self._prefix = prefix
        self._timeout = timeout_seconds
        self._patience = 3 * timeout_seconds
        self._ca_file = ca_file
        self.requests: Counter[str] = Counter()
        config = Config(
            # Without it, addresses are signed in the way of version 2.
            signature_version="s3v4",
            s3={"addressing_style": addressing},  # type: ignore[arg-type]
            # What other servers make of checksums that nobody asked for ranges from ignoring to refusing them.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": _TRIES},
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=timeout_seconds,
            max_pool_connections=_CONTROLLERS,
        )

        # What was found where AWS's tools look stays in a session.
        session = _session() if access_key else boto3.Session()

        def client(address: str) -> Any:
            return session.client(
                "s3",
                endpoint_url=address or None,
                config=config,
                verify=ca_file or None,
                region_name=region,
                aws_access_key_id=access_key or None,
                aws_secret_access_key=secret_key or None,
                aws_session_token=session_token or None,
            )

        self._client = client(endpoint)
        self._public = client(public_endpoint) if public_endpoint else self._client
        self._client.meta.events.register("before-send.s3", self._count)
        self._threads = Threads(_CONTROLLERS, "control")
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Let go of threads and connections."""
        if self._session:
            await self._session.close()
        await self._threads.close()
        self._client.close()
        self._public.close()

    # -- bytes

    async def put(self, key: str, pieces: Sequence[bytes | bytearray]) -> None:
        """Make an object of `pieces`."""
        await self._send("PutObject", "put_object", {"Key": self._prefix + key}, pieces)

    async def put_part(self, key: str, upload_id: str, number: int, pieces: Sequence[bytes | bytearray]) -> str:
        """Send a part and return its tag; raises `UploadLost`."""
        where = {"Key": self._prefix + key, "UploadId": upload_id, "PartNumber": number}
        return await self._send("UploadPart", "upload_part", where, pieces)

    async def read(self, key: str, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` up to but not including `stop`; goes on where a connection broke.

        Raises:
            ContentMissing: they are not there.
        """
        failures = 0
        while start < stop:
            try:
                async with contextlib.aclosing(self._read(key, start, stop)) as pieces:
                    async for piece in pieces:
                        start += len(piece)
                        failures = 0
                        yield piece
            except (_Again, *_FAILURES) as error:
                failures += 1
                if failures >= _TRIES:
                    raise StoreUnavailable(f"GetObject: {_said(error)}") from None
                await asyncio.sleep(_pause(failures))

    async def _read(self, key: str, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        url = await self._sign(self._client, "get_object", {"Key": self._prefix + key}, _SIGNED_SECONDS)
        self.requests["GetObject"] += 1
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        async with self._http().get(url, headers=headers, allow_redirects=False) as response:
            # A server that knows no ranges would send the beginning.
            if response.status != 206 and (response.status != 200 or start):
                await _refuse("GetObject", response)
            async for piece in response.content.iter_any():
                yield piece
                start += len(piece)
        if start < stop:
            raise _Again("it ended early")

    async def address(self, key: str) -> str:
        """Return a URL under which anybody may fetch an object for a while."""
        url = await self._sign(self._public, "get_object", {"Key": self._prefix + key}, _PUBLIC_SECONDS)
        return str(url)

    # -- control

    async def create(self, key: str) -> str:
        """Begin an upload in parts and return its id."""
        answer = await self._call(self._client.create_multipart_upload, Key=self._prefix + key)
        return str(answer["UploadId"])

    async def complete(self, key: str, upload_id: str, tags: Sequence[str]) -> None:
        """Make an object of all parts that were sent.

        If it fails, in whichever way, it may have been done all the same: answers get lost.

        Raises:
            UploadLost: there is no such upload, a part is another one now, or there are more.
        """
        parts = [{"ETag": tag, "PartNumber": number} for number, tag in enumerate(tags, 1)]
        await self._call(
            self._client.complete_multipart_upload,
            Key=self._prefix + key,
            UploadId=upload_id,
            MultipartUpload={"Parts": parts},
        )

    async def abort(self, key: str, upload_id: str) -> None:
        """Drop an upload in parts; none there is fine."""
        with contextlib.suppress(UploadLost):
            await self._call(self._client.abort_multipart_upload, Key=self._prefix + key, UploadId=upload_id)

    async def size(self, key: str) -> int:
        """Return the size of an object, or raise `ContentMissing`."""
        answer = await self._call(self._client.head_object, Key=self._prefix + key)
        return int(answer["ContentLength"])

    async def delete(self, key: str) -> None:
        """Delete an object; none there is fine."""
        with contextlib.suppress(ContentMissing):
            await self._call(self._client.delete_object, Key=self._prefix + key)

    async def list(self, prefix: str) -> AsyncGenerator[Listed, None]:
        """Yield all objects whose keys begin with `prefix`."""
        more: dict[str, Any] = {}
        while True:
            answer = await self._call(self._client.list_objects_v2, Prefix=self._prefix + prefix, **more)
            for found in answer.get("Contents", ()):
                yield Listed(self._bare(found["Key"]), found["Size"], found["LastModified"].timestamp())
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    async def unfinished(self, prefix: str) -> AsyncGenerator[Listed, None]:
        """Yield all uploads in parts that are not complete and whose keys begin with `prefix`."""
        more: dict[str, Any] = {}
        while True:
            answer = await self._call(self._client.list_multipart_uploads, Prefix=self._prefix + prefix, **more)
            for found in answer.get("Uploads", ()):
                begun = found["Initiated"].timestamp()
                yield Listed(self._bare(found["Key"]), 0, begun, upload_id=found["UploadId"])
            if not answer.get("IsTruncated"):
                return
            more = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    # -- how

    def _bare(self, key: str) -> str:
        return key.removeprefix(self._prefix)

    def _count(self, event_name: str, **_: Any) -> None:
        self.requests[event_name.rpartition(".")[2]] += 1

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            # As boto3 takes them.
            trust = _trust(self._ca_file or os.environ.get("AWS_CA_BUNDLE"))
            self._session = aiohttp.ClientSession(
                # No limit: slow clients that pull must not keep others from a connection.
                connector=aiohttp.TCPConnector(limit=0, ssl=trust, keepalive_timeout=30),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=_CONNECT_SECONDS, sock_read=self._timeout, connect=self._timeout
                ),
                auto_decompress=False,
                read_bufsize=_READ_SIZE,
                # Signed is what we name; and nothing is to be compressed on the way.
                headers={"Accept-Encoding": "identity", "User-Agent": "hythe"},
                skip_auto_headers=("Content-Type", "Accept"),
            )
        return self._session

    async def _sign(self, client: Any, operation: str, where: dict[str, Any], seconds: int) -> URL:
        def sign() -> str:
            parameters = {"Bucket": self._name, **where}
            with _boto_errors(operation):
                signed: str = client.generate_presigned_url(operation, Params=parameters, ExpiresIn=seconds)
            return signed

        # Credentials may have to be fetched first.
        return URL(await self._threads.run(sign), encoded=True)

    async def _send(self, kind: str, operation: str, where: dict[str, Any], pieces: Sequence[bytes | bytearray]) -> str:
        """Send bytes, as often as needed, and return the tag they were given."""
        headers = {"Content-Length": str(sum(map(len, pieces)))}

        async def try_once() -> str:
            url = await self._sign(self._client, operation, where, _SIGNED_SECONDS)
            self.requests[kind] += 1
            async with asyncio.timeout(self._timeout) as limit:
                body = _flow(pieces, limit, self._timeout)
                async with self._http().put(url, data=body, headers=headers, allow_redirects=False) as response:
                    if response.status != 200:
                        await _refuse(kind, response)
                    await response.read()
                    return response.headers.get("ETag", "")

        return await self._repeat(kind, try_once)

    async def _repeat(self, kind: str, try_once: Callable[[], Awaitable[T]]) -> T:
        failures, end = 0, 0.0
        while True:
            try:
                return await try_once()
            except (_Again, *_FAILURES) as error:
                failures += 1
                end = end or time.monotonic() + self._patience
                if failures >= _TRIES or time.monotonic() > end:
                    raise StoreUnavailable(f"{kind}: {_said(error)}") from None
            await asyncio.sleep(_pause(failures))

    async def _call(self, method: Callable[..., Any], **parameters: Any) -> Any:
        def call() -> Any:
            with _boto_errors(method.__name__):
                return method(Bucket=self._name, **parameters)

        return await self._threads.run(call)


@cache
def _session() -> boto3.Session:
    """Return what keeps the description of the service, which takes long to read."""
    return boto3.Session()


@cache
def _trust(ca_file: str | None) -> ssl.SSLContext:
    """Return whose certificates are believed, which takes as long to read as several requests."""
    return ssl.create_default_context(cafile=ca_file)


async def _flow(
    pieces: Sequence[bytes | bytearray], limit: asyncio.Timeout, seconds: float
) -> AsyncGenerator[bytes | bytearray, None]:
    """Yield the pieces as they are taken; whoever takes the next one within the time has so much time again."""
    for piece in pieces:
        if not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time() + seconds)
        yield piece


async def _refuse(kind: str, response: aiohttp.ClientResponse) -> NoReturn:
    """Raise what an answer that is no success means."""
    text = await response.content.read(_ERROR_SIZE)
    found = _CODE.search(text)
    code = found[1].decode(errors="replace") if found else ""
    is_passing = code in _PASSING or response.status in (408, 429, 500, 502, 503, 504)
    if is_passing and code not in _FULL:
        raise _Again(f"the server answers {response.status} {code}")
    raise _meaning(kind, response.status, code)


@contextlib.contextmanager
def _boto_errors(kind: str) -> Iterator[None]:
    """Turn what boto3 raises into errors of a store."""
    try:
        yield
    except ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        raise _meaning(kind, status, str(error.response.get("Error", {}).get("Code", ""))) from error
    except BotoCoreError as error:
        raise StoreUnavailable(f"{kind}: {error}") from error


def _meaning(kind: str, status: int, code: str) -> StorageError:
    said = f"{kind}: the server answers {status} {code}".rstrip()
    if code in _FULL or status == 507:
        return OutOfSpace(said)
    if code in ("NoSuchUpload", "InvalidPart", "InvalidPartOrder"):
        return UploadLost(said)
    if code in ("NoSuchKey", "InvalidRange") or (status == 404 and code in ("", "404")) or status == 416:
        return ContentMissing(said)
    return StoreUnavailable(said)


def _said(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientResponseError):
        # As a text it has the address, which is signed.
        return f"the answer cannot be read: {' '.join(error.message.split())}"
    return str(error) or type(error).__name__


def _pause(failures: int) -> float:
    """Return the seconds to wait: longer each time, and not all at once."""
    return float(_PAUSE * 2**failures * (0.5 + random.random()))  # noqa: S311
