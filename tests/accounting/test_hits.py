"""Postings of stored answers, on both databases: once each, and never beyond a budget."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest
from sqlalchemy import select

from headrace.backends.errors import BudgetHeld, BudgetSpent, LedgerUnavailable
from headrace.backends.usage import Cost
from headrace.server.accounting import hits as hits_module
from headrace.server.accounting.checks import differences
from headrace.server.accounting.hits import Hit, add_free, posting_of
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.queries import State, receipts
from headrace.server.accounting.records import Account, Allowance
from headrace.server.accounting.schema import daily_usage
from tests.accounting.ledger_kit import ManualClock, balance, open_ledger, posted, request, settlement

_numbers = itertools.count()


def hit(nanos: int = 0, *, limit: int | None = None, request_id: str | None = None, key: str = "") -> Hit:
    return Hit(
        tenant="acme",
        key=key,
        model="letters",
        backend="scripted",
        request_id=request_id or f"hit-{next(_numbers)}",
        cost=Cost(currency="USD", charge_nanos=nanos, price_id="book", estimated=False),
        allowances=((Account("acme"), Allowance(nanos=limit)),),
    )


@pytest.fixture
async def ledger(database_setting: str, tmp_path: Path) -> AsyncIterator[Ledger]:
    async with open_ledger(database_setting, tmp_path, clock=ManualClock()) as made:
        yield made


async def test_free_hits_are_posted_together_and_nobody_waits(ledger: Ledger) -> None:
    for _ in range(600):
        await ledger.post_hit(hit())
    rows = await ledger.read(posted)
    assert len(rows) == len({row.id for row in rows}) == 600
    assert {(row.state, row.charge_nanos, row.held_nanos, row.output_tokens) for row in rows} == {
        ("posted", 0, 0, None)
    }
    assert await ledger.read(balance) == (0, 0, 0, 0)
    (day,) = await ledger.read(lambda connection: list(connection.execute(select(daily_usage))))
    assert (day.requests, day.charge_nanos, day.output_tokens) == (600, 0, 0)


async def test_a_hit_has_a_receipt(ledger: Ledger) -> None:
    await ledger.post_hit(hit(request_id="mine", key="k"))
    (receipt,) = await ledger.read(lambda connection: receipts(connection, "acme", "mine"))
    assert (receipt.state, receipt.key, receipt.price_id, receipt.charge_nanos) == (State.POSTED, "k", "book", 0)


async def test_free_hits_are_posted_without_anybody_asking_and_when_the_ledger_is_closed(
    database_setting: str, tmp_path: Path
) -> None:
    async with open_ledger(database_setting, tmp_path) as ledger:
        await ledger.post_hit(hit())
        async with asyncio.timeout(10):
            while ledger._hits._waiting:  # noqa: ASYNC110  # nobody is told
                await asyncio.sleep(0.01)
        await ledger.post_hit(hit())
    async with open_ledger(database_setting, tmp_path) as ledger:
        assert len(await ledger.read(posted)) == 2


async def test_a_hit_that_costs_something_is_posted_at_once_to_tenant_and_key(ledger: Ledger) -> None:
    await ledger.post_hit(hit(7, key="k"))
    assert await ledger.read(balance) == (7, 0, 0, 0)
    assert await ledger.read(lambda connection: balance(connection, Account("acme", "k"))) == (7, 0, 0, 0)
    (row,) = await ledger.read(posted)
    assert (row.charge_nanos, row.price_id) == (7, "book")


async def test_hits_at_the_same_time_never_exceed_a_budget(ledger: Ledger) -> None:
    results = await asyncio.gather(*(ledger.post_hit(hit(7, limit=70)) for _ in range(25)), return_exceptions=True)
    assert sum(one is None for one in results) == 10
    assert all(isinstance(one, BudgetSpent) for one in results if one is not None)
    assert await ledger.read(balance) == (70, 0, 0, 0)
    assert await ledger.read(differences) == []


async def test_what_is_held_for_calls_that_run_is_not_there_for_hits(ledger: Ledger) -> None:
    hold = await ledger.hold(request(nanos=25))
    assert hold.worst_case.nanos == 20
    with pytest.raises(BudgetHeld):
        await ledger.post_hit(hit(6, limit=25))
    await ledger.post_hit(hit(5, limit=25))
    assert await ledger.read(balance) == (5, 0, 20, 15)
    await ledger.settle(settlement(hold, 1, 1))
    await ledger.post_hit(hit(6, limit=25))
    assert await ledger.read(balance) == (14, 2, 0, 0)


async def test_a_hit_is_posted_once_even_if_a_commit_only_seems_to_fail(ledger: Ledger) -> None:
    with mock.patch.object(hits_module, "_RETRY_SECONDS", 0.0):
        write, failures = ledger._hits._write, iter([True, False])

        async def fails_once(work: object) -> object:
            result = await write(work)  # type: ignore[arg-type,var-annotated]
            if next(failures, False):
                raise LedgerUnavailable
            return result

        ledger._hits._write = fails_once  # type: ignore[assignment]
        await ledger.post_hit(hit())
        async with asyncio.timeout(10):
            while ledger._hits._waiting:  # noqa: ASYNC110  # nobody is told
                await asyncio.sleep(0.01)
    assert len(await ledger.read(posted)) == 1
    (day,) = await ledger.read(lambda connection: list(connection.execute(select(daily_usage))))
    assert day.requests == 1


async def test_posting_the_same_again_adds_nothing(ledger: Ledger) -> None:
    row = posting_of(hit(), now=1)
    for _ in range(2):
        await ledger.write(lambda connection: add_free(connection, [row]))
    assert len(await ledger.read(posted)) == 1


async def test_a_name_that_no_column_takes_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="at most"):
        await ledger.post_hit(hit(key="k" * 200))


async def test_while_the_ledger_is_away_only_what_was_given_already_waits(ledger: Ledger) -> None:
    ledger._writer.healthy = False
    with pytest.raises(LedgerUnavailable):
        await ledger.post_hit(hit())
    with pytest.raises(LedgerUnavailable):
        await ledger.post_hit(hit(7), is_given=True)
    await ledger.post_hit(hit(), is_given=True)
    ledger._writer.healthy = True
    assert len(await ledger.read(posted)) == 1
