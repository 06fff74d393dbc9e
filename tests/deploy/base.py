"""A base image without a network: the files of the Debian packages of this machine that Python needs.

It takes two seconds, where debootstrap takes forty and a mirror.
"""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tests.services.processes import run

_PACKAGES = ("base-files", "bash", "coreutils", "dash", "python3-venv")
_DIRECTORIES = ("dev", "etc", "proc", "run", "sys", "usr", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "var")
_LINKS = ("bin", "lib", "lib64", "sbin")
_NOT_NEEDED = ("/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
#: What tells pip where packages are. Where else it looks, and how it talks, is this machine's own.
_PIP_KEYS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "cert")


def missing() -> str:
    """Return why such an image cannot be made here, or nothing."""
    if shutil.which("apt-cache") is None or shutil.which("dpkg-query") is None:
        return "no Debian packages here to make a base image of"
    shown = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Status}\n", *_PACKAGES], check=False, capture_output=True, text=True
    )
    return "" if shown.stdout.count("ok installed") == len(_PACKAGES) else f"not installed: one of {_PACKAGES}"


def write_base(path: Path) -> None:
    """Write the root directory of a small Debian with Python and venv, as a tar."""
    with tarfile.open(path, "w") as tar:
        for name in (*_DIRECTORIES, "tmp"):
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(member)
        for name in _LINKS:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
        for file in {*_files(), _CERTIFICATES, *_certificates_of_pip()}:
            # Packages may still say /bin for what is in /usr/bin.
            tar.add(file, str(file.parent.resolve() / file.name)[1:], recursive=False)


def write_pip_configuration(path: Path) -> None:
    """Write what tells pip, in an image that is built, to get packages from where this machine gets them."""
    configuration = configparser.RawConfigParser()
    configuration["global"] = {key: value for key, value in reversed(_pip_configuration()) if key in _PIP_KEYS}
    with path.open("w") as file:
        configuration.write(file)


def _files() -> Iterator[Path]:
    only = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    found = run("apt-cache", "depends", "--recurse", "--installed", *only, *_PACKAGES).splitlines()
    names = {line for line in found if line[:1].isalnum()}
    for name in set(run("dpkg-query", "--listfiles", *names).splitlines()):
        path = Path(name)
        if not name.startswith(_NOT_NEEDED) and (path.is_symlink() or path.is_file()):
            yield path


def _pip_configuration() -> list[tuple[str, str]]:
    """Return keys and values, what counts more before what counts less: `:env:.cert='…'`, then `global.cert='…'`."""
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    split = [line.partition("=") for line in lines]
    return [(name.rpartition(".")[2], value.strip("'")) for name, _, value in split]


def _certificates_of_pip() -> set[Path]:
    return {Path(value) for key, value in _pip_configuration() if key == "cert" and Path(value).is_file()}
