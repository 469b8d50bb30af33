"""The tables of the ledger's database, SQLite or PostgreSQL.

Times are nanoseconds since the epoch (UTC). Money is in billionths of the currency's unit. Whoever writes holds the
ledger's one write lock (``store.py``), so rows change in one order, that of ``postings.sequence``.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    text,
)

metadata = MetaData()

_NAME = String(128)
_COUNT = BigInteger
_NANOS = BigInteger
_TIME = BigInteger
_SEQUENCE = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts up only what it calls INTEGER; it has 64 bits there too."""

facts = Table(
    "facts",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("value", String(256), nullable=False),
)
"""What holds for the whole ledger: its ``id``, its ``currency``, and ``accounts_version``, which changes whenever
tenants or keys do."""

tenants = Table(
    "tenants",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("plan", _NAME),
    Column("created_at", _TIME, nullable=False),
    Column("disabled_at", _TIME),
)
"""Who can have keys. Others, such as those of a plugin's authenticator, need no row."""

keys = Table(
    "keys",
    metadata,
    Column("id", _NAME, primary_key=True),
    Column("tenant", _NAME, ForeignKey("tenants.name"), nullable=False, index=True),
    Column("label", String(256), nullable=False),
    Column("secret_sha256", LargeBinary(32)),
    Column("certificate_name", String(512)),
    Column("operator", Boolean, nullable=False),
    Column("created_at", _TIME, nullable=False),
    Column("expires_at", _TIME),
    Column("revoked_at", _TIME),
    Column("entitlements", JSON, nullable=False),
    CheckConstraint("(secret_sha256 IS NULL) <> (certificate_name IS NULL)", name="one_credential"),
    Index(
        "keys_by_certificate",
        "certificate_name",
        unique=True,
        sqlite_where=text("revoked_at IS NULL"),
        postgresql_where=text("revoked_at IS NULL"),
    ),
)
"""A secret, of which only the hash is here, or the name in a client certificate. ``entitlements``: the fields of
``plans.Limits`` that are set."""

balances = Table(
    "balances",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("key", _NAME, primary_key=True),
    Column("month", String(7), primary_key=True),
    Column("posted_nanos", _NANOS, nullable=False),
    Column("posted_tokens", _COUNT, nullable=False),
    Column("held_nanos", _NANOS, nullable=False),
    Column("held_tokens", _COUNT, nullable=False),
    CheckConstraint("held_nanos >= 0 AND held_tokens >= 0", name="held_not_negative"),
)
"""Of each tenant (``key`` is empty) and of each key, by month ("2026-11")."""

holds = Table(
    "holds",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", _NAME, nullable=False),
    Column("key", _NAME, nullable=False),
    Column("month", String(7), nullable=False),
    Column("model", String(256), nullable=False),
    Column("request_id", _NAME, nullable=False),
    Column("held_nanos", _NANOS, nullable=False),
    Column("held_tokens", _COUNT, nullable=False),
    Column("held_at", _TIME, nullable=False),
    Column("owner", String(32), nullable=False),
    Column("expires_at", _TIME, nullable=False, index=True),
    Index("holds_by_request", "tenant", "request_id"),
    Index("holds_by_owner", "owner"),
)
"""Calls that run. The row goes in the transaction that writes the posting. ``owner`` is the process that runs it."""

postings = Table(
    "postings",
    metadata,
    Column("sequence", _SEQUENCE, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False),
    Column("tenant", _NAME, nullable=False),
    Column("key", _NAME, nullable=False),
    Column("month", String(7), nullable=False),
    Column("model", String(256), nullable=False),
    Column("backend", _NAME),
    Column("request_id", _NAME, nullable=False),
    Column("state", String(8), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("input_tokens", _COUNT),
    Column("cache_read_input_tokens", _COUNT),
    Column("cache_write_input_tokens", _COUNT),
    Column("output_tokens", _COUNT),
    Column("reasoning_output_tokens", _COUNT),
    Column("sent_output_tokens", _COUNT),
    Column("price_id", String(256)),
    Column("charge_nanos", _NANOS, nullable=False),
    Column("cost_nanos", _NANOS),
    Column("estimated", Boolean, nullable=False),
    Column("recovered", Boolean, nullable=False),
    Column("held_nanos", _NANOS, nullable=False),
    Column("held_tokens", _COUNT, nullable=False),
    Column("held_at", _TIME, nullable=False),
    Column("settled_at", _TIME, nullable=False),
    UniqueConstraint("id", name="settled_once"),
    Index("postings_by_request", "tenant", "request_id"),
    sqlite_autoincrement=True,
)
"""Settled calls; only ever added to. ``id`` is that of the hold."""

daily_usage = Table(
    "daily_usage",
    metadata,
    Column("day", String(10), primary_key=True),
    Column("tenant", _NAME, primary_key=True),
    Column("key", _NAME, primary_key=True),
    Column("model", String(256), primary_key=True),
    Column("requests", _COUNT, nullable=False),
    Column("cancelled_requests", _COUNT, nullable=False),
    Column("failed_requests", _COUNT, nullable=False),
    Column("cached_requests", _COUNT, nullable=False),
    Column("input_tokens", _COUNT, nullable=False),
    Column("cache_read_input_tokens", _COUNT, nullable=False),
    Column("cache_write_input_tokens", _COUNT, nullable=False),
    Column("output_tokens", _COUNT, nullable=False),
    Column("reasoning_output_tokens", _COUNT, nullable=False),
    Column("charge_nanos", _NANOS, nullable=False),
    Column("cost_nanos", _NANOS),
)
"""Sums over postings, kept up in the same transactions."""

answers = Table(
    "answers",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("key", _NAME, primary_key=True),
    Column("digest", LargeBinary(32), nullable=False),
    Column("owner", String(32), nullable=False),
    Column("done_at", _TIME),
    Column("expires_at", _TIME, nullable=False, index=True),
    Column("bytes_before", _COUNT),
    Column("events", LargeBinary),
    Index(
        "answers_kept",
        "bytes_before",
        sqlite_where=text("events IS NOT NULL"),
        postgresql_where=text("events IS NOT NULL"),
    ),
)
"""Calls that were sent with an idempotency key (``key``), and what they answered (``answer_store.py``). ``owner`` is
the process that runs, or ran, the call. From ``expires_at`` on the row counts for nothing: while the call runs that is
put off again and again; afterwards it says how long the key is remembered. ``events`` go sooner, oldest first.
``bytes_before`` counts the bytes of the answers that were stored before this one."""

exports = Table(
    "exports",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("sequence", _COUNT, nullable=False),
    Column("owner", String(32), nullable=False),
    Column("lease_until", _TIME, nullable=False),
)
"""How far usage events have been handed over, and who does it now."""
