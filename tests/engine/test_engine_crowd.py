"""Calls beside each other: what one gets does not depend on the others, and nothing of them is left behind."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
from engine_kit import Answer, letters, make_call, read, running_engine, scripted, until

from headrace.backends.events import FinishReason
from headrace.backends.requests import LatencyClass, ResponseOptions, Sampling, Scheduling, Stopping
from headrace.backends.scripted import ScriptedStepModel
from headrace.backends.types import Call


def random_call(dice: random.Random) -> Call:
    prompt = bytes(dice.randrange(1, 256) for _ in range(dice.choice([1, 2, 5, 20, 33, 70, 150])))
    drawn = dice.random() < 0.5
    return make_call(
        prompt,
        max_new_tokens=dice.choice([1, 2, 10, 30, 90]),
        n=dice.choice([1, 1, 1, 3]),
        seed=dice.randrange(1000),
        sampling=Sampling(temperature=dice.choice([0.7, 3.0]), top_p=dice.choice([1.0, 0.9]), presence_penalty=0.5)
        if drawn
        else None,
        stopping=Stopping(stop_sequences=("qu", "e"), min_new_tokens=1) if dice.random() < 0.3 else None,
        response=ResponseOptions(logprobs=True, top_logprobs=2) if dice.random() < 0.3 else None,
        scheduling=Scheduling(latency_class=dice.choice(list(LatencyClass)), priority=dice.randrange(-5, 5)),
    )


def like(call: Call) -> Call:
    """The same call once more, unused."""
    assert call.prompt is not None
    again = make_call(bytes(call.prompt.token_ids), max_new_tokens=call.max_new_tokens)
    again.request = call.request
    return again


def essence(answer: Answer, n: int) -> list[object]:
    return [(answer.text(i), answer.ids(i), answer.logprobs(i), answer.finish(i)) for i in range(n)]


@pytest.mark.parametrize("seed", range(6))
async def test_what_a_call_gets_in_a_crowd_is_what_it_gets_alone(seed: int) -> None:
    dice = random.Random(seed)
    model = scripted(num_slots=dice.choice([1, 2, 5]), num_kv_tokens=dice.choice([300, 600, 5000]))
    async with running_engine(model) as engine:

        async def visit(call: Call, delay: float, limit: int | None) -> Answer | None:
            await asyncio.sleep(delay)
            if dice.random() < 0.2:
                task = asyncio.ensure_future(read(engine, call))
                await asyncio.sleep(delay / 3)
                if task.cancel():
                    await asyncio.wait([task])
                    return None
                return await task
            answer = await read(engine, call, limit=limit)
            return answer if limit is None else None

        calls = [random_call(dice) for _ in range(40)]
        visits = [
            visit(call, dice.random() * 0.1, dice.choice([None, None, None, dice.randrange(1, 20)])) for call in calls
        ]
        answers = await asyncio.gather(*visits)
        num_compared = 0
        for call, answer in zip(calls, answers, strict=True):
            if answer is not None:
                num_compared += 1
                alone = await read(engine, like(call))
                assert essence(answer, call.request.n) == essence(alone, call.request.n)
        assert num_compared > 10
        await until(lambda: engine.runner.num_running == engine.num_queued == 0)
        assert model.num_reserved_tokens == engine.runner.num_retained_tokens


async def test_500_vanished_callers_leave_nothing_behind() -> None:
    before = threading.active_count()
    dice = random.Random(500)
    model = scripted(num_slots=4, num_kv_tokens=1000)
    async with running_engine(model) as engine:

        async def vanish(call: Call) -> None:
            task = asyncio.ensure_future(read(engine, call))
            await asyncio.sleep(dice.random() * 0.02)
            task.cancel()
            await asyncio.wait([task])

        for _ in range(10):
            await asyncio.gather(*(vanish(random_call(dice)) for _ in range(50)))
        await until(lambda: engine.runner.num_running == engine.num_queued == 0)
        assert engine.runner.kv_utilization == 0
        assert model.num_reserved_tokens == engine.runner.num_retained_tokens
        assert not list(engine.runner._scheduler)
        # And the engine is as good as new.
        assert (await read(engine, make_call(max_new_tokens=20))).text() == letters("prompt", 20)
    await until(lambda: threading.active_count() <= before + 1, timeout=2)  # asyncio.to_thread keeps one
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]


async def test_a_vanished_callers_slot_is_free_within_one_step() -> None:
    model = scripted(num_slots=1, seconds_per_step=0.01)
    async with running_engine(model) as engine:
        await read(engine, make_call(max_new_tokens=1000), limit=3)
        num_steps = model.num_steps
        await until(lambda: engine.runner.num_running == 0)
        assert model.num_steps <= num_steps + 1


async def test_a_caller_that_vanishes_from_the_queue_is_not_run() -> None:
    model = scripted(num_slots=1, seconds_per_step=0.002)
    async with running_engine(model) as engine:
        first = asyncio.ensure_future(read(engine, make_call(max_new_tokens=30)))
        await until(lambda: engine.runner.num_running == 1)
        second = asyncio.ensure_future(read(engine, call := make_call(max_new_tokens=30, n=3)))
        await until(lambda: engine.num_queued == 3)
        second.cancel()
        await until(lambda: engine.num_queued == 0)
        await first
    assert call.meter.started is None
    assert call.meter.usage().output_tokens == 0


# --- slow readers


async def standing_still(call: Call, model: ScriptedStepModel) -> int:
    """Waits until a call gets no more tokens made, because nobody reads them; returns how many it has."""
    await until(lambda: (call.meter.usage().output_tokens or 0) >= 64)
    num_steps = -1
    while num_steps != model.num_steps:
        num_steps = model.num_steps
        await asyncio.sleep(0.03)
    return call.meter.usage().output_tokens or 0


async def test_a_slow_reader_holds_up_itself_alone_and_goes_on_where_it_was() -> None:
    model = scripted(num_slots=2)
    async with running_engine(model) as engine:
        slow = engine.generate(call := make_call("slow", max_new_tokens=500))
        answer = Answer([await anext(slow)])
        others = [await read(engine, make_call(f"fast {i}", max_new_tokens=100)) for i in range(3)]
        assert [other.text() for other in others] == [letters(f"fast {i}", 100) for i in range(3)]
        assert await standing_still(call, model) < 70, "a reader that does not read gets no more made for it"
        assert engine.runner.num_running == 1
        async for event in slow:
            answer.events.append(event)
        answer.check_order(1)
    assert answer.text() == letters("slow", 500)


async def test_many_slow_readers_all_get_everything() -> None:
    async with running_engine(scripted(num_slots=3)) as engine:
        dice = random.Random(1)

        async def read_slowly(i: int) -> str:
            answer = Answer()
            async for event in engine.generate(make_call(f"reader {i}", max_new_tokens=300, n=2)):
                answer.events.append(event)
                if dice.random() < 0.02:
                    await asyncio.sleep(dice.random() * 0.02)
            answer.check_order(2)
            assert answer.text(0) == answer.text(1)
            return answer.text()

        texts = await asyncio.gather(*(read_slowly(i) for i in range(6)))
    assert texts == [letters(f"reader {i}", 300) for i in range(6)]


async def test_a_slow_reader_with_an_endless_time_limit_is_no_trouble() -> None:
    """A wait of 3e11 seconds, which a protobuf duration can hold, is more than a queue takes as its time-out."""
    model = scripted()
    async with running_engine(model) as engine:
        slow = engine.generate(call := make_call("slow", max_new_tokens=300, stopping=Stopping(time_limit=3e11)))
        answer = Answer([await anext(slow)])
        await standing_still(call, model)
        async for event in slow:
            answer.events.append(event)
        answer.check_order(1)
    assert answer.text() == letters("slow", 300)
    assert answer.finish().reason is FinishReason.MAX_TOKENS
