"""The command, as a person or a script runs it: another process, its output in a pipe."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from storage.oci import OCI_CONFIG, OCI_INDEX
from tests.content import LAYER, Image, descriptor, digest_of, make_image
from tests.services.processes import HytheServer, free_port, hythe_server

COMMANDS = [
    *([], ["serve"], ["config"], ["config", "check"], ["ls"], ["tags"], ["inspect"], ["rm"]),
    *(["migrate"], ["copy-store"], ["copy-database"], ["user"], ["user", "add"], ["user", "import"], ["user", "list"]),
    *(["user", "password"], ["user", "disable"], ["user", "enable"], ["user", "remove"], ["team"], ["team", "add"]),
    *(["team", "join"], ["team", "leave"], ["team", "list"], ["team", "remove"], ["token"], ["token", "create"]),
    *(["token", "list"], ["token", "revoke"], ["grant"], ["revoke"], ["grants"], ["who-can"], ["read-only"], ["audit"]),
]


def hythe(*arguments: str, standard_input: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, whatever that is."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HYTHE_")}
    return subprocess.run(
        [sys.executable, "-m", "hythe", *arguments],
        check=False,
        input=standard_input,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean | environment,
    )


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HytheServer]:
    """A registry for tests that put nothing into it."""
    with hythe_server(tmp_path_factory.mktemp("empty")) as running:
        yield running


def ask(server: HytheServer, *arguments: str) -> str:
    """Run a command that must work, and return what it printed."""
    done = hythe(*arguments, "--server", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def ask_json(server: HytheServer, *arguments: str) -> Any:
    return json.loads(ask(server, *arguments, "--json"))


def push(server: HytheServer, repository: str, *tags: str, **more: Any) -> Image:
    image = make_image(**more)
    base = f"{server.url}/v2/{repository}"
    for content in image.blobs:
        requests.post(
            f"{base}/blobs/uploads/", params={"digest": digest_of(content)}, data=content, timeout=10
        ).raise_for_status()
    headers = {"Content-Type": image.media_type}
    for tag in tags or (image.digest,):
        requests.put(f"{base}/manifests/{tag}", data=image.manifest, headers=headers, timeout=10).raise_for_status()
    return image


def words(text: str) -> list[list[str]]:
    """Return the cells of a table, line by line."""
    return [re.split(r" {3,}", line) for line in text.splitlines()]


def test_ls_shows_what_lies_right_below_a_path(server: HytheServer) -> None:
    push(server, "org/team/app", "v1", "v2")
    push(server, "org/tool", "v1")
    push(server, "single", "v1")
    assert [row[:2] for row in words(ask(server, "ls"))] == [["REPOSITORY", "TAGS"], ["org/"], ["single", "1"]]
    assert [row[:2] for row in words(ask(server, "ls", "org"))[1:]] == [["org/team/"], ["org/tool", "1"]]
    assert [row[:2] for row in words(ask(server, "ls", "/org/team/"))[1:]] == [["org/team/app", "2"]]


def test_ls_recursive_shows_the_whole_tree(server: HytheServer) -> None:
    push(server, "a/b/c/d/e", "v1")
    push(server, "a/b", "v1")
    push(server, "z", "v1")
    assert [row[0] for row in words(ask(server, "ls", "-r"))[1:]] == [
        "a/",
        "a/b",
        "a/b/c/",
        "a/b/c/d/",
        "a/b/c/d/e",
        "z",
    ]
    assert [row[0] for row in words(ask(server, "ls", "--recursive", "a/b"))[1:]] == ["a/b/c/", "a/b/c/d/", "a/b/c/d/e"]


def test_ls_as_json_is_what_the_api_says(server: HytheServer) -> None:
    push(server, "org/app", "v1", "v2")
    folder, app = ask_json(server, "ls", "-r")
    assert (folder["name"], folder["is_repository"], folder["has_children"]) == ("org", False, True)
    assert (app["name"], app["is_repository"], app["tags"], app["manifests"]) == ("org/app", True, 2, 1)
    assert app["updated_at"].endswith("Z")


def test_ls_of_an_empty_registry_is_a_head_alone_and_an_empty_list(empty: HytheServer) -> None:
    assert len(words(ask(empty, "ls"))) == 1
    assert ask_json(empty, "ls") == []


def test_tags_shows_digest_size_platform_and_time(server: HytheServer) -> None:
    image = push(server, "app", "v1", architecture="arm64")
    push(server, "app", "v2", layers=3)
    head, first, second = words(ask(server, "tags", "app"))
    assert head == ["TAG", "DIGEST", "SIZE", "PLATFORMS", "PUSHED"]
    assert first[:4] == ["v1", image.digest[:19], f"{sum(map(len, image.blobs))} B", "linux/arm64"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first[4])
    assert second[0] == "v2"
    assert ask_json(server, "tags", "app")[0]["digest"] == image.digest


def test_listings_longer_than_a_page_are_shown_whole(server: HytheServer) -> None:
    image = push(server, "app", "first")
    headers = {"Content-Type": image.media_type}
    url = f"{server.url}/v2/app/manifests/{image.digest}"
    for start in range(0, 1100, 50):
        params = [("tag", f"t{number:04}") for number in range(start, start + 50)]
        requests.put(url, params=params, data=image.manifest, headers=headers, timeout=30).raise_for_status()
    names = [tag["name"] for tag in ask_json(server, "tags", "app")]
    assert names == ["first", *(f"t{number:04}" for number in range(1100))]


@pytest.mark.parametrize("reference", ["app:v1", "app", "app@DIGEST", "app:v1@DIGEST", "ADDRESS/app:v1"])
def test_inspect_shows_what_a_manifest_is_made_of(server: HytheServer, reference: str) -> None:
    image = push(server, "app", "latest", "v1", layers=2, annotations={"org.example": "yes"})
    written = reference.replace("DIGEST", image.digest).replace("ADDRESS", server.address)
    text = ask(server, "inspect", written)
    for expected in (image.digest, image.media_type, "latest, v1", "Annotation org.example", OCI_CONFIG, LAYER):
        assert expected in text
    found = ask_json(server, "inspect", written)
    assert found["digest"] == image.digest
    assert [entry["relation"] for entry in found["content"]] == ["config", "layer", "layer"]
    assert [entry["digest"] for entry in found["content"]] == [digest_of(content) for content in image.blobs]


def test_inspect_shows_the_platforms_of_an_index(server: HytheServer) -> None:
    images = {name: push(server, "app", architecture=name) for name in ("amd64", "arm64")}
    manifests = [
        descriptor(image.manifest, image.media_type, platform={"os": "linux", "architecture": name})
        for name, image in images.items()
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests})
    headers = {"Content-Type": OCI_INDEX}
    requests.put(f"{server.url}/v2/app/manifests/all", data=index, headers=headers, timeout=10).raise_for_status()
    rows = words(ask(server, "inspect", "app:all"))
    assert [row[3] for row in rows[-2:]] == ["linux/amd64", "linux/arm64"]
    assert words(ask(server, "tags", "app"))[1][3] == "linux/amd64, linux/arm64"


def test_rm_of_a_tag_leaves_the_manifest_and_its_other_tags(server: HytheServer) -> None:
    image = push(server, "app", "v1", "v2")
    assert ask(server, "rm", "app:v1") == "untagged app:v1\n"
    assert [tag["name"] for tag in ask_json(server, "tags", "app")] == ["v2"]
    assert ask_json(server, "rm", "app:v2")["tags"] == ["v2"]
    assert ask_json(server, "inspect", f"app@{image.digest}")["tags"] == []


def test_rm_of_a_digest_removes_the_manifest_and_all_its_tags(server: HytheServer) -> None:
    image = push(server, "app", "v1", "v2")
    other = push(server, "app", "other")
    reference = f"app@{image.digest}"
    assert ask(server, "rm", reference).splitlines() == ["untagged app:v1", "untagged app:v2", f"deleted {reference}"]
    assert [tag["name"] for tag in ask_json(server, "tags", "app")] == ["other"]
    assert ask_json(server, "rm", f"app@{other.digest}") == {
        "repository": "app",
        "reference": other.digest,
        "tags": ["other"],
    }


def test_rm_without_a_tag_or_digest_removes_nothing(server: HytheServer) -> None:
    push(server, "app", "latest")
    done = hythe("rm", "app", "--server", server.url)
    assert done.returncode == 1
    assert "app:TAG" in done.stderr
    assert len(ask_json(server, "tags", "app")) == 1


@pytest.mark.parametrize("environment", [True, False])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_server_is_named_by_an_option_or_the_environment(
    server: HytheServer, scheme: str, environment: bool
) -> None:
    push(server, "app", "v1")
    address = scheme + server.address
    done = hythe("ls", HYTHE_SERVER=address) if environment else hythe("ls", "--server", address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "app" in done.stdout


def test_the_option_wins_over_the_environment(empty: HytheServer) -> None:
    done = hythe("ls", "--server", empty.url, HYTHE_SERVER=f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 0


@pytest.mark.parametrize(
    "command", [["ls"], ["ls", "-r", "--json"], ["tags", "app"], ["inspect", "app:v1"], ["rm", "app:v1"]]
)
def test_a_server_that_does_not_answer_is_named_on_standard_error(command: list[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = hythe(*command, "--server", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("hythe: ")
    assert url in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\n\r\n<html>", b""])
def test_something_else_than_a_registry_is_an_error_in_one_line(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=answer_once, args=(other, answer))
        thread.start()
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        done = hythe("ls", "--server", url)
        thread.join()
    assert (done.returncode, done.stdout) == (1, "")
    assert url in done.stderr
    assert len(done.stderr.splitlines()) == 1


def answer_once(listening: socket.socket, answer: bytes) -> None:
    connection, _ = listening.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(answer)


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1", "http://", "file:///etc/passwd", "http://127.0.0.1:port", "http://[::1"]
)
def test_an_address_that_is_none_is_refused_in_one_line(url: str) -> None:
    done = hythe("ls", "--server", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert url in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["tags", "no/where"],
        ["inspect", "no/where"],
        ["inspect", "no/where:v1"],
        ["rm", "no/where:v1"],
        ["rm", "no/where@sha256:" + "0" * 64],
        ["tags", "Bad Name"],
        ["ls", "Bad Name"],
        ["inspect", "app@sha256:bad"],
        ["inspect", "app:a b"],
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_is_not_there_is_an_error_in_one_line(empty: HytheServer, command: list[str], form: list[str]) -> None:
    done = hythe(*command, *form, "--server", empty.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("hythe: ")
    assert len(done.stderr.splitlines()) == 1


def test_output_in_a_pipe_is_plain(server: HytheServer) -> None:
    image = push(server, "org/app", "v1")
    for command in (["ls", "-r"], ["tags", "org/app"], ["inspect", "org/app:v1"], ["rm", f"org/app@{image.digest}"]):
        text = ask(server, *command)
        assert text.endswith("\n")
        assert "\x1b" not in text
        assert "\r" not in text
        assert all(line == line.rstrip() for line in text.splitlines())


def test_a_reader_that_leaves_early_is_no_error(server: HytheServer) -> None:
    for number in range(3):
        push(server, f"app-{number}", "v1")
    command = [sys.executable, "-m", "hythe", "ls", "-r", "--json", "--server", server.url]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr


def test_what_somebody_pushed_cannot_steer_a_terminal(server: HytheServer) -> None:
    push(server, "app", "v1", annotations={"title": "a\x1b[2Jb\u009b2J\nTags: forged"})
    text = on_terminal("inspect", "app:v1", "--server", server.url)
    assert "\x1b" not in text
    assert "\u009b" not in text
    assert not any(line.startswith("Tags: forged") for line in text.splitlines())


def on_terminal(*arguments: str) -> str:
    """Run a command on a pseudo-terminal, and return what it shows there."""
    mine, theirs = os.openpty()
    try:
        command = [sys.executable, "-m", "hythe", *arguments]
        subprocess.run(command, check=True, stdin=theirs, stdout=theirs, stderr=theirs, timeout=60)
        return os.read(mine, 1 << 16).decode()
    finally:
        os.close(mine)
        os.close(theirs)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str]) -> None:
    done = hythe(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    usage, purpose, *options = done.stdout.split("\n\n")
    assert usage.startswith(f"Usage: python -m hythe {' '.join(command)}".rstrip())
    assert purpose.endswith(".")
    assert "--help" in options[0]
    assert hythe(*command, "-h").stdout == done.stdout


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    done = hythe("--version")
    assert done.returncode == 0
    assert version("hythe") in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["nonsense"],
        ["ls", "--nonsense"],
        ["ls", "a", "b"],
        ["tags"],
        ["inspect"],
        ["rm"],
        ["rm", "a:b", "c:d"],
        ["ls", "--server"],
        ["config", "nonsense"],
        ["serve", "surplus"],
    ],
    ids=" ".join,
)
def test_a_mistyped_command_is_exit_code_2_and_nothing_on_standard_output(command: list[str]) -> None:
    done = hythe(*command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error: " in done.stderr


def write(directory: Path, text: str) -> str:
    path = directory / "config.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[server]\nlisten = "127.0.0.1:5001"\nworkers = 2\n',
        '[server]\nlisten = "[::1]:0"\n',
        '[server]\nlisten = "0.0.0.0:5000"\nallow_open = true\nbehind_proxy = true\n',
        "[registry]\ndelete = false\nsparse_manifests = true\n",
    ],
)
def test_a_good_configuration_is_said_to_be_good(tmp_path: Path, text: str) -> None:
    done = hythe("config", "check", "--config", write(tmp_path, text))
    assert (done.returncode, done.stdout, done.stderr) == (0, "the configuration is good\n", "")


def test_the_example_configuration_is_good() -> None:
    example = Path(__file__).parents[2] / "config.example.toml"
    assert hythe("config", "check", "--config", str(example)).returncode == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[server]\nlisten = "nowhere"\n', "server.listen"),
        ("[server]\nlisten = 5000\n", "server.listen"),
        ("[server]\nworkers = 0\n", "server.workers"),
        ('[server]\nworkers = "two"\n', "server.workers"),
        ("[server]\nworker = 2\n", "server.worker:"),
        ("[sever]\nworkers = 2\n", "sever:"),
        ("server = 1\n", "server:"),
        ('[storage]\ndriver = "tape"\n', "storage.driver"),
        ('[storage.filesystem]\nroot = ""\n', "storage.filesystem.root"),
        ("[storage.filesystem]\nsnyc = true\n", "storage.filesystem.snyc"),
        ("[registry]\nmanifest_bytes = 1\n", "registry.manifest_bytes"),
        ('[database]\nurl = "mysql://somewhere"\n', "database.url"),
        ('[log]\nlevel = "loud"\n', "log.level"),
        ("[server\n", "config.toml"),
        ('[server]\nlisten = "0.0.0.0:5000"\n', "server.listen"),
        ('[server]\nlisten = "0.0.0.0:5000"\nallow_open = true\n', "server.behind_proxy"),
    ],
)
def test_a_bad_configuration_is_refused_with_the_path_of_its_key(tmp_path: Path, text: str, expected: str) -> None:
    done = hythe("config", "check", "--config", write(tmp_path, text))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("hythe: ")
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_configuration_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = hythe("config", "check", "--config", str(tmp_path / "none.toml"))
    assert done.returncode == 1
    assert "none.toml" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HYTHE_SERVER__WORKERS", "many", "server.workers"),
        ("HYTHE_SERVER__WORKER", "2", "server.worker:"),
        ("HYTHE_SERVER__LISTEN", "0.0.0.0:5000", "server.listen"),
        ("HYTHE_STORAGE__FILESYSTEM", "x", "storage.filesystem"),
    ],
)
def test_the_environment_is_checked_too_and_wins_over_the_file(
    tmp_path: Path, name: str, value: str, expected: str
) -> None:
    file = write(tmp_path, '[server]\nworkers = 1\nlisten = "127.0.0.1:5000"\n')
    done = hythe("config", "check", "--config", file, **{name: value})
    assert done.returncode == 1
    assert expected in done.stderr


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:5000", "registry.example:5000"])
def test_serve_refuses_what_others_reach_in_one_sentence_that_says_what_to_do(tmp_path: Path, listen: str) -> None:
    done = hythe("serve", "--listen", listen, "--data", str(tmp_path / "data"))
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "server.allow_open" in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--listen", "5000"), ("--listen", ":5000"), ("--listen", "127.0.0.1:99999"), ("--workers", "0")],
)
def test_serve_refuses_options_that_cannot_be(tmp_path: Path, option: str, value: str) -> None:
    done = hythe("serve", option, value, "--data", str(tmp_path / "data"))
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert value in done.stderr or option.removeprefix("--") in done.stderr


def test_a_digest_can_be_written_as_tags_shows_it(server: HytheServer) -> None:
    image = push(server, "short/digest", "latest")
    other = push(server, "short/digest", "other")
    shown = ask(server, "tags", "short/digest").splitlines()[1].split()[1]
    assert image.digest.startswith(shown)
    assert image.digest in ask(server, "inspect", f"short/digest@{shown}")
    done = hythe("rm", f"short/digest@{'sha256:' + 12 * '0'}", "--server", server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no tagged manifest begins with sha256:000000000000" in done.stderr
    assert f"deleted short/digest@{image.digest}" in ask(server, "rm", f"short/digest@{shown}")
    assert ask_json(server, "tags", "short/digest")[0]["digest"] == other.digest


def test_a_path_that_nothing_has_is_a_slip_and_one_without_anything_below_is_not(server: HytheServer) -> None:
    push(server, "a/leaf", "latest")
    assert ask_json(server, "ls", "a/leaf") == []
    done = hythe("ls", "a/lief", "--server", server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no repository a/lief" in done.stderr
