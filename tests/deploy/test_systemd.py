"""The unit for systemd: it is understood, it is tight, and Hythe does nothing that it forbids."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from registry.config import Settings
from tests.clients.plain import PlainClient, with_query
from tests.clients.team import basic
from tests.conftest import needs
from tests.content import digest_of
from tests.deploy.files import DEPLOY
from tests.services.processes import HytheServer, free_port, run

UNIT = DEPLOY / "hythe.service"
HYTHE = Path(sys.executable).parent / "hythe"

pytestmark = needs("systemd-analyze")


def lines(key: str) -> list[str]:
    """Return what the unit says of a key, which may stand there several times."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def analyze(*arguments: str) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_understands_it(tmp_path: Path) -> None:
    # What it starts must be there.
    (unit := tmp_path / UNIT.name).write_text(UNIT.read_text().replace("/opt/hythe/bin/hythe", str(HYTHE)))
    assert analyze("verify", "--man=no", str(unit)) == ""


def test_it_is_tight() -> None:
    # From 0, nothing can happen, to 100, everything. Without the network at all it would be a little less.
    said = analyze("security", "--offline=true", "--threshold=20", str(UNIT))
    assert re.search(r"exposure level for hythe.service: 1\.\d OK", said)


def test_there_is_time_to_drain() -> None:
    assert int(lines("TimeoutStopSec")[0]) >= Settings().server.drain_seconds + 10


def test_data_lies_where_it_may_write() -> None:
    assert lines("StateDirectory") == ["hythe"]
    assert lines("WorkingDirectory") == ["%S/hythe"]
    assert Settings().storage.filesystem.root == "data"
    assert Settings().database.url == "sqlite:///data/hythe.db"


@needs("strace")
def test_hythe_makes_no_call_that_is_forbidden(tmp_path: Path) -> None:
    """Whole runs: start, workers, a login, a push, a pull, the end; with memory that cannot be written and executed."""
    port = free_port()
    counted = tmp_path / "calls"
    command = ["strace", "-f", "-c", "-o", str(counted), sys.executable, "-c", _GUARD]
    command += [str(HYTHE), "serve", "--workers", "2"]
    command += ["--data", str(tmp_path / "data"), "--listen", f"127.0.0.1:{port}"]
    environment = {"TMPDIR": str(tmp_path), "HYTHE_ACCOUNTS__ADMIN_PASSWORD": "correct horse"}
    server = HytheServer(command, tmp_path / "log", environment, port=port)
    try:
        server.start()
        push_and_pull(server.url)
        (traced,) = psutil.Process(server.pid).children()
        traced.terminate()
        assert server.process is not None
        assert server.process.wait(30) == 0
    finally:
        server.stop()
    made = set(re.findall(r"^\s*[\d.]+ .* (\w+)$", counted.read_text(), re.MULTILINE)) - {"total"}
    assert {"accept4", "fdatasync", "sched_setaffinity", "sendfile"} <= made, counted.read_text()
    # As root only, which the unit is not, SQLite sees to it that its files have one owner.
    forgiven = {"fchown"} if os.geteuid() == 0 else set()
    assert made <= allowed() | forgiven, sorted(made - allowed())


#: What MemoryDenyWriteExecute does, by the kernel's own means: PR_SET_MDWE of Linux 6.3. Where there is none, without.
_GUARD = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_memory_is_guarded_where_the_kernel_can() -> None:
    # That the guard of the test above guards, and outlives an exec.
    probe = "import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)"
    command = [sys.executable, "-c", _GUARD, sys.executable, "-c", probe]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    if done.returncode == 0:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert "PermissionError" in done.stderr


def push_and_pull(url: str) -> None:
    content = bytes(range(256)) * (12 << 10)
    with PlainClient(url) as client:
        asked = f"{url}/v2/token?scope=repository:org/team/app:pull,push"
        token = client.ask("GET", asked, **basic("admin", "correct horse")).json["token"]
        by = {"Authorization": f"Bearer {token}"}
        begun = client.ask("POST", f"{url}/v2/org/team/app/blobs/uploads/", **by)
        sent = client.ask("PATCH", begun.location, iter([content[:1_000_000], content[1_000_000:]]), **by)
        closed = client.ask("PUT", with_query(sent.location, f"digest={digest_of(content)}"), **by)
        assert client.ask("GET", closed.location, **by).body == content


def allowed() -> set[str]:
    """Return the system calls that the unit's filters leave."""
    groups: dict[str, list[str]] = {}
    for line in run("systemd-analyze", "syscall-filter").splitlines():
        if line.startswith("@"):
            groups[line.strip()] = []
        elif (word := line.strip()) and not word.startswith("#") and groups:
            groups[list(groups)[-1]].append(word)

    def expand(name: str) -> set[str]:
        if not name.startswith("@"):
            return {name}
        return {call for member in groups[name] for call in expand(member)}

    left: set[str] = set()
    for words in lines("SystemCallFilter"):
        named = {call for word in words.removeprefix("~").split() for call in expand(word)}
        left = left - named if words.startswith("~") else left | named
    return left
