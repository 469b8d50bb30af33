"""How equal requests that come while one of them runs share what it gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from headrace.backends.errors import BackendError
from headrace.backends.events import StreamEnd
from headrace.backends.requests import LatencyClass, ResponseCaching, Scheduling, Stopping
from headrace.backends.types import Call, Events
from headrace.server.middleware import response_cache
from headrace.server.middleware.gathering import gather
from headrace.server.middleware.idempotency import Idempotency
from headrace.server.middleware.response_cache import AHEAD
from tests.server.cache_kit import HIT, MISS, call, copied, in_memory, statuses
from tests.server.letters_kit import Letters, Reader
from tests.server.server_kit import events_of, text_of, until


async def test_equal_requests_at_the_same_time_run_once_and_all_get_the_events_as_they_come() -> None:
    model, made = Letters(free=False), in_memory()
    handler = made.cache(model.run)
    leader, follower = Reader(handler, call(model)), Reader(handler, call(model))
    leader.want()
    await until(lambda: model.runs == 1)
    follower.want()
    model.turn()
    await until(lambda: len(leader.events) == len(follower.events) == 1)
    late = Reader(handler, call(model))
    await late.read(1)
    model.turn(2)
    assert [await one.rest() for one in (leader, follower, late)] == ["abc"] * 3
    assert leader.events == follower.events == late.events
    assert model.runs == 1
    assert [one.call.meter.cache for one in (leader, follower, late)] == [MISS, HIT, HIT]
    assert len(leader.call.meter.attempts) == 1
    assert follower.call.meter.attempts == late.call.meter.attempts == []
    assert made._flights == {}
    assert made._size == 0


async def test_a_run_goes_on_when_the_one_who_began_it_leaves() -> None:
    model, made = Letters(free=False), in_memory()
    handler = made.cache(model.run)
    leader, follower = Reader(handler, call(model)), Reader(handler, call(model))
    model.turn()
    await leader.read(1)
    await follower.read(1)
    await leader.leave()
    model.turn(2)
    assert await follower.rest() == "abc"
    assert (model.runs, model.closed) == (1, 1)
    # And is stored.
    assert await statuses(model, made, call(model)) == [HIT]


async def test_the_last_to_leave_cancels_it_and_waits_until_it_is_settled() -> None:
    model, made = Letters(free=False), in_memory()
    handler = made.cache(model.run)
    readers = [Reader(handler, call(model)) for _ in range(3)]
    model.turn()
    for reader in readers:
        await reader.read(1)
    for reader in readers[:2]:
        await reader.leave()
        assert model.closed == 0
    await readers[2].leave()
    assert model.closed == 1
    assert made._flights == {}
    assert made._size == 0
    # The next one begins anew.
    model.turn(3)
    assert await statuses(model, made, call(model)) == [MISS]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"stopping": Stopping(time_limit=5.0)}),
        ({"stopping": Stopping(time_limit=5.0)}, {"stopping": Stopping(time_limit=5.0)}),
        ({"clamp_to_budget": True}, {"clamp_to_budget": True}),
        ({}, {"scheduling": Scheduling(latency_class=LatencyClass.VOICE)}),
        ({}, {"response_caching": ResponseCaching(no_store=True)}),
        ({}, {"response_caching": ResponseCaching(namespace="a")}),
        ({}, {"seed": 3}),
    ],
)
async def test_runs_are_not_shared_by_calls_that_could_be_cut_short_or_served_in_another_way(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    model, made = Letters(free=False), in_memory()
    handler = made.cache(model.run)
    readers = [Reader(handler, call(model, **changes)) for changes in (one, other)]
    for reader in readers:
        reader.want()
    await until(lambda: model.runs == 2)
    model.turn(6)
    assert [await reader.rest() for reader in readers] == ["abc", "abc"]
    assert [reader.call.meter.cache for reader in readers] == [MISS, MISS]


async def test_other_tenants_run_for_themselves() -> None:
    model, made = Letters(free=False), in_memory()
    handler = made.cache(model.run)
    readers = [Reader(handler, call(model, tenant=tenant)) for tenant in ("acme", "zeta")]
    for reader in readers:
        reader.want()
    await until(lambda: model.runs == 2)
    model.turn(6)
    assert [await reader.rest() for reader in readers] == ["abc", "abc"]


async def test_a_run_lasts_until_the_latest_deadline_of_its_readers() -> None:
    model, made = Letters(free=False), in_memory()
    handler = made.cache(model.run)
    first, patient, endless = call(model), call(model), call(model)
    first.deadline, patient.deadline = 10.0, 20.0
    readers = [Reader(handler, one) for one in (first, patient, endless)]
    model.turn()
    await readers[0].read(1)
    (run,) = model.calls
    assert run.deadline == 10.0
    await readers[1].read(1)
    assert run.deadline == 20.0
    await readers[2].read(1)
    assert run.deadline is None
    # Each keeps its own.
    assert [one.deadline for one in (first, patient, endless)] == [10.0, 20.0, None]
    model.turn(2)
    assert [await reader.rest() for reader in readers] == ["abc"] * 3


async def test_a_run_lasts_longer_where_a_reader_is_given_more_time() -> None:
    """By somebody who reads that call, under its idempotency key or on another connection."""
    model, made = Letters(free=False), in_memory()
    first = call(model)
    first.deadline = 10.0
    reader = Reader(made.cache(model.run), first)
    model.turn()
    await reader.read(1)
    (run,) = model.calls
    first.extend(20.0)
    assert (first.deadline, run.deadline) == (20.0, 20.0)
    first.extend(15.0)
    assert (first.deadline, run.deadline) == (20.0, 20.0)
    model.turn(2)
    assert await reader.rest() == "abc"
    first.extend(30.0)
    assert run.deadline == 20.0


async def test_a_run_is_streamed_as_soon_as_one_of_its_readers_is() -> None:
    """So that the ledger notes what it has used before that one sees it."""
    model, made = Letters(free=False), in_memory()
    handler = made.cache(model.run)
    whole, stream = Reader(handler, call(model)), Reader(handler, copied(call(model), is_streamed=True))
    model.turn()
    await whole.read(1)
    (run,) = model.calls
    assert not run.is_streamed
    await stream.read(1)
    assert run.is_streamed
    assert not whole.call.is_streamed
    model.turn(2)
    assert [await whole.rest(), await stream.rest()] == ["abc", "abc"]


async def test_a_stream_that_attaches_to_a_whole_answer_by_its_key_gets_its_parts_as_they_come(
    keys: Idempotency,
) -> None:
    model = Letters(free=False)
    handler = keys.replay(in_memory().cache(gather(model.run)))
    made = call(model, idempotency_key="order-1")
    whole = Reader(handler, made)
    whole.want()
    model.turn()
    await until(lambda: model.said == 1)
    stream = Reader(handler, copied(made, is_streamed=True))
    stream.want()
    await until(lambda: made.is_streamed)
    model.turn()
    await until(lambda: len(stream.events) == 1)
    assert model.said == 2
    model.turn()
    assert [await whole.rest(), await stream.rest()] == ["abc", "abc"]


async def test_one_of_those_that_wait_tries_again_when_a_run_fails_before_its_first_event() -> None:
    model, made = Letters(error=BackendError("broken"), error_first=True), in_memory()
    handler = made.cache(model.run)
    readers = [Reader(handler, call(model)) for _ in range(3)]
    for reader in readers:
        reader.want()
    await until(lambda: len([one for flight in made._flights.values() for one in flight.broadcast.readers]) == 3)
    model.turn()
    await until(lambda: model.runs == 2)
    model.error = None
    model.turn()
    results = await asyncio.gather(*(reader.rest() for reader in readers), return_exceptions=True)
    assert [type(one) for one in results] == [BackendError, str, str]
    assert model.runs == 2
    assert sorted(str(reader.call.meter.cache) for reader in readers[1:]) == [str(HIT), str(MISS)]


async def test_who_begins_anew_begins_at_the_first_model_wherever_the_run_before_has_been() -> None:
    model, other, made = Letters(), Letters(name="other"), in_memory()
    entered: list[str] = []

    async def run(made: Call) -> Events:
        """Fails at the first model, falls back to the other, and fails there, too."""
        assert made.model is not None
        entered.append(made.model.card.name)
        await model.go.acquire()
        made.enter(made.targets[1])
        raise BackendError("broken")
        yield StreamEnd()

    handler = made.cache(run)
    readers = [Reader(handler, call(model, other)) for _ in range(2)]
    for reader in readers:
        reader.want()
    await until(lambda: len([one for flight in made._flights.values() for one in flight.broadcast.readers]) == 2)
    model.turn(2)
    results = await asyncio.gather(*(reader.rest() for reader in readers), return_exceptions=True)
    assert [type(one) for one in results] == [BackendError] * 2
    assert entered == ["letters", "letters"]


async def test_an_error_reaches_all_that_wait_after_two_runs_at_most() -> None:
    model, made = Letters(error=BackendError("broken"), error_first=True), in_memory()
    handler = made.cache(model.run)
    readers = [Reader(handler, call(model)) for _ in range(5)]
    for reader in readers:
        reader.want()
    await until(lambda: len([one for flight in made._flights.values() for one in flight.broadcast.readers]) == 5)
    model.turn(5)
    results = await asyncio.gather(*(reader.rest() for reader in readers), return_exceptions=True)
    assert [type(one) for one in results] == [BackendError] * 5
    assert model.runs == 2
    assert made._flights == {}


async def test_an_error_after_the_first_event_reaches_all_after_what_there_was() -> None:
    model, made = Letters("ab", free=False, error=BackendError("broken")), in_memory()
    handler = made.cache(model.run)
    readers = [Reader(handler, call(model)) for _ in range(3)]
    model.turn()
    for reader in readers:
        await reader.read(1)
    model.turn()
    results = await asyncio.gather(*(reader.rest() for reader in readers), return_exceptions=True)
    assert [type(one) for one in results] == [BackendError] * 3
    assert [text_of(reader.events) for reader in readers] == ["ab"] * 3
    assert model.runs == 1


async def test_a_run_is_little_ahead_of_its_furthest_reader() -> None:
    model, made = Letters("x" * 200), in_memory()
    handler = made.cache(model.run)
    reader = Reader(handler, call(model))
    await reader.read(1)
    await asyncio.sleep(0.02)
    assert model.said <= AHEAD + 3
    slow = Reader(handler, call(model))
    await slow.read(1)
    assert await reader.rest() == "x" * 200  # the slow one does not hold it up
    assert await slow.rest() == "x" * 200
    assert model.runs == 1


async def test_a_run_too_large_to_be_kept_goes_at_the_pace_of_its_slowest_reader_and_takes_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(response_cache, "MAX_ANSWER_BYTES", 5000)
    model, made = Letters("x" * 200), in_memory()
    handler = made.cache(model.run)
    fast, slow = Reader(handler, call(model)), Reader(handler, call(model))
    await fast.read(1)
    await slow.read(1)
    fast.want(10_000)
    await until(lambda: any(not flight.broadcast.kept for flight in made._flights.values()))
    said = model.said
    await asyncio.sleep(0.02)
    assert model.said == said
    alone = Reader(handler, call(model))
    assert await alone.rest() == "x" * 200
    assert model.runs == 2
    assert await slow.rest() == "x" * 200
    assert await fast.rest() == "x" * 200
    assert made._size == 0


async def test_calls_that_run_have_a_bound_on_memory_together() -> None:
    model, made = Letters("x" * 100), in_memory(max_bytes=20_000)
    handler = made.cache(model.run)
    readers = [Reader(handler, call(model, text=f"prompt {i}")) for i in range(4)]
    for reader in readers:
        reader.want(60)
    await until(lambda: all(len(reader.events) == 60 for reader in readers))
    assert made._size <= 20_000 + 4 * 1000
    assert [await reader.rest() for reader in readers] == ["x" * 100] * 4
    assert made._size == 0


def forgetful(run: Callable[[Call], Events]) -> Callable[[Call], Events]:
    async def handle(made: Call) -> Events:
        async for event in run(made):
            if not isinstance(event, StreamEnd):
                yield event

    return handle


async def test_a_stream_without_its_end_is_a_bug_that_is_raised() -> None:
    model, made = Letters(), in_memory()
    with pytest.raises(RuntimeError, match="This is a bug"):
        await events_of(made.cache(forgetful(model.run)), call(model))
    assert made.num_bytes == 0
