"""What commands have in common: options, how they fail, how they print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from registry.config import Settings

P = ParamSpec("P")
T = TypeVar("T")

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Configuration file (TOML); config.example.toml names every key.",
)
data_option = click.option("--data", metavar="DIR", help="Directory of blobs and database, as for serve.")
server_option = click.option(
    "--server",
    default="http://127.0.0.1:5000",
    show_default=True,
    envvar="HYTHE_SERVER",
    help="Address of the registry.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def says_why(command: Callable[P, T]) -> Callable[P, T]:
    """Turn an error that a person can mend into its message and exit code 1."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        from hythe.client import ServerError
        from registry.errors import AccountsError, ConfigurationError

        try:
            return command(*args, **kwargs)
        except (AccountsError, ConfigurationError, ServerError) as error:
            click.echo(f"hythe: {error}", err=True)
            sys.exit(1)

    return wrapped


def show(result: Any, as_json: bool) -> None:
    """Print what a command found."""
    click.echo(json.dumps(result.data, indent=2) if as_json else result.text, nl=bool(as_json or result.text))


def overrides_of(data: str | None) -> dict[str, str]:
    """Return the settings that `--data` stands for."""
    if not data:
        return {}
    return {"storage.filesystem.root": data, "database.url": f"sqlite:///{Path(data) / 'hythe.db'}"}


def settings_of(config_path: Path | None, data: str | None) -> Settings:
    """Return the settings of file, environment and `--data`."""
    from registry.config import load

    return load(config_path, os.environ, overrides_of(data))
