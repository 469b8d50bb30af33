"""The ledger: holds and settlements, in groups, off the event loop.

One thread writes. It takes whatever waits, applies it in one transaction, and answers when that is durable: under load
many calls share one fsync. A hold is admitted if ``posted + held + worst case <= limit`` for each of its accounts; that
is decided inside the transaction, under the database's one write lock, so processes that share a database share
budgets.

A settlement is never lost: it waits for a database that is away, and what a live hold has used so far is also in the
file of ``progress.py``, from which another process settles it if this one is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import structlog
from sqlalchemy import Connection

from headrace.backends.components import Price
from headrace.backends.errors import LedgerUnavailable
from headrace.backends.usage import AttemptOutcome, Usage
from headrace.server.accounting import recovery
from headrace.server.accounting.clock import Clock, SteadyClock
from headrace.server.accounting.database import Database, is_outage, reason_of
from headrace.server.accounting.groups import Answer, HoldOp, SettleOp, SweepOp, WorkOp
from headrace.server.accounting.hits import Hit, HitPostings
from headrace.server.accounting.progress import Noted, ProgressFile, Slot
from headrace.server.accounting.records import Hold, HoldRequest, Settlement
from headrace.server.accounting.store import OpenHold, fitting, posting_of
from headrace.server.accounting.writer import Writer
from headrace.server.config import SettingsError

T = TypeVar("T")

logger = structlog.get_logger("headrace.ledger")

HOLD_SECONDS = 600.0
"""After which a hold is void whose process has not been heard of."""
SWEEP_SECONDS = 30.0
"""Between two looks after dead processes; those of this machine are noticed by it, whatever ``HOLD_SECONDS``."""
CLOSE_SECONDS = 10.0
"""How long ``close`` waits for a database that is away."""
MOST_SECONDS_APART = 5.0
"""Of this machine's clock and PostgreSQL's, unless it is worth a warning: leases of keys last for 30 s."""
_READERS = 4
_NAME_LENGTH = 128


class Ledger:
    """Used from one event loop; ``open`` from anywhere. ``close`` when no call runs."""

    def __init__(
        self, database: Database, *, state_dir: Path, clock: Clock, hold_seconds: float, sweep_seconds: float
    ) -> None:
        """Takes over ``database``. Raises OSError."""
        self.owner = uuid.uuid4().hex
        """The name of this process in the ledger."""
        self._database = database
        self._clock = clock
        self._open: dict[str, tuple[OpenHold, Slot]] = {}
        self._num_asked = 0
        """Holds that were asked for and are not answered yet."""
        self._num_unsettled = 0
        """Settlements that are not durable yet."""
        self._closed = False
        folder = state_dir / "progress"
        self._progress = ProgressFile(folder, owner=self.owner, ledger_id=database.id)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="ledger-reader")
        self._hits = HitPostings(self.write, clock=clock, currency=database.currency)
        self._writer = Writer(
            database,
            owner=self.owner,
            folder=folder,
            clock=clock,
            hold_seconds=hold_seconds,
            sweep_seconds=sweep_seconds,
            answer=self._answer,
        )

    @classmethod
    def open(
        cls,
        setting: str,
        *,
        state_dir: Path,
        currency: str,
        clock: Clock | None = None,
        hold_seconds: float = HOLD_SECONDS,
        sweep_seconds: float = SWEEP_SECONDS,
    ) -> Self:
        """Opens the database that ``Settings.ledger`` names, and settles what killed servers have left. Blocks. Raises
        SettingsError.
        """
        clock = clock or SteadyClock()
        database = Database.open(setting, state_dir=state_dir, currency=currency)
        try:
            ledger = cls(
                database, state_dir=state_dir, clock=clock, hold_seconds=hold_seconds, sweep_seconds=sweep_seconds
            )
        except OSError as error:
            database.close()
            raise SettingsError(f"state_dir: cannot write into {state_dir}: {error.strerror}") from error
        ledger._begin()
        return ledger

    def _begin(self) -> None:
        try:
            with self._database.connect() as connection:
                recovery.sweep(
                    self._database,
                    connection,
                    self._progress.path.parent,
                    owner=self.owner,
                    clock=self._clock,
                    expires=False,
                )
            ahead = self._database.seconds_ahead(self._clock())
        except BaseException as error:
            self._progress.close(delete=True)
            self._database.close()
            if not is_outage(error):
                raise
            raise SettingsError(f"ledger: cannot be used: {reason_of(error)}") from error
        if abs(ahead) > MOST_SECONDS_APART:
            hint = "set this machine's clock: by it others take what runs here for dead, or are taken for dead"
            logger.warning("clocks_differ", hint=hint, seconds_ahead_of_database=round(ahead, 3))
        self._writer.start()

    async def close(self) -> None:
        """Writes what waits. Holds that are open stay so, and are settled from what was noted of them by whoever opens
        the ledger next; so is what cannot be written because the database is away.
        """
        await self._hits.close(CLOSE_SECONDS)
        self._closed = True
        await asyncio.to_thread(self._writer.stop, CLOSE_SECONDS)
        # The last answers have been sent to the loop before, and whoever waits for them settles one turn later.
        for _ in range(2):
            await asyncio.sleep(0)
        self._progress.close(delete=not self._open and not self._num_unsettled)
        # What a cancelled reader has asked for may still be on its way.
        await asyncio.to_thread(self._readers.shutdown)
        self._database.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def id(self) -> str:
        """Of the database, as long as it lives."""
        return self._database.id

    @property
    def currency(self) -> str:
        """ISO 4217."""
        return self._database.currency

    @property
    def healthy(self) -> bool:
        """Whether calls can be held; otherwise they are refused until the database is back."""
        return self._writer.healthy and not self._closed

    @property
    def num_open(self) -> int:
        """Holds of this process, those asked for included, whose settlement is not durable yet."""
        return self._num_asked + len(self._open) + self._num_unsettled

    async def hold(self, request: HoldRequest) -> Hold:
        """Holds a call's worst case. Raises BudgetSpent, BudgetHeld, or LedgerUnavailable. If the caller is cancelled
        while it waits, nothing stays held.
        """
        asked = self.ask(request)
        try:
            return await asked
        except asyncio.CancelledError:
            # The answer may have come in the same moment; if it has not, it finds the future cancelled.
            if asked.done() and not asked.cancelled() and asked.exception() is None:
                self._void(asked.result())
            raise

    def ask(self, request: HoldRequest) -> asyncio.Future[Hold]:
        """Asks for a hold: ``hold`` for those who do something else meanwhile. Cancelled before it is done, the future
        leaves nothing held; what it gives is to be settled. Raises LedgerUnavailable.
        """
        self._check(request.tenant, request.key)
        try:
            slot = self._progress.take_slot()
        except OSError as error:
            raise LedgerUnavailable() from error
        op = HoldOp(request, slot, asyncio.get_running_loop().create_future())
        self._num_asked += 1
        self._writer.put(op)
        return op.future

    def note(self, hold: Hold, usage: Usage, charge_nanos: int, price: Price | None, backend: str | None) -> None:
        """Notes what a running call has used so far where a killed process leaves it. Quick: called for each part of a
        stream.
        """
        label = (hold.id, None, None, backend) if price is None else (hold.id, price.currency, price.id, backend)
        self._progress.write_counts(self._open[hold.id][1], label, usage, charge_nanos)

    def settle(self, settlement: Settlement) -> asyncio.Future[None]:
        """Settles a hold, once. Never fails: the future is done when it is durable, however long that takes. What the
        settlement says is noted before this returns, so that not even a kill loses it.
        """
        hold_id = settlement.hold.id
        row, slot = self._open.pop(hold_id)
        self._num_unsettled += 1
        self._progress.write(
            slot,
            hold_id,
            Noted(settlement.usage, settlement.cost, settlement.backend, settlement.outcome, over=True),
        )
        posting = posting_of(
            row,
            usage=settlement.usage,
            cost=settlement.cost,
            outcome=settlement.outcome,
            backend=settlement.backend,
            model=settlement.model,
            settled_at=self._clock(),
        )
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer.put(SettleOp(posting, slot, future))
        return future

    async def post_hit(self, hit: Hit, *, is_given: bool = False) -> None:
        """Posts a stored answer before it is given; waits for that only if it costs something. One that ``is_given``
        already, and free, is posted whenever the database is back. Raises BudgetSpent, BudgetHeld, or
        LedgerUnavailable.
        """
        if hit.nanos or not is_given:
            self._check(hit.tenant, hit.key)
        await self._hits.post(hit)

    def _check(self, *names: str) -> None:
        """Whether calls of such a tenant and key can be written down now."""
        for name in names:
            if fitting(name, _NAME_LENGTH) != name:
                raise ValueError(f"a tenant or key must have at most {_NAME_LENGTH} characters and no NUL: {name!r}")
        if not self.healthy:
            raise LedgerUnavailable()

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` in a thread, in a transaction that sees all that was settled or posted before the call. Raises
        LedgerUnavailable.
        """
        if self._closed:
            raise LedgerUnavailable()
        await self._hits.flush()
        if self._num_unsettled:
            await self.write(_nothing)
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    def _read(self, work: Callable[[Connection], T]) -> T:
        try:
            self._database.check_file()
            with self._database.reading() as connection:
                return work(connection)
        except Exception as error:
            if is_outage(error):
                raise LedgerUnavailable() from error
            raise

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` in the writer's thread and in a group's transaction; returns when it is durable. ``work`` must
        be quick, may be run again if the transaction has to be, and what it raises undoes what it did alone, and is
        raised here. Raises LedgerUnavailable; then it may be durable all the same.
        """
        if not self.healthy:
            raise LedgerUnavailable()
        op = WorkOp(work, asyncio.get_running_loop().create_future())
        self._writer.put(op)
        result: T = await op.future
        return result

    async def sweep(self) -> None:
        """Does now what is done every ``SWEEP_SECONDS``: settles what killed processes have left, and voids holds that
        have expired. Raises LedgerUnavailable.
        """
        if self._closed:
            raise LedgerUnavailable()
        op = SweepOp(asyncio.get_running_loop().create_future())
        self._writer.put(op)
        await op.future

    def _void(self, hold: Hold) -> None:
        self.settle(Settlement(hold=hold, usage=Usage(), cost=None, outcome=AttemptOutcome.CANCELLED, backend=None))

    # --- answers ----------------------------------------------------------------------------------------------------

    def _answer(self, answers: Sequence[Answer]) -> None:
        """Called in the writer's thread: hands a group's answers over to the loop, all at once."""
        for op, _ in answers:
            if op.future is not None:
                # A loop that is closed has nobody left who waits.
                with contextlib.suppress(RuntimeError):
                    op.future.get_loop().call_soon_threadsafe(self._answered, answers)
                return

    def _answered(self, answers: Sequence[Answer]) -> None:
        for op, result in answers:
            if isinstance(op, HoldOp):
                self._held(op, result)
            elif isinstance(op, SettleOp) and op.slot is not None:
                self._progress.free_slot(op.slot)
                self._num_unsettled -= 1
            if op.future is not None and not op.future.done():
                if isinstance(result, Exception):
                    op.future.set_exception(result)
                else:
                    op.future.set_result(result)

    def _held(self, op: HoldOp, result: Any) -> None:
        self._num_asked -= 1
        if not isinstance(result, Hold):
            self._progress.free_slot(op.slot)
            return
        assert op.row is not None, "held without a row. This is a bug"
        self._open[result.id] = (op.row, op.slot)
        if op.future.cancelled():
            self._void(result)


def _nothing(_: Connection) -> None:
    """Work that takes its turn."""
