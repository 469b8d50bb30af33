"""Tells somebody else what every settled call used: usage events, as CloudEvents 1.0.

Postings are read in the order of their sequence and handed over in batches; the cursor in the table ``exports`` moves
when a batch is durable where it went. So each event comes at least once, with the same id each time, and none is left
out. Of all processes that share a ledger one does this at a time: the cursor's row is its lease.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import structlog
from sqlalchemy import Connection, insert, select, update

from headrace.backends.errors import LedgerUnavailable
from headrace.server.accounting.clock import Clock
from headrace.server.accounting.event_sinks import NotAccepted, Sink, open_sink
from headrace.server.accounting.event_targets import HttpTarget, Target
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.queries import Page, Receipt, last_sequence, settled_after
from headrace.server.accounting.records import POSTED_COUNTS
from headrace.server.accounting.schema import exports
from headrace.server.config import SettingsError

EVENT_TYPE = "io.headrace.usage.v1"
NAME = "usage_events"
"""Of the cursor."""
LEASE_SECONDS = 30.0
BATCH = 100
POLL_SECONDS = 1.0
FIRST_DELAY_SECONDS = 0.5
MOST_DELAY_SECONDS = 60.0
REFUSED_SECONDS = 300.0
"""Until what was refused is tried again: somebody has to change something first."""
CLOSE_SECONDS = 5.0
"""For what has been settled last when the server stops; the next one hands over the rest."""
_SECOND = 1_000_000_000

logger = structlog.get_logger("headrace.usage_events")


def event_of(receipt: Receipt, *, ledger_id: str, currency: str) -> dict[str, Any]:
    """A settled call as docs/usage-events.md describes it. ``None`` (null) is "not reported" or "none"."""
    assert receipt.settled_at is not None and receipt.usage is not None and receipt.outcome is not None  # noqa: PT018
    usage = asdict(receipt.usage)
    return {
        "specversion": "1.0",
        "id": receipt.id,
        "source": f"/ledgers/{ledger_id}",
        "type": EVENT_TYPE,
        "time": _time(receipt.settled_at),
        "subject": receipt.tenant,
        "datacontenttype": "application/json",
        "data": {
            "sequence": receipt.sequence,
            "state": receipt.state.value,
            "tenant": receipt.tenant,
            "key_id": receipt.key or None,
            "request_id": receipt.request_id,
            "model": receipt.model,
            "backend": receipt.backend,
            "outcome": receipt.outcome.name.lower(),
            "month": receipt.month,
            "usage": {name: usage[name] for name in POSTED_COUNTS},
            "estimated": receipt.usage.estimated,
            "currency": currency,
            "charge_nanos": receipt.charge_nanos,
            "cost_nanos": receipt.cost_nanos,
            "price_id": receipt.price_id,
            "held_at": _time(receipt.held_at),
            "recovered": receipt.recovered,
            "cache_hit": receipt.is_hit,
        },
    }


class UsageEvents:
    """Hands over what is settled, now and again, from ``start`` to ``close``. Trouble holds up nothing but this."""

    def __init__(
        self,
        *,
        target: Target,
        ledger: Ledger,
        clock: Clock,
        token: str | None = None,
        random_source: random.Random | None = None,
        poll_seconds: float = POLL_SECONDS,
        batch: int = BATCH,
    ) -> None:
        """Raises SettingsError for a token that others could read on its way."""
        if token is not None and isinstance(target, HttpTarget) and not target.is_private:
            raise SettingsError("usage_events_token: must not be set where usage_events is not an https URL")
        self.lag = 0
        """Settled calls that are not handed over yet."""
        self._target = target
        self._ledger = ledger
        self._clock = clock
        self._token = token
        self._random = random_source or random.Random()  # noqa: S311  # spreads retries
        self._poll_seconds = poll_seconds
        self._batch = batch
        self._cursor = 0
        self._lease_until = 0
        self._failures = 0
        self._not_before = 0.0
        """Of the loop's clock."""
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, in a task."""
        self._task = asyncio.create_task(self.run())

    async def close(self) -> None:
        """Hands over what there is, if that is quickly done, and ends."""
        self._closing.set()
        if self._task is not None:
            _, late = await asyncio.wait({self._task}, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()
                await asyncio.wait({task})

    async def run(self) -> None:
        """Hands over until ``close``, or until it is cancelled."""
        try:
            async with open_sink(self._target, self._token) as sink:
                while True:
                    seconds = await self._turn(sink)
                    if seconds and self._closing.is_set():
                        break
                    with suppress(TimeoutError):
                        async with asyncio.timeout(seconds):
                            await self._closing.wait()
        finally:
            with suppress(LedgerUnavailable):
                await self._leave()

    async def _turn(self, sink: Sink) -> float:
        """Hands one batch over, if there is one. Returns the seconds until there may be more to do."""
        try:
            if not await self._has_lease():
                return self._poll_seconds
            page, last = await self._ledger.read(self._next)
            self.lag = last - self._cursor
            if page.upto == self._cursor:
                return self._poll_seconds
            waits = self._not_before - asyncio.get_running_loop().time()
            if waits > 0:
                return min(waits, LEASE_SECONDS / 3)
            await self._hand_over(sink, page.receipts)
            await self._move(page.upto)
        except NotAccepted as error:
            return self._put_off(error)
        except LedgerUnavailable as error:
            return error.retry_after
        except Exception:
            logger.exception("usage_events_failed")
            return MOST_DELAY_SECONDS
        return 0.0

    def _next(self, connection: Connection) -> tuple[Page, int]:
        return settled_after(connection, self._cursor, limit=self._batch), last_sequence(connection)

    async def _hand_over(self, sink: Sink, receipts: Sequence[Receipt]) -> None:
        ledger = self._ledger
        if receipts:
            await sink([event_of(one, ledger_id=ledger.id, currency=ledger.currency) for one in receipts])
        self._failures = 0

    def _put_off(self, error: NotAccepted) -> float:
        delay = min(MOST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** min(self._failures, 10))
        delay = max(REFUSED_SECONDS if error.refused else delay * self._random.uniform(0.5, 1), error.retry_after)
        self._failures += 1
        self._not_before = asyncio.get_running_loop().time() + delay
        log = logger.error if error.refused else logger.warning
        log("usage_events_not_accepted", reason=str(error), retry_in=round(delay, 1), waiting=self.lag)
        return min(delay, LEASE_SECONDS / 3)

    # --- the lease -------------------------------------------------------------------------------------------------

    async def _has_lease(self) -> bool:
        """Whether it is this process's turn; puts the end off where it is."""
        now = self._clock()
        if self._lease_until - now > LEASE_SECONDS * _SECOND * 2 / 3:
            return True
        if self._lease_until <= now:
            row, last = await self._ledger.read(lambda connection: (_row(connection), last_sequence(connection)))
            if row is not None and self._is_others(row, now):
                self._cursor = row["sequence"]
                self.lag = last - self._cursor
                return False
        return await self._ledger.write(self._take)

    def _take(self, connection: Connection) -> bool:
        now = self._clock()
        row = _row(connection)
        if row is not None and self._is_others(row, now):
            self._lease_until = 0
            return False
        until = now + round(LEASE_SECONDS * _SECOND)
        lease = {"owner": self._ledger.owner, "lease_until": until}
        if row is None:
            connection.execute(insert(exports).values(name=NAME, sequence=0, **lease))
        else:
            connection.execute(update(exports).where(exports.c.name == NAME).values(**lease))
        self._cursor = 0 if row is None else row["sequence"]
        self._lease_until = until
        return True

    def _is_others(self, row: Mapping[Any, Any], now: int) -> bool:
        return bool(row["owner"] != self._ledger.owner and row["lease_until"] > now)

    async def _move(self, upto: int) -> None:
        """Moves the cursor, unless another process has taken over: it has begun where this one had."""
        until = self._clock() + round(LEASE_SECONDS * _SECOND)
        mine = (exports.c.name == NAME) & (exports.c.owner == self._ledger.owner)

        def move(connection: Connection) -> bool:
            moved = connection.execute(update(exports).where(mine).values(sequence=upto, lease_until=until))
            return moved.rowcount == 1

        if await self._ledger.write(move):
            self.lag -= upto - self._cursor
            self._cursor, self._lease_until = upto, until
        else:
            self._lease_until = 0

    async def _leave(self) -> None:
        """Lets another process take over at once."""
        mine = (exports.c.name == NAME) & (exports.c.owner == self._ledger.owner)

        def leave(connection: Connection) -> None:
            connection.execute(update(exports).where(mine).values(lease_until=0))

        await self._ledger.write(leave)


def _row(connection: Connection) -> Mapping[Any, Any] | None:
    return connection.execute(select(exports).where(exports.c.name == NAME)).mappings().one_or_none()


def _time(at: int) -> str:
    seconds, nanos = divmod(at, _SECOND)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanos // 1000:06}Z"
