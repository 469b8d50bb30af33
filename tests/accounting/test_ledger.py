"""Holds, settlements and what is written of them, on both databases."""

from __future__ import annotations

import asyncio
import re
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import Connection, event, insert, select, text

from headrace.backends.errors import BudgetHeld, BudgetSpent, LedgerUnavailable
from headrace.backends.types import AttemptOutcome, Cost, Usage
from headrace.server.accounting.checks import differences
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.records import Account, Hold, Settlement
from headrace.server.accounting.schema import daily_usage, tenants
from tests.accounting.conftest import PostgresServer
from tests.accounting.ledger_kit import (
    ACME,
    PRICE,
    ManualClock,
    balance,
    bury,
    kill,
    kill_after_commit,
    kill_before_commit,
    note,
    open_holds,
    open_ledger,
    posted,
    request,
    settlement,
    steady,
)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def ledger(database_setting: str, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Ledger]:
    async with open_ledger(database_setting, tmp_path, clock=steady(clock)) as opened:
        yield opened
        assert await opened.read(differences) == []


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


async def test_a_caller_who_gives_up_while_it_waits_leaves_nothing_held(ledger: Ledger) -> None:
    asked = [asyncio.create_task(ledger.hold(request())) for _ in range(20)]
    await asyncio.sleep(0)
    for number, task in enumerate(asked):
        if number % 2:
            task.cancel()
    holds = await asyncio.gather(*asked, return_exceptions=True)
    kept = [hold for hold in holds if isinstance(hold, Hold)]
    assert len(kept) == 10
    for hold in kept:
        await ledger.settle(settlement(hold))
    while ledger.num_open:
        await ledger.write(lambda _: None)
    assert await ledger.read(open_holds) == []
    assert await ledger.read(balance) == (200, 150, 0, 0)


async def test_a_caller_who_gives_up_while_it_is_written_leaves_nothing_held(ledger: Ledger) -> None:
    begun, taken, cancelled = threading.Event(), threading.Event(), threading.Event()

    def wait_for_others(_: Connection) -> None:
        begun.set()
        taken.wait(10)

    def wait_for_cancel(_: Connection) -> None:
        cancelled.wait(10)

    first = asyncio.create_task(ledger.write(wait_for_others))
    await asyncio.to_thread(begun.wait, 10)
    # The next group: a hold, and work that keeps it from being committed.
    asked = asyncio.create_task(ledger.hold(request()))
    second = asyncio.create_task(ledger.write(wait_for_cancel))
    await asyncio.sleep(0)
    taken.set()
    await first
    await asyncio.sleep(0.05)
    asked.cancel()
    cancelled.set()
    await second
    assert [row.state for row in await ledger.read(posted)] == ["voided"]
    assert await ledger.read(open_holds) == []


async def test_a_caller_who_gives_up_as_the_answer_comes_leaves_nothing_held(ledger: Ledger) -> None:
    task = asyncio.create_task(ledger.hold(request()))
    while ledger.num_open == 0:  # noqa: ASYNC110  # it must be the very turn of the loop in which the answer comes
        await asyncio.sleep(0)
    # The hold has been handed over; the task has not run since.
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await ledger.write(lambda _: None)
    assert await ledger.read(open_holds) == []


async def test_work_is_done_in_a_transaction_and_its_result_returned(ledger: Ledger) -> None:
    def add(connection: Connection) -> str:
        connection.execute(insert(tenants).values(name="acme", created_at=0))
        return "done"

    assert await ledger.write(add) == "done"
    assert await ledger.read(lambda connection: connection.scalars(select(tenants.c.name)).all()) == ["acme"]


async def test_work_that_fails_undoes_itself_alone(ledger: Ledger) -> None:
    def add(connection: Connection) -> None:
        connection.execute(insert(tenants).values(name="acme", created_at=0))

    def add_and_fail(connection: Connection) -> None:
        connection.execute(insert(tenants).values(name="other", created_at=0))
        raise LookupError("no such thing")

    def add_again(connection: Connection) -> None:
        connection.execute(insert(tenants).values(name="acme", created_at=0))

    results = await asyncio.gather(
        ledger.hold(request()),
        ledger.write(add),
        ledger.write(add_and_fail),
        ledger.write(add_again),
        ledger.hold(request()),
        return_exceptions=True,
    )
    assert isinstance(results[2], LookupError)
    assert type(results[3]).__name__ == "IntegrityError"
    assert await ledger.read(lambda connection: connection.scalars(select(tenants.c.name)).all()) == ["acme"]
    for hold in (results[0], results[4]):
        assert isinstance(hold, Hold)
        await ledger.settle(settlement(hold))


async def test_a_read_sees_all_that_was_settled_before(ledger: Ledger) -> None:
    for number in range(20):
        ledger.settle(settlement(await ledger.hold(request())))
        assert len(await ledger.read(posted)) == number + 1


async def test_a_read_cannot_write(ledger: Ledger) -> None:
    with pytest.raises(LedgerUnavailable) as refused:
        await ledger.read(lambda connection: connection.execute(insert(tenants).values(name="acme", created_at=0)))
    assert re.search("readonly|read-only", str(refused.value.__cause__))


async def test_many_calls_share_a_transaction(ledger: Ledger) -> None:
    commits = 0

    @event.listens_for(ledger._database._writers, "commit")
    def committed(_: Connection) -> None:
        nonlocal commits
        commits += 1

    holds = await asyncio.gather(*(ledger.hold(request()) for _ in range(500)))
    await asyncio.gather(*(ledger.settle(settlement(hold)) for hold in holds))
    assert len(await ledger.read(posted)) == 500
    # What waits while a group is written is one group: two of them at the least, and one more for each begin.
    assert 2 <= commits <= 20


async def test_any_number_of_calls_is_answered(ledger: Ledger) -> None:
    holds = await asyncio.gather(*(ledger.hold(request()) for _ in range(3_000)))
    assert ledger.num_open == 3_000
    await asyncio.gather(*(ledger.settle(settlement(hold)) for hold in holds))
    assert await ledger.read(balance) == (60_000, 45_000, 0, 0)


async def test_a_ledger_that_is_closed_refuses_and_leaves_nobody_waiting(database_setting: str, tmp_path: Path) -> None:
    ledger = open_ledger(database_setting, tmp_path)
    asked = [asyncio.create_task(ledger.hold(request())) for _ in range(10)]
    await asyncio.sleep(0)
    await ledger.close()
    assert all(isinstance(result, Hold) for result in await asyncio.gather(*asked))
    with pytest.raises(LedgerUnavailable):
        await ledger.hold(request())
    with pytest.raises(LedgerUnavailable):
        await ledger.write(lambda _: None)
    with pytest.raises(LedgerUnavailable):
        await ledger.read(posted)
    with pytest.raises(LedgerUnavailable):
        await ledger.sweep()


async def test_exactly_as_many_run_as_the_budget_is_for(database_setting: str, tmp_path: Path) -> None:
    ledgers = [open_ledger(database_setting, tmp_path) for _ in range(3)]
    asked = request(10, 5, nanos=200)
    results = await asyncio.gather(*(ledgers[number % 3].hold(asked) for number in range(200)), return_exceptions=True)
    holds = [hold for hold in results if isinstance(hold, Hold)]
    assert len(holds) == 10
    assert {type(result) for result in results} == {Hold, BudgetHeld}
    by_id = {hold_id: one for one in ledgers for hold_id in one._open}
    await asyncio.gather(*(by_id[hold.id].settle(settlement(hold)) for hold in holds))
    for one in ledgers:
        with pytest.raises(BudgetSpent):
            await one.hold(asked)
    assert await ledgers[0].read(balance) == (200, 150, 0, 0)
    assert await ledgers[0].read(differences) == []
    for one in ledgers:
        await one.close()


# --- servers that are killed ---------------------------------------------------------------------------------------


async def test_what_a_killed_server_had_noted_is_settled_by_the_next(database_setting: str, tmp_path: Path) -> None:
    killed = open_ledger(database_setting, tmp_path)
    noted, silent, over = [await killed.hold(request(10, 5, nanos=1_000)) for _ in range(3)]
    note(killed, noted, 10, 1)
    note(killed, noted, 10, 2)
    kill_before_commit(killed)
    unheard = killed.settle(settlement(over, 10, 4))
    bury(killed)
    assert not unheard.done()

    async with open_ledger(database_setting, tmp_path) as opened:
        rows = {row.id: row for row in await opened.read(posted)}
        assert {
            hold.id: (rows[hold.id].state, rows[hold.id].outcome, rows[hold.id].output_tokens)
            for hold in (noted, silent, over)
        } == {
            noted.id: ("posted", "failed", 2),
            silent.id: ("voided", "failed", None),
            over.id: ("posted", "completed", 4),
        }
        assert all(row.recovered for row in rows.values())
        assert rows[noted.id].backend == "scripted"
        assert rows[noted.id].price_id == "book"
        assert await opened.read(balance) == (14 + 18, 12 + 14, 0, 0)
        assert await opened.read(differences) == []
    assert list((tmp_path / "progress").iterdir()) == []


async def test_what_was_written_before_the_kill_is_not_written_again(database_setting: str, tmp_path: Path) -> None:
    killed = open_ledger(database_setting, tmp_path)
    hold = await killed.hold(request())
    kill_after_commit(killed)
    killed.settle(settlement(hold))
    bury(killed)
    async with open_ledger(database_setting, tmp_path) as opened:
        (row,) = await opened.read(posted)
        assert not row.recovered
        assert await opened.read(balance) == (20, 15, 0, 0)


async def test_a_hold_that_nobody_heard_of_is_voided(database_setting: str, tmp_path: Path) -> None:
    killed = open_ledger(database_setting, tmp_path)
    kill_after_commit(killed)
    asked = asyncio.create_task(killed.hold(request()))
    await asyncio.sleep(0)
    bury(killed)
    asked.cancel()
    async with open_ledger(database_setting, tmp_path) as opened:
        (row,) = await opened.read(posted)
        assert (row.state, row.recovered) == ("voided", True)
        assert await opened.read(open_holds) == []


async def test_a_server_that_runs_looks_after_one_that_was_killed(database_setting: str, tmp_path: Path) -> None:
    async with open_ledger(database_setting, tmp_path, sweep_seconds=0.01) as running:
        killed = open_ledger(database_setting, tmp_path, sweep_seconds=3_600.0)
        hold = await killed.hold(request())
        note(killed, hold, 10, 3)
        await asyncio.sleep(0.1)
        assert await running.read(open_holds) == [hold.id]
        kill(killed)
        async with asyncio.timeout(30):
            while await running.read(open_holds):  # noqa: ASYNC110  # that is what it waits for
                await asyncio.sleep(0.01)
        (row,) = await running.read(posted)
        assert (row.output_tokens, row.recovered) == (3, True)


async def test_a_server_that_closes_with_open_holds_leaves_them_to_the_next(
    database_setting: str, tmp_path: Path
) -> None:
    async with open_ledger(database_setting, tmp_path) as closed:
        note(closed, await closed.hold(request()), 10, 3)
    async with open_ledger(database_setting, tmp_path) as opened:
        (row,) = await opened.read(posted)
        assert (row.output_tokens, row.recovered) == (3, True)


async def test_a_hold_of_a_machine_that_does_not_come_back_expires(
    database_setting: str, tmp_path: Path, clock: ManualClock
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    gone = open_ledger(database_setting, there, clock=steady(clock))
    hold = await gone.hold(request())
    note(gone, hold, 10, 3)
    kill(gone)
    async with open_ledger(database_setting, here, clock=steady(clock)) as running:
        clock.advance(599)
        await running.sweep()
        assert await running.read(open_holds) == [hold.id]
        clock.advance(2)
        await running.sweep()
        assert await running.read(open_holds) == []
        assert await running.read(balance) == (0, 0, 0, 0)
    with structlog.testing.capture_logs() as logs:
        await open_ledger(database_setting, there, clock=steady(clock)).close()
    (line,) = [line for line in logs if line["event"] == "settled_too_late"]
    assert (line["id"], line["output_tokens"], line["charge_nanos"]) == (hold.id, 3, 16)


async def test_holds_of_a_machine_that_lives_do_not_expire(
    database_setting: str, tmp_path: Path, clock: ManualClock
) -> None:
    async with (
        open_ledger(database_setting, tmp_path / "here", clock=steady(clock)) as here,
        open_ledger(database_setting, tmp_path / "there", clock=steady(clock)) as there,
    ):
        hold = await there.hold(request())
        for _ in range(5):
            clock.advance(300)
            await there.sweep()
            await here.sweep()
        await there.settle(settlement(hold))
        (row,) = await here.read(posted)
        assert row.state == "posted"


async def test_a_server_of_this_machine_is_not_taken_for_dead_while_it_lives(
    database_setting: str, tmp_path: Path, clock: ManualClock
) -> None:
    async with (
        open_ledger(database_setting, tmp_path, clock=steady(clock)) as stuck,
        open_ledger(database_setting, tmp_path, clock=steady(clock)) as running,
    ):
        hold = await stuck.hold(request())
        clock.advance(24 * 3600)
        await running.sweep()
        assert await running.read(open_holds) == [hold.id]
        await stuck.settle(settlement(hold))
        (row,) = await running.read(posted)
        assert row.state == "posted"


async def test_what_is_settled_after_its_hold_was_voided_is_not_billed_and_logged(
    database_setting: str, tmp_path: Path, clock: ManualClock
) -> None:
    async with (
        open_ledger(database_setting, tmp_path / "here", clock=steady(clock)) as here,
        open_ledger(database_setting, tmp_path / "there", clock=steady(clock)) as there,
    ):
        cut_off, other = await there.hold(request()), await there.hold(request(tenant="other"))
        clock.advance(601)
        await here.sweep()
        others = await there.hold(request(tenant="other"))
        with structlog.testing.capture_logs() as logs:
            await asyncio.gather(*(there.settle(settlement(one)) for one in (cut_off, other, others)))
        assert {line["id"] for line in logs if line["event"] == "settled_too_late"} == {cut_off.id, other.id}
        assert [line["charge_nanos"] for line in logs if line["event"] == "settled_too_late"] == [20, 20]
        rows = {row.id: row.state for row in await here.read(posted)}
        assert rows == {cut_off.id: "voided", other.id: "voided", others.id: "posted"}
        assert await here.read(balance) == (0, 0, 0, 0)
        assert await here.read(differences) == []


async def test_nothing_expires_until_all_could_come_back_from_an_outage(
    new_postgres: Callable[[], PostgresServer], tmp_path: Path, clock: ManualClock
) -> None:
    """Whoever is back first does not take the others for dead, whose settlements wait for the database, too."""
    server = new_postgres()
    setting = server.create_database()
    async with (
        open_ledger(setting, tmp_path / "here", clock=steady(clock), sweep_seconds=3_600.0) as here,
        open_ledger(setting, tmp_path / "there", clock=steady(clock), sweep_seconds=3_600.0) as there,
    ):
        hold, lost = await there.hold(request()), await there.hold(request())
        clock.advance(120)
        await asyncio.to_thread(server.stop)
        with pytest.raises(LedgerUnavailable):
            await here.write(lambda _: None)
        clock.advance(900)
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(60):
            while not here.healthy:  # noqa: ASYNC110  # another thread sets it
                await asyncio.sleep(0.01)
        await here.sweep()
        async with open_ledger(setting, tmp_path / "new", clock=steady(clock)) as new:
            await new.sweep()
        await there.settle(settlement(hold))
        (row,) = await here.read(posted)
        assert (row.id, row.state) == (hold.id, "posted")
        clock.advance(61)
        await here.sweep()
        assert {row.id: row.state for row in await here.read(posted)} == {hold.id: "posted", lost.id: "voided"}


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


@pytest.mark.parametrize("seconds", [-60, 60])
async def test_a_clock_that_is_not_postgresql_s_is_told_of(postgres_url: str, tmp_path: Path, seconds: int) -> None:
    with structlog.testing.capture_logs() as logs:
        async with open_ledger(postgres_url, tmp_path, clock=lambda: time.time_ns() + seconds * 10**9):
            pass
        async with open_ledger(postgres_url, tmp_path):
            pass
    (line,) = [line for line in logs if line["event"] == "clocks_differ"]
    assert abs(line["seconds_ahead_of_database"] - seconds) < 30


async def test_another_ledgers_files_are_left_alone(database_setting: str, tmp_path: Path) -> None:
    killed = open_ledger(database_setting, tmp_path)
    note(killed, await killed.hold(request()), 10, 3)
    kill(killed)
    await open_ledger(f"sqlite:///{tmp_path / 'another.db'}", tmp_path).close()
    async with open_ledger(database_setting, tmp_path) as opened:
        (row,) = await opened.read(posted)
        assert row.output_tokens == 3


async def test_a_new_sqlite_file_is_its_owners_alone(tmp_path: Path) -> None:
    async with open_ledger("auto", tmp_path / "state") as opened:
        await opened.hold(request())
        files = [path for path in (tmp_path / "state").iterdir() if path.is_file()]
        assert {path.name for path in files} == {"ledger.db", "ledger.db-wal", "ledger.db-shm"}
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)


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
