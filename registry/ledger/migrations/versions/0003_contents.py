"""Encrypted contents: where each segment's keys are, and the root of its entries' commitments."""

import sqlalchemy as sa
from alembic import op

from riverdelta.core.errors import Unsupported

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, unless the ledger was made with them; a ledger that names contents in the clear is refused."""
    bind = op.get_bind()
    held = {column["name"] for column in sa.inspect(bind).get_columns("segments")}
    if "keyring" in held:
        return
    if bind.execute(sa.text("SELECT count(*) FROM segments")).scalar():
        raise Unsupported(
            "This ledger's contents were stored before they were encrypted.", "Start with a new data folder."
        )
    op.add_column("segments", sa.Column("keyring", sa.String(64), nullable=False, server_default=""))
    op.add_column("segments", sa.Column("root", sa.String(64), nullable=False, server_default=""))


def downgrade() -> None:
    """Remove the columns."""
    op.drop_column("segments", "keyring")
    op.drop_column("segments", "root")
