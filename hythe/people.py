"""The commands about who may do what: `user`, `team`, `token`, `grant`, `revoke`, `who-can`, `read-only`, `audit`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hythe.options import config_option, data_option, json_option, says_why, settings_of, show

if TYPE_CHECKING:
    from hythe.browse import Result
    from hythe.ledger import Ledger
    from hythe.remote import Remote

_RIGHTS: Final = click.Choice(["pull", "push", "delete", "admin"])


def _local(work: Callable[..., Result]) -> Any:
    """Make a command of what works on the database of the configuration, with the options that all of these have."""

    @wraps(work)
    def run(config_path: Path | None, data: str | None, as_json: bool, **options: Any) -> None:
        from hythe.ledger import Ledger

        show(work(Ledger(settings_of(config_path, data)), **options), as_json)

    return config_option(data_option(json_option(says_why(run))))


def _anywhere(work: Callable[..., Result]) -> Any:
    """Make a command of what works on the database of the configuration, or on a registry elsewhere."""

    @wraps(work)
    def run(config_path: Path | None, data: str | None, server: str | None, as_json: bool, **options: Any) -> None:
        from hythe.ledger import Ledger
        from hythe.remote import Remote

        place = Remote(server) if server else Ledger(settings_of(config_path, data))
        show(work(place, **options), as_json)

    return config_option(data_option(_elsewhere_option(json_option(says_why(run)))))


_elsewhere_option = click.option(
    "--server", metavar="URL", help="Ask the registry there, as HYTHE_USER with HYTHE_PASSWORD, not the database here."
)


def _password(from_stdin: bool) -> str:
    """Ask for a password, twice; or read one from standard input, to the end of its line."""
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask for a password at: send it, with --password-stdin")
    return str(click.prompt("Password (8 characters or more)", hide_input=True, confirmation_prompt=True, err=True))


_stdin_option = click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")


@click.group()
def user() -> None:
    """People and robots who can log in."""


@user.command("add")
@click.argument("name")
@click.option("--admin", is_flag=True, help="May administer everything; the first account must.")
@click.option("--robot", is_flag=True, help="Has no password, only tokens.")
@_stdin_option
@_local
def user_add(ledger: Ledger, name: str, *, admin: bool, robot: bool, password_stdin: bool) -> Result:
    """Make the account NAME; asks for its password."""
    from hythe import accounts

    return accounts.add_user(ledger, name, None if robot else _password(password_stdin), admin=admin)


@user.command("import")
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_local
def user_import(ledger: Ledger, path: Path) -> Result:
    """Make accounts of the users of an htpasswd FILE (bcrypt), with the passwords that they have."""
    from hythe import accounts

    return accounts.import_users(ledger, path)


@user.command("list")
@_local
def user_list(ledger: Ledger) -> Result:
    """List all accounts."""
    from hythe import accounts

    return accounts.list_users(ledger)


@user.command("password")
@click.argument("name")
@_stdin_option
@_local
def user_password(ledger: Ledger, name: str, *, password_stdin: bool) -> Result:
    """Change the password of NAME."""
    from hythe import accounts

    return accounts.set_password(ledger, name, _password(password_stdin))


@user.command("disable")
@click.argument("name")
@_local
def user_disable(ledger: Ledger, name: str) -> Result:
    """Let NAME do nothing any more, at once; what it may is kept."""
    from hythe import accounts

    return accounts.set_disabled(ledger, name, disabled=True)


@user.command("enable")
@click.argument("name")
@_local
def user_enable(ledger: Ledger, name: str) -> Result:
    """Let NAME do again what it may."""
    from hythe import accounts

    return accounts.set_disabled(ledger, name, disabled=False)


@user.command("remove")
@click.argument("name")
@_local
def user_remove(ledger: Ledger, name: str) -> Result:
    """Remove NAME, with its tokens and rules; what it pushed stays."""
    from hythe import accounts

    return accounts.remove_user(ledger, name)


@click.group()
def team() -> None:
    """Teams, to give rights to."""


@team.command("list")
@_local
def team_list(ledger: Ledger) -> Result:
    """List all teams and who is in them."""
    from hythe import accounts

    return accounts.list_teams(ledger)


@team.command("add")
@click.argument("name")
@_local
def team_add(ledger: Ledger, name: str) -> Result:
    """Make the team NAME."""
    from hythe import accounts

    return accounts.change_team(ledger, "add", name, [])


@team.command("remove")
@click.argument("name")
@_local
def team_remove(ledger: Ledger, name: str) -> Result:
    """Remove the team NAME, with its rules."""
    from hythe import accounts

    return accounts.change_team(ledger, "remove", name, [])


@team.command("join")
@click.argument("name")
@click.argument("members", nargs=-1, required=True)
@_local
def team_join(ledger: Ledger, name: str, members: tuple[str, ...]) -> Result:
    """Put MEMBERS into the team NAME."""
    from hythe import accounts

    return accounts.change_team(ledger, "join", name, members)


@team.command("leave")
@click.argument("name")
@click.argument("members", nargs=-1, required=True)
@_local
def team_leave(ledger: Ledger, name: str, members: tuple[str, ...]) -> Result:
    """Take MEMBERS out of the team NAME."""
    from hythe import accounts

    return accounts.change_team(ledger, "leave", name, members)


@click.group()
def token() -> None:
    """Personal access tokens, in place of a password."""


@token.command("create")
@click.argument("name")
@click.option("--user", "owner", metavar="USER", help="Whose it is.")
@click.option("--scope", multiple=True, metavar="RIGHT:NODE", help="How far it reaches; may be given again.  [all]")
@click.option("--days", default=90, show_default=True, type=click.IntRange(0, 36500), help="Until it ends; 0: never.")
@_anywhere
def token_create(place: Ledger | Remote, name: str, owner: str | None, scope: tuple[str, ...], days: int) -> Result:
    """Make a token called NAME and print it, once."""
    from hythe import accounts

    return accounts.create_token(place, owner, name, scope, days)


@token.command("list")
@click.option("--user", "owner", metavar="USER", help="Only those of one account.")
@_anywhere
def token_list(place: Ledger | Remote, owner: str | None) -> Result:
    """List tokens: whose, how far they reach, when they end, when they were used last."""
    from hythe import accounts

    return accounts.list_tokens(place, owner)


@token.command("revoke")
@click.argument("token_id", metavar="ID", type=int)
@_anywhere
def token_revoke(place: Ledger | Remote, token_id: int) -> Result:
    """Let the token ID be good for nothing, at once."""
    from hythe import accounts

    return accounts.revoke_token(place, token_id)


@click.command()
@click.argument("right", type=_RIGHTS)
@click.argument("node")
@click.argument("subject", metavar="TO")
@_anywhere
def grant(place: Ledger | Remote, right: str, node: str, subject: str) -> Result:
    """Give RIGHT on NODE (/ for all) and all below it TO an account, team:NAME, users or everybody."""
    from hythe import accounts

    return accounts.grant(place, right, node, subject)


@click.command()
@click.argument("right", type=_RIGHTS)
@click.argument("node")
@click.argument("subject", metavar="FROM")
@_anywhere
def revoke(place: Ledger | Remote, right: str, node: str, subject: str) -> Result:
    """Take back the rule that gives RIGHT on NODE."""
    from hythe import accounts

    return accounts.revoke(place, right, node, subject)


@click.command()
@click.argument("node", required=False)
@_anywhere
def grants(place: Ledger | Remote, node: str | None) -> Result:
    """List all rules, or those that hold for NODE."""
    from hythe import accounts

    return accounts.list_rules(place, node)


@click.command("who-can")
@click.argument("right", type=_RIGHTS)
@click.argument("node")
@_anywhere
def who_can(place: Ledger | Remote, right: str, node: str) -> Result:
    """Say who may do RIGHT on NODE, and by which rules."""
    from hythe import accounts

    return accounts.who_can(place, right, node)


@click.command("read-only")
@click.argument("state", type=click.Choice(["on", "off"]), required=False)
@click.option("--reason", default="maintenance", show_default=True, help="What clients are told.")
@_local
def read_only(ledger: Ledger, state: str | None, reason: str) -> Result:
    """Answer writes with 503 and a reason while pulls go on; without an argument, say whether it is so."""
    from hythe import accounts

    if state is None:
        return accounts.show_read_only(ledger)
    return accounts.set_read_only(ledger, reason if state == "on" else None)


@click.command()
@click.option("--since", default="7d", show_default=True, help="7d, 12h, 30m, or a date.")
@click.option("--user", "user_name", metavar="USER", help="Only what one account did.")
@click.option("--repo", "repository", metavar="REPO", help="Only in a repository, and all below it.")
@click.option("--limit", default=1000, show_default=True, type=click.IntRange(1), help="The newest so many.")
@_local
def audit(ledger: Ledger, since: str, user_name: str | None, repository: str | None, limit: int) -> Result:
    """Say who changed what, and what was refused to whom."""
    from hythe import accounts

    return accounts.list_audit(ledger, since, user_name, repository, limit)


COMMANDS: Final = [user, team, token, grant, revoke, grants, who_can, read_only, audit]
