"""Calls that are given up at random phases of everything at once leave nothing behind."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from engine_kit import make_call, scripted, until

from headrace.backends.requests import LatencyClass, Scheduling
from headrace.backends.types import Call
from headrace.server.engine.engine import Engine

NUM_AT_ONCE = 64


def random_call(dice: random.Random) -> Call:
    """Many begin alike, repeat themselves, or have several choices; some are more urgent than others."""
    return make_call(
        f"prompt {dice.randrange(4)} " * dice.randint(1, 10),
        n=dice.choice([1, 1, 1, 3]),
        scheduling=Scheduling(latency_class=dice.choice(list(LatencyClass))),
        tenant=dice.choice(["a", "b"]),
        max_new_tokens=200,
    )


async def _read(engine: Engine, call: Call) -> None:
    async for _ in engine.generate(call):
        pass


@pytest.mark.parametrize("num_calls", [2_000, pytest.param(10_000, marks=pytest.mark.soak)])
async def test_cancels_at_random_phases_leave_nothing_behind(num_calls: int) -> None:
    dice = random.Random(3)
    model = scripted(num_slots=8, num_spare_slots=4, num_kv_tokens=2048, mixes=True, max_drafts=64)
    engine = Engine(model, clock=time.monotonic, max_queued=4 * NUM_AT_ONCE)
    places = asyncio.Semaphore(NUM_AT_ONCE)
    num_cancelled = 0

    async def give_up() -> None:
        nonlocal num_cancelled
        call, patience = random_call(dice), dice.random() * 0.02

        async with places:
            task = asyncio.create_task(_read(engine, call))
            await asyncio.sleep(patience)
            num_cancelled += task.cancel()
            await asyncio.wait([task])

    # All the memory there is, for as long as a storm needs to begin: whatever is more urgent takes it away.
    batch = Scheduling(latency_class=LatencyClass.BATCH)
    long = [make_call("long", scheduling=batch, tenant="a", max_new_tokens=1_000) for _ in range(2)]
    fillers = [asyncio.create_task(_read(engine, call)) for call in long]
    await until(lambda: engine.runner.num_running == len(fillers))
    await asyncio.gather(*(give_up() for _ in range(num_calls)))
    await asyncio.gather(*fillers)
    await until(lambda: not (engine.runner.num_running or engine.num_queued))
    assert num_cancelled > num_calls / 2
    assert engine.runner.num_preemptions
    assert engine.runner.num_reused_tokens
    assert model.num_reserved_tokens == engine.runner.num_retained_tokens
    await engine.close()
    assert model.num_reserved_tokens == 0
