"""What uploads leave in the store, whose registry this is."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add what several servers need that share a store."""
    with op.batch_alter_table("upload_session") as batch:
        batch.add_column(sa.Column("is_torn", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "leftover",
        sa.Column("upload", sa.String(length=36), nullable=False),
        sa.Column("kept", sa.Text(), nullable=True),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("upload"),
    )
    op.create_index("leftover_at", "leftover", ["at"], unique=False)
    identity = op.create_table(
        "identity",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.bulk_insert(identity, [{"id": str(uuid.uuid4())}])


def downgrade() -> None:
    """Nothing but this version knows these tables."""
    raise NotImplementedError("restore the copy that the upgrade made")
