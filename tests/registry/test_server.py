"""`hythe serve` as a process: how it starts, what it refuses, how it ends, and what its workers do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from tests.content import digest_of
from tests.facts import query
from tests.services.processes import HytheServer, answers, free_port, hythe_server, wait_until

CONTENT = bytes(range(256)) * (64 << 10)  # 16 MiB: more than any buffer between the two ends
HALF = len(CONTENT) // 2
#: What is surely stored of the first half when an upload is slow.
SOME = HALF // 2
UPLOADS = "/v2/org/app/blobs/uploads/"

each_number_of_workers = pytest.mark.parametrize("workers", ["1", "2"])


def environment(directory: Path, **settings: str) -> dict[str, str]:
    # What several processes share lies in a temporary directory: in the test's own, so that it goes with it.
    return {"TMPDIR": str(directory), **settings}


@contextlib.contextmanager
def serving(directory: Path, workers: str = "1", **settings: str) -> Iterator[HytheServer]:
    with hythe_server(directory, "--workers", workers, environment=environment(directory, **settings)) as server:
        yield server


def refused(directory: Path, *arguments: str, **settings: str) -> str:
    """Run a server that must not start, and return what it said to standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "hythe", "serve", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=directory,
        env={**os.environ, **environment(directory, **settings)},
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("hythe: ")
    return done.stderr


Answer = tuple[int, dict[str, str], bytes]


def ask(
    server: HytheServer, method: str, path: str, body: bytes = b"", request_id: str = "", chunk: str = ""
) -> Answer:
    headers = {"X-Request-Id": request_id, "Content-Range": chunk}
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request(method, path, body, {name: value for name, value in headers.items() if value})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def begin(server: HytheServer) -> str:
    status, headers, _ = ask(server, "POST", UPLOADS)
    assert status == 202
    return headers["Location"].removeprefix(server.url)


def push(server: HytheServer, content: bytes) -> str:
    digest = digest_of(content)
    assert ask(server, "POST", f"{UPLOADS}?digest={digest}", content)[0] == 201
    return f"/v2/org/app/blobs/{digest}"


def finish(server: HytheServer, location: str, content: bytes) -> None:
    """Resume an upload from wherever it stands, and finish it."""
    status, headers, _ = ask(server, "GET", location)
    assert status == 204
    offset = int(headers["Range"].partition("-")[2]) + 1
    offset = 0 if offset == 1 else offset
    rest = content[offset:]
    sent = f"{offset}-{len(content) - 1}"
    assert ask(server, "PATCH", location, rest, chunk=sent)[0] == 202
    status, headers, _ = ask(server, "PUT", f"{location}?digest={digest_of(content)}")
    assert status == 201
    assert ask(server, "GET", f"/v2/org/app/blobs/{digest_of(content)}")[2] == content


def send_head(server: HytheServer, method: str, path: str, length: str = "Content-Length: 0") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    # So little fits into it that an answer which nobody reads stays with the server.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
    return connection


class SlowUpload:
    """A PATCH whose first half is sent, and some of it stored."""

    def __init__(self, server: HytheServer, location: str, *, chunked: bool = False) -> None:
        self._chunked = chunked
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(CONTENT)}"
        self.connection = send_head(server, "PATCH", location, length)
        self._send(CONTENT[:HALF])
        path = server.data / "uploads" / location.partition("?")[0].rpartition("/")[2]
        wait_until(lambda: path.exists() and path.stat().st_size >= SOME, "the first bytes")

    def __enter__(self) -> SlowUpload:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send_rest(self) -> bytes:
        """Send the second half, and return the head of the answer."""
        self._send(CONTENT[HALF:])
        if self._chunked:
            self.connection.sendall(b"0\r\n\r\n")
        return read_answer(self.connection)[0]

    def _send(self, content: bytes) -> None:
        self.connection.sendall(b"%x\r\n%b\r\n" % (len(content), content) if self._chunked else content)


def is_refused(server: HytheServer) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def terminate(server: HytheServer) -> None:
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: is_refused(server), "the end of new connections")


def ended(server: HytheServer) -> int:
    assert server.process
    return server.process.wait(30)


def read_answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """Read an answer with its announced length, or to the end, and return head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        assert piece, "the connection ended before the answer"
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    parts = [body]
    missing = int(fields.get(b"content-length", b"0")) - len(body)
    while missing > 0 and (piece := connection.recv(1 << 20)):
        parts.append(piece)
        missing -= len(piece)
    return head, b"".join(parts)


def workers_of(server: HytheServer) -> list[psutil.Process]:
    return psutil.Process(server.pid).children()


# --- the start -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def announced(directory: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server with its standard output in a pipe; yield it and the first line it says."""
    command = [sys.executable, "-m", "hythe", "serve", *arguments]
    with (
        (directory / "stderr").open("wb") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=directory,
            env={**os.environ, **environment(directory)},
        ) as process,
    ):
        try:
            assert process.stdout
            yield process, process.stdout.readline()
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                kill_all(process.pid)
                raise


def kill_all(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()


@each_number_of_workers
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_one_line_says_where_it_listens_and_what_to_type(tmp_path: Path, host: str, workers: str) -> None:
    if host == "[::1]" and not has_ipv6():
        pytest.skip("no IPv6 on this machine")
    with announced(tmp_path, "--listen", f"{host}:0", "--workers", workers) as (process, line):
        port = line.partition(f"http://{host}:")[2].partition(" ")[0]
        assert port.isdecimal(), line
        assert f"docker push {host}:{port}/" in line
        assert answers(f"http://{host}:{port}/v2/")
        process.terminate()
        assert process.wait(30) == 0
        assert process.stdout
        assert process.stdout.read() == ""
    # Without --data it is ./data.
    assert (tmp_path / "data" / "hythe.db").exists()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@each_number_of_workers
def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path, workers: str) -> None:
    with serving(tmp_path, workers) as server:
        for data in (server.data, server.data / ".." / "data"):
            said = refused(tmp_path, "--data", str(data), "--listen", f"127.0.0.1:{free_port()}")
            assert "another server uses the data" in said
            assert "--data" in said
        blob = push(server, b"content")
        assert ask(server, "GET", blob)[2] == b"content"


@pytest.mark.parametrize("shared", ["HYTHE_STORAGE__FILESYSTEM__ROOT", "HYTHE_DATABASE__URL"])
def test_a_server_that_shares_only_blobs_or_only_facts_is_refused(tmp_path: Path, shared: str) -> None:
    with serving(tmp_path) as server:
        settings = {
            "HYTHE_STORAGE__FILESYSTEM__ROOT": str(tmp_path / "other"),
            "HYTHE_DATABASE__URL": f"sqlite:///{tmp_path / 'other' / 'hythe.db'}",
            "HYTHE_SERVER__LISTEN": f"127.0.0.1:{free_port()}",
        }
        ours = {
            "HYTHE_STORAGE__FILESYSTEM__ROOT": str(server.data),
            "HYTHE_DATABASE__URL": f"sqlite:///{server.data / 'hythe.db'}",
        }
        said = refused(tmp_path, **settings | {shared: ours[shared]})
        assert "another server uses the data" in said


def test_one_directory_under_two_names_is_no_second_server(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    settings = {
        "HYTHE_STORAGE__FILESYSTEM__ROOT": str(tmp_path / "data"),
        "HYTHE_DATABASE__URL": f"sqlite:///{tmp_path / 'link' / 'hythe.db'}",
    }
    port = free_port()
    command = [sys.executable, "-m", "hythe", "serve", "--listen", f"127.0.0.1:{port}"]
    server = HytheServer(command, tmp_path / "log", environment(tmp_path, **settings), port=port)
    try:
        server.start()
    finally:
        server.stop()


@each_number_of_workers
def test_a_port_in_use_is_refused_and_the_data_is_free_again(tmp_path: Path, workers: str) -> None:
    (tmp_path / "other").mkdir()
    with serving(tmp_path / "other", workers) as other:
        port = other.port
        listen = f"127.0.0.1:{port}"
        said = refused(tmp_path, "--data", str(tmp_path / "data"), "--listen", listen, "--workers", workers)
    assert f"server.listen: 127.0.0.1:{port}" in said
    assert "in use" in said
    # Nothing was served, so the next start has nothing to recover.
    assert (tmp_path / "data" / "hythe.lock").read_bytes() == b""
    with serving(tmp_path) as server:
        assert ask(server, "GET", "/v2/")[0] == 200


def test_a_start_that_is_refused_does_not_make_a_crash_forgotten(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.kill()
    (tmp_path / "other").mkdir()
    with serving(tmp_path / "other") as other:
        refused(tmp_path, "--data", str(tmp_path / "data"), "--listen", f"127.0.0.1:{other.port}")
    assert (tmp_path / "data" / "hythe.lock").read_bytes() == b"unclear\n"


def test_a_crash_is_remembered_until_what_it_left_is_gone(tmp_path: Path) -> None:
    lock, left = tmp_path / "data" / "hythe.lock", tmp_path / "data" / "uploads" / "left"
    with serving(tmp_path) as server:
        server.kill()
    assert lock.read_bytes() == b"running\n"
    left.touch()
    with serving(tmp_path):
        wait_until(lambda: lock.read_bytes() == b"running\n" and not left.exists(), "the end of the doubt")
    assert lock.read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--listen", "0.0.0.0:0"], "server.allow_open"),
        (["--listen", "nonsense"], "server.listen: expected HOST:PORT"),
        (["--workers", "0"], "server.workers"),
        (["--config", "absent.toml"], "absent.toml"),
        (["--data", "file"], "file"),
        (["--data", "file/below"], "file"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "file").touch()
    assert expected in refused(tmp_path, *arguments)


# --- the end ---------------------------------------------------------------------------------------------


@each_number_of_workers
@pytest.mark.parametrize("chunked", [True, False])
def test_an_upload_in_flight_finishes_before_the_end(tmp_path: Path, workers: str, chunked: bool) -> None:
    with serving(tmp_path, workers) as server:
        location = begin(server)
        with SlowUpload(server, location, chunked=chunked) as upload:
            terminate(server)
            head = upload.send_rest()
        assert head.startswith(b"HTTP/1.1 202 ")
        assert f"0-{len(CONTENT) - 1}".encode() in head
        assert ended(server) == 0
        server.start()
        assert ask(server, "PUT", f"{location}?digest={digest_of(CONTENT)}")[0] == 201


@each_number_of_workers
def test_a_download_in_flight_finishes_before_the_end(tmp_path: Path, workers: str) -> None:
    with serving(tmp_path, workers) as server:
        blob = push(server, CONTENT)
        with send_head(server, "GET", blob) as connection:
            assert connection.recv(1, socket.MSG_PEEK)
            terminate(server)
            head, body = read_answer(connection)
        assert head.startswith(b"HTTP/1.1 200 ")
        assert body == CONTENT
        assert ended(server) == 0


@each_number_of_workers
def test_idle_connections_do_not_keep_it_from_ending(tmp_path: Path, workers: str) -> None:
    with serving(tmp_path, workers) as server, contextlib.ExitStack() as stack:
        for _ in range(10):
            connection = stack.enter_context(send_head(server, "GET", "/v2/"))
            read_answer(connection)
            silent = socket.create_connection(("127.0.0.1", server.port))
            stack.enter_context(silent)
        assert server.stop(seconds=10) == 0


@each_number_of_workers
def test_clients_that_do_nothing_do_not_keep_it_from_ending(tmp_path: Path, workers: str) -> None:
    with serving(tmp_path, workers, HYTHE_SERVER__DRAIN_SECONDS="1") as server, contextlib.ExitStack() as stack:
        blob = push(server, CONTENT)
        locations = [begin(server) for _ in range(8)]
        for location in locations:
            stack.enter_context(SlowUpload(server, location))
            downloading = stack.enter_context(send_head(server, "GET", blob))
            assert downloading.recv(1, socket.MSG_PEEK)
        try:
            assert server.stop(seconds=20) == 0
        except subprocess.TimeoutExpired:
            pytest.fail("it does not end")
        server.start()
        assert ask(server, "GET", blob)[2] == CONTENT
        # What they had sent was not lost.
        for location in locations:
            _, headers, _ = ask(server, "GET", location)
            assert SOME <= int(headers["Range"].removeprefix("0-")) + 1 <= HALF
        finish(server, locations[0], CONTENT)


@each_number_of_workers
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_where_nothing_is_in_flight(tmp_path: Path, workers: str, number: int) -> None:
    with serving(tmp_path, workers, HYTHE_SERVER__DRAIN_SECONDS="600") as server:
        push(server, b"content")
        assert server.stop(number) == 0


@each_number_of_workers
def test_a_signal_right_after_the_start_is_not_lost(tmp_path: Path, workers: str) -> None:
    for number in range(3):
        directory = tmp_path / str(number)
        directory.mkdir()
        with announced(directory, "--listen", "127.0.0.1:0", "--workers", workers) as (process, line):
            assert line
            process.terminate()
            try:
                assert process.wait(15) == 0
            except subprocess.TimeoutExpired:
                kill_all(process.pid)
                pytest.fail("it does not end")


@each_number_of_workers
def test_what_a_request_brought_is_kept_when_the_time_to_drain_is_over(tmp_path: Path, workers: str) -> None:
    with serving(tmp_path, workers, HYTHE_SERVER__DRAIN_SECONDS="1") as server:
        with SlowUpload(server, begin(server)):
            assert server.stop() == 0
        rows = query(f"sqlite:///{server.data / 'hythe.db'}", 'SELECT writer, "offset" FROM upload_session')
        # All but what was still being received; and nobody has to wait for a claim to end by itself.
        assert [(writer, 0 < offset <= HALF) for writer, offset in rows] == [(None, True)]


# --- the crash -------------------------------------------------------------------------------------------


def killed(server: HytheServer) -> None:
    """Kill all of a server at once."""
    kill_all(server.pid)
    assert server.process
    server.process.wait()


@each_number_of_workers
def test_an_upload_goes_on_after_a_crash(tmp_path: Path, workers: str) -> None:
    with serving(tmp_path, workers) as server:
        location = begin(server)
        assert ask(server, "PATCH", location, CONTENT[:HALF])[0] == 202
        with SlowUpload(server, begin(server)):
            killed(server)
        server.start()
        finish(server, location, CONTENT)


@pytest.mark.parametrize("is_crash", [True, False])
def test_leftovers_are_looked_for_only_after_a_crash(tmp_path: Path, is_crash: bool) -> None:
    with serving(tmp_path) as server:
        blob = push(server, b"content")
        leftover = server.data / "uploads" / "leftover"
        leftover.touch()
        if is_crash:
            server.kill()
        else:
            assert server.stop() == 0
        server.start()
        if is_crash:
            wait_until(lambda: not leftover.exists(), "the leftover to be cleared")
        assert server.stop() == 0
        assert leftover.exists() != is_crash
        server.start()
        assert ask(server, "GET", blob)[2] == b"content"


# --- workers ---------------------------------------------------------------------------------------------


def test_a_worker_that_died_is_started_again(tmp_path: Path) -> None:
    with serving(tmp_path, "2") as server:
        blob = push(server, b"content")
        dead = workers_of(server)
        assert len(dead) == 2
        # One after the other: in the end nobody serves who was there from the start.
        for worker in dead:
            wait_until(partial(is_replaced, server, kill_worker(server, worker)), "a new worker")
            wait_until(lambda: answers(f"{server.url}/v2/"), "an answer")
        for _ in range(50):
            assert ask(server, "GET", blob)[2] == b"content"
        assert "a worker died and is started again" in server.output.read_text()
        assert server.stop() == 0
        # It may have left files without a row, so the next start is to look for them, however this one ended.
        assert (server.data / "hythe.lock").read_bytes() == b"unclear\n"


def kill_worker(server: HytheServer, worker: psutil.Process) -> set[int]:
    before = {process.pid for process in workers_of(server)}
    worker.kill()
    return before


def is_replaced(server: HytheServer, before: set[int]) -> bool:
    now = {process.pid for process in workers_of(server)}
    return len(now) == 2 and len(now - before) == 1


def test_a_new_worker_goes_on_serving(tmp_path: Path) -> None:
    with serving(tmp_path, "2") as server:
        before = kill_worker(server, workers_of(server)[0])
        wait_until(lambda: is_replaced(server, before), "a new worker")
        # It answers itself: the ids of requests begin with a word that each process makes for itself.
        runs: set[str] = set()

        def have_two_answered() -> bool:
            _, _, body = ask(server, "GET", "/v2/app/manifests/absent")
            runs.add(str(json.loads(body)["request_id"]).partition("-")[0])
            return len(runs) == 2

        wait_until(have_two_answered, "answers of both workers")


def test_workers_end_when_the_one_that_watches_them_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path, "2") as server:
        blob = push(server, b"content")
        workers = workers_of(server)
        try:
            server.kill()
            wait_until(lambda: not any(map(is_alive, workers)), "the end of the workers")
        finally:
            for worker in filter(is_alive, workers):
                worker.kill()
        server.start()
        assert ask(server, "GET", blob)[2] == b"content"


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_workers_that_drain_hold_the_data(tmp_path: Path) -> None:
    with serving(tmp_path, "2") as server:
        location = begin(server)
        workers = workers_of(server)
        with SlowUpload(server, location) as upload:
            server.kill()
            wait_until(lambda: sum(map(is_alive, workers)) == 1, "the end of the idle worker")
            said = refused(tmp_path, "--data", str(server.data), "--listen", "127.0.0.1:0")
            assert "another server uses the data" in said
            assert upload.send_rest().startswith(b"HTTP/1.1 202 ")
        wait_until(lambda: not any(map(is_alive, workers)), "the end of the workers")


# --- the log ---------------------------------------------------------------------------------------------


def lines(server: HytheServer) -> Iterator[dict[str, Any]]:
    log: IO[str]
    with server.output.open() as log:
        for line in log:
            if not line.startswith("Hythe listens on"):
                yield json.loads(line)


def logged(server: HytheServer, request_id: str) -> list[dict[str, Any]]:
    return [line for line in lines(server) if line.get("request_id") == request_id]


@each_number_of_workers
@pytest.mark.parametrize("sent", ["", "chosen-by-the-client_1.2"])
def test_the_log_in_a_pipe_is_json_and_names_the_request_as_header_and_body_do(
    tmp_path: Path, workers: str, sent: str
) -> None:
    with serving(tmp_path, workers) as server:
        status, answered, body = ask(server, "GET", "/v2/org/app/manifests/absent", request_id=sent)
        request_id = answered["X-Request-Id"]
        assert status == 404
        assert not sent or request_id == sent
        assert json.loads(body)["request_id"] == request_id
        wait_until(lambda: logged(server, request_id), "the line of the request")
        (line,) = logged(server, request_id)
    assert (line["event"], line["method"], line["status"]) == ("request", "GET", 404)
    assert line["path"] == "/v2/org/app/manifests/absent"


@pytest.mark.parametrize("sent", ["with space", "x" * 65, "semi;colon", "\u00e4"])
def test_a_request_id_that_could_forge_lines_is_not_taken(server: HytheServer, sent: str) -> None:
    _, answered, _ = ask(server, "GET", "/v2/", request_id=sent)
    assert answered["X-Request-Id"] != sent


def test_what_was_logged_is_there_when_it_ended(server: HytheServer) -> None:
    ids = [ask(server, "GET", "/v2/")[1]["X-Request-Id"] for _ in range(5)]
    assert server.stop() == 0
    assert all(len(logged(server, request_id)) == 1 for request_id in ids)


def test_the_access_log_can_be_turned_off(tmp_path: Path) -> None:
    with serving(tmp_path, HYTHE_LOG__ACCESS="false") as server:
        ask(server, "GET", "/v2/")
        assert server.stop() == 0
        assert not [line for line in lines(server) if line["event"] == "request"]
