"""Postings of hits: answers that were stored, and given again. A hit has no hold; what it costs is known at once.

One that costs something is posted before anything of it is given, in the transaction that finds that the budget covers
it. One that costs nothing is posted soon, with others, and nobody waits for it; a kill within that moment loses it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import structlog
from sqlalchemy import Connection

from headrace.backends.errors import LedgerUnavailable
from headrace.backends.usage import AttemptOutcome, Cost
from headrace.server.accounting.admission import check
from headrace.server.accounting.clock import Clock, month_of
from headrace.server.accounting.records import Account, Allowance
from headrace.server.accounting.store import (
    Posting,
    add_postings,
    fitting,
    places_of,
    read_balances,
    settled_among,
    write_balances,
)

T = TypeVar("T")

GATHER_SECONDS = 0.1
"""For which free hits wait for others to share a transaction with."""
_RETRY_SECONDS = 0.5
_AT_ONCE = 512

logger = structlog.get_logger("headrace.ledger")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A stored answer that is given."""

    tenant: str
    key: str
    """The id of the key that it was sent with; empty: none."""
    model: str
    backend: str
    request_id: str
    cost: Cost | None
    allowances: tuple[tuple[Account, Allowance], ...] = ()
    """Limits that it must keep, if it costs something."""

    @property
    def nanos(self) -> int:
        """What it costs."""
        return self.cost.charge_nanos if self.cost is not None else 0

    @property
    def tokens(self) -> int:
        """None are used."""
        return 0


class _Writes(Protocol):
    async def __call__(self, work: Callable[[Connection], T]) -> T: ...


class HitPostings:
    """Those of one ledger, for its event loop."""

    def __init__(self, write: _Writes, *, clock: Clock, currency: str) -> None:
        """``write`` is the ledger's."""
        self._write = write
        self._clock = clock
        self._currency = currency
        self._waiting: list[Posting] = []
        self._flushing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def post(self, hit: Hit) -> None:
        """Posts a hit; at once, if it costs something. Raises BudgetSpent, BudgetHeld or LedgerUnavailable."""
        posting = posting_of(hit, now=self._clock())
        if hit.nanos:
            await self._write(lambda connection: self._charge(connection, hit, posting))
            return
        self._waiting.append(posting)
        if self._task is None:
            self._task = asyncio.create_task(self._flush_soon())

    async def flush(self) -> None:
        """Returns when all hits until now are durable. Raises LedgerUnavailable."""
        async with self._flushing:
            while some := self._waiting[:_AT_ONCE]:
                try:
                    await self._write(partial(add_free, postings=some))
                except LedgerUnavailable:
                    raise
                except Exception:
                    logger.exception("hits_not_posted", count=len(some))
                del self._waiting[: len(some)]

    async def close(self, patience: float) -> None:
        """Posts what waits, unless the database is away for longer than ``patience`` seconds."""
        task = self._task
        if task is not None:
            await asyncio.wait({task}, timeout=patience)
            task.cancel()
            await asyncio.wait({task})
        if self._waiting:
            logger.error("hits_not_posted", count=len(self._waiting), hint="they cost nothing")

    async def _flush_soon(self) -> None:
        try:
            await asyncio.sleep(GATHER_SECONDS)
            while self._waiting:
                try:
                    await self.flush()
                except LedgerUnavailable:
                    await asyncio.sleep(_RETRY_SECONDS)
        finally:
            self._task = None

    def _charge(self, connection: Connection, hit: Hit, posting: Posting) -> None:
        places = places_of(posting)
        limited = [(account.tenant, account.key, posting.month) for account, _ in hit.allowances]
        balances = read_balances(connection, {*places, *limited})
        check(
            hit.allowances,
            [balances[place] for place in limited],
            hit,
            month=posting.month,
            currency=self._currency,
        )
        for place in places:
            balances[place].posted_nanos += posting.charge_nanos
        add_postings(connection, [posting])
        write_balances(connection, {place: balances[place] for place in places})


def posting_of(hit: Hit, *, now: int) -> Posting:
    """What a hit becomes: no tokens were used, and nothing was held."""
    return Posting(
        id=os.urandom(16).hex(),
        tenant=hit.tenant,
        key=hit.key,
        month=month_of(now),
        model=fitting(hit.model, 256),
        backend=fitting(hit.backend, 128),
        request_id=fitting(hit.request_id, 128),
        state="posted",
        outcome=AttemptOutcome.COMPLETED.name.lower(),
        input_tokens=None,
        cache_read_input_tokens=None,
        cache_write_input_tokens=None,
        output_tokens=None,
        reasoning_output_tokens=None,
        sent_output_tokens=None,
        price_id=fitting(hit.cost.price_id, 256) if hit.cost is not None else None,
        charge_nanos=hit.nanos,
        cost_nanos=None,
        estimated=hit.cost is not None and hit.cost.estimated,
        recovered=False,
        held_nanos=0,
        held_tokens=0,
        held_at=now,
        settled_at=now,
    )


def add_free(connection: Connection, postings: Sequence[Posting]) -> None:
    """Adds postings that cost nothing, once: a commit that seems to have failed may not have."""
    there: Collection[str] = settled_among(connection, [one.id for one in postings])
    if new := [one for one in postings if one.id not in there]:
        add_postings(connection, new)
