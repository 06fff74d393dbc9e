"""`hythe`: serve a registry, look into one.

Exit codes: 0 done, 1 it could not be done (the reason is on standard error), 2 the command was mistyped.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from hythe import people
from hythe.options import config_option, json_option, overrides_of, says_why, server_option, show

if TYPE_CHECKING:
    from registry.config import Settings

_DRIVERS: Final = click.Choice(["filesystem", "s3"])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hythe")
def main() -> None:
    """A registry for container images."""


@main.command()
@config_option
@click.option("--listen", metavar="HOST:PORT", help="Address to listen on.  [default: 127.0.0.1:5000]")
@click.option("--data", metavar="DIR", help="Directory for blobs and database.  [default: ./data]")
@click.option("--workers", metavar="N", help="Processes that serve.  [default: 1]")
@says_why
def serve(config_path: Path | None, listen: str | None, data: str | None, workers: str | None) -> None:
    """Serve a registry, until SIGTERM: then requests in flight finish and it exits with 0."""
    from registry.config import load
    from registry.server import serve as serve_registry

    overrides = overrides_of(data)
    if listen:
        overrides["server.listen"] = listen
    if workers:
        overrides["server.workers"] = workers
    settings = load(config_path, os.environ, overrides)
    sys.exit(serve_registry(settings, partial(_announce, settings)))


def _announce(settings: Settings, address: str) -> None:
    scheme = "https" if settings.tls.certificate else "http"
    url = settings.server.public_url.rstrip("/") or f"{scheme}://{address}"
    name = url.partition("://")[2]
    click.echo(f"Hythe listens on {url}  (push: docker tag IMAGE {name}/IMAGE && docker push {name}/IMAGE)")


@main.group()
def config() -> None:
    """Work with the configuration."""


@config.command()
@config_option
@says_why
def check(config_path: Path | None) -> None:
    """Say whether the configuration can be used: file, environment and defaults together."""
    from registry.config import load

    load(config_path, os.environ)
    click.echo("the configuration is good")


@main.command()
@click.argument("path", default="")
@click.option("-r", "--recursive", is_flag=True, help="The whole tree below PATH.")
@server_option
@json_option
@says_why
def ls(path: str, *, recursive: bool, server: str, as_json: bool) -> None:
    """List what lies below PATH in the tree of repositories."""
    from hythe.browse import list_repositories

    show(list_repositories(server, path, recursive=recursive), as_json)


@main.command()
@click.argument("repository")
@server_option
@json_option
@says_why
def tags(repository: str, server: str, *, as_json: bool) -> None:
    """List the tags of REPOSITORY: digest, size, platforms, when."""
    from hythe.browse import list_tags

    show(list_tags(server, repository), as_json)


@main.command()
@click.argument("reference", metavar="REF")
@server_option
@json_option
@says_why
def inspect(reference: str, server: str, *, as_json: bool) -> None:
    """Show what REF (REPOSITORY[:TAG] or REPOSITORY@DIGEST) is made of."""
    from hythe.browse import inspect_manifest

    show(inspect_manifest(server, reference), as_json)


@main.command()
@click.argument("reference", metavar="REF")
@server_option
@json_option
@says_why
def rm(reference: str, server: str, *, as_json: bool) -> None:
    """Remove REF: REPOSITORY:TAG removes the tag, REPOSITORY@DIGEST the manifest and all its tags."""
    from hythe.browse import remove_manifest

    show(remove_manifest(server, reference), as_json)


@main.command()
@config_option
@json_option
@says_why
def migrate(config_path: Path | None, *, as_json: bool) -> None:
    """Bring the database up to date, as `serve` does when it starts; for when that is to happen before."""
    from hythe.move import migrate as run
    from registry.config import load

    show(run(load(config_path, os.environ)), as_json)


@main.command("copy-store")
@config_option
@click.option("--from", "source", type=_DRIVERS, required=True, help="Where the blobs are.")
@click.option("--to", "target", type=_DRIVERS, required=True, help="Where they shall be too.")
@json_option
@says_why
def copy_store(config_path: Path | None, source: str, target: str, *, as_json: bool) -> None:
    """Copy all blobs from one store of the configuration to another, while the registry serves; run again to go on."""
    from hythe.move import copy_blobs
    from registry.config import load

    show(copy_blobs(load(config_path, os.environ), source, target), as_json)


@main.command("copy-database")
@config_option
@click.option("--from", "source", metavar="URL", required=True, help="The database of a registry that is stopped.")
@click.option("--to", "target", metavar="URL", help="A new one.  [default: database.url of the configuration]")
@json_option
@says_why
def copy_database(config_path: Path | None, source: str, target: str | None, *, as_json: bool) -> None:
    """Copy all that one database knows into another one, such as from SQLite to PostgreSQL."""
    from hythe.move import copy_facts
    from registry.config import load

    show(copy_facts(source, target or load(config_path, os.environ).database.url), as_json)


for command in people.COMMANDS:
    main.add_command(command)
