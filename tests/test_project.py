"""The project as a whole: what is committed, and what is shipped."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import needs

ROOT = Path(__file__).parents[1]
SOURCES = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
PYTHON = [str(path) for path in SOURCES if not path.parts[0].startswith(".")]


@cache
def committed() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", [path for path in PYTHON if not path.startswith("tests/")])
def test_a_module_says_in_a_docstring_what_it_is(path: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    assert docstring
    assert docstring.splitlines()[0][-1] in ".:!?]", "the first line is a sentence"


@pytest.mark.parametrize(
    "path", [path for path in PYTHON if path.startswith("tests/") and Path(path).name.startswith("test_")]
)
def test_a_test_is_named_by_a_sentence(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    short = [node.name for node in functions if node.name.startswith("test_") and node.name.count("_") < 3]
    assert not short


@needs("git")
def test_nothing_that_belongs_to_one_machine_is_committed() -> None:
    home = re.compile(r"(?<![\w.])/(?:home|Users|root)/\w|/tmp/(?!\$|\{|pytest)[\w-]+/\w")
    found = []
    for name in committed():
        text = (ROOT / name).read_text(errors="replace")
        found += [f"{name}: {match.group()}" for match in home.finditer(text)]
    assert not found


@needs("git")
def test_no_private_key_and_no_large_file_is_committed() -> None:
    marker = "-----BEGIN " + "PRIVATE KEY"
    for name in committed():
        path = ROOT / name
        assert path.stat().st_size < 1 << 20, name
        assert marker not in path.read_text(errors="replace").replace("RSA ", "").replace("EC ", ""), name


@needs("git")
def test_what_is_made_while_working_is_not_committed() -> None:
    made = re.compile(r"(^|/)(__pycache__|\.venv|build|dist|data|\.hypothesis|.*\.egg-info)(/|$)|\.(pyc|db|log)$")
    assert not [name for name in committed() if made.search(name)]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel that is built from what is committed, and from nothing that lies beside it."""
    directory = tmp_path_factory.mktemp("wheel")
    for name in committed():
        (directory / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / "tree" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), "./tree"]
    # With setuptools at hand nothing need be fetched; where it is too old, pip gets one for the build alone.
    if has_setuptools():
        command.insert(-1, "--no-build-isolation")
    done = subprocess.run(command, cwd=directory, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as archive:
        return archive.namelist()


def has_setuptools() -> bool:
    try:
        return int(metadata.version("setuptools").partition(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@needs("git")
def test_the_wheel_holds_every_module_and_what_the_program_reads(wheel: list[str]) -> None:
    shipped = ("hythe/", "registry/", "runner/", "storage/", "migrations/")
    modules = {name for name in committed() if name.startswith(shipped) and name.endswith(".py")}
    assert any(name.startswith("migrations/versions/0001") for name in modules)
    assert {*modules, "registry/openapi.json"} <= set(wheel)


@needs("git")
def test_the_wheel_holds_nothing_else(wheel: list[str]) -> None:
    shipped = ("hythe/", "registry/", "runner/", "storage/", "migrations/", "hythe-")
    assert not [name for name in wheel if not name.startswith(shipped)]
    assert any(name.endswith("entry_points.txt") for name in wheel)
    assert any("LICENSE" in name for name in wheel)


def test_every_dependency_is_bounded_below() -> None:
    dependencies = project()["dependencies"]
    assert isinstance(dependencies, list)
    assert not [dependency for dependency in dependencies if ">=" not in dependency]


def test_the_command_knows_its_version() -> None:
    shown = subprocess.run([sys.executable, "-m", "hythe", "--version"], check=True, capture_output=True, text=True)
    assert str(project()["version"]) in shown.stdout


def test_the_version_has_its_entry_in_the_change_log() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## .*({re.escape(str(project()['version']))}|[Uu]nreleased)", text, re.MULTILINE)
