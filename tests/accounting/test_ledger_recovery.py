"""Servers that are killed, machines that do not come back, and clocks: what becomes of their holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from headrace.backends.errors import LedgerUnavailable
from headrace.server.accounting.checks import differences
from tests.accounting.conftest import PostgresServer
from tests.accounting.ledger_kit import (
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


async def test_another_ledgers_files_are_left_alone(database_setting: str, tmp_path: Path) -> None:
    killed = open_ledger(database_setting, tmp_path)
    note(killed, await killed.hold(request()), 10, 3)
    kill(killed)
    await open_ledger(f"sqlite:///{tmp_path / 'another.db'}", tmp_path).close()
    async with open_ledger(database_setting, tmp_path) as opened:
        (row,) = await opened.read(posted)
        assert row.output_tokens == 3
