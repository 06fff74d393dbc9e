"""The tables. What a schema change needs: an edit here, a revision in migrations/versions, a new HEAD there.

    repository ──< repository_blob >── blob
        │   └────< repository_manifest >── manifest ──< manifest_reference >── blob, manifest
        └──< tag >── repository_manifest
             tag_event: every move of every tag, for ever          upload_session: bytes on their way in
                                                                   leftover: bytes that nobody will ask for
             identity: one row, which says whose facts these are

    account ──< access_token                 access_rule: who may do what below a node of the tree
        ├────< team_member >── team          policy: one row, which tells that any of these changed
        └────< access_rule >── team          signing_key: what tokens are signed by        audit_event: who did what

Times are microseconds since the epoch, UTC; sizes are bytes. The foreign keys are the collector's lock: a blob
row that a manifest points to cannot be deleted, whoever gets there first.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.types import TypeEngine

metadata = MetaData()

# SQLite numbers rows by itself only where the key is INTEGER to the letter.
_Id = BigInteger().with_variant(Integer, "sqlite")


def _name(length: int) -> TypeEngine[str]:
    """Return a text that is sorted byte by byte, as SQLite sorts all."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


#: Microseconds in it.
DAY: Final = 86400 * 1_000_000


def now() -> int:
    """Return microseconds since the epoch."""
    return time.time_ns() // 1000


def rfc3339(microseconds: int | None) -> str | None:
    """Return a time since the epoch as text, in seconds and UTC; None for None."""
    if microseconds is None:
        return None
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


repository = Table(
    "repository",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("parent_id", _Id, ForeignKey("repository.id")),
    Column("name", _name(255), nullable=False, unique=True, comment="the whole path"),
    Column("has_content", Boolean, nullable=False, comment="False: only a folder on the way to others"),
    Column("created_at", BigInteger, nullable=False),
    Index("repository_parent", "parent_id"),
)

blob = Table(
    "blob",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("digest", String(136), nullable=False, unique=True),
    Column("size", BigInteger, nullable=False),
    Column("key", Text, nullable=False, unique=True, comment="in the store; never used twice"),
    Column("created_at", BigInteger, nullable=False),
    Column(
        "touched_at",
        BigInteger,
        nullable=False,
        comment="a client was told that it is here; begins its grace",
    ),
)

repository_blob = Table(
    "repository_blob",
    metadata,
    Column("repository_id", _Id, ForeignKey("repository.id"), primary_key=True),
    Column("blob_id", _Id, ForeignKey("blob.id"), primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Index("repository_blob_blob", "blob_id"),
)

manifest = Table(
    "manifest",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("digest", _name(136), nullable=False, unique=True),
    Column("size", BigInteger, nullable=False),
    Column("content", LargeBinary, nullable=False, comment="the exact bytes that were pushed"),
    Column("subject", String(136), comment="digest; need not exist"),
    Column("artifact_type", Text, nullable=False),
    Column("annotations", Text, nullable=False, comment="JSON object, for referrers"),
    Column("image_size", BigInteger, nullable=False, comment="configs and layers, over all platforms"),
    Column("platforms", Text, nullable=False, comment="JSON list of os/architecture[/variant]"),
    Column("created_at", BigInteger, nullable=False),
    Index("manifest_subject", "subject"),
)

manifest_reference = Table(
    "manifest_reference",
    metadata,
    Column("manifest_id", _Id, ForeignKey("manifest.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("relation", String(16), nullable=False, comment="config, layer or child"),
    Column("digest", String(136), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("blob_id", _Id, ForeignKey("blob.id"), comment="NULL: foreign, or not pushed yet (sparse)"),
    Column("child_id", _Id, ForeignKey("manifest.id", ondelete="SET NULL")),
    Index("manifest_reference_blob", "blob_id"),
    Index("manifest_reference_child", "child_id"),
    Index("manifest_reference_digest", "digest"),
)

repository_manifest = Table(
    "repository_manifest",
    metadata,
    Column("repository_id", _Id, ForeignKey("repository.id"), primary_key=True),
    Column("manifest_id", _Id, ForeignKey("manifest.id"), primary_key=True),
    Column("media_type", Text, nullable=False, comment="the Content-Type it was pushed with here"),
    Column("pushed_at", BigInteger, nullable=False),
    Column("pushed_by", Text, nullable=False),
    Index("repository_manifest_manifest", "manifest_id"),
)

tag = Table(
    "tag",
    metadata,
    Column("repository_id", _Id, primary_key=True),
    Column("name", _name(128), primary_key=True),
    Column("manifest_id", _Id, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("updated_by", Text, nullable=False),
    ForeignKeyConstraint(
        ["repository_id", "manifest_id"],
        ["repository_manifest.repository_id", "repository_manifest.manifest_id"],
    ),
    Index("tag_manifest", "repository_id", "manifest_id"),
    sqlite_with_rowid=False,
)

tag_event = Table(
    "tag_event",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("repository_id", _Id, ForeignKey("repository.id"), nullable=False),
    Column("name", _name(128), nullable=False),
    Column("digest", String(136), comment="what it points to since; NULL: deleted"),
    Column("at", BigInteger, nullable=False),
    Column("by", Text, nullable=False),
    Index("tag_event_tag", "repository_id", "name", "at"),
)

upload_session = Table(
    "upload_session",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("repository", String(255), nullable=False),
    Column("key", Text, nullable=False),
    Column("algorithm", String(16), nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("state", LargeBinary, nullable=False),
    Column("writer", String(36), comment="the request that is writing now"),
    Column("claimed_at", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column(
        "is_torn",
        Boolean,
        nullable=False,
        server_default=false(),
        comment="a writer never let go: the store may hold more than this row knows",
    ),
    Column("opened_by", BigInteger, nullable=False, server_default="0", comment="id of an account; 0: nobody's"),
    UniqueConstraint("key"),
    Index("upload_session_updated", "updated_at"),
)

leftover = Table(
    "leftover",
    metadata,
    Column("upload", String(36), primary_key=True, comment="whose bytes the store is to forget, in a while"),
    Column("kept", Text, comment="the key of those that became a blob"),
    Column("at", BigInteger, nullable=False),
    Index("leftover_at", "at"),
)

identity = Table(
    "identity",
    metadata,
    Column("id", String(36), primary_key=True, comment="of the registry, for the store to bear"),
)

account = Table(
    "account",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", _name(64), nullable=False, unique=True),
    Column("kind", String(8), nullable=False, comment="user or robot"),
    Column("source", String(8), nullable=False, comment="own, or htpasswd: the file says who there is"),
    Column("password", Text, comment="hash; NULL: by tokens only"),
    Column("is_disabled", Boolean, nullable=False, server_default=false()),
    Column("created_at", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False, comment="tokens for requests that were signed before are void"),
    # An id that was given once is in logs and in signed tokens: it must not come to mean somebody else.
    sqlite_autoincrement=True,
)

team = Table(
    "team",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", _name(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
)

team_member = Table(
    "team_member",
    metadata,
    Column("team_id", _Id, ForeignKey("team.id", ondelete="CASCADE"), primary_key=True),
    Column("account_id", _Id, ForeignKey("account.id", ondelete="CASCADE"), primary_key=True),
    Index("team_member_account", "account_id"),
)

access_token = Table(
    "access_token",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("account_id", _Id, ForeignKey("account.id", ondelete="CASCADE"), nullable=False),
    Column("kind", String(8), nullable=False, comment="personal, or refresh: what docker login keeps"),
    Column("name", Text, nullable=False, comment="for people"),
    Column("secret", String(64), nullable=False, unique=True, comment="SHA-256; the token itself is not kept"),
    Column("scope", Text, nullable=False, comment="JSON list of [node, right]; empty: all that the account may"),
    Column("created_at", BigInteger, nullable=False),
    Column("ends_at", BigInteger, comment="NULL: when it is revoked"),
    Column("used_at", BigInteger, comment="to the minute"),
    Index("access_token_account", "account_id"),
    sqlite_autoincrement=True,
)

access_rule = Table(
    "access_rule",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("node", _name(255), nullable=False, comment="of the tree; empty: its root"),
    Column("right", String(8), nullable=False),
    Column("account_id", _Id, ForeignKey("account.id", ondelete="CASCADE")),
    Column("team_id", _Id, ForeignKey("team.id", ondelete="CASCADE")),
    Column("audience", String(16), comment="users or everybody, where it is for no account and no team"),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
    Index("access_rule_account", "account_id"),
    Index("access_rule_team", "team_id"),
    Index("access_rule_node", "node"),
)

policy = Table(
    "policy",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", BigInteger, nullable=False, comment="another one whenever anybody's rights may have changed"),
    Column("read_only", Text, comment="why nothing may be written now; NULL: all may be"),
)

signing_key = Table(
    "signing_key",
    metadata,
    Column("id", String(36), primary_key=True, comment="the kid of tokens"),
    Column("private", Text, nullable=False, comment="PEM"),
    Column("created_at", BigInteger, nullable=False),
)

audit_event = Table(
    "audit_event",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", Text, nullable=False, comment="name of an account at that time; empty: nobody"),
    Column("credential", Text, nullable=False, comment="what it came with: password, token 12, …"),
    Column("address", Text, nullable=False),
    Column("action", String(32), nullable=False),
    Column("outcome", String(8), nullable=False, comment="done or refused"),
    Column("repository", _name(255), nullable=False),
    Column("target", Text, nullable=False, comment="tag, digest, account, …"),
    Column("detail", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Index("audit_event_at", "at"),
    Index("audit_event_actor", "actor", "at"),
    Index("audit_event_repository", "repository", "at"),
)
