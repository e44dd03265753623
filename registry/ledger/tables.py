"""The ledger's tables, for SQLite and PostgreSQL. `migrations/` brings an older ledger here."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()
_BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite autoincrements INTEGER keys only

meta = Table("meta", metadata, Column("key", String(192), primary_key=True), Column("value", Text, nullable=False))

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("recipe", JSON, nullable=False),
    Column("recipe_digest", String(64), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("head", BigInteger, nullable=False),
    Column("next_index", BigInteger, nullable=False),
    Column("next_segment", Integer, nullable=False),
    Column("next_version", Integer, nullable=False),
    Column("release", Integer, nullable=False),
    Column("tip", Integer, nullable=False),
    Column("held", Integer),
    Column("held_tip", Integer),
    Index("adapters_heads", "name", "head"),
)

facts = Table(
    "facts",
    metadata,
    Column("id", _BigId, primary_key=True, autoincrement=True),
    Column("adapter", String(63), ForeignKey("adapters.name"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("body", JSON, nullable=False),
    Column("at", String(32), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Column("chain", String(64), nullable=False),
    UniqueConstraint("adapter", "seq"),
)

segments = Table(
    "segments",
    metadata,
    Column("adapter", String(63), ForeignKey("adapters.name"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("first", BigInteger, nullable=False),
    Column("count", Integer, nullable=False),
    Column("trigger", String(16), nullable=False),
    Column("payload", Text, nullable=False),
    Column("payload_sha", String(64), nullable=False),
    Column("keyring", String(64), nullable=False),
    Column("root", String(64), nullable=False),
    Column("sealed_at", String(32), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("version", Integer),
    Column("cause", String(16), nullable=False),
    Column("note", Text, nullable=False),
    Column("hand", String(8), nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("manifest", LargeBinary, nullable=False),
    Index("segments_by_outcome", "outcome", "adapter", "number"),
)

versions = Table(
    "versions",
    metadata,
    Column("adapter", String(63), ForeignKey("adapters.name"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("state", String(64), nullable=False),
    Column("parent", Integer, nullable=False),
    Column("segment", Integer),
    Column("epoch", Integer, nullable=False),
    Column("recipe_digest", String(64), nullable=False),
    Column("saw", JSON, nullable=False),
    Column("fingerprint", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("made_at", String(32), nullable=False),
    Column("revoked", Boolean, nullable=False),
    Column("purged", Boolean, nullable=False),
    Column("parts", JSON, nullable=False, server_default="[]"),
    Column("withheld", Text, nullable=False, server_default=""),
)

# Which segments hold live entries about a subject, or written by a version: what a forget looks up.
mentions = Table(
    "mentions",
    metadata,
    Column("mention", String(64), primary_key=True),  # first: what a forget looks up by
    Column("adapter", String(63), primary_key=True),
    Column("segment", Integer, primary_key=True),
    sqlite_with_rowid=False,  # there is a row for each entry's subject: one tree to keep, not three
)

# Per adapter and partition, the offset before which every event has been decided.
consumed = Table(
    "consumed",
    metadata,
    Column("adapter", String(63), primary_key=True),
    Column("incarnation", String(64), primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("next_offset", BigInteger, nullable=False),
)

# Per bucket and partition, the offset from which a restarted dataflow must read again.
positions = Table(
    "positions",
    metadata,
    Column("incarnation", String(64), primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("bucket", Integer, primary_key=True),
    Column("next_offset", BigInteger, nullable=False),
)

suppressions = Table(
    "suppressions",
    metadata,
    Column("adapter", String(63), primary_key=True),  # '*' is every adapter, those to come included
    Column("subject", String(64), primary_key=True),
    Column("since", String(32), nullable=False),
)

fences = Table(
    "fences",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", String(32), nullable=False),
    Column("digests", JSON, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("holder", String(128), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("ttl", Float, nullable=False),
    Column("acked", Integer, nullable=False),
    Column("renewed_at", String(32), nullable=False),
)

# Which trainer works on an adapter: a lease on the ledger's clock, with a token that only grows.
claims = Table(
    "claims",
    metadata,
    Column("adapter", String(63), ForeignKey("adapters.name"), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("expires", Float, nullable=False),
)

forgets = Table(
    "forgets",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("subject", String(64), nullable=False),
    Column("everywhere", Boolean, nullable=False),
    Column("adapters", JSON, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("stage", String(16), nullable=False, index=True),
    Column("at", String(32), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Column("body", JSON, nullable=False),
)

# How much of an adapter's journal MLflow shows.
projections = Table(
    "projections",
    metadata,
    Column("adapter", String(63), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("body", JSON, nullable=False),
)
