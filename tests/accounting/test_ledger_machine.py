"""Any order of calls, kills, clocks and servers: the ledger does what the reference does, and never overruns."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, text

from headrace.backends.errors import BudgetHeld, BudgetSpent
from headrace.backends.usage import AttemptOutcome
from headrace.server.accounting.checks import differences
from headrace.server.accounting.clock import Clock, month_of
from headrace.server.accounting.database import Database
from headrace.server.accounting.ledger import HOLD_SECONDS, Ledger
from headrace.server.accounting.records import Account, Allowance, Hold
from headrace.server.accounting.writer import COME_BACK_SECONDS
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
from tests.accounting.reference_ledger import HELD, SPENT, Open, ReferenceLedger

T = TypeVar("T")

TENANT, KEY = Account("acme"), Account("acme", "ab12")
LIMITS = ((TENANT, Allowance(nanos=200, tokens=160)), (KEY, Allowance(nanos=90, tokens=10**6)))
MACHINES = ("here", "there")
HOLD_NANOS = round(HOLD_SECONDS * 1e9)
COME_BACK_NANOS = round(COME_BACK_SECONDS * 1e9)
servers = st.integers(0, 10)
"""Which of those that run; counted around."""


@dataclass
class Server:
    """A ledger as a process has it."""

    machine: str
    ledger: Ledger
    clock: Clock
    expires_from: int
    """Before it voids nothing that has expired."""
    holds: dict[str, Hold] = field(default_factory=dict)
    lost: int = 0


class LedgerMachine(RuleBasedStateMachine):
    """``setting`` and ``folder`` are set by a subclass."""

    new_database: Callable[[Path], str]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp())
        self.setting = type(self).new_database(self.folder)
        self.database = Database.open(self.setting, state_dir=self.folder, currency="USD")
        self.time = ManualClock()
        self.reference = ReferenceLedger()
        self.running: list[Server] = []
        self.dead: list[tuple[str, str]] = []
        """Machine and owner of those that were killed, and not yet taken over."""
        self.months = {"2026-11"}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    # --- servers ----------------------------------------------------------------------------------------------------

    @initialize()
    def first(self) -> None:
        self.open("here")

    @precondition(lambda self: len(self.running) < 3)
    @rule(machine=st.sampled_from(MACHINES))
    def open(self, machine: str) -> None:
        clock = steady(self.time)
        ledger = open_ledger(self.setting, self.folder / machine, clock=clock, sweep_seconds=3_600.0)
        self.running.append(Server(machine, ledger, clock, clock() + COME_BACK_NANOS))
        self._swept(self.running[-1])

    @precondition(lambda self: len(self.running) > 1)
    @rule(which=servers)
    def close(self, which: int) -> None:
        server = self.running.pop(which % len(self.running))
        self.run(server.ledger.close())
        if server.holds:
            self.dead.append((server.machine, server.ledger.owner))

    @precondition(lambda self: self.running)
    @rule(which=servers)
    def kill(self, which: int) -> None:
        self._dies(which, kill)

    @precondition(lambda self: self.running)
    @rule(which=servers, committed=st.booleans())
    def kill_in_a_hold(self, which: int, committed: bool) -> None:
        server = self.running[which % len(self.running)]
        asked = replace(request(7, 3), allowances=LIMITS[:1])
        month = month_of(server.clock())
        expected = self.reference.decide(asked, month)
        (kill_after_commit if committed else kill_before_commit)(server.ledger)

        async def ask() -> None:
            task = self.loop.create_task(server.ledger.hold(asked))
            await asyncio.sleep(0)
            await asyncio.to_thread(bury, server.ledger)
            task.cancel()

        self.run(ask())
        self._dies(which, lambda _: None)
        if committed and expected == asked.worst_case.max_new_tokens:
            (unheard,) = set(self._read(open_holds)) - self.reference.open.keys()
            self.months.add(month)
            self.reference.open[unheard] = Open(
                (TENANT,), month, 13, 10, server.machine, server.ledger.owner, server.clock() + HOLD_NANOS
            )

    @precondition(lambda self: any(server.holds for server in self.running))
    @rule(which=servers, used=st.tuples(st.integers(0, 7), st.integers(0, 3)), committed=st.booleans())
    def kill_in_a_settlement(self, which: int, used: tuple[int, int], committed: bool) -> None:
        server = self._with_holds(which)
        hold = server.holds.popitem()[1]
        (kill_after_commit if committed else kill_before_commit)(server.ledger)

        async def settle() -> None:
            server.ledger.settle(settlement(hold, *used))
            await asyncio.to_thread(bury, server.ledger)

        self.run(settle())
        amounts = (used[0] + 2 * used[1], sum(used))
        if hold.id in self.reference.open:
            self.reference.open[hold.id].noted = amounts
        self._dies(self.running.index(server), lambda _: None)
        if committed:
            self.reference.settle(hold.id, amounts)

    def _dies(self, which: int, how: Callable[[Ledger], None]) -> None:
        server = self.running.pop(which % len(self.running))
        how(server.ledger)
        self.dead.append((server.machine, server.ledger.owner))

    # --- calls ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.running)
    @rule(
        which=servers,
        input_tokens=st.integers(0, 40),
        new_tokens=st.integers(0, 40),
        key=st.booleans(),
        least=st.none() | st.integers(1, 20),
    )
    def hold(self, which: int, input_tokens: int, new_tokens: int, key: bool, least: int | None) -> None:
        server = self.running[which % len(self.running)]
        asked = replace(
            request(input_tokens, new_tokens, key="ab12" if key else "", least=least),
            allowances=LIMITS if key else LIMITS[:1],
        )
        month = month_of(server.clock())
        expected = self.reference.decide(asked, month)
        try:
            hold = self.run(server.ledger.hold(asked))
        except BudgetSpent:
            assert expected == SPENT
        except BudgetHeld:
            assert expected == HELD
        else:
            assert hold.worst_case.max_new_tokens == expected
            assert hold.month == month
            self.months.add(month)
            server.holds[hold.id] = hold
            self.reference.open[hold.id] = Open(
                (TENANT, KEY) if key else (TENANT,),
                month,
                hold.worst_case.nanos,
                hold.worst_case.tokens,
                server.machine,
                server.ledger.owner,
                server.clock() + HOLD_NANOS,
            )

    @precondition(lambda self: any(server.holds for server in self.running))
    @rule(which=servers, share=st.floats(0, 1))
    def note(self, which: int, share: float) -> None:
        server = self._with_holds(which)
        hold = list(server.holds.values())[which % len(server.holds)]
        used = self._used(hold, share)
        note(server.ledger, hold, *used)
        if hold.id in self.reference.open:
            self.reference.open[hold.id].noted = (used[0] + 2 * used[1], sum(used))

    @precondition(lambda self: any(server.holds for server in self.running))
    @rule(which=servers, share=st.floats(0, 1), outcome=st.sampled_from(AttemptOutcome))
    def settle(self, which: int, share: float, outcome: AttemptOutcome) -> None:
        server = self._with_holds(which)
        hold = server.holds.popitem()[1]
        used = self._used(hold, share)

        async def settle() -> None:
            await server.ledger.settle(settlement(hold, *used, outcome=outcome))

        self.run(settle())
        self.reference.settle(hold.id, (used[0] + 2 * used[1], sum(used)))

    @staticmethod
    def _used(hold: Hold, share: float) -> tuple[int, int]:
        return round(share * hold.worst_case.input_tokens), round(share * hold.worst_case.max_new_tokens)

    def _with_holds(self, which: int) -> Server:
        with_holds = [server for server in self.running if server.holds]
        return with_holds[which % len(with_holds)]

    # --- time -------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1, 60, 700, 86_400, 20 * 86_400]) | st.integers(-40 * 86_400, 0))
    def pass_time(self, seconds: int) -> None:
        self.time.advance(seconds)

    @precondition(lambda self: self.running)
    @rule(which=servers)
    def sweep(self, which: int) -> None:
        server = self.running[which % len(self.running)]
        self.run(server.ledger.sweep())
        self._swept(server)

    def _swept(self, server: Server) -> None:
        """What ``server`` has done to holds of others."""
        now = server.clock()
        killed = [owner for machine, owner in self.dead if machine == server.machine]
        self.dead = [(machine, owner) for machine, owner in self.dead if machine != server.machine]
        for hold_id, one in list(self.reference.open.items()):
            if one.owner == server.ledger.owner:
                one.expires_at = now + HOLD_NANOS
            elif one.owner in killed:
                self.reference.settle(hold_id, one.noted or (0, 0))
            elif one.machine != server.machine and one.expires_at < now and now >= server.expires_from:
                self.reference.settle(hold_id, (0, 0))

    # --- what must be true ------------------------------------------------------------------------------------------

    @invariant()
    def it_is_as_the_reference_has_it(self) -> None:
        with self.database.reading() as connection:
            self._compare(connection)

    def _compare(self, connection: Connection) -> None:
        assert differences(connection) == []
        rows = posted(connection)
        assert len({row.id for row in rows}) == len(rows)
        tokens = {row.id: (row.input_tokens or 0) + (row.output_tokens or 0) for row in rows}
        assert {row.id: (row.charge_nanos, tokens[row.id]) for row in rows} == self.reference.settled
        assert set(open_holds(connection)) == self.reference.open.keys()
        for account, limits in LIMITS:
            for month in self.months:
                nanos, tokens_, held_nanos, held_tokens = balance(connection, account, month)
                assert (nanos, tokens_) == self.reference.posted[account, month]
                assert (held_nanos, held_tokens) == self.reference.held(account, month)
                assert limits.nanos is not None
                assert limits.tokens is not None
                assert nanos + held_nanos <= limits.nanos
                assert tokens_ + held_tokens <= limits.tokens

    def _read(self, work: Callable[[Connection], T]) -> T:
        with self.database.reading() as connection:
            return work(connection)

    def teardown(self) -> None:
        for _ in range(len(self.running)):
            self._dies(0, kill)
        for machine in MACHINES:
            self.open(machine)
            self.run(self.running.pop().ledger.close())
        assert self.reference.open == {}
        self.it_is_as_the_reference_has_it()
        for machine in MACHINES:
            assert list((self.folder / machine / "progress").iterdir()) == []
        self.database.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        rmtree(self.folder)


def run_machine(machine: type[LedgerMachine], num_examples: int) -> None:
    chosen = settings(
        max_examples=num_examples,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(machine, settings=chosen)  # type: ignore[no-untyped-call]


def test_any_order_of_things_on_sqlite(tmp_path: Path) -> None:
    empty = tmp_path / "empty.db"
    Database.open(f"sqlite:///{empty}", state_dir=tmp_path, currency="USD").close()

    class OnSqlite(LedgerMachine):
        @staticmethod
        def new_database(folder: Path) -> str:
            copyfile(empty, folder / "ledger.db")
            return f"sqlite:///{folder / 'ledger.db'}"

    run_machine(OnSqlite, 40)


def test_any_order_of_things_on_postgresql(postgres_url: str, tmp_path: Path) -> None:
    database = Database.open(postgres_url, state_dir=tmp_path, currency="USD")
    written = ("balances", "holds", "postings", "daily_usage")

    class OnPostgresql(LedgerMachine):
        @staticmethod
        def new_database(_: Path) -> str:
            with database.writing() as connection:
                connection.execute(text(f"TRUNCATE {', '.join(written)}"))
            return postgres_url

    run_machine(OnPostgresql, 20)
    database.close()
