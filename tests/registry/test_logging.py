"""The log: nobody outside writes lines of their own into it, and no secret gets there."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.registry.raw import exchange
from tests.services.processes import HytheServer, hythe_server

FORGED = "FORGED-LINE"
FIELDS = {
    "at",
    "level",
    "event",
    "method",
    "path",
    "status",
    "bytes_in",
    "bytes_out",
    "ms",
    "remote",
    "agent",
    "user",
    "request_id",
}
#: What a terminal, or a reader of lines, takes for more than text.
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
TEXT_LINE = re.compile(r"\d\d:\d\d:\d\d \d{3} [A-Z-]+ +/\S*  \d+ B  \d+\.\d ms")
PATHS = [
    f"/v2/a%0A{FORGED}/tags/list",
    f"/v2/a%0D%0A{FORGED}/tags/list",
    f"/v2/%1b[2J%1b[1;1H{FORGED}/tags/list",
    f"/v2/%C2%85{FORGED}%C2%9b2J/tags/list",
    f"/v2/%E2%80%A8{FORGED}/tags/list",
    f"/v2/%00{FORGED}/tags/list",
    f"/v2/_catalog?last=%0A{FORGED}",
    f'/v2/%22,%22event%22:%22{FORGED}"/tags/list',
    f"/v2/%ff%fe{FORGED}/tags/list",
]
HEADERS = [
    f"User-Agent: x\x1b[2J{FORGED}".encode(),
    f"User-Agent: x\u0085{FORGED}\u2028".encode(),
    f'User-Agent: "}}\\n{{"event":"{FORGED}"}}'.encode(),
    b"User-Agent: \xff\xfe" + FORGED.encode(),
    b"User-Agent: x\r\n " + FORGED.encode(),
    f"X-Request-Id: x {FORGED}".encode(),
    f"X-Request-Id: x\x1b[2J{FORGED}".encode(),
    b"X-Forwarded-For: " + FORGED.encode(),
]


@pytest.fixture(params=["json", "text"])
def logging_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HytheServer]:
    with hythe_server(tmp_path, environment={"HYTHE_LOG__FORMAT": request.param}) as server:
        yield server


def ask(server: HytheServer, target: str, *headers: bytes, method: str = "GET") -> bytes:
    lines = [f"{method} {target} HTTP/1.1".encode(), b"Host: x", b"Connection: close", *headers]
    return exchange(server.port, b"\r\n".join(lines) + b"\r\n\r\n", end=False)


def finished_log(server: HytheServer) -> str:
    """Return all that was logged; the server has ended then, so that all of it is there."""
    assert server.stop() == 0
    return server.output.read_text(encoding="utf-8")


def lines_of(server: HytheServer) -> list[str]:
    # The first line is for people: where the server listens.
    return finished_log(server).rstrip("\n").split("\n")[1:]


def is_json(server: HytheServer) -> bool:
    return server.environment["HYTHE_LOG__FORMAT"] == "json"


def test_each_request_is_one_line_whatever_its_path_says(logging_server: HytheServer) -> None:
    for path in PATHS:
        assert ask(logging_server, path).startswith(b"HTTP/1.1 ")
    lines = lines_of(logging_server)
    requests = [line for line in lines if "/v2/" in line and " /v2/ " not in line and '"/v2/"' not in line]
    assert len(requests) == len(PATHS)
    check_lines(logging_server, lines)


def test_each_request_is_one_line_whatever_its_headers_say(logging_server: HytheServer) -> None:
    for number, header in enumerate(HEADERS):
        answer = ask(logging_server, f"/v2/_catalog?last={number}", header)
        # A header that HTTP forbids may be refused, but not by a failure.
        assert re.match(rb"HTTP/1\.[01] (200|400) ", answer), answer
    check_lines(logging_server, lines_of(logging_server))


def check_lines(server: HytheServer, lines: list[str]) -> None:
    for line in lines:
        assert not CONTROLS.search(line), line
        if is_json(server):
            entry = json.loads(line)
            assert entry["event"] == "request", entry
            assert set(entry) == FIELDS
        else:
            assert TEXT_LINE.fullmatch(line), line


def test_a_failure_is_one_line_too_whatever_the_path_says(logging_server: HytheServer) -> None:
    drop(logging_server, "upload_session")
    forged = [f"x%0A{FORGED}", f"x%0D{FORGED}", f"%1b[2J{FORGED}", f"%C2%9b2J{FORGED}", f"x%E2%80%A8{FORGED}"]
    upload = "00000000-0000-4000-8000-000000000000"
    paths = [path for each in forged for path in (each, f"{upload}?{each}")]
    answers = [ask(logging_server, f"/v2/app/blobs/uploads/{path}")[9:12] for path in paths]
    assert set(answers) == {b"503", b"404"}
    lines = lines_of(logging_server)
    assert sum("request failed" in line for line in lines) == answers.count(b"503")
    for line in lines:
        assert not line.startswith(FORGED)
        assert not CONTROLS.search(line), line
        if is_json(logging_server):
            json.loads(line)


def drop(server: HytheServer, table: str) -> None:
    with closing(sqlite3.connect(server.data / "hythe.db")) as database:
        database.execute(f"DROP TABLE {table}")


SECRETS = [
    ("/v2/_catalog", "Authorization: Basic {}"),
    ("/v2/_catalog", "Authorization: Bearer {}"),
    ("/v2/_catalog", "Proxy-Authorization: Basic {}"),
    ("/v2/_catalog", "Cookie: token={}"),
    ("/v2/_catalog?access_token={}", ""),
    ("/v2/_catalog?account=me&password={}", ""),
    ("/api/v1/tags?repository=a&token={}", ""),
    ("/v2/app/blobs/uploads/00000000-0000-4000-8000-000000000000?_state={}", ""),
    ("/v2/app/blobs/uploads/00000000-0000-4000-8000-000000000000?X-Amz-Signature={}", ""),
    ("http://me:{}@127.0.0.1/v2/_catalog", ""),
]


@pytest.mark.parametrize("broken", [False, True])
def test_what_may_be_a_secret_is_never_logged(logging_server: HytheServer, broken: bool) -> None:
    if broken:
        drop(logging_server, "repository")
    for number, (target, header) in enumerate(SECRETS):
        secret = f"c2VjcmV0{number}="
        ask(logging_server, target.format(secret), (header or "X-Test: 1").format(secret).encode())
    text = finished_log(logging_server)
    leaked = [SECRETS[number] for number in range(len(SECRETS)) if f"c2VjcmV0{number}" in text]
    assert leaked == []
    assert text.count("/v2/_catalog") >= 5


def test_a_good_request_id_is_taken_over_into_log_and_error_body(logging_server: HytheServer) -> None:
    for sent in ("my-id_1.2", "0" * 64):
        head, given = error_of(logging_server, sent)
        assert f"X-Request-Id: {sent}".encode() in head
        assert given == sent


def test_a_bad_request_id_is_replaced_and_the_new_one_is_in_the_log(tmp_path: Path) -> None:
    with hythe_server(tmp_path, environment={"HYTHE_LOG__FORMAT": "json"}) as server:
        given = [error_of(server, sent)[1] for sent in ("a b", "0" * 65, "", "ä", '"', "a\tb")]
        assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", one) for one in given)
        assert len(set(given)) == len(given)
        assert "0" * 65 not in given
        assert set(given) <= {json.loads(line)["request_id"] for line in lines_of(server)}


def error_of(server: HytheServer, request_id: str) -> tuple[bytes, str]:
    """Send a request that is refused, and return the head of the answer and the id in its body."""
    answer = ask(server, "/v2/app/tags/list", b"X-Request-Id: " + request_id.encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, str(json.loads(body)["request_id"])
