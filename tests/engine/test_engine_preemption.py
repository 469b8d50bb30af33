"""Sequences that make room for more urgent ones: nobody who reads their answers sees a difference."""

from __future__ import annotations

import asyncio

import pytest
from engine_kit import Answer, Clock, letters, make_call, read, running_engine, scripted, until

from headrace.backends.errors import QueueTimeout
from headrace.backends.requests import LatencyClass, ResponseOptions, Sampling, Scheduling
from headrace.backends.types import Call
from headrace.backends.usage import AttemptOutcome
from headrace.server.engine.engine import Engine

BATCH = Scheduling(latency_class=LatencyClass.BATCH)
VOICE = Scheduling(latency_class=LatencyClass.VOICE)


def start(engine: Engine, call: Call) -> asyncio.Task[Answer]:
    return asyncio.ensure_future(read(engine, call))


async def says(call: Call, num_tokens: int = 1) -> None:
    await until(lambda: (call.meter.usage().output_tokens or 0) >= num_tokens)


@pytest.mark.parametrize("prefix_cache", [True, False])
async def test_a_voice_takes_the_only_slot_and_the_batch_goes_on_where_it_was(prefix_cache: bool) -> None:
    model = scripted(num_slots=1, seconds_per_step=0.001)
    async with running_engine(model, prefix_cache=prefix_cache) as engine:
        batch = make_call("a long story", max_new_tokens=400, scheduling=BATCH)
        task = start(engine, batch)
        await says(batch, 20)
        began = batch.meter.started
        for i in range(3):
            voice = make_call(f"question {i}", max_new_tokens=2, scheduling=VOICE)
            assert (await read(engine, voice)).text() == letters(f"question {i}", 2)
            await until(lambda: engine.num_queued == 0)
            assert not task.done()
            await says(batch, (batch.meter.usage().output_tokens or 0) + 5)
        answer = await task
        assert engine.runner.num_preemptions == 3
    assert answer.text() == letters("a long story", 400)
    assert len(answer.ids()) == 400
    usage = batch.meter.usage()
    assert (usage.input_tokens, usage.output_tokens) == (len("a long story"), 400)
    assert usage.cache_read_input_tokens == (0 if prefix_cache else None)
    assert batch.meter.started == began
    assert [attempt.outcome for attempt in batch.meter.attempts] == [AttemptOutcome.COMPLETED]
    assert model.num_reserved_tokens == 0


async def test_what_is_drawn_after_a_preemption_is_what_would_have_been_drawn() -> None:
    def sampled(scheduling: Scheduling) -> Call:
        return make_call(
            "a long story",
            max_new_tokens=200,
            seed=7,
            sampling=Sampling(temperature=3.0, repetition_penalty=1.2, presence_penalty=0.5),
            response=ResponseOptions(token_ids=True, logprobs=True, top_logprobs=2),
            scheduling=scheduling,
        )

    async with running_engine(scripted(num_slots=1, seconds_per_step=0.001)) as engine:
        alone = await read(engine, sampled(VOICE))
        task = start(engine, batch := sampled(BATCH))
        for i in range(5):
            await says(batch, 30 * (i + 1))
            await read(engine, make_call(f"question {i}", max_new_tokens=1, scheduling=VOICE))
        again = await task
        assert engine.runner.num_preemptions == 5
    assert again.ids() == alone.ids()
    assert again.logprobs() == alone.logprobs()
    assert again.finish() == alone.finish()


async def test_where_that_could_change_what_comes_the_voice_waits() -> None:
    model = scripted(num_slots=1, seconds_per_step=0.001, answer="la" * 60)  # of class BIT_EXACT
    async with running_engine(model) as engine:
        batch = make_call(max_new_tokens=100, scheduling=BATCH)
        task = start(engine, batch)
        await says(batch)
        await read(engine, make_call(max_new_tokens=1, scheduling=VOICE))
        assert task.done()
        assert engine.runner.num_preemptions == 0
        assert (await task).text() == "la" * 50


async def test_room_is_made_as_well_as_slots() -> None:
    async with running_engine(scripted(num_slots=4, num_kv_tokens=600, seconds_per_step=0.001)) as engine:
        calls = [make_call(f"story {i}", max_new_tokens=190, scheduling=BATCH) for i in range(3)]
        tasks = [start(engine, call) for call in calls]
        for call in calls:
            await says(call)
        chat = make_call("p" * 100, max_new_tokens=2)
        assert (await read(engine, chat)).text() == letters("p" * 100, 2)
        assert engine.runner.num_preemptions == 1
        assert [(await task).text() for task in tasks] == [letters(f"story {i}", 190) for i in range(3)]


async def test_who_made_room_waits_as_a_queued_one_but_not_against_its_queue_timeout() -> None:
    clock = Clock()
    model = scripted(num_slots=1, seconds_per_step=0.001)
    async with running_engine(model, clock=clock, max_queued=1) as engine:
        scheduling = Scheduling(latency_class=LatencyClass.BATCH, queue_timeout=5)
        batch = make_call("a long story", max_new_tokens=100, scheduling=scheduling)
        task = start(engine, batch)
        await says(batch)
        voice = make_call("question", max_new_tokens=4000, scheduling=VOICE)
        talk = start(engine, voice)
        await says(voice)
        await until(lambda: engine.num_queued == 1)
        clock.now += 100
        await says(voice, 50)
        talk.cancel()
        assert (await task).text() == letters("a long story", 100)
        assert engine.num_queued == 0


async def test_one_that_made_room_can_be_cancelled_while_it_waits() -> None:
    model = scripted(num_slots=1, seconds_per_step=0.001)
    async with running_engine(model) as engine:
        task = start(engine, batch := make_call("a long story", max_new_tokens=1000, scheduling=BATCH))
        await says(batch)
        talk = start(engine, voice := make_call("question", max_new_tokens=60, scheduling=VOICE))
        await says(voice)
        task.cancel()
        await until(lambda: engine.num_queued == 0)
        assert (await talk).text() == letters("question", 60)
        assert batch.meter.attempts[0].outcome is AttemptOutcome.CANCELLED


async def test_a_tenant_with_many_prompts_does_not_keep_another_waiting() -> None:
    async with running_engine(scripted(num_slots=2, seconds_per_step=0.001)) as engine:
        many = [make_call(f"many {i}", max_new_tokens=20, tenant="many") for i in range(60)]
        tasks = [start(engine, call) for call in many]
        await says(many[0])
        await until(lambda: engine.num_queued >= 50)
        await read(engine, make_call("one", max_new_tokens=20, tenant="one"))
        assert sum(task.done() for task in tasks) < 20
        await asyncio.gather(*tasks)


async def test_a_started_choice_is_counted_by_its_call_only_once() -> None:
    """Choices of one call make room one by one, and each goes on as itself."""
    async with running_engine(scripted(num_slots=3, seconds_per_step=0.001)) as engine:
        batch = make_call("a long story", n=3, max_new_tokens=150, scheduling=BATCH)
        task = start(engine, batch)
        await says(batch, 30)
        for i in range(4):
            await read(engine, make_call(f"question {i}", max_new_tokens=3, scheduling=VOICE))
        answer = await task
        assert engine.runner.num_preemptions > 0
    for choice in range(3):
        assert answer.text(choice) == letters("a long story", 150)
    usage = batch.meter.usage()
    assert (usage.input_tokens, usage.output_tokens) == (len("a long story"), 3 * 150)


async def test_a_queue_timeout_before_the_first_start_still_counts() -> None:
    clock = Clock()
    async with running_engine(scripted(num_slots=1, seconds_per_step=0.001), clock=clock) as engine:
        talk = start(engine, voice := make_call(max_new_tokens=4000, scheduling=VOICE))
        await says(voice)
        task = start(engine, make_call(scheduling=Scheduling(latency_class=LatencyClass.BATCH, queue_timeout=5)))
        await until(lambda: engine.num_queued == 1)
        clock.now += 6
        with pytest.raises(QueueTimeout):
            await task
        talk.cancel()
        await asyncio.wait([talk])
