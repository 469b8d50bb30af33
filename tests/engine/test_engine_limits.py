"""What ends a call early: its deadline, its limits, a full queue, a failing model, the end of the server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence as Rows

import pytest
from engine_kit import Answer, Clock, letters, make_call, read, running_engine, scripted, until

from headrace.backends.api import Logits, Row
from headrace.backends.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    QueueFull,
    QueueTimeout,
)
from headrace.backends.events import FinishReason
from headrace.backends.requests import ExpiryAction, LatencyClass, Scheduling, Stopping
from headrace.backends.scripted import ScriptedModelOptions, ScriptedStepModel
from headrace.backends.types import Call
from headrace.backends.usage import AttemptOutcome
from headrace.server.engine.engine import Engine


def start(engine: Engine, call: Call) -> asyncio.Task[Answer]:
    return asyncio.ensure_future(read(engine, call))


async def has_begun(call: Call) -> None:
    await until(lambda: (call.meter.usage().output_tokens or 0) > 0)


# --- time


async def test_a_call_whose_deadline_passes_ends_with_that_error() -> None:
    clock = Clock()
    async with running_engine(scripted(seconds_per_step=0.001), clock=clock) as engine:
        call = make_call(max_new_tokens=4000, deadline=clock.now + 5, arrived=clock.now)
        task = start(engine, call)
        await has_begun(call)
        clock.now += 4.5
        await asyncio.sleep(0.01)
        assert not task.done()
        clock.now += 0.5
        with pytest.raises(DeadlineExceeded):
            await task
        await until(lambda: engine.runner.num_running == 0)
    assert call.meter.attempts[0].outcome is AttemptOutcome.EXPIRED
    assert 0 < (call.meter.usage().output_tokens or 0) < 4000


async def test_the_time_limit_gives_the_text_so_far() -> None:
    clock = Clock()
    async with running_engine(scripted(seconds_per_step=0.001), clock=clock) as engine:
        call = make_call(max_new_tokens=4000, arrived=clock.now, stopping=Stopping(time_limit=2))
        task = start(engine, call)
        await has_begun(call)
        clock.now += 2
        answer = await task
    assert answer.finish().reason is FinishReason.TIME_LIMIT
    assert answer.text() == letters("prompt", len(answer.ids()))
    assert 0 < len(answer.ids()) == call.meter.usage().output_tokens
    assert call.meter.attempts[0].outcome is AttemptOutcome.COMPLETED


async def test_the_time_limit_shows_what_a_stop_sequence_held_back() -> None:
    clock = Clock()
    model = scripted(answer="abcabcabc", seconds_per_step=0.005)
    async with running_engine(model, clock=clock) as engine:
        stopping = Stopping(time_limit=2, stop_sequences=("abcabcabcd",))
        task = start(engine, call := make_call(max_new_tokens=4000, arrived=clock.now, stopping=stopping))
        await until(lambda: (call.meter.usage().output_tokens or 0) >= 4)
        clock.now += 2
        answer = await task
    assert answer.text() == "abcabcabc"[: len(answer.text())]
    assert len(answer.text()) >= 4


async def test_the_time_limit_is_an_error_for_whoever_wants_it_so() -> None:
    clock = Clock()
    async with running_engine(scripted(seconds_per_step=0.001), clock=clock) as engine:
        scheduling = Scheduling(on_expiry=ExpiryAction.ERROR)
        call = make_call(max_new_tokens=4000, arrived=clock.now, stopping=Stopping(time_limit=2), scheduling=scheduling)
        task = start(engine, call)
        await has_begun(call)
        clock.now += 2
        with pytest.raises(DeadlineExceeded, match="time_limit"):
            await task
    assert call.meter.attempts[0].outcome is AttemptOutcome.EXPIRED


async def test_a_call_that_expires_in_the_queue_never_starts() -> None:
    clock = Clock()
    async with running_engine(scripted(num_slots=1, seconds_per_step=0.001), clock=clock) as engine:
        first = start(engine, busy := make_call(max_new_tokens=4000))
        await has_begun(busy)
        scheduling = Scheduling(queue_timeout=3)
        calls = [
            make_call(scheduling=scheduling),
            make_call(deadline=clock.now + 3),
            make_call(arrived=clock.now, stopping=Stopping(time_limit=3)),
        ]
        tasks = [start(engine, call) for call in calls]
        await until(lambda: engine.num_queued == 3)
        clock.now += 3
        with pytest.raises(QueueTimeout) as timeout:
            await tasks[0]
        assert timeout.value.retry_after > 0
        with pytest.raises(DeadlineExceeded):
            await tasks[1]
        assert (await tasks[2]).finish().reason is FinishReason.TIME_LIMIT
        for call in calls:
            assert call.meter.started is None
            assert (call.meter.usage().input_tokens, call.meter.usage().output_tokens) == (0, 0)
        await until(lambda: engine.num_queued == 0)
        assert not first.done()
        first.cancel()
        await asyncio.wait([first])


async def test_time_passes_for_a_call_that_stands_still_too() -> None:
    """Nothing steps, so the engine must wake up by itself."""
    async with running_engine(scripted()) as engine:
        call = make_call(max_new_tokens=500, stopping=Stopping(time_limit=0.3))
        slow = engine.generate(call)
        answer = Answer([await anext(slow)])
        await until(lambda: engine.runner.num_running == 0)
        assert time.monotonic() - call.arrived >= 0.3
        async for event in slow:
            answer.events.append(event)
        answer.check_order(1)
    assert answer.finish().reason is FinishReason.TIME_LIMIT


async def test_a_queue_timeout_does_not_touch_what_has_started() -> None:
    clock = Clock()
    async with running_engine(scripted(seconds_per_step=0.001), clock=clock) as engine:
        call = make_call(max_new_tokens=40, scheduling=Scheduling(queue_timeout=1))
        task = start(engine, call)
        await has_begun(call)
        clock.now += 100
        assert len((await task).ids()) == 40


# --- the queue


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async with running_engine(scripted(num_slots=1, seconds_per_step=0.002), max_queued=3) as engine:
        first = start(engine, busy := make_call(max_new_tokens=4000))
        await has_begun(busy)
        waiting = start(engine, make_call(n=3, max_new_tokens=1))
        await until(lambda: engine.num_queued == 3)
        with pytest.raises(QueueFull) as full:
            await read(engine, refused := make_call())
        assert 0 < full.value.retry_after <= 30
        assert refused.meter.attempts == []
        first.cancel()
        await waiting
        assert engine.num_queued == 0
        assert (await read(engine, make_call(n=3, max_new_tokens=1))).finish(2).reason is FinishReason.MAX_TOKENS


async def test_the_queue_is_served_by_class_then_priority_then_arrival() -> None:
    async with running_engine(scripted(num_slots=1, seconds_per_step=0.001)) as engine:
        first = start(engine, busy := make_call(max_new_tokens=4000))
        await has_begun(busy)
        ended: list[str] = []

        async def enqueue(name: str, latency_class: LatencyClass, priority: int = 0) -> None:
            call = make_call(max_new_tokens=2, scheduling=Scheduling(latency_class=latency_class, priority=priority))
            await read(engine, call)
            ended.append(name)

        tasks = []
        for i, (name, latency_class, priority) in enumerate(
            [
                ("batch", LatencyClass.BATCH, 100),
                ("chat", LatencyClass.CHAT, 0),
                ("second chat", LatencyClass.CHAT, 0),
                ("low chat", LatencyClass.CHAT, -1),
                ("high chat", LatencyClass.CHAT, 1),
                ("voice", LatencyClass.VOICE, -100),
            ]
        ):
            tasks.append(asyncio.ensure_future(enqueue(name, latency_class, priority)))
            await until(lambda i=i: engine.num_queued == i + 1)
        first.cancel()
        await asyncio.gather(*tasks)
    assert ended == ["voice", "high chat", "chat", "second chat", "low chat", "batch"]


async def test_the_gauges_tell_what_is_there() -> None:
    async with running_engine(scripted(num_slots=2, num_kv_tokens=1000, seconds_per_step=0.001)) as engine:
        assert (engine.runner.num_running, engine.num_queued, engine.runner.kv_utilization) == (0, 0, 0)
        task = start(engine, make_call(b"p" * 50, n=3, max_new_tokens=350))
        await until(lambda: (engine.runner.num_running, engine.num_queued, engine.runner.kv_utilization) == (2, 1, 0.8))
        task.cancel()
        await until(lambda: (engine.runner.num_running, engine.num_queued, engine.runner.kv_utilization) == (0, 0, 0))


async def test_the_cache_bounds_a_choice_where_it_is_smaller_than_the_context() -> None:
    async with running_engine(scripted(context_length=100, num_kv_tokens=64)) as engine:
        assert engine.max_tokens == 64
        assert len((await read(engine, make_call(b"p" * 30, max_new_tokens=34))).ids()) == 34
    async with running_engine(scripted(context_length=50, num_kv_tokens=64)) as engine:
        assert engine.max_tokens == 50


# --- models that fail


class Fragile(ScriptedStepModel):
    """Raises in the steps whose numbers are given, in those with so many rows, and in ``release`` if told to."""

    def __init__(
        self, *fails_in: int, error: Exception, fails_with_rows: int | None = None, fails_in_release: bool = False
    ) -> None:
        super().__init__("fragile", ScriptedModelOptions())
        self._fails_in = fails_in
        self._fails_with_rows = fails_with_rows
        self._error = error
        self._fails_in_release = fails_in_release

    def step(self, rows: Rows[Row]) -> Logits:
        logits = super().step(rows)
        if self.num_steps in self._fails_in or len(rows) == self._fails_with_rows:
            raise self._error
        return logits

    def release(self, slot: int) -> None:
        super().release(slot)
        if self._fails_in_release:
            raise self._error


async def test_a_failing_prompt_fails_its_own_run_and_the_streams_go_on() -> None:
    async with running_engine(scripted(seconds_per_step=0.001)) as engine:
        calls = [make_call(f"good {i}", max_new_tokens=60) for i in range(3)]
        tasks = [start(engine, call) for call in calls]
        for call in calls:
            await has_begun(call)
        with pytest.raises(BackendError, match="makes this model fail"):
            await read(engine, make_call(b"bad\0", max_new_tokens=5))
        assert [(await task).text() for task in tasks] == [letters(f"good {i}", 60) for i in range(3)]


async def test_what_a_model_raises_is_not_told_to_callers_unless_it_is_meant_for_them() -> None:
    async with running_engine(Fragile(3, error=RuntimeError("/srv/models/secret"))) as engine:
        with pytest.raises(BackendError) as hidden:
            await read(engine, call := make_call(max_new_tokens=10))
        assert "secret" not in str(hidden.value)
        assert call.meter.attempts[0].outcome is AttemptOutcome.FAILED
        assert call.meter.usage().output_tokens == 2
        # The engine goes on.
        assert (await read(engine, make_call(max_new_tokens=10))).text() == letters("prompt", 10)
    async with running_engine(Fragile(1, error=BackendUnavailable("a moment, please"))) as engine:
        with pytest.raises(BackendUnavailable, match="a moment, please"):
            await read(engine, make_call())


async def test_a_run_that_fails_fails_all_that_are_in_it() -> None:
    async with running_engine(Fragile(error=RuntimeError("boom"), fails_with_rows=4)) as engine:
        results = await asyncio.gather(
            *(read(engine, make_call(f"prompt {i}", max_new_tokens=2000)) for i in range(4)), return_exceptions=True
        )
        assert [type(result) for result in results] == [BackendError] * 4
        await until(lambda: engine.runner.num_running == 0)


async def test_failures_of_different_callers_are_different_exceptions() -> None:
    """An exception gathers the tracebacks of everybody who raises it, and with them their frames and prompts."""
    async with running_engine(Fragile(error=BackendUnavailable("later"), fails_with_rows=2)) as engine:
        first, second = await asyncio.gather(
            *(read(engine, make_call(f"prompt {i}", max_new_tokens=2000)) for i in range(2)), return_exceptions=True
        )
    assert first is not second
    assert (type(first), str(first)) == (type(second), str(second)) == (BackendUnavailable, "later")


async def test_an_engine_outlives_a_model_that_cannot_release() -> None:
    async with running_engine(Fragile(error=RuntimeError("stuck"), fails_in_release=True)) as engine:
        for _ in range(3):
            # The last token is there before the slot is released.
            answer = await asyncio.wait_for(read(engine, make_call(max_new_tokens=3)), 5)
            assert answer.text() == letters("prompt", 3)
        await asyncio.wait_for(engine.finish_all(), 5)


# --- the end


async def test_finish_all_ends_every_choice_with_what_it_has() -> None:
    async with running_engine(scripted(num_slots=2, seconds_per_step=0.001)) as engine:
        calls = [make_call(max_new_tokens=4000, n=2), make_call(max_new_tokens=4000)]
        tasks = [start(engine, call) for call in calls]
        await has_begun(calls[0])
        await until(lambda: engine.num_queued == 1)
        await engine.finish_all()
        running, queued = await asyncio.gather(*tasks)
        assert {running.finish(i).reason for i in range(2)} == {FinishReason.SHUTDOWN}
        assert 0 < len(running.text()) < 4000
        assert running.text() == letters("prompt", len(running.text()))
        assert (queued.finish().reason, queued.text()) == (FinishReason.SHUTDOWN, "")
        assert (engine.runner.num_running, engine.num_queued) == (0, 0)


async def test_finish_all_on_an_idle_engine_returns() -> None:
    async with running_engine(scripted()) as engine:
        await asyncio.wait_for(engine.finish_all(), 5)


async def test_an_engine_can_be_closed_as_soon_as_its_last_reader_is_gone() -> None:
    for _ in range(20):
        model = scripted(seconds_per_step=0.001)
        async with running_engine(model) as engine:
            await read(engine, make_call(max_new_tokens=1000, n=3), limit=1)
        assert model.num_reserved_tokens == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]


async def test_a_call_that_was_not_tokenized_is_a_bug() -> None:
    async with running_engine(scripted()) as engine:
        call = make_call()
        call.prompt = None
        with pytest.raises(RuntimeError, match="This is a bug"):
            await read(engine, call)
        assert engine.num_queued == 0
