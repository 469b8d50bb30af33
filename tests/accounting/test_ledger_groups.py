"""Many callers at once: what waits shares transactions, and whoever gives up, fails or comes too late harms nobody."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, insert, select

from headrace.backends.errors import BudgetHeld, BudgetSpent, LedgerUnavailable
from headrace.server.accounting.checks import differences
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.records import Hold
from headrace.server.accounting.schema import tenants
from tests.accounting.ledger_kit import (
    balance,
    open_holds,
    open_ledger,
    posted,
    request,
    settlement,
)


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
