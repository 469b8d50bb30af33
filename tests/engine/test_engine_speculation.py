"""Guessed tokens change how fast an answer comes, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from engine_kit import Answer, make_call, read, running_engine, scripted

from headrace.backends.events import FinishReason
from headrace.backends.requests import ResponseOptions, Sampling, Stopping
from headrace.backends.scripted import EOS, ScriptedStepModel
from headrace.backends.types import Call

CHORUS = "row, row, row your boat, gently down the stream; " * 4
SECONDS = 0.002
"""A step takes so long, however many tokens it has: guesses are as good as free."""


def drafting(**options: object) -> ScriptedStepModel:
    return scripted(max_drafts=32, seconds_per_step=SECONDS, num_slots=8, **options)


def seen(answer: Answer) -> list[object]:
    """All that does not depend on when tokens came."""
    found: list[object] = []
    for choice in sorted({event.choice for event in answer.events[:-1]}):
        finish = answer.finish(choice)
        found += [answer.text(choice), answer.ids(choice), answer.logprobs(choice)]
        found += [finish.reason, finish.stop_sequence, finish.stop_token_id]
    return found


async def answers(calls: Sequence[Call], *, speculation: bool, **options: object) -> list[Answer]:
    """Of calls that come together."""
    async with running_engine(drafting(**options), speculation=speculation) as engine:
        return list(await asyncio.gather(*(read(engine, call) for call in calls)))


@pytest.mark.usefixtures("guesses_pay")
async def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    model = drafting(answer=CHORUS)
    call = make_call(max_new_tokens=len(CHORUS) + 1)
    async with running_engine(model) as engine:
        answer = await read(engine, call)
    assert answer.text() == CHORUS
    assert answer.finish().reason is FinishReason.EOS_TOKEN
    assert model.num_steps < len(CHORUS) / 2
    usage = call.meter.usage()
    assert usage.output_tokens == len(CHORUS) + 1
    assert usage.accepted_draft_tokens is not None
    assert usage.rejected_draft_tokens is not None
    assert usage.accepted_draft_tokens + model.num_steps >= len(CHORUS)


async def test_without_speculation_every_token_takes_a_step() -> None:
    model = drafting(answer=CHORUS)
    call = make_call(max_new_tokens=200)
    async with running_engine(model, speculation=False) as engine:
        await read(engine, call)
    assert model.num_steps >= len(CHORUS)
    assert call.meter.usage().accepted_draft_tokens is None


@pytest.mark.parametrize("limit", [1, 2, 3, 40, 41, 42, 43, 44, 45, 46])
async def test_an_answer_ends_at_its_limit_though_guesses_reach_beyond(limit: int) -> None:
    async with running_engine(drafting(answer=CHORUS)) as engine:
        answer = await read(engine, make_call(max_new_tokens=limit))
    assert answer.text() == CHORUS[:limit]
    assert answer.finish().reason is FinishReason.MAX_TOKENS


async def test_a_guess_that_ends_the_answer_ends_it() -> None:
    answer = "abcabcabc" * 8
    async with running_engine(drafting(answer=answer)) as engine:
        # The end was seen in the prompt: it is guessed.
        got = await read(engine, make_call(b"cabcabc" + bytes([0x20]), max_new_tokens=200))
    assert got.text() == answer
    assert got.finish().stop_token_id == EOS


async def test_a_stop_sequence_within_a_run_of_guesses_is_found() -> None:
    stopping = Stopping(stop_sequences=("the stream; row, row, row your",))
    async with running_engine(drafting(answer=CHORUS)) as engine:
        got = await read(engine, make_call(max_new_tokens=200, stopping=stopping))
    assert got.text() == CHORUS[: CHORUS.index("the stream")]
    assert got.finish().reason is FinishReason.STOP_SEQUENCE


SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=2.5),
    "top_k": Sampling(temperature=3.0, top_k=3),
    "penalties": Sampling(
        temperature=2.0, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5, logit_bias={97: 2.0}
    ),
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("answer", [None, CHORUS], ids=["letters", "chorus"])
async def test_answers_are_the_same_with_guesses_and_without(name: str, answer: str | None) -> None:
    def calls() -> list[Call]:
        return [
            make_call(
                f"prompt {i}, prompt {i}",
                max_new_tokens=60 + 9 * i,
                n=1 + i % 2,
                seed=i,
                sampling=SAMPLINGS[name],
                stopping=Stopping(min_new_tokens=5 * i),
                response=ResponseOptions(token_ids=True, logprobs=i % 3 == 0, top_logprobs=2 * (i % 3 == 0)),
            )
            for i in range(5)
        ]

    with_guesses = calls()
    plain = await answers(calls(), speculation=False, answer=answer)
    alone = [(await answers([call], speculation=True, answer=answer))[0] for call in calls()]
    together = await answers(with_guesses, speculation=True, answer=answer)
    assert [seen(one) for one in together] == [seen(one) for one in plain]
    assert [seen(one) for one in alone] == [seen(one) for one in plain]


async def test_a_chat_goes_on_from_an_answer_that_was_guessed() -> None:
    model = drafting(answer=CHORUS)
    async with running_engine(model) as engine:
        first = await read(engine, make_call("ask", max_new_tokens=120))
        call = make_call("ask" + first.text() + " again", max_new_tokens=40)
        second = await read(engine, call)
    assert second.text() == CHORUS[:40]
    cached = call.meter.usage().cache_read_input_tokens
    assert cached is not None
    assert cached >= 112, "the model insists that what is kept was right"
