"""Calls that begin before their hold is durable: nothing of them is handed over before, and nothing is lost."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calls_kit import INPUT_NANOS, OUTPUT_NANOS, Served, serving

from headrace.backends.errors import BackendError, BudgetHeld, BudgetSpent, LedgerUnavailable
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, StreamEnd
from headrace.backends.requests import GenerateRequest, TextInput
from headrace.backends.types import Call, Events, Handler, Principal, Prompt, Target
from headrace.backends.usage import AttemptOutcome, Usage
from headrace.server.accounting.charges import WorstCase
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.records import Account, Allowance, HoldRequest, Settlement
from headrace.server.middleware.accounting import account
from headrace.server.middleware.early import EarlyStarts
from headrace.server.middleware.limits import RateLimits
from tests.server.server_kit import until

Start = Callable[[Handler], Handler]


class Backend:
    """Says a letter as often as it is told to."""

    def __init__(self, letters: str = "abc", error: Exception | None = None) -> None:
        self.letters, self.error = letters, error
        self.began = self.closed = 0

    async def run(self, call: Call) -> Events:
        self.began += 1
        attempt = call.meter.begin("backend", price_id="test")
        attempt.usage = Usage(input_tokens=6, output_tokens=0)
        try:
            for i, letter in enumerate(self.letters):
                attempt.usage.output_tokens = i + 1
                yield Delta(0, letter, (i,))
            if self.error is not None:
                raise self.error
            yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
            yield StreamEnd()
        finally:
            self.closed += 1


def call(served: Served, *, tenant: str = "acme", max_new_tokens: int = 4, **request: Any) -> Call:
    model = served.app.registry.find("letters").model
    assert model is not None
    made = Call(
        request=GenerateRequest(input=TextInput("prompt"), **request),
        request_id="r",
        arrived=0.0,
        is_streamed=True,
        principal=Principal(tenant),
        targets=(Target(model=model, prompt=Prompt("prompt", tuple(b"prompt")), max_new_tokens=max_new_tokens),),
    )
    made.enter(made.targets[0])
    return made


def accounted(served: Served, backend: Backend) -> Handler:
    limits = RateLimits(served.app.accounting.accounts.terms, clock=time.monotonic)
    return account(backend.run, accounting=served.app.accounting, limits=limits)


@contextmanager
def locked(state_dir: Path) -> Iterator[sqlite3.Connection]:
    """Nobody else can write into the ledger until it is rolled back."""
    with closing(sqlite3.connect(state_dir / "ledger.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other
        if other.in_transaction:
            other.rollback()


@asynccontextmanager
async def reading(handler: Handler, made: Call) -> AsyncIterator[tuple[asyncio.Task[None], list[Event]]]:
    """Reads a call in a task of its own."""
    seen: list[Event] = []

    async def read() -> None:
        async with aclosing(handler(made)) as events:
            async for event in events:
                seen.append(event)  # noqa: PERF401 - one by one, as they come

    task = asyncio.create_task(read())
    try:
        yield task, seen
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_call_without_limits_begins_at_once_and_hands_nothing_over_before_it_is_held(tmp_path: Path) -> None:
    backend = Backend()
    async with serving(tmp_path) as served:
        with locked(tmp_path) as other:
            async with reading(accounted(served, backend), made := call(served)) as (task, seen):
                await until(lambda: backend.began == 1)
                await asyncio.sleep(0.05)
                assert seen == []
                other.rollback()
                await task
        assert [type(event) for event in seen] == [Delta, Delta, Delta, ChoiceFinish, StreamEnd]
        [posting] = await served.postings()
    assert (posting.input_tokens, posting.output_tokens, posting.outcome) == (6, 3, "completed")
    assert made.meter.cost is not None
    assert posting.charge_nanos == made.meter.cost.charge_nanos == 6 * INPUT_NANOS + 3 * OUTPUT_NANOS


async def test_what_began_early_and_is_refused_is_cut_off_and_costs_its_caller_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Backend()
    async with serving(tmp_path) as served:
        ledger = served.app.accounting.ledger
        assert ledger is not None
        ask = ledger.ask

        def refused(request: HoldRequest) -> asyncio.Future[Any]:
            asyncio.get_running_loop().call_later(0.02, future.set_exception, LedgerUnavailable())
            return future

        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(ledger, "ask", refused)
        async with reading(accounted(served, backend), made := call(served)) as (task, seen):
            with pytest.raises(LedgerUnavailable):
                await task
        monkeypatch.setattr(ledger, "ask", ask)
        assert seen == []
        assert (backend.began, backend.closed) == (1, 1)
        assert made.meter.attempts == []
        assert made.meter.cost is None
        assert await served.postings() == []
        assert await served.num_holds() == 0


async def test_one_that_is_cancelled_before_it_is_held_is_billed_what_it_had_used(tmp_path: Path) -> None:
    backend = Backend()
    async with serving(tmp_path) as served:
        with locked(tmp_path) as other:
            async with reading(accounted(served, backend), call(served)) as (task, seen):
                await until(lambda: backend.began == 1)
                task.cancel()
                await until(lambda: backend.closed == 1)
                assert not task.done()  # it waits for what becomes of its hold
                assert seen == []
                other.rollback()
                await asyncio.wait({task})
        [posting] = await served.postings()
        balance = await served.balance()
    assert (posting.output_tokens, posting.outcome) == (1, "cancelled")
    assert posting.charge_nanos == 6 * INPUT_NANOS + OUTPUT_NANOS
    assert (balance.held_nanos, balance.posted_nanos) == (0, posting.charge_nanos)


async def test_a_backend_that_fails_before_it_is_held_leaves_no_hold(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with locked(tmp_path) as other:
            backend = Backend("", BackendError("broken"))
            async with reading(accounted(served, backend), call(served)) as (task, _):
                await until(lambda: backend.closed == 1)
                other.rollback()
                with pytest.raises(BackendError, match="broken"):
                    await task
        [posting] = await served.postings()
        assert posting.outcome == "failed"
        assert await served.num_holds() == 0


async def test_one_that_is_cancelled_again_while_it_waits_is_settled_once_it_is_held(tmp_path: Path) -> None:
    backend = Backend()
    async with serving(tmp_path) as served:
        with locked(tmp_path) as other:
            async with reading(accounted(served, backend), call(served)) as (task, _):
                await until(lambda: backend.began == 1)
                for _ in range(2):
                    task.cancel()
                    await asyncio.sleep(0.02)
                assert task.done()
            other.rollback()
            await served.all_settled()
        [posting] = await served.postings()
    assert (posting.output_tokens, posting.outcome) == (1, "cancelled")


async def test_one_that_waits_for_its_model_ends_when_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = closed = 0

    async def never(made: Call) -> Events:
        nonlocal began, closed
        began += 1
        try:
            await asyncio.Event().wait()
            yield StreamEnd()
        finally:
            closed += 1

    async with serving(tmp_path) as served:
        ledger = served.app.accounting.ledger
        assert ledger is not None
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(ledger, "ask", lambda _: answer)
        backend = Backend()
        monkeypatch.setattr(backend, "run", never)
        async with reading(accounted(served, backend), call(served)) as (task, _):
            await until(lambda: began == 1)
            answer.set_exception(LedgerUnavailable())
            with pytest.raises(LedgerUnavailable):
                await task
        assert closed == 1
        monkeypatch.undo()


async def test_a_paid_backend_does_not_begin_early_where_a_limit_could_refuse_the_call(tmp_path: Path) -> None:
    early = EarlyStarts()
    need = WorstCase(input_tokens=10, n=1, max_new_tokens=0, price=None)
    limited = HoldRequest(
        tenant="acme",
        key="",
        model="m",
        request_id="r",
        worst_case=need,
        allowances=((Account("acme"), Allowance(tokens=10_000)),),
    )
    async with serving(tmp_path) as served:
        assert served.app.accounting.ledger is not None
        hold = await served.app.accounting.ledger.hold(limited)
        served.app.accounting.ledger.settle(
            Settlement(hold=hold, usage=Usage(), cost=None, outcome=AttemptOutcome.FAILED, backend=None)
        )
    assert not early.may_begin(limited, is_costly=False)
    early.held(hold)
    assert early.may_begin(limited, is_costly=False)
    assert not early.may_begin(limited, is_costly=True)
    early.refused(limited)
    assert not early.may_begin(limited, is_costly=False)
    assert early.may_begin(replace(limited, allowances=((Account("acme"), Allowance()),)), is_costly=True)


async def test_with_limits_only_those_begin_early_to_whom_the_last_hold_left_plenty(tmp_path: Path) -> None:
    backend = Backend()
    async with serving(tmp_path, plan={"monthly_tokens": 100_000}) as served:
        handler = accounted(served, backend)
        with locked(tmp_path) as other:
            async with reading(handler, call(served)) as (task, _):
                await asyncio.sleep(0.05)
                assert backend.began == 0
                other.rollback()
                await task
        assert backend.began == 1
        for early, options in (
            (True, {}),
            (False, {"max_new_tokens": 1_000}),
            (False, {"clamp_to_budget": True}),
            (False, {"tenant": "other"}),
        ):
            began = backend.began
            with locked(tmp_path) as other:
                async with reading(handler, call(served, **options)) as (task, seen):
                    await asyncio.sleep(0.05)
                    assert (backend.began == began + 1) is early, options
                    assert seen == []
                    other.rollback()
                    await task
        assert len(await served.postings()) == 5


async def test_a_budget_that_another_server_has_spent_meanwhile_is_not_overrun(tmp_path: Path) -> None:
    backend = Backend()
    async with serving(tmp_path, plan={"monthly_tokens": 10_000}) as served:
        handler = accounted(served, backend)
        async with reading(handler, call(served)) as (task, _):
            await task
        other = await asyncio.to_thread(
            Ledger.open, f"sqlite:///{tmp_path / 'ledger.db'}", state_dir=tmp_path / "other", currency="USD"
        )
        try:
            need = WorstCase(input_tokens=9_990, n=1, max_new_tokens=0, price=None)
            limit = ((Account("acme"), Allowance(tokens=10_000)),)
            await other.hold(
                HoldRequest(tenant="acme", key="", model="m", request_id="r", worst_case=need, allowances=limit)
            )
            async with reading(handler, made := call(served)) as (task, seen):
                with pytest.raises((BudgetHeld, BudgetSpent)):
                    await task
            assert seen == []
            assert (backend.began, backend.closed) == (2, 2)
            assert made.meter.attempts == []
            # The next one waits again for what the ledger says.
            async with reading(handler, call(served)) as (task, _):
                with pytest.raises((BudgetHeld, BudgetSpent)):
                    await task
            assert backend.began == 2
        finally:
            await other.close()
