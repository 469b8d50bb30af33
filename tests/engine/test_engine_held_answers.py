"""Whole answers of class BATCH are handed out several at a time while others wait for a slot."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headrace.backends.errors import BackendError
from headrace.backends.requests import LatencyClass, Scheduling
from headrace.backends.types import Call
from headrace.server.engine.engine import Engine
from headrace.server.engine.runner import Outbox
from tests.engine.engine_kit import Clock, make_call, read, running_engine, scripted, until

BATCH = Scheduling(latency_class=LatencyClass.BATCH)
FIRST = Scheduling(latency_class=LatencyClass.BATCH, priority=100)
NUM_SLOTS = 4


def batch_calls(count: int) -> list[Call]:
    """Of different lengths: each ends in a step of its own."""
    return [make_call(f"prompt {i}", max_new_tokens=3 + i, scheduling=BATCH, is_streamed=False) for i in range(count)]


def count_wakings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets, for each time that the engine wakes the event loop from now on, how many events it then hands out."""
    wakings, deliver = [], engine.runner._deliver

    def counted(num_dequeued: int, events: Outbox) -> None:
        wakings.append(len(events))
        deliver(num_dequeued, events)

    monkeypatch.setattr(engine.runner, "_deliver", counted)
    return wakings


async def test_they_wait_for_each_other_while_calls_wait_for_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = batch_calls(40)
    # By a clock that stands still they wait as long as they may.
    async with running_engine(scripted(num_slots=NUM_SLOTS, seconds_per_step=0.002), clock=Clock()) as engine:
        wakings = count_wakings(engine, monkeypatch)
        answers = await asyncio.gather(*(read(engine, call) for call in calls))
    assert [len(answer.ids()) for answer in answers] == [call.max_new_tokens for call in calls]
    # The slots were filled 40 times, mostly in steps of their own; the last ones had nobody to wait for.
    assert len(wakings) < 20
    assert max(wakings) > 40


async def test_not_longer_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), batch_calls(40)
    async with running_engine(scripted(num_slots=NUM_SLOTS, seconds_per_step=0.002), clock=clock) as engine:
        wakings = count_wakings(engine, monkeypatch)
        reading = [asyncio.create_task(read(engine, call)) for call in calls]
        await until(lambda: calls[10].meter.first_token is not None)
        assert not reading[0].done()
        clock.now += 1
        await until(reading[0].done)
        assert engine.runner._scheduler.num_waiting
        assert wakings
        await asyncio.gather(*reading)


@pytest.mark.parametrize(
    "hurried",
    [
        {},
        {"is_streamed": False},
        {"scheduling": FIRST},
        {"scheduling": FIRST, "is_streamed": False, "deadline": 1001.0},
    ],
    ids=["a chat", "that is not streamed", "batch work that is streamed", "batch work whose time is short"],
)
async def test_whoever_is_in_a_hurry_takes_them_along(hurried: dict[str, Any]) -> None:
    calls, clock = batch_calls(40), Clock(1000.0)
    async with running_engine(scripted(num_slots=NUM_SLOTS, seconds_per_step=0.002), clock=clock) as engine:
        reading = [asyncio.create_task(read(engine, call)) for call in calls]
        await until(lambda: calls[10].meter.first_token is not None)
        assert not reading[0].done()
        answer = await read(engine, make_call("now", max_new_tokens=5, **hurried))
        assert len(answer.ids()) == 5
        assert reading[0].done()
        assert engine.runner._scheduler.num_waiting >= NUM_SLOTS  # so it was not for want of others
        await asyncio.gather(*reading)


async def test_an_error_waits_no_longer_than_an_answer() -> None:
    calls = [make_call("\0", scheduling=BATCH, is_streamed=False), *batch_calls(2)]
    async with running_engine(scripted(num_slots=NUM_SLOTS), clock=Clock()) as engine:
        failed, *answers = await asyncio.gather(*(read(engine, call) for call in calls), return_exceptions=True)
    assert isinstance(failed, BackendError)
    assert len(answers) == 2
