"""Holds, settlements and what is written of them, on both databases."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, text

from headrace.backends.errors import BudgetHeld, BudgetSpent
from headrace.backends.usage import AttemptOutcome, Cost, Usage
from headrace.server.accounting.checks import differences
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.records import Account, Settlement
from headrace.server.accounting.schema import daily_usage
from tests.accounting.ledger_kit import (
    ACME,
    PRICE,
    ManualClock,
    balance,
    open_holds,
    open_ledger,
    posted,
    request,
    settlement,
    steady,
)


async def test_a_hold_counts_until_it_is_settled_and_what_was_used_from_then_on(ledger: Ledger) -> None:
    hold = await ledger.hold(request(10, 5, key="ab12"))
    assert await ledger.read(balance) == (0, 0, 20, 15)
    assert await ledger.read(lambda connection: balance(connection, Account("acme", "ab12"))) == (0, 0, 20, 15)
    assert ledger.num_open == 1
    await ledger.settle(settlement(hold, 10, 2))
    assert await ledger.read(balance) == (14, 12, 0, 0)
    assert await ledger.read(lambda connection: balance(connection, Account("acme", "ab12"))) == (14, 12, 0, 0)
    assert ledger.num_open == 0


async def test_a_posting_says_all_that_is_known(ledger: Ledger, clock: ManualClock) -> None:
    hold = await ledger.hold(request(10, 5, key="ab12", request_id="mine"))
    held_at = clock.now
    clock.advance(2)
    usage = Usage(
        input_tokens=10,
        cache_read_input_tokens=4,
        cache_write_input_tokens=0,
        output_tokens=5,
        reasoning_output_tokens=None,
        sent_output_tokens=3,
    )
    cost = Cost(currency="USD", charge_nanos=19, cost_nanos=31, price_id="book", estimated=True)
    await ledger.settle(
        Settlement(hold=hold, usage=usage, cost=cost, outcome=AttemptOutcome.CANCELLED, backend="scripted")
    )
    (row,) = await ledger.read(posted)
    assert row._asdict() == {
        "sequence": 1,
        "id": hold.id,
        "tenant": "acme",
        "key": "ab12",
        "month": "2026-11",
        "model": "letters",
        "backend": "scripted",
        "request_id": "mine",
        "state": "posted",
        "outcome": "cancelled",
        "input_tokens": 10,
        "cache_read_input_tokens": 4,
        "cache_write_input_tokens": 0,
        "output_tokens": 5,
        "reasoning_output_tokens": None,
        "sent_output_tokens": 3,
        "price_id": "book",
        "charge_nanos": 19,
        "cost_nanos": 31,
        "estimated": True,
        "recovered": False,
        "held_nanos": 20,
        "held_tokens": 15,
        "held_at": held_at,
        "settled_at": clock.now,
    }


async def test_days_are_summed_up(ledger: Ledger, clock: ManualClock) -> None:
    for outcome in (AttemptOutcome.COMPLETED, AttemptOutcome.EXPIRED, AttemptOutcome.FAILED):
        hold = await ledger.hold(request())
        await ledger.settle(settlement(hold, 10, 2, outcome=outcome, cache_read_input_tokens=4))
    clock.advance(24 * 3600)
    await ledger.settle(settlement(await ledger.hold(request()), 10, 2))
    rows = await ledger.read(lambda connection: connection.execute(select(daily_usage).order_by("day")).all())
    columns = ("requests", "cancelled_requests", "failed_requests", "cached_requests", "input_tokens", "output_tokens")
    assert [(row.day, *(getattr(row, name) for name in columns)) for row in rows] == [
        ("2026-11-23", 3, 1, 1, 3, 30, 6),
        ("2026-11-24", 1, 0, 0, 0, 10, 2),
    ]
    assert [(row.charge_nanos, row.cost_nanos) for row in rows] == [(42, None), (14, None)]


async def test_a_call_without_usage_is_voided(ledger: Ledger) -> None:
    hold = await ledger.hold(request())
    await ledger.settle(settlement(hold, None, None, outcome=AttemptOutcome.FAILED))
    (row,) = await ledger.read(posted)
    assert (row.state, row.outcome, row.charge_nanos) == ("voided", "failed", 0)
    assert await ledger.read(balance) == (0, 0, 0, 0)


async def test_a_tenant_pays_no_more_than_was_held(ledger: Ledger) -> None:
    hold = await ledger.hold(request(10, 5))
    cost = Cost(currency="USD", charge_nanos=1_000, cost_nanos=1_000, price_id="book", estimated=False)
    usage = Usage(input_tokens=500, output_tokens=250)
    await ledger.settle(
        Settlement(hold=hold, usage=usage, cost=cost, outcome=AttemptOutcome.COMPLETED, backend="remote")
    )
    (row,) = await ledger.read(posted)
    assert (row.charge_nanos, row.cost_nanos, row.input_tokens) == (20, 1_000, 500)
    assert await ledger.read(balance) == (20, 15, 0, 0)


async def test_a_model_without_a_price_is_held_in_tokens(ledger: Ledger) -> None:
    hold = await ledger.hold(request(10, 5, price=None, nanos=0, tokens=15))
    with pytest.raises(BudgetHeld):
        await ledger.hold(request(1, 1, price=None, nanos=0, tokens=15))
    await ledger.settle(settlement(hold, 10, 5))
    (row,) = await ledger.read(posted)
    assert (row.state, row.charge_nanos, row.cost_nanos, row.price_id) == ("posted", 0, None, None)


async def test_budgets_are_kept_and_soft_limits_are_told_of(ledger: Ledger) -> None:
    first = await ledger.hold(request(10, 5, nanos=50, soft_nanos=20))
    assert first.soft_limits_exceeded == ()
    second = await ledger.hold(request(10, 5, nanos=50, soft_nanos=20))
    assert second.soft_limits_exceeded == (ACME,)
    with pytest.raises(BudgetHeld):
        await ledger.hold(request(10, 5, nanos=50))
    lowered = await ledger.hold(request(4, 5, nanos=50, least=1))
    assert (lowered.worst_case.max_new_tokens, lowered.worst_case.nanos) == (3, 10)
    for hold in (first, second, lowered):
        await ledger.settle(settlement(hold, hold.worst_case.input_tokens, hold.worst_case.max_new_tokens))
    with pytest.raises(BudgetSpent):
        await ledger.hold(request(1, 0, nanos=50))
    await ledger.settle(settlement(await ledger.hold(request(1, 0, tenant="other", nanos=50)), 1, 0))


async def test_a_call_counts_for_the_month_in_which_it_began(ledger: Ledger, clock: ManualClock) -> None:
    clock.advance(8 * 24 * 3600 - 12 * 3600 - 1)
    hold = await ledger.hold(request(10, 5, nanos=20))
    clock.advance(2)
    assert (await ledger.hold(request(10, 5, nanos=20))).month == "2026-12"
    await ledger.settle(settlement(hold, 10, 5))
    assert await ledger.read(balance) == (20, 15, 0, 0)
    assert await ledger.read(lambda connection: balance(connection, month="2026-12")) == (0, 0, 20, 15)
    (row,) = await ledger.read(posted)
    assert row.month == "2026-11"


async def test_a_clock_that_steps_back_opens_no_old_month(ledger: Ledger, clock: ManualClock) -> None:
    clock.advance(10 * 24 * 3600)
    hold = await ledger.hold(request())
    clock.advance(-20 * 24 * 3600)
    again = await ledger.hold(request())
    assert again.month == hold.month == "2026-12"
    assert again.held_at == hold.held_at
    await asyncio.gather(*(ledger.settle(settlement(one)) for one in (hold, again)))
    await ledger.sweep()
    assert [row.state for row in await ledger.read(posted)] == ["posted", "posted"]


async def test_a_hold_is_settled_once(ledger: Ledger) -> None:
    hold = await ledger.hold(request())
    await ledger.settle(settlement(hold))
    with pytest.raises(KeyError):
        ledger.settle(settlement(hold))
    assert len(await ledger.read(posted)) == 1


async def test_labels_of_any_length_and_content_are_written(ledger: Ledger) -> None:
    hold = await ledger.hold(request(request_id="é\0" * 500))
    await ledger.settle(settlement(hold))
    (row,) = await ledger.read(posted)
    assert row.request_id == ("é�" * 500)[:128]


async def test_a_name_that_does_not_fit_is_no_other_one(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="at most 128"):
        await ledger.hold(request(tenant="a" * 129))


@pytest.mark.parametrize(
    ("input_tokens", "output_tokens", "more"),
    [
        (2**63, 5, {}),
        (-3, 5, {}),
        (10, -5, {}),
        (10, 2**70, {}),
        (10, 0, {"cache_read_input_tokens": 100}),
        (10, 5, {"reasoning_output_tokens": 2**64}),
    ],
)
async def test_counts_that_a_backend_made_up_are_settled_too(
    ledger: Ledger, input_tokens: int, output_tokens: int, more: dict[str, Any]
) -> None:
    cheaper_cached = replace(PRICE, cache_read_input_nanos=0)
    for _ in range(2):
        hold = await ledger.hold(request(price=cheaper_cached))
        made_up = settlement(hold, input_tokens, output_tokens, **more)
        assert made_up.cost is not None
        ledger.note(hold, made_up.usage, made_up.cost.charge_nanos, PRICE, "made\ud800up")
        await ledger.settle(replace(made_up, backend="made\ud800up"))
    assert await ledger.read(open_holds) == []
    for row in await ledger.read(posted):
        assert 0 <= row.charge_nanos <= row.held_nanos
        assert row.backend == "made?up"


async def test_checks_find_what_is_wrong(database_setting: str, tmp_path: Path, clock: ManualClock) -> None:
    async with open_ledger(database_setting, tmp_path, clock=steady(clock)) as opened:
        await opened.settle(settlement(await opened.hold(request())))
        hold = await opened.hold(request())
        assert await opened.read(differences) == []
        await opened.write(_spoil)
        of_balances, of_days = await opened.read(differences)
        assert of_balances == (
            "balances: tenant 'acme', key '', month '2026-11': is posted_nanos 21, posted_tokens 15, held_nanos 20, "
            "held_tokens 15, should be posted_nanos 20, posted_tokens 15, held_nanos 20, held_tokens 15"
        )
        assert of_days.startswith(
            "daily_usage: day '2026-11-23', tenant 'acme', key '', model 'letters': is requests 7, "
        )
        await opened.settle(settlement(hold))


def _spoil(connection: Connection) -> None:
    connection.execute(text("UPDATE balances SET posted_nanos = posted_nanos + 1"))
    connection.execute(text("UPDATE daily_usage SET requests = 7"))
