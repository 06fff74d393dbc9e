"""Repositories, blobs, manifests, tags with their history, upload sessions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _name(length: int) -> sa.types.TypeEngine[str]:
    """Return a text that is sorted byte by byte, as SQLite sorts all."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    """Make the first tables."""
    op.create_table(
        "blob",
        sa.Column("id", _ID, nullable=False),
        sa.Column("digest", sa.String(length=136), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("touched_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("digest"),
        sa.UniqueConstraint("key"),
    )
    op.create_table(
        "manifest",
        sa.Column("id", _ID, nullable=False),
        sa.Column("digest", _name(136), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("subject", sa.String(length=136), nullable=True),
        sa.Column("artifact_type", sa.Text(), nullable=False),
        sa.Column("annotations", sa.Text(), nullable=False),
        sa.Column("image_size", sa.BigInteger(), nullable=False),
        sa.Column("platforms", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("digest"),
    )
    op.create_index("manifest_subject", "manifest", ["subject"], unique=False)
    op.create_table(
        "repository",
        sa.Column("id", _ID, nullable=False),
        sa.Column("parent_id", _ID, nullable=True),
        sa.Column("name", _name(255), nullable=False),
        sa.Column("has_content", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["parent_id"],
            ["repository.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_index("repository_parent", "repository", ["parent_id"], unique=False)
    op.create_table(
        "upload_session",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("repository", sa.String(length=255), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("algorithm", sa.String(length=16), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.Column("writer", sa.String(length=36), nullable=True),
        sa.Column("claimed_at", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key"),
    )
    op.create_index("upload_session_updated", "upload_session", ["updated_at"], unique=False)
    op.create_table(
        "manifest_reference",
        sa.Column("manifest_id", _ID, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("relation", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=136), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("blob_id", _ID, nullable=True),
        sa.Column("child_id", _ID, nullable=True),
        sa.ForeignKeyConstraint(
            ["blob_id"],
            ["blob.id"],
        ),
        sa.ForeignKeyConstraint(["child_id"], ["manifest.id"], ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["manifest_id"], ["manifest.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("manifest_id", "position"),
    )
    op.create_index("manifest_reference_blob", "manifest_reference", ["blob_id"], unique=False)
    op.create_index("manifest_reference_child", "manifest_reference", ["child_id"], unique=False)
    op.create_index("manifest_reference_digest", "manifest_reference", ["digest"], unique=False)
    op.create_table(
        "repository_blob",
        sa.Column("repository_id", _ID, nullable=False),
        sa.Column("blob_id", _ID, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["blob_id"],
            ["blob.id"],
        ),
        sa.ForeignKeyConstraint(
            ["repository_id"],
            ["repository.id"],
        ),
        sa.PrimaryKeyConstraint("repository_id", "blob_id"),
    )
    op.create_index("repository_blob_blob", "repository_blob", ["blob_id"], unique=False)
    op.create_table(
        "repository_manifest",
        sa.Column("repository_id", _ID, nullable=False),
        sa.Column("manifest_id", _ID, nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.Column("pushed_at", sa.BigInteger(), nullable=False),
        sa.Column("pushed_by", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["manifest_id"],
            ["manifest.id"],
        ),
        sa.ForeignKeyConstraint(
            ["repository_id"],
            ["repository.id"],
        ),
        sa.PrimaryKeyConstraint("repository_id", "manifest_id"),
    )
    op.create_index("repository_manifest_manifest", "repository_manifest", ["manifest_id"], unique=False)
    op.create_table(
        "tag_event",
        sa.Column("id", _ID, nullable=False),
        sa.Column("repository_id", _ID, nullable=False),
        sa.Column("name", _name(128), nullable=False),
        sa.Column("digest", sa.String(length=136), nullable=True),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["repository_id"],
            ["repository.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("tag_event_tag", "tag_event", ["repository_id", "name", "at"], unique=False)
    op.create_table(
        "tag",
        sa.Column("repository_id", _ID, nullable=False),
        sa.Column("name", _name(128), nullable=False),
        sa.Column("manifest_id", _ID, nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_by", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["repository_id", "manifest_id"],
            ["repository_manifest.repository_id", "repository_manifest.manifest_id"],
        ),
        sa.PrimaryKeyConstraint("repository_id", "name"),
        sqlite_with_rowid=False,
    )
    op.create_index("tag_manifest", "tag", ["repository_id", "manifest_id"], unique=False)


def downgrade() -> None:
    """There is nothing before the first tables."""
    raise NotImplementedError("restore the copy that the upgrade made")
