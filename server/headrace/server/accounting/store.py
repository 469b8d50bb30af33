"""The ledger's rows, and the statements that write them. Callers hold the write lock.

The statements are text that SQLite and PostgreSQL read alike, each for many rows at once: Python's driver of SQLite
lets go of the interpreter's lock at each step of a statement, and beside a busy event loop getting it back can take
longer than all the rest. Only names of this module and placeholders go into the text, so S608 does not apply.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection

from headrace.backends.usage import AttemptOutcome, Cost, Usage
from headrace.server.accounting.admission import Balance
from headrace.server.accounting.clock import day_of

_MOST_ROWS = 64
"""Of one statement. Each count of rows is a statement of its own, and is prepared once."""
MOST = 2**53
"""Of a count, and of nano-units that a provider bills for one call: their sums stay within 64 bits."""


class OpenHold(NamedTuple):
    """A row of ``holds``, without its owner and its expiry."""

    id: str
    tenant: str
    key: str
    month: str
    model: str
    request_id: str
    held_nanos: int
    held_tokens: int
    held_at: int


class Posting(NamedTuple):
    """A row of ``postings``, without its sequence."""

    id: str
    tenant: str
    key: str
    month: str
    model: str
    backend: str | None
    request_id: str
    state: str
    outcome: str
    input_tokens: int | None
    cache_read_input_tokens: int | None
    cache_write_input_tokens: int | None
    output_tokens: int | None
    reasoning_output_tokens: int | None
    sent_output_tokens: int | None
    price_id: str | None
    charge_nanos: int
    cost_nanos: int | None
    estimated: bool
    recovered: bool
    held_nanos: int
    held_tokens: int
    held_at: int
    settled_at: int

    @property
    def posted_tokens(self) -> int:
        """What counts against a budget: never more than was held."""
        return min((self.input_tokens or 0) + (self.output_tokens or 0), self.held_tokens)


def posting_of(
    hold: OpenHold,
    *,
    usage: Usage,
    cost: Cost | None,
    outcome: AttemptOutcome,
    backend: str | None,
    settled_at: int,
    model: str | None = None,
    recovered: bool = False,
) -> Posting:
    """What a hold becomes; ``model`` if it went elsewhere in the end. The tenant pays at most what was held; what a
    provider bills stands beside it. Never fails: counts are a backend's own, and a settlement that cannot be written
    would leave its hold behind.
    """
    used = bool(usage.input_tokens or usage.output_tokens)
    charge = cost.charge_nanos if cost is not None and used else 0
    return Posting(
        id=hold.id,
        tenant=hold.tenant,
        key=hold.key,
        month=hold.month,
        model=hold.model if model is None else fitting(model, 256),
        backend=fitting(backend, 128) if backend is not None else None,
        request_id=hold.request_id,
        state="posted" if used else "voided",
        outcome=outcome.name.lower(),
        input_tokens=countable(usage.input_tokens),
        cache_read_input_tokens=countable(usage.cache_read_input_tokens),
        cache_write_input_tokens=countable(usage.cache_write_input_tokens),
        output_tokens=countable(usage.output_tokens),
        reasoning_output_tokens=countable(usage.reasoning_output_tokens),
        sent_output_tokens=countable(usage.sent_output_tokens),
        price_id=fitting(cost.price_id, 256) if cost is not None else None,
        charge_nanos=max(min(charge, hold.held_nanos), 0),
        cost_nanos=countable(cost.cost_nanos) if cost is not None else None,
        estimated=usage.estimated or (cost is not None and cost.estimated),
        recovered=recovered,
        held_nanos=hold.held_nanos,
        held_tokens=hold.held_tokens,
        held_at=hold.held_at,
        settled_at=settled_at,
    )


def voided(hold: OpenHold, *, settled_at: int, recovered: bool = False) -> Posting:
    """What a hold becomes of which nothing was used, as far as anybody knows."""
    return posting_of(
        hold,
        usage=Usage(),
        cost=None,
        outcome=AttemptOutcome.FAILED,
        backend=None,
        settled_at=settled_at,
        recovered=recovered,
    )


def fitting(text: str, most: int) -> str:
    """A label as a column takes it: PostgreSQL refuses what is too long, or has a NUL, and no database takes half of a
    surrogate pair.
    """
    return text.encode(errors="replace").decode().replace("\0", "�")[:most]


def countable(count: int | None) -> int | None:
    """A count as a column takes it, and its sums."""
    return None if count is None else min(max(int(count), 0), MOST)


Place = tuple[str, str, str]
"""Of a balance: tenant, key, month."""


def places_of(row: OpenHold | Posting) -> tuple[Place, ...]:
    """The balances that a hold counts in: its tenant's, and its key's if it has one."""
    whole = (row.tenant, "", row.month)
    return (whole, (row.tenant, row.key, row.month)) if row.key else (whole,)


class HoldsGone(Exception):
    """Some of the holds to be settled are not there: they have expired, or their settlement was written before."""


def read_balances(connection: Connection, places: Collection[Place]) -> dict[Place, Balance]:
    """Those balances; one that has no row yet is empty."""
    balances = {place: Balance() for place in places}
    for cursor in _run(connection, _READ_BALANCES, list(places)):
        for tenant, key, month, *sums in cursor.fetchall():
            balances[tenant, key, month] = Balance(*sums)
    return balances


def write_balances(connection: Connection, balances: Mapping[Place, Balance]) -> None:
    rows = [
        (*place, one.posted_nanos, one.posted_tokens, one.held_nanos, one.held_tokens)
        for place, one in balances.items()
    ]
    _run(connection, _WRITE_BALANCES, rows)


def insert_holds(connection: Connection, rows: Sequence[OpenHold], *, owner: str, expires_at: int) -> None:
    _run(connection, _INSERT_HOLDS, [(*row, owner, expires_at) for row in rows])


def post(connection: Connection, postings: Sequence[Posting]) -> None:
    """Turns holds into postings, and counts these in ``daily_usage``; balances are the caller's. Raises HoldsGone,
    and then the transaction must be undone.
    """
    cursors = _run(connection, _DELETE_HOLDS, [(posting.id,) for posting in postings])
    if sum(cursor.rowcount for cursor in cursors) < len(postings):
        raise HoldsGone
    add_postings(connection, postings)


def add_postings(connection: Connection, postings: Sequence[Posting]) -> None:
    """Adds postings, and counts them in ``daily_usage``; holds and balances are the caller's."""
    _run(connection, _INSERT_POSTINGS, postings)
    _run(connection, _COUNT_DAYS, [(*day, *row) for day, row in daily_sums(postings).items()])


def held_among(connection: Connection, ids: Iterable[str]) -> set[str]:
    """Those of the holds that are open."""
    cursors = _run(connection, _READ_HOLDS, [(one,) for one in ids])
    return {row[0] for cursor in cursors for row in cursor.fetchall()}


def settled_among(connection: Connection, ids: Iterable[str]) -> dict[str, tuple[str, int]]:
    """State and time of those that are settled."""
    cursors = _run(connection, _READ_POSTINGS, [(one,) for one in ids])
    return {row[0]: (row[1], row[2]) for cursor in cursors for row in cursor.fetchall()}


Day = tuple[str, str, str, str]
"""Of a row of ``daily_usage``: day, tenant, key, model."""
DAILY_SUMS = (
    "requests",
    "cancelled_requests",
    "failed_requests",
    "cached_requests",
    "input_tokens",
    "cache_read_input_tokens",
    "cache_write_input_tokens",
    "output_tokens",
    "reasoning_output_tokens",
    "charge_nanos",
    "cost_nanos",
)


def daily_sums(postings: Iterable[Posting]) -> dict[Day, list[int | None]]:
    """What ``daily_usage`` counts, by its rows, in the order of ``DAILY_SUMS``."""
    sums: dict[Day, list[int | None]] = {}
    for one in postings:
        day = (day_of(one.settled_at), one.tenant, one.key, one.model)
        counts = (
            1,
            one.outcome in ("cancelled", "expired"),
            one.outcome == "failed",
            bool(one.cache_read_input_tokens),
            one.input_tokens or 0,
            one.cache_read_input_tokens or 0,
            one.cache_write_input_tokens or 0,
            one.output_tokens or 0,
            one.reasoning_output_tokens or 0,
            one.charge_nanos,
        )
        row = sums.get(day)
        if row is None:
            sums[day] = [*map(int, counts), one.cost_nanos]
            continue
        for place, count in enumerate(counts):
            row[place] = (row[place] or 0) + count
        if one.cost_nanos is not None:
            row[-1] = (row[-1] or 0) + one.cost_nanos
    return sums


# --- statements ------------------------------------------------------------------------------------------------------


def _names(columns: Sequence[str]) -> str:
    """``key`` is a word of SQL's."""
    return ", ".join(f'"{name}"' for name in columns)


def _inserting(table: str, columns: Sequence[str], tail: str = "") -> str:
    return f"INSERT INTO {table} ({_names(columns)}) VALUES {{rows}}{tail}"  # noqa: S608


_BALANCE = ("posted_nanos", "posted_tokens", "held_nanos", "held_tokens")
_READ_BALANCES = (
    f'SELECT tenant, "key", month, {_names(_BALANCE)} FROM balances '  # noqa: S608
    'WHERE (tenant, "key", month) IN (VALUES {rows})'
)
_WRITE_BALANCES = _inserting(
    "balances",
    ("tenant", "key", "month", *_BALANCE),
    ' ON CONFLICT (tenant, "key", month) DO UPDATE SET ' + ", ".join(f"{name} = excluded.{name}" for name in _BALANCE),
)
_INSERT_HOLDS = _inserting("holds", (*OpenHold._fields, "owner", "expires_at"))
_DELETE_HOLDS = "DELETE FROM holds WHERE id IN ({rows})"
_READ_HOLDS = "SELECT id FROM holds WHERE id IN ({rows})"
_INSERT_POSTINGS = _inserting("postings", Posting._fields)
_READ_POSTINGS = "SELECT id, state, settled_at FROM postings WHERE id IN ({rows})"
_COUNT_DAYS = _inserting(
    "daily_usage",
    ("day", "tenant", "key", "model", *DAILY_SUMS),
    ' ON CONFLICT (day, tenant, "key", model) DO UPDATE SET '
    + ", ".join(f"{name} = daily_usage.{name} + excluded.{name}" for name in DAILY_SUMS if name != "cost_nanos")
    # Unknown and unknown is unknown; unknown and known is what is known.
    + ", cost_nanos = coalesce("
    "daily_usage.cost_nanos + excluded.cost_nanos, daily_usage.cost_nanos, excluded.cost_nanos)",
)


def _run(connection: Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Cursors of the driver's, one for each ``_MOST_ROWS``: what SQLAlchemy does for a statement takes longer than
    most of these. It raises what the driver raises.
    """
    mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
    cursors = []
    for first in range(0, len(rows), _MOST_ROWS):
        some = rows[first : first + _MOST_ROWS]
        cursor = connection.connection.cursor()
        cursor.execute(_text(statement, mark, len(some[0]), len(some)), tuple(itertools.chain.from_iterable(some)))
        cursors.append(cursor)
    return cursors


@functools.cache
def _text(statement: str, mark: str, num_columns: int, num_rows: int) -> str:
    """With placeholders for so many rows."""
    row = f"({', '.join([mark] * num_columns)})"
    return statement.replace("{rows}", ", ".join([row] * num_rows))
