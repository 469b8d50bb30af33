"""What happens when the database is locked, lost, full or read-only: nothing is served unbilled, nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import Connection, insert

from headrace.backends.errors import LedgerUnavailable
from headrace.server.accounting import database as database_module
from headrace.server.accounting import ledger as ledger_module
from headrace.server.accounting import writer as writer_module
from headrace.server.accounting.checks import differences
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.records import Hold
from headrace.server.accounting.schema import tenants
from headrace.server.config import SettingsError
from tests.accounting.conftest import PostgresServer
from tests.accounting.ledger_kit import PRICE, balance, kill, open_holds, open_ledger, posted, request, settlement


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience of a test."""
    monkeypatch.setattr(database_module, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(writer_module, "_LAST_RETRY", 0.1)
    monkeypatch.setattr(ledger_module, "CLOSE_SECONDS", 0.3)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    async with open_ledger("auto", tmp_path) as opened:
        yield opened


async def until_healthy(ledger: Ledger) -> None:
    async with asyncio.timeout(60):
        while not ledger.healthy:  # noqa: ASYNC110  # another thread sets it
            await asyncio.sleep(0.01)


async def until_refused(ledger: Ledger, held: list[Hold]) -> None:
    """Holds as long as it can."""
    with contextlib.suppress(LedgerUnavailable):
        while True:
            held.append(await ledger.hold(request()))


async def refused(ledger: Ledger) -> None:
    with pytest.raises(LedgerUnavailable) as error:
        await ledger.hold(request())
    assert error.value.retry_after > 0


async def test_a_locked_database_is_waited_for_then_calls_are_refused_until_it_is_free(
    ledger: Ledger, tmp_path: Path
) -> None:
    hold = await ledger.hold(request())
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    settled = ledger.settle(settlement(hold, 10, 3))
    await refused(ledger)
    assert not ledger.healthy
    with pytest.raises(LedgerUnavailable):
        await ledger.write(lambda _: None)
    assert not settled.done()
    assert ledger.num_open == 1
    other.execute("ROLLBACK")
    other.close()
    await settled
    await until_healthy(ledger)
    await ledger.settle(settlement(await ledger.hold(request()), 10, 3))
    assert await ledger.read(balance) == (32, 26, 0, 0)


async def test_a_database_that_goes_away_while_it_is_opened_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(open_ledger("auto", tmp_path))
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None, check_same_thread=False)

    def locked(*_: object, **__: object) -> None:
        other.execute("BEGIN IMMEDIATE")  # the database is open, and what was left behind not yet settled

    monkeypatch.setattr(ledger_module, "Writer", locked)
    with pytest.raises(SettingsError, match=r"^ledger: cannot be used: database is locked"):
        await asyncio.to_thread(Ledger.open, "auto", state_dir=tmp_path, currency="USD")
    other.close()


async def test_a_short_lock_is_nothing_but_a_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(database_module, "LOCK_SECONDS", 60.0)
    async with open_ledger("auto", tmp_path) as ledger:
        other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        asked = asyncio.create_task(ledger.hold(request()))
        await asyncio.sleep(0.3)
        assert not asked.done()
        other.execute("ROLLBACK")
        other.close()
        await ledger.settle(settlement(await asked))


async def test_a_database_that_is_read_only_refuses_calls(ledger: Ledger, tmp_path: Path) -> None:
    hold = await ledger.hold(request())
    # What a file system that has become read-only makes SQLite say.
    await ledger.write(lambda connection: connection.exec_driver_sql("PRAGMA query_only = ON") and None)
    with structlog.testing.capture_logs() as logs:
        settled = ledger.settle(settlement(hold))
        await refused(ledger)
        await settled
    assert [line["event"] for line in logs] == ["ledger_unavailable", "ledger_back"]
    await until_healthy(ledger)
    await ledger.settle(settlement(await ledger.hold(request())))


async def test_a_full_disk_refuses_calls_and_loses_no_settlement(ledger: Ledger) -> None:
    """As SQLite's own limit of pages has it; ``test_a_full_file_system`` has a real one."""
    hold = await ledger.hold(request())

    def fill(connection: Any) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    await ledger.write(fill)
    with pytest.raises(LedgerUnavailable):
        await ledger.write(_many_rows)
    settled = ledger.settle(settlement(hold, 10, 3))
    # The limit was the connection's, which is made anew: as if there were room again.
    await settled
    await until_healthy(ledger)
    assert await ledger.read(balance) == (16, 13, 0, 0)


def _many_rows(connection: Connection) -> None:
    connection.execute(insert(tenants), [{"name": f"{number:0>128}", "created_at": 0} for number in range(1_000)])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes; needs to be root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root can have a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_full_file_system_refuses_calls_and_loses_no_settlement(small_disk: Path, tmp_path: Path) -> None:
    async with open_ledger(f"sqlite:///{small_disk / 'ledger.db'}", tmp_path) as ledger:
        held = [await ledger.hold(request()) for _ in range(5)]
        with (small_disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(b"\0" * 4096)
        await until_refused(ledger, held)
        settlements = [ledger.settle(settlement(hold, 10, 3)) for hold in held]
        (small_disk / "ballast").unlink()
        await asyncio.gather(*settlements)
        await until_healthy(ledger)
        assert await ledger.read(balance) == (16 * len(held), 13 * len(held), 0, 0)
        assert await ledger.read(open_holds) == []
        assert await ledger.read(differences) == []


async def test_no_call_runs_that_could_not_be_noted(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    held: list[Hold] = []
    await until_refused(ledger, held)
    assert held
    await asyncio.gather(*(ledger.settle(settlement(hold)) for hold in held))
    await ledger.settle(settlement(await ledger.hold(request())))


async def test_a_file_that_is_gone_is_not_written_to_and_not_replaced(ledger: Ledger, tmp_path: Path) -> None:
    hold = await ledger.hold(request())
    (tmp_path / "ledger.db").rename(tmp_path / "away.db")
    settled = ledger.settle(settlement(hold))
    await refused(ledger)
    with pytest.raises(LedgerUnavailable):
        await ledger.read(posted)
    assert not (tmp_path / "ledger.db").exists()
    assert not settled.done()
    (tmp_path / "away.db").rename(tmp_path / "ledger.db")
    await settled
    await until_healthy(ledger)
    assert len(await ledger.read(posted)) == 1


async def test_a_server_that_stops_during_an_outage_leaves_its_settlements_to_the_next(tmp_path: Path) -> None:
    ledger = open_ledger("auto", tmp_path)
    hold = await ledger.hold(request())
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    settled = ledger.settle(settlement(hold, 10, 3))
    await ledger.close()
    assert not settled.done()
    other.execute("ROLLBACK")
    other.close()
    async with open_ledger("auto", tmp_path) as opened:
        (row,) = await opened.read(posted)
        assert (row.output_tokens, row.outcome, row.recovered) == (3, "completed", True)


class FailingCommit:
    """The next commit is done, and seems to have failed."""

    def __init__(self, ledger: Ledger) -> None:
        self._dialect = ledger._database._writers.dialect
        self._commit = self._dialect.do_commit
        self._dialect.do_commit = self

    def __call__(self, connection: Any) -> None:
        self._dialect.do_commit = self._commit
        self._commit(connection)
        raise sqlite3.OperationalError("disk I/O error")


async def test_a_hold_whose_commit_seemed_to_fail_does_not_stay(ledger: Ledger) -> None:
    FailingCommit(ledger)
    await refused(ledger)
    await until_healthy(ledger)
    await ledger.write(lambda _: None)
    assert await ledger.read(open_holds) == []
    assert [row.state for row in await ledger.read(posted)] == ["voided"]
    assert await ledger.read(differences) == []


async def test_a_settlement_whose_commit_seemed_to_fail_is_written_once(ledger: Ledger) -> None:
    holds = [await ledger.hold(request()) for _ in range(3)]
    with structlog.testing.capture_logs() as logs:
        FailingCommit(ledger)
        await asyncio.gather(*(ledger.settle(settlement(hold)) for hold in holds))
    assert "settled_too_late" not in {line["event"] for line in logs}
    assert len(await ledger.read(posted)) == 3
    assert await ledger.read(balance) == (60, 45, 0, 0)


@pytest.mark.parametrize("num_others", [0, 5])
async def test_what_cannot_be_written_fails_alone(database_setting: str, tmp_path: Path, num_others: int) -> None:
    endless = request(2**62, 0, price=replace(PRICE, input_nanos=10**9), tenant="other")
    async with open_ledger(database_setting, tmp_path) as ledger:
        results = await asyncio.gather(
            *(ledger.hold(request()) for _ in range(num_others)), ledger.hold(endless), return_exceptions=True
        )
        assert isinstance(results.pop(), Exception)
        assert ledger.healthy
        for hold in results:
            assert isinstance(hold, Hold)
            await ledger.settle(settlement(hold))
        assert await ledger.read(open_holds) == []
        assert await ledger.read(differences) == []


async def test_a_postgresql_that_stops_and_starts_again_loses_nothing(
    new_postgres: Callable[[], PostgresServer], tmp_path: Path
) -> None:
    server = new_postgres()
    async with open_ledger(server.create_database(), tmp_path) as ledger:
        first, second = await ledger.hold(request()), await ledger.hold(request())
        await ledger.settle(settlement(first, 10, 3))
        await asyncio.to_thread(server.stop)
        settled = ledger.settle(settlement(second, 10, 3))
        await refused(ledger)
        with pytest.raises(LedgerUnavailable):
            await ledger.read(posted)
        assert not settled.done()
        await asyncio.to_thread(server.start)
        await settled
        await until_healthy(ledger)
        await ledger.settle(settlement(await ledger.hold(request()), 10, 3))
        assert await ledger.read(balance) == (48, 39, 0, 0)
        assert await ledger.read(open_holds) == []
        assert await ledger.read(differences) == []


async def test_calls_go_on_through_a_postgresql_that_is_restarted(
    new_postgres: Callable[[], PostgresServer], tmp_path: Path
) -> None:
    """Whatever the moment, each call that ran is posted once, and none that was refused."""
    server = new_postgres()
    posted_ids: list[str] = []
    async with open_ledger(server.create_database(), tmp_path) as ledger:
        running = True

        async def caller() -> None:
            while running:
                try:
                    hold = await ledger.hold(request())
                except LedgerUnavailable:
                    await asyncio.sleep(0.01)
                    continue
                await ledger.settle(settlement(hold))
                posted_ids.append(hold.id)

        callers = [asyncio.create_task(caller()) for _ in range(8)]
        for _ in range(3):
            before = len(posted_ids)
            async with asyncio.timeout(60):
                while len(posted_ids) < before + 50:  # noqa: ASYNC110  # load as it comes
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
        running = False
        await asyncio.gather(*callers)
        await until_healthy(ledger)
        await ledger.write(lambda _: None)
        rows = await ledger.read(posted)
        assert sorted(row.id for row in rows if row.state == "posted") == sorted(posted_ids)
        assert await ledger.read(open_holds) == []
        assert await ledger.read(differences) == []
