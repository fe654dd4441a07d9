"""Alembic's entry: runs on the connection that ``broker.database`` hands over, inside its transaction."""

from alembic import context
from sqlmodel import SQLModel

import broker.models  # noqa: F401 - fills the metadata for autogenerate and the drift test

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
