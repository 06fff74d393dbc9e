"""A PostgreSQL server of the tests' own: one cluster, removed at the end, and as many databases as are asked for."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.services.processes import Program, free_port, wait_until

#: Debian keeps these out of the path, by version. Older ones know no ICU.
_NEWEST = max((int(path.name) for path in Path("/usr/lib/postgresql").glob("[1-9]*")), default=0)
_PROGRAMS = Path(f"/usr/lib/postgresql/{_NEWEST}/bin")

needs_postgres = pytest.mark.skipif(
    _NEWEST < 15 or not (_PROGRAMS / "initdb").exists(), reason="not installed: PostgreSQL 15 or newer"
)

#: Databases sort as the English do, as most servers' do, so that who relies on the order of bytes must ask for it.
_INITDB = ("--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US", "--no-sync")
_ACCESS = ("--username=postgres", "--auth-local=reject", "--auth-host=scram-sha-256")
_SETTINGS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": "200"}
#: For a machine that does not lose its power. What is committed still outlives the server, as the kernel has it.
_CARELESS = {"fsync": "off", "full_page_writes": "off"}

#: How many others use a database; they are told to go.
_END_OTHERS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


@dataclass
class Postgres(Program):
    """A PostgreSQL; its role `hythe` owns the databases that are made here, and may do nothing else."""

    port: int = 0
    password: str = ""
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def url(self, database: str) -> str:
        """Return the URL under which Hythe uses a database."""
        return f"postgresql://hythe:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it and wait until it lets somebody in."""
        super().start()
        wait_until(self._is_up, f"PostgreSQL; it says {self.output}")

    def stop(self, number: int = signal.SIGINT, seconds: float = 30) -> int:
        """Stop it, without waiting for its clients to leave."""
        return super().stop(number, seconds)

    def kill(self) -> None:
        """End it as a crash would: it recovers when it is started again."""
        self.stop(signal.SIGQUIT)

    def restart(self) -> None:
        """Stop it and start it again, on the same port."""
        self.stop()
        self.start()

    def create(self, template: str = "template0") -> str:
        """Make a database, perhaps as a copy of another that nobody uses now; return its URL."""
        name = f"hythe_{next(self._numbers)}"
        self.execute(f'CREATE DATABASE "{name}" OWNER hythe TEMPLATE "{template}"')
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database, whoever uses it."""
        self.execute(f'DROP DATABASE "{urlsplit(url).path[1:]}" WITH (FORCE)')

    def empty(self, url: str, tables: Sequence[str]) -> None:
        """Delete all rows of `tables`, in this order, whoever uses the database: they lose their connections."""
        with self._connect(urlsplit(url).path[1:]) as connection:
            # Until they are gone they might still write.
            wait_until(lambda: connection.execute(_END_OTHERS).fetchone() == (0,), "the end of who uses it")
            connection.execute(";".join(f'DELETE FROM "{table}"' for table in tables))

    def execute(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement as the superuser, outside a transaction; return its rows."""
        with self._connect(database) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def _connect(self, database: str) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            password=self.password,
            dbname=database,
            autocommit=True,
            connect_timeout=10,
        )

    def _is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.output.read_text(errors="replace")
        try:
            self._connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True


@contextlib.contextmanager
def postgres(directory: Path, *, sync: bool = False) -> Iterator[Postgres]:
    """Run PostgreSQL while the block lasts. Its output goes to `directory`, which its user need not be able to enter.

    With `sync` it waits for the disk, as it does in earnest.
    """
    directory.mkdir(exist_ok=True)
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="hythe-postgres-") as home:
        cluster = Path(home) / "cluster"
        user, group = _unprivileged()
        if user:
            shutil.chown(home, user, group)
        _initdb(cluster, password, user, group)
        settings = {**_SETTINGS, **({} if sync else _CARELESS), "port": str(port := free_port())}
        command = [str(_PROGRAMS / "postgres"), "-D", str(cluster)]
        command += [f"--{name}={value}" for name, value in settings.items()]
        server = Postgres(command, directory / "postgres.log", user=user, group=group, port=port, password=password)
        try:
            server.start()
            server.execute(f"CREATE ROLE hythe LOGIN PASSWORD '{password}'")
            yield server
        finally:
            server.stop()


def _unprivileged() -> tuple[str | None, int | None]:
    """Return whom it shall run as, for it refuses to be root: the user that its package made, or nobody."""
    if os.geteuid() != 0:
        return None, None
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return user.pw_name, user.pw_gid


def _initdb(cluster: Path, password: str, user: str | None, group: int | None) -> None:
    """Make a cluster whose superuser has that password."""
    secret = cluster.parent / "password"
    secret.write_text(password)
    if user:
        shutil.chown(secret, user, group)
    done = subprocess.run(
        [str(_PROGRAMS / "initdb"), "-D", str(cluster), f"--pwfile={secret}", *_INITDB, *_ACCESS],
        check=False,
        cwd=cluster.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        user=user,
        group=group,
        extra_groups=None if user is None else [],
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")
    secret.unlink()
