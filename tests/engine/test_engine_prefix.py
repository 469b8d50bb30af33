"""Prompts that begin alike, through the engine: the same answers, less to compute."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence as Rows
from dataclasses import replace

import pytest
from engine_kit import Answer, letters, make_call, read, running_engine, scripted, until
from test_engine_crowd import essence, random_call

from headrace.backends.api import Logits, Row
from headrace.backends.errors import BackendError
from headrace.backends.requests import Sampling
from headrace.backends.scripted import ScriptedModelOptions, ScriptedStepModel
from headrace.backends.types import Call
from headrace.server.engine.engine import Engine

SYSTEM = "You are a helpful assistant. " * 5


class Counting(ScriptedStepModel):
    """Counts the prompt tokens that it runs."""

    num_chunk_tokens = 0

    def step(self, rows: Rows[Row]) -> Logits:
        self.num_chunk_tokens += sum(len(row.token_ids) for row in rows if len(row.token_ids) > 1)
        return super().step(rows)


def counting(**options: object) -> Counting:
    return Counting("script", ScriptedModelOptions(**options))


def cached(call: Call) -> int | None:
    return call.meter.usage().cache_read_input_tokens


async def ask(engine: Engine, prompt: str, **options: object) -> tuple[str, int | None]:
    call = make_call(prompt, max_new_tokens=20, **options)
    return (await read(engine, call)).text(), cached(call)


async def test_a_second_prompt_begins_where_it_differs_from_the_first_and_is_answered_as_ever() -> None:
    model = counting()
    async with running_engine(model) as engine:
        assert await ask(engine, SYSTEM + "One.") == (letters(SYSTEM + "One.", 20), 0)
        assert await ask(engine, SYSTEM + "Two.") == (letters(SYSTEM + "Two.", 20), 144)
        assert model.num_chunk_tokens == 149 + 5
        assert (engine.runner.num_looked_up_tokens, engine.runner.num_reused_tokens) == (2 * 149, 144)
        assert 0 < engine.runner.num_retained_tokens <= 2 * (149 + 20)
        assert (engine.runner.kv_utilization, engine.runner.num_running) == (0, 0)


async def test_other_tenants_find_nothing() -> None:
    async with running_engine(scripted()) as engine:
        await ask(engine, SYSTEM, tenant="red")
        assert await ask(engine, SYSTEM, tenant="blue") == (letters(SYSTEM, 20), 0)
        assert await ask(engine, SYSTEM, tenant="red") == (letters(SYSTEM, 20), 128)


async def test_a_bypass_neither_reads_nor_writes() -> None:
    async with running_engine(scripted()) as engine:
        assert await ask(engine, SYSTEM, use_prefix_cache=False) == (letters(SYSTEM, 20), 0)
        assert engine.runner.num_retained_tokens == engine.runner.num_looked_up_tokens == 0
        assert await ask(engine, SYSTEM) == (letters(SYSTEM, 20), 0)
        assert await ask(engine, SYSTEM, use_prefix_cache=False) == (letters(SYSTEM, 20), 0)


@pytest.mark.parametrize("num_slots", [1, 4])
async def test_a_chat_of_ten_turns_computes_each_of_its_tokens_once(num_slots: int) -> None:
    model = counting(num_slots=num_slots, num_kv_tokens=700)
    async with running_engine(model) as engine:
        history = SYSTEM
        for turn in range(10):
            history += f" Question {turn}? "
            answer, hit = await ask(engine, history)
            assert answer == letters(history, 20)
            assert hit == (0 if turn == 0 else (len(history) - len(f" Question {turn}? ") - 1) // 16 * 16)
            history += answer
        assert model.num_chunk_tokens < len(history)
        assert engine.runner.num_retained_tokens <= len(history), "one copy of the history is kept"


async def test_prompts_that_arrive_together_are_computed_once() -> None:
    model = counting(num_slots=8, seconds_per_step=0.001)
    async with running_engine(model) as engine:
        answers = await asyncio.gather(*(ask(engine, f"{SYSTEM}{i}, go.") for i in range(8)))
    assert answers == [(letters(f"{SYSTEM}{i}, go.", 20), 144 if i else 0) for i in range(8)]
    assert model.num_chunk_tokens == len(SYSTEM) + 6 + 7 * 7


async def test_the_choices_of_a_call_share_its_prompt_which_is_counted_once() -> None:
    model = counting()
    async with running_engine(model) as engine:
        call = make_call(SYSTEM, max_new_tokens=20, n=4)
        answer = await read(engine, call)
    assert {answer.text(i) for i in range(4)} == {letters(SYSTEM, 20)}
    assert model.num_chunk_tokens == 145 + 3 * (145 - 128)  # two tokens at least are left to run
    assert (call.meter.usage().input_tokens, cached(call)) == (len(SYSTEM), 0)


async def test_when_the_call_that_computes_for_others_is_cancelled_they_go_on() -> None:
    model = counting(num_slots=8, seconds_per_step=0.005)
    async with running_engine(model) as engine:
        long = SYSTEM * 5
        first = asyncio.ensure_future(ask(engine, long + "first"))
        await until(lambda: engine.runner.num_running == 1)
        others = [asyncio.ensure_future(ask(engine, f"{long}{i}")) for i in range(4)]
        await until(lambda: engine.runner.num_running == 5)
        first.cancel()
        assert [text for text, _ in await asyncio.gather(*others)] == [letters(f"{long}{i}", 20) for i in range(4)]
    assert model.num_chunk_tokens < 2 * len(long)


async def test_a_prompt_that_fails_leaves_nothing_for_others() -> None:
    async with running_engine(scripted()) as engine:
        with pytest.raises(BackendError):
            await ask(engine, SYSTEM + "\0")
        assert engine.runner.num_retained_tokens == 0


async def test_an_engine_told_not_to_reuses_nothing_and_reports_nothing() -> None:
    async with running_engine(scripted(), prefix_cache=False) as engine:
        assert await ask(engine, SYSTEM) == await ask(engine, SYSTEM) == (letters(SYSTEM, 20), None)
        assert engine.runner.num_retained_tokens == engine.runner.num_looked_up_tokens == 0


def alike(dice: random.Random) -> Call:
    """A call whose prompt begins like many others'."""
    call = random_call(dice)
    pieces = [dice.choice([SYSTEM, "Some other beginning, not so long. "]), "And then more. " * dice.randrange(6)]
    prompt = "".join(pieces[: dice.randrange(1, 3)]) + str(dice.randrange(20))
    again = make_call(
        prompt,
        max_new_tokens=call.max_new_tokens,
        tenant=dice.choice(["red", "blue"]),
        use_prefix_cache=dice.random() < 0.9,
    )
    again.request = replace(call.request, input=again.request.input, use_prefix_cache=again.request.use_prefix_cache)
    return again


@pytest.mark.parametrize("seed", range(4))
async def test_what_a_call_gets_does_not_depend_on_what_it_finds(seed: int) -> None:
    dice = random.Random(seed)
    model = counting(num_slots=dice.choice([2, 5]), num_kv_tokens=dice.choice([600, 1200, 5000]), num_spare_slots=3)
    async with running_engine(model) as engine:

        async def visit(call: Call, delay: float) -> Answer | None:
            await asyncio.sleep(delay)
            task = asyncio.ensure_future(read(engine, call))
            if dice.random() < 0.25:
                await asyncio.sleep(dice.random() * 0.02)
                task.cancel()
                await asyncio.wait([task])
                return None
            return await task

        calls = [alike(dice) for _ in range(60)]
        answers = await asyncio.gather(*(visit(call, dice.random() * 0.2) for call in calls))
        await until(lambda: engine.runner.num_running == engine.num_queued == 0)
        assert model.num_reserved_tokens == engine.runner.num_retained_tokens
        assert engine.runner.num_reused_tokens > 1000
    async with running_engine(counting(), prefix_cache=False) as engine:
        for call, answer in zip(calls, answers, strict=True):
            if answer is not None:
                assert call.prompt is not None
                again = make_call(call.prompt.text, max_new_tokens=call.max_new_tokens)
                again.request = call.request
                assert essence(answer, call.request.n) == essence(await read(engine, again), call.request.n)


async def test_a_drawn_answer_is_the_same_with_a_hit_and_without() -> None:
    async with running_engine(scripted()) as engine:
        options = {"seed": 7, "sampling": Sampling(temperature=3.0, presence_penalty=0.5)}
        cold, hit = await ask(engine, SYSTEM, **options), await ask(engine, SYSTEM, **options)
    assert (cold[0], cold[1], hit[1]) == (hit[0], 0, 128)


async def test_what_is_cached_can_be_told_before_a_prompt_is_sent() -> None:
    async with running_engine(scripted()) as engine:
        assert engine.num_known_tokens(make_call(SYSTEM + "Two.")) == 0
        await ask(engine, SYSTEM + "One.")
        assert engine.num_known_tokens(make_call(SYSTEM + "Two.")) == 144
        assert (await ask(engine, SYSTEM + "Two."))[1] == 144
        assert engine.num_known_tokens(make_call(SYSTEM + "Two.", tenant="other")) == 0
        assert engine.num_known_tokens(make_call(SYSTEM + "Two.", use_prefix_cache=False)) == 0
        assert engine.num_known_tokens(make_call("x" + SYSTEM)) == 0
