"""The parts of a version's shards, and why a gate withheld a version."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, unless the ledger was made with them."""
    held = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("versions")}
    if "parts" not in held:
        op.add_column("versions", sa.Column("parts", sa.JSON, nullable=False, server_default="[]"))
        op.add_column("versions", sa.Column("withheld", sa.Text, nullable=False, server_default=""))


def downgrade() -> None:
    """Remove the columns."""
    op.drop_column("versions", "parts")
    op.drop_column("versions", "withheld")
