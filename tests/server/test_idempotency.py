"""The middleware that answers a request once, on a real ledger."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import pytest
from sqlalchemy import select, update

from headrace.backends.api import DeterminismClass, ModelCard
from headrace.backends.errors import (
    AnswerExpired,
    BackendError,
    InvalidArgument,
    LedgerUnavailable,
    ModelNotFound,
    Overloaded,
)
from headrace.backends.types import (
    AttemptOutcome,
    Call,
    ChoiceFinish,
    Cost,
    Delta,
    Event,
    Events,
    FinishReason,
    GenerateRequest,
    Handler,
    Principal,
    Prompt,
    ResponseOptions,
    StreamEnd,
    TextInput,
)
from headrace.server.accounting.answers import AnsweredBy
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.schema import answers
from headrace.server.middleware import idempotency as idempotency_module
from headrace.server.middleware.idempotency import MAX_UNREAD, Idempotency
from tests.accounting.ledger_kit import ManualClock, kill, open_ledger
from tests.server.server_kit import events_of, text_of, until

_numbers = itertools.count()
COST = Cost(currency="USD", charge_nanos=42, price_id="book", estimated=False)
FOREVER = 3600.0


def call(text: str = "prompt", key: str | None = "order-1", *, tenant: str = "acme", **request: Any) -> Call:
    return Call(
        request=GenerateRequest(input=TextInput(text), idempotency_key=key, **request),
        request_id=f"call-{next(_numbers)}",
        arrived=time.monotonic(),
        principal=Principal(tenant),
    )


class Turns(asyncio.Semaphore):
    """None at first."""

    def __init__(self) -> None:
        super().__init__(0)

    def give(self, count: int = 1) -> None:
        for _ in range(count):
            self.release()


@dataclass
class Model:
    """Says the letters of a text, one each time that ``go`` has a turn; or all, if ``free``."""

    letters: str = "abc"
    free: bool = True
    error: Exception | None = None
    """What it ends with instead of a finish."""
    runs: int = 0
    said: int = 0
    closed: int = 0
    go: Turns = field(default_factory=Turns)

    async def run(self, made: Call) -> Events:
        self.runs += 1
        attempt = made.meter.begin("tests", price_id="book")
        attempt.usage.input_tokens, attempt.usage.output_tokens = len("prompt"), 0
        made.model = AnsweredBy(
            card=ModelCard(name="letters", context_length=64, digest="sha256:00"),
            backend="tests",
            determinism=DeterminismClass.STRICT,
        )
        made.prompt = Prompt("prompt", (1, 2))
        made.meter.started = made.meter.first_token = made.meter.last_token = time.monotonic()
        try:
            for i, letter in enumerate(self.letters):
                if not self.free:
                    await self.go.acquire()
                attempt.usage.output_tokens += 1
                self.said += 1
                yield Delta(0, letter, (i,))
            if self.error is not None:
                attempt.outcome = AttemptOutcome.FAILED
                raise self.error
            attempt.outcome = AttemptOutcome.COMPLETED
            yield ChoiceFinish(0, FinishReason.EOS_TOKEN, seed=7)
            yield StreamEnd()
        finally:
            made.meter.cost = COST
            self.closed += 1


def idempotency(ledger: Ledger | None, **options: Any) -> Idempotency:
    options = {"clock": time.time_ns, "hours": 24.0, "max_bytes": 10**6, "linger": FOREVER} | options
    return Idempotency(ledger, **options)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    async with open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}", tmp_path) as opened:
        yield opened


@pytest.fixture
async def brief(ledger: Ledger) -> AsyncIterator[Idempotency]:
    """Lets nothing go on that nobody reads."""
    made = idempotency(ledger, linger=0.0)
    yield made
    await made.close()


@pytest.fixture
async def keys(ledger: Ledger) -> AsyncIterator[Idempotency]:
    made = idempotency(ledger)
    yield made
    await made.close()
    assert made._size == 0
    assert not made._runs


class Reader:
    """Reads a call in a task, as far as it is told to."""

    def __init__(self, handler: Handler, made: Call) -> None:
        self.call = made
        self.events: list[Event] = []
        self.wanted = Turns()
        self._handler = handler
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with aclosing(self._handler(self.call)) as events:
            await self.wanted.acquire()
            async for event in events:
                self.events.append(event)
                await self.wanted.acquire()

    async def read(self, count: int) -> None:
        """Until it has so many events."""
        self.wanted.give(count - len(self.events))
        await until(lambda: len(self.events) == count or self.task.done())
        assert len(self.events) == count

    async def rest(self) -> str:
        self.wanted.give(1000)
        await self.task
        return text_of(self.events)

    async def leave(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


# --- replaying ------------------------------------------------------------------------------------------------------


async def test_without_a_key_every_call_runs(keys: Idempotency) -> None:
    model = Model()
    for _ in range(2):
        assert text_of(await events_of(keys.replay(model.run), call(key=None))) == "abc"
    assert model.runs == 2


async def test_the_same_request_under_the_same_key_runs_once_and_gets_the_same(keys: Idempotency) -> None:
    model, first, second = Model(), call(), call()
    handler = keys.replay(model.run)
    events = await events_of(handler, first)
    assert await events_of(handler, second) == events
    assert model.runs == 1
    assert second.meter.usage() == first.meter.usage()
    assert second.meter.attempts == first.meter.attempts
    assert second.meter.cost == first.meter.cost == COST
    assert (first.meter.replayed, second.meter.replayed) == (False, True)
    assert first.model is not None
    assert second.model is not None
    assert second.model.card == first.model.card
    assert (second.model.backend, second.model.determinism) == ("tests", DeterminismClass.STRICT)


async def test_a_replay_has_no_timings_since_nothing_was_computed(keys: Idempotency) -> None:
    handler, second = keys.replay(Model().run), call()
    await events_of(handler, call())
    await events_of(handler, second)
    meter = second.meter
    assert (meter.started, meter.first_token, meter.first_answer_token, meter.last_token) == (None,) * 4


async def test_a_replay_survives_a_restart(tmp_path: Path) -> None:
    setting, model = f"sqlite:///{tmp_path / 'ledger.db'}", Model()
    for _ in range(2):
        async with open_ledger(setting, tmp_path) as ledger:
            assert text_of(await events_of(idempotency(ledger).replay(model.run), call())) == "abc"
    assert model.runs == 1


async def test_the_prompt_is_kept_where_it_is_echoed(keys: Idempotency) -> None:
    handler = keys.replay(Model().run)
    for key, response, prompt in (
        ("a", ResponseOptions(echo=True), Prompt("prompt", (1, 2))),
        ("b", ResponseOptions(), None),
    ):
        await events_of(handler, call(key=key, response=response))
        again = call(key=key, response=response)
        await events_of(handler, again)
        assert again.prompt == prompt


async def test_what_a_plugin_inside_has_rewritten_holds_for_replays_too(keys: Idempotency) -> None:
    async def rewriting(made: Call) -> Events:
        made.request = replace(made.request, n=1)
        async with aclosing(Model().run(made)) as events:
            async for event in events:
                yield event

    handler, again = keys.replay(rewriting), call(n=3)
    await events_of(handler, call(n=3))
    await events_of(handler, again)
    assert again.request.n == 1


async def test_another_request_under_the_key_is_refused(keys: Idempotency) -> None:
    handler = keys.replay(Model().run)
    await events_of(handler, call())
    with pytest.raises(InvalidArgument) as error:
        await events_of(handler, call("another prompt"))
    assert error.value.field == "idempotency_key"


async def test_another_request_under_the_key_of_one_that_runs_is_refused(keys: Idempotency) -> None:
    model = Model(free=False)
    running = Reader(keys.replay(model.run), call())
    running.wanted.give()
    await until(lambda: model.runs == 1)
    with pytest.raises(InvalidArgument, match="which runs"):
        await events_of(keys.replay(model.run), call("another prompt"))
    model.go.give(3)
    assert await running.rest() == "abc"


async def test_tenants_have_keys_of_their_own(keys: Idempotency) -> None:
    model = Model()
    handler = keys.replay(model.run)
    await events_of(handler, call("one"))
    other = call("another", tenant="globex")
    await events_of(handler, other)
    assert (model.runs, other.meter.replayed) == (2, False)


async def test_a_caller_who_may_not_use_the_model_gets_no_answer_of_it(keys: Idempotency) -> None:
    handler = keys.replay(Model().run)
    await events_of(handler, call())
    poor = call()
    poor.principal = Principal("acme", models=frozenset({"small"}))
    with pytest.raises(ModelNotFound):
        await events_of(handler, poor)
    assert poor.model is None
    assert not poor.meter.attempts


@pytest.mark.parametrize("options", [{"ledger": None}, {"hours": 0.0}, {"max_bytes": 0}])
async def test_keys_are_refused_by_name_where_no_answers_are_kept(ledger: Ledger, options: dict[str, Any]) -> None:
    model = Model()
    handler = idempotency(**({"ledger": ledger} | options)).replay(model.run)
    with pytest.raises(InvalidArgument, match="keeps no answers") as error:
        await events_of(handler, call())
    assert error.value.field == "idempotency_key"
    assert text_of(await events_of(handler, call(key=None))) == "abc"


async def test_an_answer_that_is_too_old_is_expired(ledger: Ledger) -> None:
    clock, model = ManualClock(), Model()
    handler = idempotency(ledger, clock=clock, hours=1.0).replay(model.run)
    await events_of(handler, call())
    clock.advance(3600)
    with pytest.raises(AnswerExpired):
        await events_of(handler, call())
    assert model.runs == 1


async def test_an_answer_that_another_version_wrote_is_expired(ledger: Ledger, keys: Idempotency) -> None:
    handler = keys.replay(Model().run)
    await events_of(handler, call())
    await ledger.write(lambda one: one.execute(update(answers).values(events=b"\xff")))
    with pytest.raises(AnswerExpired, match="another version"):
        await events_of(handler, call())


# --- attaching ------------------------------------------------------------------------------------------------------


async def test_calls_that_come_while_it_runs_get_all_events_from_the_first_on(keys: Idempotency) -> None:
    model = Model(free=False)
    handler = keys.replay(model.run)
    first = Reader(handler, call())
    model.go.give(2)
    await first.read(2)
    others = [Reader(handler, call()) for _ in range(3)]
    await others[0].read(2)
    model.go.give()
    assert [await one.rest() for one in (first, *others)] == ["abc"] * 4
    assert model.runs == 1
    assert [one.call.meter.replayed for one in (first, *others)] == [False, True, True, True]
    for one in others:
        assert one.events == first.events
        assert one.call.meter.usage().output_tokens == 3
        assert one.call.meter.cost == COST
        assert one.call.meter.first_token is None


async def test_many_that_come_at_once_run_once(keys: Idempotency) -> None:
    model = Model()
    handler = keys.replay(model.run)
    made = [call() for _ in range(50)]
    answered = await asyncio.gather(*(events_of(handler, one) for one in made))
    assert model.runs == 1
    assert all(events == answered[0] for events in answered)
    assert sum(not one.meter.replayed for one in made) == 1


async def test_a_slow_reader_holds_nobody_up(keys: Idempotency) -> None:
    model = Model("x" * 100)
    handler = keys.replay(model.run)
    slow = Reader(handler, call())
    await slow.read(1)
    quick = Reader(handler, call())
    assert await quick.rest() == "x" * 100
    assert len(slow.events) == 1
    assert await slow.rest() == "x" * 100


async def test_a_run_goes_on_when_its_first_caller_leaves_another(keys: Idempotency) -> None:
    model = Model(free=False)
    handler = keys.replay(model.run)
    first, second = Reader(handler, call()), Reader(handler, call())
    model.go.give()
    await first.read(1)
    await second.read(1)
    await first.leave()
    model.go.give(2)
    assert await second.rest() == "abc"
    assert model.runs == 1


async def test_a_caller_whose_connection_broke_finds_its_answer(keys: Idempotency) -> None:
    model = Model(free=False)
    handler = keys.replay(model.run)
    first = Reader(handler, call())
    model.go.give()
    await first.read(1)
    await first.leave()
    model.go.give(2)
    assert text_of(await events_of(handler, call())) == "abc"
    assert model.runs == 1


async def test_a_caller_who_left_finds_its_answer_when_it_is_over(keys: Idempotency) -> None:
    model = Model(free=False)
    handler = keys.replay(model.run)
    first = Reader(handler, call())
    model.go.give()
    await first.read(1)
    await first.leave()
    model.go.give(2)
    await until(lambda: not keys._runs)
    again = call()
    assert text_of(await events_of(handler, again)) == "abc"
    assert again.meter.replayed
    assert model.runs == 1


@pytest.mark.parametrize("linger", [0.0, 0.01])
async def test_what_nobody_reads_is_cancelled_in_the_end_and_its_key_is_free(ledger: Ledger, linger: float) -> None:
    model = Model(free=False)
    keys = idempotency(ledger, linger=linger)
    handler = keys.replay(model.run)
    first = Reader(handler, call())
    model.go.give()
    await first.read(1)
    await first.leave()
    await until(lambda: model.closed == 1)
    model.go.give(3)
    again = call()
    assert text_of(await events_of(handler, again)) == "abc"
    assert model.runs == 2
    assert not again.meter.replayed


async def test_a_run_lasts_as_long_as_anybody_wants_it(keys: Idempotency) -> None:
    model = Model(free=False)
    handler = keys.replay(model.run)
    first, patient, endless = call(), call(), call()
    first.deadline, patient.deadline = 10.0, 20.0
    readers = [Reader(handler, first)]
    model.go.give()
    await readers[0].read(1)
    assert first.deadline == 10.0
    readers.append(Reader(handler, patient))
    await readers[1].read(1)
    assert first.deadline == 20.0
    readers.append(Reader(handler, endless))
    await readers[2].read(1)
    assert first.deadline is None
    model.go.give(2)
    assert [await one.rest() for one in readers] == ["abc"] * 3


async def test_only_so_many_calls_of_a_tenant_go_on_unread(keys: Idempotency) -> None:
    model = Model("ab", free=False)
    handler = keys.replay(model.run)
    for i in range(MAX_UNREAD + 3):
        reader = Reader(handler, call(key=f"order-{i}"))
        reader.wanted.give()
        await until(lambda: model.runs == i + 1)  # noqa: B023  # it is awaited here
        await reader.leave()
    await until(lambda: model.closed == 3)
    await until(lambda: len(keys._runs) == MAX_UNREAD)
    await keys.close()
    assert model.closed == MAX_UNREAD + 3


async def test_closing_cancels_what_nobody_reads_and_waits_for_it(ledger: Ledger, keys: Idempotency) -> None:
    model = Model(free=False)
    reader = Reader(keys.replay(model.run), call())
    reader.wanted.give()
    await until(lambda: model.runs == 1)
    await reader.leave()
    await keys.close()
    assert model.closed == 1
    assert await ledger.read(lambda one: one.execute(select(answers)).all()) == []


async def test_closing_leaves_a_call_that_is_cancelled_already_to_clean_up(brief: Idempotency) -> None:
    cleaning, go_on, cleaned = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def tidy(made: Call) -> Events:
        try:
            async with aclosing(Model(free=False).run(made)) as events:
                async for event in events:
                    yield event
        finally:
            cleaning.set()
            await go_on.wait()
            cleaned.set()

    reader = Reader(brief.replay(tidy), call())
    reader.wanted.give()
    await until(lambda: bool(brief._runs) and next(iter(brief._runs.values())).call.model is not None)
    await reader.leave()
    await cleaning.wait()
    closing = asyncio.create_task(brief.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    assert cleaned.is_set()


# --- what goes wrong ------------------------------------------------------------------------------------------------


async def test_a_call_that_failed_leaves_nothing_and_the_next_runs_anew(keys: Idempotency) -> None:
    model = Model(free=False, error=BackendError("it broke"))
    handler = keys.replay(model.run)
    readers = [Reader(handler, call()) for _ in range(2)]
    model.go.give()
    for reader in readers:
        await reader.read(1)
    model.go.give(10)
    for reader in readers:
        with pytest.raises(BackendError):
            await reader.rest()
        assert text_of(reader.events) == "abc"
    model.error = None
    again = call()
    assert text_of(await events_of(handler, again)) == "abc"
    assert (model.runs, again.meter.replayed) == (2, False)


async def test_a_stream_that_stops_without_its_end_is_no_answer(keys: Idempotency) -> None:
    async def stops(made: Call) -> Events:
        yield Delta(0, "a")

    with pytest.raises(RuntimeError, match="This is a bug"):
        await events_of(keys.replay(stops), call())


async def test_an_answer_too_large_is_read_by_one_at_its_own_pace_and_not_kept(
    keys: Idempotency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency_module, "MAX_ANSWER_BYTES", 3000)
    model = Model("x" * 100, free=False)
    handler = keys.replay(model.run)
    first, slow = Reader(handler, call()), Reader(handler, call())
    model.go.give(3)
    await first.read(2)
    await slow.read(1)
    model.go.give(97)
    await until(lambda: not next(iter(keys._runs.values())).broadcast.kept)
    with pytest.raises(AnswerExpired, match="too large"):
        await slow.rest()
    assert model.said < 20  # it waits for the one that is ahead
    with pytest.raises(AnswerExpired, match="too large"):
        await events_of(handler, call())
    assert await first.rest() == "x" * 100
    with pytest.raises(AnswerExpired, match="no longer kept"):
        await events_of(handler, call())
    assert model.runs == 1


async def test_an_answer_too_large_that_nobody_reads_any_more_is_cancelled(
    keys: Idempotency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency_module, "MAX_ANSWER_BYTES", 3000)
    model = Model("x" * 100)
    first = Reader(keys.replay(model.run), call())
    await first.read(50)
    await first.leave()
    await until(lambda: not keys._runs)
    assert model.said < 60


async def test_running_calls_have_a_bound_on_memory_together(ledger: Ledger) -> None:
    model = Model("x" * 100)
    keys = idempotency(ledger, max_bytes=20_000)
    handler = keys.replay(model.run)
    readers = [Reader(handler, call(key=f"order-{i}")) for i in range(4)]
    for reader in readers:
        await reader.read(1)
    await until(lambda: sum(not run.broadcast.kept for run in keys._runs.values()) == len(keys._runs))
    assert keys._size < 25_000 + 2000
    assert [await reader.rest() for reader in readers] == ["x" * 100] * 4
    assert keys._size == 0


async def test_replays_that_are_read_slowly_have_a_bound_on_memory_together(ledger: Ledger) -> None:
    model = Model("x" * 100)
    keys = idempotency(ledger, max_bytes=60_000)
    handler = keys.replay(model.run)
    assert text_of(await events_of(handler, call())) == "x" * 100
    slow = Reader(handler, call())
    await slow.read(1)
    for _ in range(3):
        with pytest.raises(Overloaded, match="too many answers"):
            await events_of(handler, call())
    assert keys._size < 60_000
    assert await slow.rest() == "x" * 100
    assert text_of(await events_of(handler, call())) == "x" * 100
    assert (keys._size, model.runs) == (0, 1)


# --- durability -----------------------------------------------------------------------------------------------------


class Held:
    """Keeps the ledger's writer from going on."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._begun, self._over = ledger, threading.Event(), threading.Event()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._ledger.write(self._wait))
        await asyncio.to_thread(self._begun.wait)
        return self

    def _wait(self, _: Any) -> None:
        self._begun.set()
        self._over.wait(30)

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await self._task


async def test_a_call_does_not_run_before_its_key_is_durable(ledger: Ledger, keys: Idempotency) -> None:
    model = Model()
    async with Held(ledger):
        reader = Reader(keys.replay(model.run), call())
        reader.wanted.give(10)
        await until(lambda: bool(keys._runs))
        for _ in range(100):
            await asyncio.sleep(0)
        assert model.runs == 0
    assert await reader.rest() == "abc"


async def test_nobody_gets_the_last_event_before_the_answer_is_durable(ledger: Ledger, keys: Idempotency) -> None:
    model = Model(free=False)
    reader = Reader(keys.replay(model.run), call())
    model.go.give()
    await reader.read(1)
    async with Held(ledger):
        model.go.give(2)
        await reader.read(4)  # the finish is the fourth
        reader.wanted.give(10)
        await until(lambda: model.closed == 1)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(reader.events) == 4
    await reader.rest()
    assert isinstance(reader.events[-1], StreamEnd)


async def test_an_answer_that_cannot_be_kept_is_handed_over_all_the_same(
    keys: Idempotency, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise LedgerUnavailable

    monkeypatch.setattr(idempotency_module.answer_store, "keep", away)
    model = Model()
    handler = keys.replay(model.run)
    assert text_of(await events_of(handler, call())) == "abc"
    monkeypatch.undo()
    assert text_of(await events_of(handler, call())) == "abc"
    assert model.runs == 2


async def test_a_call_that_is_cancelled_before_it_has_its_key_leaves_none(ledger: Ledger, brief: Idempotency) -> None:
    model, keys = Model(), brief
    async with Held(ledger):
        reader = Reader(keys.replay(model.run), call())
        reader.wanted.give()
        await until(lambda: bool(keys._runs))
        await reader.leave()
    await keys.close()
    assert model.runs == 0
    assert await ledger.read(lambda one: one.execute(select(answers)).all()) == []


# --- several processes ----------------------------------------------------------------------------------------------


async def test_a_call_that_runs_in_another_process_is_not_run_here_and_answered_later(tmp_path: Path) -> None:
    setting, model = f"sqlite:///{tmp_path / 'ledger.db'}", Model(free=False)
    async with open_ledger(setting, tmp_path) as one, open_ledger(setting, tmp_path) as other:
        reader = Reader(idempotency(one).replay(model.run), call())
        reader.wanted.give()
        await until(lambda: model.runs == 1)
        elsewhere = idempotency(other).replay(model.run)
        with pytest.raises(Overloaded, match="another server process") as error:
            await events_of(elsewhere, call())
        assert error.value.retry_after > 0
        model.go.give(3)
        assert await reader.rest() == "abc"
        again = call()
        assert text_of(await events_of(elsewhere, again)) == "abc"
        assert again.meter.replayed
    assert model.runs == 1


async def test_the_key_of_a_call_that_runs_long_stays_its_process_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency_module, "LEASE", idempotency_module.SECOND // 100)
    setting, model, clock = f"sqlite:///{tmp_path / 'ledger.db'}", Model(free=False), ManualClock()

    def expires_at(one: Any) -> int:
        return int(one.execute(select(answers.c.expires_at)).scalar_one())

    async with open_ledger(setting, tmp_path) as one, open_ledger(setting, tmp_path) as other:
        reader = Reader(idempotency(one, clock=clock).replay(model.run), call())
        reader.wanted.give()
        await until(lambda: model.runs == 1)
        for _ in range(3):
            clock.advance(25)
            async with asyncio.timeout(10):
                while await one.read(expires_at) < clock() + 30 * 10**9:  # noqa: ASYNC110  # another task writes it
                    await asyncio.sleep(0.01)
            with pytest.raises(Overloaded):
                await events_of(idempotency(other, clock=clock).replay(model.run), call())
        model.go.give(3)
        assert await reader.rest() == "abc"


async def test_a_call_whose_process_was_killed_runs_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = f"sqlite:///{tmp_path / 'ledger.db'}"
    killed = open_ledger(setting, tmp_path)
    keys, model = idempotency(killed), Model(free=False)
    reader = Reader(keys.replay(model.run), call())
    model.go.give()
    await reader.read(1)
    kill(killed)

    async def write(_: Any) -> None:
        raise LedgerUnavailable

    monkeypatch.setattr(killed, "write", write)  # what is left of it must not wait for it
    async with open_ledger(setting, tmp_path) as ledger:
        again, anew = call(), Model()
        assert text_of(await events_of(idempotency(ledger).replay(anew.run), again)) == "abc"
        assert (anew.runs, again.meter.replayed) == (1, False)
    await reader.leave()
    await keys.close()
