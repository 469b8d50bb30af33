"""How Alembic runs the migrations: on the connection, and in the transaction, that ``database.py`` gives it."""

from __future__ import annotations

from alembic import context

from headrace.server.accounting.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
