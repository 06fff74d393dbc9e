"""Who may import whom, and why. A new import that is not allowed here wants a reason, or another place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = ("hythe", "registry", "runner", "storage", "migrations")

#: Which of our packages each of them may import, and why.
ALLOWED: dict[str, dict[str, str]] = {
    "hythe": {
        "registry": "the command starts it, and it is the one place that knows both halves",
        "storage": "names and digests, where a command reads them",
    },
    "registry": {
        "storage": "content, and where its bytes lie",
        "migrations": "the start brings the database up to date",
    },
    "runner": {
        "storage": "digests, descriptors and manifests; it and the registry never meet",
    },
    "storage": {},
    "migrations": {},
}

#: Imports that stay in few files, and why.
SEAMS: dict[str, tuple[list[str], str]] = {
    "migrations": (["registry/metadata/schema.py"], "the one place that brings a database up to date"),
    "aiohttp": (
        [
            *("registry/app.py", "registry/server.py", "registry/middleware.py", "registry/dispatch.py"),
            *("registry/calls.py", "registry/responses.py", "registry/locations.py", "registry/transfer.py"),
            *("registry/blobs.py", "registry/uploads.py", "registry/manifests.py", "registry/referrers.py"),
            *("registry/listings.py", "registry/browse.py", "registry/health.py", "registry/wire.py"),
            *("registry/answers.py", "registry/record.py", "registry/access/gate.py", "registry/access/tokens.py"),
            *("registry/access/clients.py", "registry/access/audit.py", "registry/access/granting.py"),
            *("registry/access/credentials.py", "registry/access/challenges.py"),
            # Where the keys of other issuers are fetched.
            "registry/access/issuers.py",
            # What aiohttp itself reports of broken clients is told from what it reports of us.
            "registry/logs.py",
            # The bytes of an object store; its control is boto3's.
            "storage/bucket.py",
        ],
        "what speaks HTTP; stores, facts, settings and errors know none",
    ),
    "sqlalchemy": (["registry/metadata/", "migrations/"], "the facts; all else asks for units of work"),
    "alembic": (["registry/metadata/schema.py", "migrations/"], "imported only where there is something to upgrade"),
    "sqlite3": (
        ["registry/metadata/"],
        "the database, and the watch on its version",
    ),
    "ctypes": (
        ["storage/digest.py", "storage/files.py"],
        "a hash that can be saved, and a hint to the kernel; runner seams come later",
    ),
    "hashlib": (["storage/digest.py"], "digests are made in one place"),
    "click": (["hythe/cli.py", "hythe/options.py", "hythe/people.py", "hythe/move.py"], "the command line"),
    "uvloop": (["registry/server.py"], "optional: chosen where the loop is made"),
    "prometheus_client": (["registry/metrics.py", "registry/health.py"], "numbers"),
    "aiofiles": (["storage/filesystem.py"], "files"),
    "boto3": (["storage/bucket.py"], "the bucket of an object store"),
    "botocore": (["storage/bucket.py"], "the bucket of an object store"),
    "jwt": (["registry/access/signing.py", "registry/access/issuers.py"], "signed tokens: ours, and those of others"),
    "cryptography": (["registry/access/signing.py"], "the keys that tokens are signed by"),
    "argon2": (["registry/access/passwords.py"], "passwords"),
    "bcrypt": (["registry/access/passwords.py"], "passwords of htpasswd files"),
    "psycopg": (["registry/metadata/postgres.py"], "PostgreSQL"),
    "requests": ([], "tests only"),
    "pytest": ([], "tests only"),
}


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imports(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of every import, also of those inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.lineno, node.module or ""


def violations(path: str, text: str) -> list[str]:
    house = path.partition("/")[0]
    found = []
    for line, name in imports(text):
        top = name.partition(".")[0]
        if top in {*HOUSES, "tests", "benchmarks", "runner"} and top != house and top not in ALLOWED[house]:
            found.append(f"{path}:{line}: {house} may not import {top}")
        places, reason = SEAMS.get(top, ([path], ""))
        if top != house and not path.startswith(tuple(places)):
            found.append(f"{path}:{line}: {name} is for {', '.join(places) or 'nobody'}: {reason}")
    return found


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in sources(*HOUSES)])
def test_a_module_imports_only_what_it_may(path: str) -> None:
    assert not violations(path, (ROOT / path).read_text())


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("storage/base.py", "import registry.errors"),
        ("storage/base.py", "from hythe import cli"),
        ("storage/filesystem.py", "def f():\n    from aiohttp import web"),
        ("registry/errors.py", "from aiohttp import web"),
        ("registry/metadata/tags.py", "from aiohttp.web import Response"),
        ("registry/uploads.py", "import sqlalchemy as sa"),
        ("registry/app.py", "import migrations"),
        ("registry/app.py", "import hythe"),
        ("registry/app.py", "import tests.content"),
        ("registry/logs.py", "if True:\n    import ctypes"),
        ("storage/memory.py", "import boto3"),
        ("migrations/env.py", "from registry.metadata.tables import metadata"),
    ],
)
def test_an_import_out_of_place_would_be_noticed(path: str, text: str) -> None:
    assert violations(path, text)


def test_the_list_has_no_place_that_does_not_need_it() -> None:
    used = {
        (name.partition(".")[0], str(path.relative_to(ROOT)))
        for path in sources(*HOUSES)
        for _, name in imports(path.read_text())
    }
    unused = [
        f"{name}: {place}"
        for name, (places, _) in SEAMS.items()
        for place in places
        if not any(top == name and path.startswith(place) for top, path in used)
    ]
    assert not unused


def test_the_metadata_of_the_registry_does_not_know_its_endpoints() -> None:
    # Below the endpoints lie facts and errors only: what is imported upwards could not be read alone.
    allowed = {"registry.errors", "registry.metadata"}
    for path in sources("registry/metadata"):
        for line, name in imports(path.read_text()):
            is_ours = name.startswith("registry")
            assert not is_ours or name.startswith(tuple(allowed)), f"{path.name}:{line}: {name}"
