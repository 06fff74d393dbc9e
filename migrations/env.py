"""Runs revisions. Called by Alembic, which is called by `registry.metadata.schema`."""

import sqlite3
from pathlib import Path

from alembic import context
from sqlalchemy import create_engine, event

path: Path = context.config.attributes["path"]
engine = create_engine(f"sqlite:///{path}")


@event.listens_for(engine, "connect")
def _connected(connection: sqlite3.Connection, _record: object) -> None:
    # Transactions are begun by hand: with sqlite3's own, a failed upgrade would leave half of its tables.
    connection.isolation_level = None
    connection.execute("PRAGMA synchronous=FULL")


@event.listens_for(engine, "begin")
def _begun(connection: object) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # type: ignore[attr-defined]


with engine.connect() as connection:
    context.configure(connection=connection, render_as_batch=True, transaction_per_migration=False)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
engine.dispose()
