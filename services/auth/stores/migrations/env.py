"""What Alembic runs around revisions: `services.auth.stores.migrating` hands it a connection."""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    # all steps in the transaction of the connection: SQLite can do that too
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
