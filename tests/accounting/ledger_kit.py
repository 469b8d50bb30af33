"""What tests of the ledger share: requests, settlements, a clock, and a kill."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import Connection, event, select

from headrace.backends.components import Price
from headrace.backends.usage import AttemptOutcome, Cost, Usage
from headrace.server.accounting.charges import WorstCase, charge_nanos
from headrace.server.accounting.clock import SteadyClock
from headrace.server.accounting.groups import WorkOp
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.records import Account, Allowance, Hold, HoldRequest, Settlement
from headrace.server.accounting.schema import balances, holds, postings
from headrace.server.accounting.writer import Writer

PRICE = Price(id="book", currency="USD", input_nanos=1_000_000, output_nanos=2_000_000)
"""A nano for a token of input, two for one of output."""
ACME = Account("acme")
_numbers = itertools.count()


class ManualClock:
    """The time of day, as a test sets it."""

    def __init__(self, start: str = "2026-11-23T12:00:00") -> None:
        self.now = int(datetime.fromisoformat(start).replace(tzinfo=UTC).timestamp()) * 10**9

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


def open_ledger(setting: str, state_dir: Path, **options: Any) -> Ledger:
    """One that can be killed."""
    with mock.patch.object(Writer, "_run", _until_killed):
        return Ledger.open(setting, state_dir=state_dir, **{"currency": "USD", **options})


_run = Writer._run


def _until_killed(writer: Writer) -> None:
    with contextlib.suppress(SystemExit):
        _run(writer)


def request(
    input_tokens: int = 10,
    max_new_tokens: int = 5,
    *,
    key: str = "",
    tenant: str = "acme",
    price: Price | None = PRICE,
    least: int | None = None,
    nanos: int | None = None,
    tokens: int | None = None,
    request_id: str | None = None,
    **allowance: int,
) -> HoldRequest:
    """Of a tenant with these limits: ``nanos`` and ``tokens`` are hard ones."""
    limits = Allowance(nanos=nanos, tokens=tokens, **allowance)
    return HoldRequest(
        tenant=tenant,
        key=key,
        model="letters",
        request_id=request_id or f"request-{next(_numbers)}",
        worst_case=WorstCase(input_tokens=input_tokens, n=1, max_new_tokens=max_new_tokens, price=price),
        least_new_tokens=least,
        allowances=((Account(tenant), limits),),
    )


def settlement(
    hold: Hold,
    input_tokens: int | None = 10,
    output_tokens: int | None = 5,
    *,
    outcome: AttemptOutcome = AttemptOutcome.COMPLETED,
    **usage: Any,
) -> Settlement:
    used = Usage(input_tokens=input_tokens, output_tokens=output_tokens, **usage)
    price = hold.request.worst_case.price
    cost = None
    if price is not None and (input_tokens or output_tokens):
        cost = Cost(currency="USD", charge_nanos=charge_nanos(used, price), price_id=price.id, estimated=False)
    return Settlement(hold=hold, usage=used, cost=cost, outcome=outcome, backend="scripted")


def note(ledger: Ledger, hold: Hold, input_tokens: int, output_tokens: int) -> None:
    """What ``settlement`` would say, of a call that runs."""
    so_far, price = settlement(hold, input_tokens, output_tokens), hold.request.worst_case.price
    ledger.note(hold, so_far.usage, so_far.cost.charge_nanos if so_far.cost is not None else 0, price, so_far.backend)


def kill(ledger: Ledger) -> None:
    """Leaves what kill -9 of its process would: a connection that is gone, a file without a lock."""
    ledger._writer.put(WorkOp(_exit, concurrent.futures.Future()))  # type: ignore[arg-type]
    _buried(ledger)


def _exit(_: Connection) -> None:
    raise SystemExit


def kill_before_commit(ledger: Ledger) -> None:
    """Its next transaction is its last, and is not committed. ``bury`` waits for that."""
    event.listen(ledger._database._writers, "commit", _exit)


def kill_after_commit(ledger: Ledger) -> None:
    """Its next transaction is its last, and is committed, and nobody hears of it. ``bury`` waits for that."""

    def exits(_: Sequence[Any]) -> None:
        raise SystemExit

    ledger._writer._answer = exits


def bury(ledger: Ledger) -> None:
    _buried(ledger)


def _buried(ledger: Ledger) -> None:
    ledger._writer._thread.join(10)
    assert not ledger._writer._thread.is_alive()
    ledger._writer._drop_connection()
    ledger._progress.close(delete=False)
    ledger._readers.shutdown()
    ledger._database.close()


def balance(connection: Connection, account: Account = ACME, month: str = "2026-11") -> tuple[int, int, int, int]:
    """Posted nanos and tokens, held nanos and tokens."""
    row = connection.execute(
        select(balances.c.posted_nanos, balances.c.posted_tokens, balances.c.held_nanos, balances.c.held_tokens).where(
            balances.c.tenant == account.tenant, balances.c.key == account.key, balances.c.month == month
        )
    ).one_or_none()
    return (0, 0, 0, 0) if row is None else (row[0], row[1], row[2], row[3])


def posted(connection: Connection) -> list[Any]:
    """All postings, in their order."""
    return list(connection.execute(select(postings).order_by(postings.c.sequence)))


def open_holds(connection: Connection) -> list[str]:
    return list(connection.scalars(select(holds.c.id)))


def steady(clock: ManualClock) -> SteadyClock:
    return SteadyClock(clock)
