"""Which trainer works on which adapter."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table, unless the ledger was made with it."""
    if not sa.inspect(op.get_bind()).has_table("claims"):
        op.create_table(
            "claims",
            sa.Column("adapter", sa.String(63), sa.ForeignKey("adapters.name"), primary_key=True),
            sa.Column("holder", sa.String(128), nullable=False),
            sa.Column("token", sa.BigInteger, nullable=False),
            sa.Column("expires", sa.Float, nullable=False),
        )


def downgrade() -> None:
    """Remove the table."""
    op.drop_table("claims")
