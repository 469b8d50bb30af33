"""Answers that nobody sees in parts."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from headrace.backends.errors import BackendError
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, StreamEnd
from headrace.backends.types import Call, Events
from headrace.server.middleware.gathering import gather
from tests.server.cache_kit import Letters, call
from tests.server.server_kit import events_of, until


def whole(model: Letters, **options: object) -> Call:
    return replace(call(model, **options), is_streamed=False)


def streamed(model: Letters) -> Call:
    return replace(call(model), is_streamed=True)


async def test_what_is_not_streamed_comes_in_one_part_when_it_is_over() -> None:
    model = Letters()
    delta, finish, end = await events_of(gather(model.run), whole(model))
    assert delta == Delta(0, "abc", (0, 1, 2))
    assert finish == ChoiceFinish(0, FinishReason.EOS_TOKEN, seed=7)
    assert end == StreamEnd()


async def test_what_is_streamed_comes_as_it_does() -> None:
    model = Letters(free=False)
    events = gather(model.run)(streamed(model))
    for i, letter in enumerate("abc"):
        model.turn()
        assert await anext(events) == Delta(0, letter, (i,))
    assert [type(event) async for event in events] == [ChoiceFinish, StreamEnd]


async def test_choices_that_take_turns_come_one_after_the_other() -> None:
    async def two(made: Call) -> Events:
        for letter in "ab":
            for choice in (1, 0):
                yield Delta(choice, letter)
        for choice in (1, 0):
            yield ChoiceFinish(choice, FinishReason.MAX_TOKENS)
        yield StreamEnd()

    events = await events_of(gather(two), whole(Letters(), n=2))
    assert events == [
        Delta(0, "ab"),
        ChoiceFinish(0, FinishReason.MAX_TOKENS),
        Delta(1, "ab"),
        ChoiceFinish(1, FinishReason.MAX_TOKENS),
        StreamEnd(),
    ]


async def test_an_error_is_raised_after_what_came_before_it() -> None:
    model = Letters(error=BackendError("broken"))
    events = gather(model.run)(whole(model))
    assert await anext(events) == Delta(0, "abc", (0, 1, 2))
    with pytest.raises(BackendError, match="broken"):
        await anext(events)
    assert model.closed == 1


async def test_a_call_that_comes_to_be_streamed_gives_what_there_is_with_its_next_event() -> None:
    model = Letters("abcd", free=False)
    made = whole(model)
    events = gather(model.run)(made)
    first: asyncio.Task[Event] = asyncio.ensure_future(anext(events))
    model.turn(2)
    await until(lambda: model.said == 2)
    made.is_streamed = True
    assert not first.done()
    model.turn()
    assert await first == Delta(0, "abc", (0, 1, 2))
    model.turn()
    assert await anext(events) == Delta(0, "d", (3,))
    assert [type(event) async for event in events] == [ChoiceFinish, StreamEnd]


async def test_a_cancel_reaches_what_runs() -> None:
    model = Letters(free=False)
    events = gather(model.run)(whole(model))

    async def read() -> None:
        async with aclosing(events):
            await anext(events)

    reading = asyncio.create_task(read())
    model.turn()
    await until(lambda: model.said == 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert model.closed == 1
