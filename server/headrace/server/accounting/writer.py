"""The thread that writes the ledger: groups, one after the other, and what happens when the database is away."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
from sqlalchemy import Connection, update

from headrace.backends.errors import LedgerUnavailable
from headrace.server.accounting import groups, recovery
from headrace.server.accounting.clock import Clock
from headrace.server.accounting.database import Database, is_of_values, is_outage, reason_of
from headrace.server.accounting.groups import Answer, Group, HoldOp, Op, SettleOp, SweepOp
from headrace.server.accounting.schema import facts
from headrace.server.accounting.store import HoldsGone, voided

logger = structlog.get_logger("headrace.ledger")

MOST_OPS = 512
"""That are taken at once."""
SETTLE_SECONDS = 0.01
"""How long settlements may wait for a hold to share a transaction with: nobody waits for them alone."""
COME_BACK_SECONDS = 60.0
"""After an outage, and after a start, which may end one: for so long no hold expires. Nobody could renew theirs, and
whoever is back first must not take the others for dead, whose settlements wait.
"""
_FIRST_RETRY, _LAST_RETRY = 0.05, 2.0
"""Seconds between tries to reach a database that is away."""


class Writer:
    """Everything here but ``put``, ``sweep``, ``stop`` and ``healthy`` is the thread's own."""

    def __init__(
        self,
        database: Database,
        *,
        owner: str,
        folder: Path,
        clock: Clock,
        hold_seconds: float,
        sweep_seconds: float,
        answer: Callable[[Sequence[Answer]], None],
    ) -> None:
        self.healthy = True
        """Whether the database could be used when it was last tried."""
        self._database, self._owner, self._folder, self._clock = database, owner, folder, clock
        self._hold_nanos = round(hold_seconds * 1e9)
        self._sweep_seconds = sweep_seconds
        self._answer = answer
        self._queue: queue.SimpleQueue[Op | SweepOp | None] = queue.SimpleQueue()
        self._unwritten: list[SettleOp] = []
        """Settlements that wait for the database, the oldest first."""
        self._settle_by = 0.0
        """When they are written at the latest, if the database can be."""
        self._connection: Connection | None = None
        self._committing = False
        self._retry_seconds = _FIRST_RETRY
        self._next_try = 0.0
        self._next_sweep = time.monotonic() + sweep_seconds
        self._expires_from = self._after_coming_back()
        """Of the ledger's clock."""
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, op: Op | SweepOp) -> None:
        self._queue.put(op)

    def stop(self, patience: float) -> None:
        """Ends the thread when all that was put is written, or after ``patience`` seconds of a database that is away.
        Blocks.
        """
        self._stop_at = time.monotonic() + patience
        self._queue.put(None)
        self._thread.join()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_done():
                self._turn()
        finally:
            self.healthy = False
            self._drop_connection()
            left, sweeps = Group(), list[SweepOp]()
            while not self._queue.empty():
                self._take(left, sweeps)
            self._answer([(op, LedgerUnavailable()) for op in (*left.ops(), *sweeps)])

    def _turn(self) -> None:
        group, sweeps = Group(), list[SweepOp]()
        self._take(group, sweeps, wait_until=self._due())
        if not self.healthy and time.monotonic() < self._next_try:
            self._answer([(op, LedgerUnavailable()) for op in group.ops()])
        else:
            may_wait = self.healthy and self._stop_at is None and time.monotonic() < self._settle_by
            if group.holds or group.works or not may_wait:
                group.settlements = list(self._unwritten)
            if group.ops() or not self.healthy:
                self._write(group)
        if sweeps or (self.healthy and time.monotonic() >= self._next_sweep):
            self._next_sweep = time.monotonic() + self._sweep_seconds
            error = self._sweep()
            self._answer([(op, error) for op in sweeps])

    def _due(self) -> float:
        """When there is something to do, even if nobody asks."""
        due = self._next_sweep if self.healthy else self._next_try
        if self.healthy and self._unwritten:
            due = self._settle_by
        return due if self._stop_at is None else min(due, self._stop_at)

    def _take(self, group: Group, sweeps: list[SweepOp], wait_until: float = 0.0) -> None:
        """Adds what waits; if that is nothing, what comes until then. Settlements join those that wait already."""
        with contextlib.suppress(queue.Empty):
            for number in range(MOST_OPS):
                seconds = 0.0 if number else max(wait_until - time.monotonic(), 0.0)
                op = self._queue.get(timeout=seconds) if seconds else self._queue.get_nowait()
                if isinstance(op, SettleOp):
                    if not self._unwritten:
                        self._settle_by = time.monotonic() + SETTLE_SECONDS
                    self._unwritten.append(op)
                elif isinstance(op, SweepOp):
                    sweeps.append(op)
                elif op is not None and not op.future.cancelled():
                    group.add(op)
                elif isinstance(op, HoldOp):
                    self._answer([(op, LedgerUnavailable())])

    def _is_done(self) -> bool:
        if self._stop_at is None or not self._queue.empty():
            return False
        return not self._unwritten or time.monotonic() >= self._stop_at

    def _write(self, group: Group) -> None:
        """Writes a group, or refuses it for now; answers."""
        try:
            answers = self._commit(group)
        except Exception as error:  # noqa: BLE001  # whatever it is, calls wait for an answer
            if is_outage(error):
                self._away(group, error)
            else:
                self._write_alone(list(group.alone()))
            return
        self._written(answers)

    def _write_alone(self, parts: Sequence[Group]) -> None:
        """Something in a group cannot be written: finds out what, so that the rest is."""
        for number, part in enumerate(parts):
            (op,) = part.ops()
            try:
                answers = self._commit(part)
            except Exception as error:
                if is_outage(error) or (isinstance(op, SettleOp) and not is_of_values(error)):
                    rest = Group()
                    for one in parts[number:]:
                        rest.add(*one.ops())
                    self._away(rest, error)
                    return
                if isinstance(op, SettleOp):
                    logger.exception("settlement_refused", posting=op.posting._asdict())
                answers = [(op, None if isinstance(op, SettleOp) else error)]
            self._written(answers)

    def _written(self, answers: Sequence[Answer]) -> None:
        if not self.healthy:
            logger.info("ledger_back", num_waited=len(self._unwritten))
            self._expires_from = self._after_coming_back()
        self.healthy = True
        done = {op for op, _ in answers}
        self._unwritten = [op for op in self._unwritten if op not in done]
        self._answer(answers)

    def _commit(self, group: Group) -> list[Answer]:
        try:
            return self._transaction(group, verify=False)
        except HoldsGone:
            return self._transaction(group, verify=True)

    def _transaction(self, group: Group, *, verify: bool) -> list[Answer]:
        self._committing = False
        self._database.check_file()
        if self._connection is None:
            self._connection = self._database.connect()
        with self._connection.begin() as transaction:
            # Under the lock, so that no hold of a group that is written later is older.
            now = self._clock()
            answers = groups.apply(
                self._connection,
                group,
                now=now,
                owner=self._owner,
                expires_at=now + self._hold_nanos,
                currency=self._database.currency,
                verify=verify,
            )
            if not answers:
                # A try whether it can be written again.
                self._connection.execute(update(facts).values(value=facts.c.value))
            self._committing = True
            transaction.commit()
        return answers

    def _away(self, group: Group, error: BaseException) -> None:
        """The database cannot be used: settlements wait, all else is refused."""
        if self._committing:
            # It may have been committed all the same.
            lost = [op.row for op in group.holds if op.row is not None]
            self._unwritten += [SettleOp(voided(row, settled_at=self._clock()), doubtful=True) for row in lost]
        if self.healthy:
            self._retry_seconds = _FIRST_RETRY
            logger.error("ledger_unavailable", hint="calls are refused until it is back", problem=reason_of(error))
        self.healthy = False
        self._next_try = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, _LAST_RETRY)
        self._drop_connection()
        refused = [op for op in group.ops() if not isinstance(op, SettleOp)]
        self._answer([(op, LedgerUnavailable()) for op in refused])

    def _sweep(self) -> Exception | None:
        """Says that this process is alive, and looks after what others have left."""
        try:
            self._database.check_file()
            if self._connection is None:
                self._connection = self._database.connect()
            with self._connection.begin():
                recovery.renew(self._connection, owner=self._owner, expires_at=self._clock() + self._hold_nanos)
            recovery.sweep(
                self._database,
                self._connection,
                self._folder,
                owner=self._owner,
                clock=self._clock,
                expires=self._clock() >= self._expires_from,
            )
        except Exception as error:  # it is done again; calls go on
            if is_outage(error):
                self._committing = False
                self._away(Group(), error)
                return LedgerUnavailable()
            logger.exception("not_swept")
            self._drop_connection()
            return error
        return None

    def _after_coming_back(self) -> int:
        return self._clock() + round(COME_BACK_SECONDS * 1e9)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.invalidate()
            with contextlib.suppress(Exception):
                connection.close()
