"""A long request notes how far it came, so that a crash does not send the client back to the beginning."""

from __future__ import annotations

import hashlib
import http.client
import random
from contextlib import closing
from pathlib import Path

import pytest

from tests.services.processes import HytheServer, hythe_server, wait_until

MIB = 1 << 20
#: How much may come between two notes. [docs/develop.md]
NOTED = 64 * MIB
UPLOADS = "/v2/org/app/blobs/uploads/"


def request(server: HytheServer, method: str, path: str, body: bytes = b"", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with closing(connection):
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        response.read()
        return response


def stands_at(server: HytheServer, location: str) -> int:
    last = (request(server, "GET", location).getheader("Range") or "").removeprefix("0-")
    return int(last) + 1 if last != "0" else 0


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with a length"])
def test_a_resumed_upload_of_hundreds_of_megabytes_goes_on_near_where_the_server_died(
    tmp_path: Path, chunked: bool
) -> None:
    begun, sent, rest = 10 * MIB, 170 * MIB, 5 * MIB
    content = random.Random(1).randbytes(MIB) * ((begun + sent + rest) // MIB)
    with hythe_server(tmp_path) as server:
        location = request(server, "POST", UPLOADS).getheader("Location") or ""
        assert request(server, "PATCH", location, content[:begun]).status == 202

        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        with closing(connection):
            connection.putrequest("PATCH", location)
            if chunked:
                connection.putheader("Transfer-Encoding", "chunked")
            else:
                connection.putheader("Content-Length", str(sent + rest))
            connection.endheaders()
            for start in range(begun, begun + sent, MIB):
                piece = content[start : start + MIB]
                connection.send(b"%x\r\n%s\r\n" % (MIB, piece) if chunked else piece)
            # All but the bytes of one note, and those that are on their way still.
            wait_until(lambda: stands_at(server, location) >= begun + sent - NOTED - 4 * MIB, "the last note")
            server.kill()
        server.start()
        offset = stands_at(server, location)
        assert begun + sent - NOTED - 4 * MIB <= offset <= begun + sent
        answer = request(server, "PATCH", location, content[offset:], Content_Range=f"{offset}-{len(content) - 1}")
        assert answer.status == 202
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert request(server, "PUT", f"{location}?digest={digest}").status == 201
