"""Runs revisions on a given connection, in its transaction. Called by Alembic for `registry.metadata.schema`."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, render_as_batch=True)
context.run_migrations()
