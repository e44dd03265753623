"""Alembic's entry: run the migrations on the connection that the ledger hands over."""

from alembic import context

from riverdelta.registry.ledger.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="ledger_version",
    transactional_ddl=False,  # the ledger's own transaction is open already
)
context.run_migrations()
