"""Reads the ledger: functions over a connection, for ``Ledger.read``. Each is bounded, however long the ledger is."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, func, literal, or_, select

from headrace.backends.usage import AttemptOutcome, Usage
from headrace.server.accounting.admission import Balance
from headrace.server.accounting.records import Account
from headrace.server.accounting.schema import balances, daily_usage, holds, postings
from headrace.server.accounting.store import DAILY_SUMS

MAX_RECEIPTS = 100
"""Of one request id."""
PAGE = 200
"""Settled calls that are read at a time."""
SPAN = 50_000
"""Sequences that a page looks through at most: a tenant's own calls may be few among others'."""


class Dimension(enum.Enum):
    """What usage can be told apart by; the names are those of the proto's UsageDimension."""

    TENANT = "tenant"
    KEY = "key"
    MODEL = "model"
    DAY = "day"


class State(enum.Enum):
    """How far a call has come; the values of settled ones are those of ``postings.state``."""

    HELD = "held"
    POSTED = "posted"
    VOIDED = "voided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over settled calls, as the proto's UsageTotals has them."""

    requests: int = 0
    cancelled_requests: int = 0
    failed_requests: int = 0
    cached_requests: int = 0
    input_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_write_input_tokens: int = 0
    output_tokens: int = 0
    reasoning_output_tokens: int = 0
    charge_nanos: int = 0
    cost_nanos: int | None = None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one group used; ``group`` has a name for each dimension that was asked for."""

    group: Mapping[Dimension, str]
    totals: Totals


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A call in the ledger. What only a settled one has is ``None`` while it runs."""

    id: str
    sequence: int | None = None
    state: State
    tenant: str
    key: str
    """Empty: none."""
    month: str
    model: str
    backend: str | None = None
    request_id: str
    outcome: AttemptOutcome | None = None
    usage: Usage | None = None
    price_id: str | None = None
    charge_nanos: int = 0
    cost_nanos: int | None = None
    held_nanos: int
    held_tokens: int
    held_at: int
    settled_at: int | None = None
    recovered: bool = False

    @property
    def is_hit(self) -> bool:
        """Whether a stored answer was given: nothing else is posted that used nothing."""
        usage = self.usage
        return self.state is State.POSTED and usage is not None and not (usage.input_tokens or usage.output_tokens)


@dataclass(frozen=True, slots=True)
class Page:
    """Settled calls in the order of their sequence, and how far was looked: none is missing up to ``upto``."""

    receipts: list[Receipt]
    upto: int
    more: bool
    """Whether there is anything behind ``upto``, perhaps of others."""


COUNTS = tuple(name for name in DAILY_SUMS if name != "cost_nanos")
"""Of ``Totals``."""


def usage(
    connection: Connection,
    *,
    first_day: str,
    last_day: str,
    group_by: Sequence[Dimension] = (),
    tenant: str | None = None,
    key: str | None = None,
    model: str | None = None,
) -> list[UsageRow]:
    """What was used on the days from first to last, a row for each group in which anything was, in order."""
    columns = [daily_usage.c[one.value] for one in group_by]
    sums = [func.sum(daily_usage.c[name]).label(name) for name in (*COUNTS, "cost_nanos")]
    query = select(*columns, *sums).where(daily_usage.c.day.between(first_day, last_day))
    for column, wanted in ((daily_usage.c.tenant, tenant), (daily_usage.c.key, key), (daily_usage.c.model, model)):
        if wanted is not None:
            query = query.where(column == wanted)
    query = query.group_by(*columns) if columns else query.having(func.count() > 0)
    rows = connection.execute(query).mappings().all()
    found = [UsageRow({one: row[one.value] for one in group_by}, _totals(row)) for row in rows]
    # Sorted here: databases order text by rules of their own.
    return sorted(found, key=lambda row: tuple(row.group.values()))


def add(totals: Collection[Totals]) -> Totals:
    """All together. The cost is that of those of which it is known."""
    costs = [one.cost_nanos for one in totals if one.cost_nanos is not None]
    sums = {name: sum(getattr(one, name) for one in totals) for name in COUNTS}
    return Totals(**sums, cost_nanos=sum(costs) if costs else None)


def receipts(connection: Connection, tenant: str, request_id: str) -> list[Receipt]:
    """The calls of a tenant that had this request id, running ones included, the newest first."""
    running = connection.execute(
        select(holds)
        .where(holds.c.tenant == tenant, holds.c.request_id == request_id)
        .order_by(holds.c.held_at.desc())
        .limit(MAX_RECEIPTS)
    ).mappings()
    settled = connection.execute(
        select(postings)
        .where(postings.c.tenant == tenant, postings.c.request_id == request_id)
        .order_by(postings.c.held_at.desc())
        .limit(MAX_RECEIPTS)
    ).mappings()
    found = [*map(_held, running), *map(_settled, settled)]
    return sorted(found, key=lambda receipt: receipt.held_at, reverse=True)[:MAX_RECEIPTS]


def last_sequence(connection: Connection) -> int:
    """Of the newest settled call; 0: there is none."""
    return connection.execute(select(func.max(postings.c.sequence))).scalar() or 0


def settled_after(connection: Connection, after: int, *, tenant: str | None = None, limit: int = PAGE) -> Page:
    """The next settled calls after the sequence ``after``, ``limit`` at most; of one tenant, or of all."""
    last = last_sequence(connection)
    end = min(after + SPAN, last)
    query = select(postings).where(postings.c.sequence > after, postings.c.sequence <= end)
    if tenant is not None:
        # The sum keeps the database off the index by tenant, which knows no order.
        query = query.where(postings.c.tenant + literal("") == tenant)
    rows = connection.execute(query.order_by(postings.c.sequence).limit(limit)).mappings()
    found = list(map(_settled, rows))
    if len(found) == limit and found[-1].sequence is not None:
        end = found[-1].sequence
    return Page(found, max(after, end), more=end < last)


def balances_of(connection: Connection, accounts: Collection[Account], month: str) -> dict[Account, Balance]:
    """What each account used and holds in a month such as "2026-11"."""
    if not accounts:
        return {}
    # Not an IN over pairs, which SQLite does not look up by the index.
    keys = [
        and_(balances.c.tenant == one.tenant, balances.c.key == one.key, balances.c.month == month) for one in accounts
    ]
    rows = connection.execute(select(balances).where(or_(*keys))).mappings()
    found = {
        Account(row["tenant"], row["key"]): Balance(
            posted_nanos=row["posted_nanos"],
            posted_tokens=row["posted_tokens"],
            held_nanos=row["held_nanos"],
            held_tokens=row["held_tokens"],
        )
        for row in rows
    }
    return {account: found.get(account, Balance()) for account in accounts}


def _totals(row: Mapping[Any, Any]) -> Totals:
    # PostgreSQL sums up in NUMERIC.
    cost = row["cost_nanos"]
    return Totals(**{name: int(row[name]) for name in COUNTS}, cost_nanos=None if cost is None else int(cost))


def _held(row: Mapping[Any, Any]) -> Receipt:
    return Receipt(
        id=row["id"],
        state=State.HELD,
        tenant=row["tenant"],
        key=row["key"],
        month=row["month"],
        model=row["model"],
        request_id=row["request_id"],
        held_nanos=row["held_nanos"],
        held_tokens=row["held_tokens"],
        held_at=row["held_at"],
    )


def _settled(row: Mapping[Any, Any]) -> Receipt:
    return Receipt(
        id=row["id"],
        sequence=row["sequence"],
        state=State(row["state"]),
        tenant=row["tenant"],
        key=row["key"],
        month=row["month"],
        model=row["model"],
        backend=row["backend"],
        request_id=row["request_id"],
        outcome=AttemptOutcome[row["outcome"].upper()],
        usage=Usage(
            input_tokens=row["input_tokens"],
            cache_read_input_tokens=row["cache_read_input_tokens"],
            cache_write_input_tokens=row["cache_write_input_tokens"],
            output_tokens=row["output_tokens"],
            reasoning_output_tokens=row["reasoning_output_tokens"],
            sent_output_tokens=row["sent_output_tokens"],
            estimated=row["estimated"],
        ),
        price_id=row["price_id"],
        charge_nanos=row["charge_nanos"],
        cost_nanos=row["cost_nanos"],
        held_nanos=row["held_nanos"],
        held_tokens=row["held_tokens"],
        held_at=row["held_at"],
        settled_at=row["settled_at"],
        recovered=row["recovered"],
    )
