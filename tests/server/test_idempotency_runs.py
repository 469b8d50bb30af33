"""Calls with the key of one that runs: who gets its events, how long it goes on, and what an error leaves."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from sqlalchemy import select

from headrace.backends.errors import (
    BackendError,
    InvalidArgument,
)
from headrace.backends.events import Delta
from headrace.backends.types import Call, Events
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.schema import answers
from headrace.server.middleware.idempotency import MAX_UNREAD, Idempotency
from tests.server.idempotency_kit import COST, Model, call, idempotency
from tests.server.letters_kit import Reader
from tests.server.server_kit import events_of, text_of, until


async def test_another_request_under_the_key_of_one_that_runs_is_refused(keys: Idempotency) -> None:
    model = Model(free=False)
    running = Reader(keys.replay(model.run), call())
    running.want()
    await until(lambda: model.runs == 1)
    with pytest.raises(InvalidArgument, match="which runs"):
        await events_of(keys.replay(model.run), call("another prompt"))
    model.turn(3)
    assert await running.rest() == "abc"


async def test_calls_that_come_while_it_runs_get_all_events_from_the_first_on(keys: Idempotency) -> None:
    model = Model(free=False)
    handler = keys.replay(model.run)
    first = Reader(handler, call())
    model.turn(2)
    await first.read(2)
    others = [Reader(handler, call()) for _ in range(3)]
    await others[0].read(2)
    model.turn()
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
    model.turn()
    await first.read(1)
    await second.read(1)
    await first.leave()
    model.turn(2)
    assert await second.rest() == "abc"
    assert model.runs == 1


async def test_a_caller_whose_connection_broke_finds_its_answer(keys: Idempotency) -> None:
    model = Model(free=False)
    handler = keys.replay(model.run)
    first = Reader(handler, call())
    model.turn()
    await first.read(1)
    await first.leave()
    model.turn(2)
    assert text_of(await events_of(handler, call())) == "abc"
    assert model.runs == 1


async def test_a_caller_who_left_finds_its_answer_when_it_is_over(keys: Idempotency) -> None:
    model = Model(free=False)
    handler = keys.replay(model.run)
    first = Reader(handler, call())
    model.turn()
    await first.read(1)
    await first.leave()
    model.turn(2)
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
    model.turn()
    await first.read(1)
    await first.leave()
    await until(lambda: model.closed == 1)
    model.turn(3)
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
    model.turn()
    await readers[0].read(1)
    assert first.deadline == 10.0
    readers.append(Reader(handler, patient))
    await readers[1].read(1)
    assert first.deadline == 20.0
    readers.append(Reader(handler, endless))
    await readers[2].read(1)
    assert first.deadline is None
    model.turn(2)
    assert [await one.rest() for one in readers] == ["abc"] * 3


async def test_only_so_many_calls_of_a_tenant_go_on_unread(keys: Idempotency) -> None:
    model = Model("ab", free=False)
    handler = keys.replay(model.run)
    for i in range(MAX_UNREAD + 3):
        reader = Reader(handler, call(key=f"order-{i}"))
        reader.want()
        await until(lambda: model.runs == i + 1)  # noqa: B023  # it is awaited here
        await reader.leave()
    await until(lambda: model.closed == 3)
    await until(lambda: len(keys._runs) == MAX_UNREAD)
    await keys.close()
    assert model.closed == MAX_UNREAD + 3


async def test_closing_cancels_what_nobody_reads_and_waits_for_it(ledger: Ledger, keys: Idempotency) -> None:
    model = Model(free=False)
    reader = Reader(keys.replay(model.run), call())
    reader.want()
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
    reader.want()
    await until(lambda: bool(brief._runs) and next(iter(brief._runs.values())).call.model is not None)
    await reader.leave()
    await cleaning.wait()
    closing = asyncio.create_task(brief.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    assert cleaned.is_set()


async def test_a_call_that_failed_leaves_nothing_and_the_next_runs_anew(keys: Idempotency) -> None:
    model = Model(free=False, error=BackendError("it broke"))
    handler = keys.replay(model.run)
    readers = [Reader(handler, call()) for _ in range(2)]
    model.turn()
    for reader in readers:
        await reader.read(1)
    model.turn(10)
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
