"""The power cut that no test can do: the order of system calls that makes it harmless, seen from outside.

data synced → name → directory synced → row → the row's commit synced → 201
"""

from __future__ import annotations

import http.client
import re
import subprocess
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import needs, needs_root
from tests.content import digest_of
from tests.services.processes import HytheServer, hythe_server, wait_until

pytestmark = [needs("strace"), needs_root]

CALLS = "rename,renameat,renameat2,fsync,fdatasync,pwrite64,pwritev,write,writev,sendto,sendmsg"
#: `[pid 12] fsync(7</data/x>) = 0`; strace -y writes the path behind each descriptor.
LINE = re.compile(r"^(?:\[pid +)?(?P<pid>\d+)\]? +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\w+)")
UNFINISHED = re.compile(r"^(?P<pid>\d+) +(?P<call>\w+)\((?P<arguments>.*) <unfinished \.\.\.>")
RESUMED = re.compile(r"^(?P<pid>\d+) +<\.\.\. (?P<call>\w+) resumed>(?P<arguments>.*)\) += (?P<result>-?\w+)")


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str


def calls(trace: str) -> list[Call]:
    """Return the calls in the order in which they ended."""
    begun: dict[str, str] = {}
    found = []
    for line in trace.splitlines():
        if match := UNFINISHED.match(line):
            begun[match["pid"]] = match["arguments"]
        elif match := RESUMED.match(line):
            found.append(Call(match["call"], begun.pop(match["pid"], "") + match["arguments"]))
        elif match := LINE.match(line):
            found.append(Call(match["call"], match["arguments"]))
    return found


def push_blob(server: HytheServer, content: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with closing(connection):
        connection.request("POST", "/v2/org/app/blobs/uploads/")
        response = connection.getresponse()
        response.read()
        location = response.getheader("Location")
        connection.request("PATCH", location or "", body=iter([content]), encode_chunked=True)
        connection.getresponse().read()
        connection.request("PUT", f"{location}?digest={digest_of(content)}", headers={"Content-Length": "0"})
        response = connection.getresponse()
        response.read()
        assert response.status == 201


def traced_push(server: HytheServer, directory: Path, content: bytes) -> list[Call]:
    """Push while strace looks on."""
    output = directory / "trace"
    command = ["strace", "-f", "-y", "-s", "64", "-e", f"trace={CALLS}", "-o", str(output), "-p", str(server.pid)]
    with (directory / "strace.log").open("wb") as log:
        strace = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: b"attached" in (directory / "strace.log").read_bytes(), "strace to attach")
        push_blob(server, content)
    finally:
        strace.terminate()
        strace.wait(10)
    return calls(output.read_text())


def position(found: list[Call], start: int, what: str, *names: str, containing: str) -> int:
    for index in range(start, len(found)):
        if found[index].name in names and containing in found[index].arguments:
            return index
    listing = "\n".join(f"{call.name}({call.arguments[:150]})" for call in found)
    raise AssertionError(f"no {what} after call {start}:\n{listing}")


def test_a_push_is_on_the_disk_step_by_step_before_it_is_answered(tmp_path: Path) -> None:
    with hythe_server(tmp_path) as server:
        push_blob(server, b"makes the directories that the traced push need not make")
        content = b"some bytes that must survive a power cut"
        found = traced_push(server, tmp_path, content)
        hexadecimal = digest_of(content).removeprefix("sha256:")
    at = position(found, 0, "bytes written", "write", "writev", containing="/uploads/")
    at = position(found, at, "data synced", "fdatasync", "fsync", containing="/uploads/")
    at = position(found, at, "name given", "rename", "renameat", "renameat2", containing=hexadecimal)
    shard = f"/blobs/sha256/{hexadecimal[:2]}>"
    at = position(found, at, "directory synced", "fsync", containing=shard)
    at = position(found, at, "row written", "pwrite64", "write", containing="hythe.db-wal")
    at = position(found, at, "commit synced", "fdatasync", "fsync", containing="hythe.db-wal")
    position(found, at, "201", "write", "writev", "sendto", "sendmsg", containing="HTTP/1.1 201")
    answers = [index for index, call in enumerate(found) if "HTTP/1.1 201" in call.arguments]
    assert len(answers) == 1
    assert answers[0] > at


def test_without_sync_nothing_waits_for_the_disk(tmp_path: Path) -> None:
    environment = {"HYTHE_STORAGE__FILESYSTEM__SYNC": "false", "HYTHE_DATABASE__SYNC": "false"}
    with hythe_server(tmp_path, environment=environment) as server:
        found = traced_push(server, tmp_path, b"some bytes that may be lost in a power cut")
    syncs = [index for index, call in enumerate(found) if call.name in ("fsync", "fdatasync")]
    assert not [found[index] for index in syncs if "/blobs/" in found[index].arguments]
    assert not [found[index] for index in syncs if "/uploads/" in found[index].arguments]
    # SQLite begins a log with a sync of its head, so that it is a log; the row behind it is not waited for.
    answer = position(found, 0, "201", "write", "writev", "sendto", "sendmsg", containing="HTTP/1.1 201")
    row = max(index for index in range(answer) if "hythe.db-wal" in found[index].arguments)
    assert row not in syncs
