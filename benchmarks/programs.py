"""Programs that are run to their ends: loads, and whatever sets a server up."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from benchmarks.servers import BenchmarkError, Server, find_program


def wrk(server: Server, path: str, seconds: int, *headers: str) -> int:
    """GET `path` by 32 connections for some seconds; return how often it was answered."""
    url = f"http://127.0.0.1:{server.port}{path}"
    options = [option for header in headers for option in ("-H", header)]
    text = run(find_program("wrk"), "-t2", "-c32", f"-d{seconds}s", *options, url)
    counted = re.search(r"(\d+) requests in ", text)
    if counted is None or "Non-2xx" in text or "Socket errors" in text:
        raise BenchmarkError(f"wrk had trouble with {server.name}:\n{text}")
    return int(counted[1])


def skopeo_push(server: Server, layout: Path, repository: str) -> None:
    """Push the image of an OCI layout."""
    target = f"docker://127.0.0.1:{server.port}/{repository}:latest"
    run(find_program("skopeo"), "--insecure-policy", "copy", "--dest-tls-verify=false", f"oci:{layout}", target)


def skopeo_pull(server: Server, directory: Path, repository: str) -> None:
    """Pull that image into a directory."""
    source = f"docker://127.0.0.1:{server.port}/{repository}:latest"
    run(find_program("skopeo"), "--insecure-policy", "copy", "--src-tls-verify=false", source, f"dir:{directory}")


def run(*command: str, words: str = "") -> str:
    """Run a program to its end with `words` as its input; return what it printed."""
    done = subprocess.run(
        command, check=False, input=words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout
