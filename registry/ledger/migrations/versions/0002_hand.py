"""What a person decided about a segment, and what was measured of a rejected candidate."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, unless the ledger was made with them."""
    held = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("segments")}
    if "hand" not in held:
        op.add_column("segments", sa.Column("hand", sa.String(8), nullable=False, server_default=""))
        op.add_column("segments", sa.Column("metrics", sa.JSON, nullable=False, server_default="{}"))


def downgrade() -> None:
    """Remove the columns."""
    op.drop_column("segments", "hand")
    op.drop_column("segments", "metrics")
