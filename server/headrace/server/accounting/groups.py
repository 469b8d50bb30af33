"""What is written together: settlements, holds and other work, applied to the database in one transaction."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy import Connection

from headrace.backends.errors import BudgetHeld, BudgetSpent
from headrace.server.accounting.admission import Balance, admit, left
from headrace.server.accounting.clock import month_of
from headrace.server.accounting.database import is_outage
from headrace.server.accounting.progress import Slot
from headrace.server.accounting.records import Hold, HoldRequest
from headrace.server.accounting.store import (
    OpenHold,
    Place,
    Posting,
    fitting,
    held_among,
    insert_holds,
    places_of,
    post,
    read_balances,
    settled_among,
    write_balances,
)

logger = structlog.get_logger("headrace.ledger")


@dataclass(slots=True, eq=False)
class HoldOp:
    """Wants to run a call."""

    request: HoldRequest
    slot: Slot
    future: asyncio.Future[Hold]
    row: OpenHold | None = None
    """What is held, once it is."""


@dataclass(slots=True, eq=False)
class SettleOp:
    """Settles a hold."""

    posting: Posting
    slot: Slot | None = None
    future: asyncio.Future[None] | None = None
    doubtful: bool = False
    """Whether the hold may never have been there."""


@dataclass(slots=True, eq=False)
class WorkOp:
    """Does something else in the transaction."""

    work: Callable[[Connection], Any]
    future: asyncio.Future[Any]


@dataclass(slots=True, eq=False)
class SweepOp:
    """Looks after what others have left, outside of the transaction."""

    future: asyncio.Future[None]


Op = HoldOp | SettleOp | WorkOp
Answer = tuple[Op | SweepOp, Any]
"""What came of it: a value, or the exception to raise."""


@dataclass(slots=True)
class Group:
    """What waits."""

    settlements: list[SettleOp] = field(default_factory=list)
    holds: list[HoldOp] = field(default_factory=list)
    works: list[WorkOp] = field(default_factory=list)

    def add(self, op: Op) -> None:
        if isinstance(op, SettleOp):
            self.settlements.append(op)
        elif isinstance(op, HoldOp):
            self.holds.append(op)
        else:
            self.works.append(op)

    def ops(self) -> list[Op]:
        return [*self.settlements, *self.holds, *self.works]

    def alone(self) -> Iterable[Group]:
        """Each of it in a group of its own."""
        for op in self.ops():
            group = Group()
            group.add(op)
            yield group


def apply(
    connection: Connection, group: Group, *, now: int, owner: str, expires_at: int, currency: str, verify: bool
) -> list[Answer]:
    """Writes a group. Settlements come first, since they make room. Raises HoldsGone unless it may ``verify`` which
    holds are still there: then the transaction is to be undone, and the group applied again.
    """
    settlements = _still_held(connection, group.settlements) if verify else group.settlements
    month = month_of(now)
    places: set[Place] = {place for op in settlements for place in places_of(op.posting)}
    for op in group.holds:
        places.update(_places(op.request, month))
    balances = read_balances(connection, places)
    answers: list[Answer] = [(op, None) for op in group.settlements]
    settle(balances, [op.posting for op in settlements])
    answers += [(op, _hold(op, balances, now, month, currency)) for op in group.holds]
    rows = [op.row for op in group.holds if op.row is not None]
    if settlements:
        post(connection, [op.posting for op in settlements])
    if rows:
        insert_holds(connection, rows, owner=owner, expires_at=expires_at)
    if settlements or rows:
        changed = {place for op in settlements for place in places_of(op.posting)}
        changed.update(place for row in rows for place in places_of(row))
        write_balances(connection, {place: balances[place] for place in changed})
    answers += [(op, _work(connection, op)) for op in group.works]
    return answers


def settle(balances: dict[Place, Balance], postings: Iterable[Posting]) -> None:
    """Moves what was held to what is posted."""
    for posting in postings:
        for place in places_of(posting):
            balance = balances[place]
            balance.held_nanos -= posting.held_nanos
            balance.held_tokens -= posting.held_tokens
            balance.posted_nanos += posting.charge_nanos
            balance.posted_tokens += posting.posted_tokens


def settle_all(connection: Connection, postings: Sequence[Posting]) -> None:
    """Settles holds that are known to be there."""
    balances = read_balances(connection, {place for posting in postings for place in places_of(posting)})
    settle(balances, postings)
    post(connection, postings)
    write_balances(connection, balances)


def _places(request: HoldRequest, month: str) -> list[Place]:
    """The balances of its tenant and its key, and those that it must keep limits of."""
    places = [(account.tenant, account.key, month) for account, _ in request.allowances]
    places.append((request.tenant, "", month))
    if request.key:
        places.append((request.tenant, request.key, month))
    return places


def _hold(op: HoldOp, balances: dict[Place, Balance], now: int, month: str, currency: str) -> Hold | Exception:
    request = op.request
    limited = [balances[account.tenant, account.key, month] for account, _ in request.allowances]
    op.row = None
    try:
        worst_case, exceeded = admit(request, limited, month=month, currency=currency)
    except (BudgetSpent, BudgetHeld) as refusal:
        return refusal
    op.row = OpenHold(
        id=os.urandom(16).hex(),
        tenant=request.tenant,
        key=request.key,
        month=month,
        model=fitting(request.model, 256),
        request_id=fitting(request.request_id, 128),
        held_nanos=worst_case.nanos,
        held_tokens=worst_case.tokens,
        held_at=now,
    )
    for place in places_of(op.row):
        balances[place].held_nanos += op.row.held_nanos
        balances[place].held_tokens += op.row.held_tokens
    left_nanos, left_tokens = left(request.allowances, limited)
    return Hold(
        id=op.row.id,
        request=request,
        worst_case=worst_case,
        month=month,
        held_at=now,
        soft_limits_exceeded=exceeded,
        left_nanos=left_nanos,
        left_tokens=left_tokens,
    )


def _work(connection: Connection, op: WorkOp) -> Any:
    """What it returns or raises; in that case what it wrote is undone, and no more than that."""
    savepoint = connection.begin_nested()
    try:
        result = op.work(connection)
    except Exception as error:
        if is_outage(error):
            raise
        savepoint.rollback()
        return error
    savepoint.commit()
    return result


def _still_held(connection: Connection, ops: Sequence[SettleOp]) -> list[SettleOp]:
    """Those whose hold is there. Of the others it is logged what will not be billed, unless it has been."""
    held = held_among(connection, [op.posting.id for op in ops])
    gone = [op for op in ops if op.posting.id not in held]
    settled = settled_among(connection, [op.posting.id for op in gone])
    for op in gone:
        posting = op.posting
        if op.doubtful or settled.get(posting.id) == (posting.state, posting.settled_at):
            continue  # it never was there; or the commit that seemed to fail did not
        log_unbilled(
            posting.id,
            state=settled[posting.id][0] if posting.id in settled else None,
            charge_nanos=posting.charge_nanos,
            input_tokens=posting.input_tokens,
            output_tokens=posting.output_tokens,
            tenant=posting.tenant,
            key=posting.key,
            model=posting.model,
            request_id=posting.request_id,
        )
    return [op for op in ops if op.posting.id in held]


def log_unbilled(hold_id: str, *, state: str | None, **posting: Any) -> None:
    """A hold was settled by another server, which took its own for dead, before what it used was known."""
    logger.error(
        "settled_too_late",
        hint="the hold had expired and was voided by another server; what the call used is not billed",
        id=hold_id,
        settled_as=state,
        **posting,
    )
