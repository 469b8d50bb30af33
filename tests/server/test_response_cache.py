"""The middleware that answers equal requests once: what it stores, and how calls share what runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from headrace.backends import types
from headrace.backends.api import DeterminismClass
from headrace.backends.errors import BackendError, UnsupportedOption
from headrace.backends.types import (
    CacheStatus,
    Call,
    ChoiceFinish,
    Delta,
    Events,
    FinishReason,
    ResponseCaching,
    Sampling,
    StreamEnd,
    Usage,
)
from headrace.server.caching.memory_store import MemoryStore
from headrace.server.middleware import response_cache
from headrace.server.middleware.response_cache import AHEAD, ResponseCache, without_cache
from tests.server.cache_kit import GREEDY, Letters, ManualClock, NoStore, Reader, cache, call, copied, stored
from tests.server.server_kit import events_of, text_of, until

HIT, MISS, BYPASS = CacheStatus.HIT, CacheStatus.MISS, CacheStatus.BYPASS


def in_memory(clock: ManualClock | None = None, **options: Any) -> ResponseCache:
    clock = clock or ManualClock()
    return cache(MemoryStore(max_bytes=10**6, clock=clock), clock=clock, **options)


async def statuses(model: Letters, made: ResponseCache, *calls: Call) -> list[CacheStatus | None]:
    """Of calls that come one after the other."""
    handler = made.cache(model.run)
    for one in calls:
        await events_of(handler, one)
    return [one.meter.cache for one in calls]


# --- what is stored --------------------------------------------------------------------------------------------------


async def test_an_equal_request_gets_the_same_events_and_has_used_nothing() -> None:
    model, made = Letters(), in_memory(priced=True)
    first, second = call(model), copied(call(model), is_streamed=True)
    events = await events_of(made.cache(model.run), first)
    assert await events_of(made.cache(model.run), second) == events
    assert model.runs == 1
    assert (first.meter.cache, second.meter.cache) == (MISS, HIT)
    assert second.meter.attempts == []
    assert second.meter.usage() == Usage()
    assert second.meter.cost is not None
    assert second.meter.cost.charge_nanos == 0
    assert second.model is model


async def test_a_hit_that_comes_whole_comes_in_as_few_parts_as_can_be() -> None:
    model, made = Letters(), in_memory()
    await events_of(made.cache(model.run), call(model))
    (delta, finish, end) = await events_of(made.cache(model.run), call(model))
    assert delta == Delta(0, "abc", (0, 1, 2))
    assert (type(finish), type(end)) == (ChoiceFinish, StreamEnd)


async def test_what_is_sent_of_a_hit_is_counted() -> None:
    model, made = Letters(), in_memory()
    await events_of(made.cache(model.run), call(model))
    again = call(model)
    for event in await events_of(made.cache(model.run), again):
        if isinstance(event, Delta):
            again.meter.sent(event)
    assert again.meter.usage() == Usage(sent_output_tokens=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": Sampling(temperature=0.7)},
        {"sampling": Sampling()},
        {"response_caching": ResponseCaching(enabled=False)},
        {"response_caching": ResponseCaching(enabled=False), "seed": 1},
    ],
)
async def test_what_is_not_deterministic_or_bypasses_runs_each_time_and_leaves_nothing(changes: dict[str, Any]) -> None:
    model, made = Letters(), in_memory()
    assert await statuses(model, made, call(model, **changes), call(model, **changes)) == [BYPASS, BYPASS]
    assert made.num_bytes == 0
    assert model.runs == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"seed": 1, "sampling": Sampling(temperature=0.7)},
        {"response_caching": ResponseCaching(enabled=True)},
    ],
)
async def test_a_seed_or_a_wish_makes_it_stored(changes: dict[str, Any]) -> None:
    model = Letters()
    changes = {"sampling": Sampling(temperature=0.7)} | changes
    assert await statuses(model, in_memory(), call(model, **changes), call(model, **changes)) == [MISS, HIT]


async def test_answers_of_a_model_that_promises_nothing_are_stored_on_demand_alone() -> None:
    model, wish = Letters(determinism=DeterminismClass.BEST_EFFORT), ResponseCaching(enabled=True)
    assert await statuses(model, in_memory(), call(model, seed=1), call(model, seed=1)) == [BYPASS, BYPASS]
    calls = [call(model, response_caching=wish) for _ in range(2)]
    assert await statuses(model, in_memory(), *calls) == [MISS, HIT]


async def test_a_bypass_does_not_read_what_is_stored() -> None:
    model = Letters()
    made = in_memory()
    bypass = ResponseCaching(enabled=False)
    assert await statuses(model, made, call(model), call(model, response_caching=bypass), call(model)) == [
        MISS,
        BYPASS,
        HIT,
    ]


async def test_no_store_takes_what_is_stored_and_leaves_nothing() -> None:
    model, no_store = Letters(), ResponseCaching(no_store=True)
    made = in_memory()
    assert await statuses(model, made, call(model, response_caching=no_store), call(model)) == [MISS, MISS]
    assert await statuses(model, made, call(model, response_caching=no_store)) == [HIT]


async def test_an_answer_is_kept_for_the_server_s_time_or_the_request_s_if_that_is_shorter() -> None:
    clock, model = ManualClock(), Letters()
    made = in_memory(clock, seconds=60.0)
    short, long = ResponseCaching(ttl=10.0), ResponseCaching(ttl=1000.0)
    await statuses(model, made, call(model, response_caching=short), call(model, text="long", response_caching=long))
    clock.advance(9)
    assert await statuses(model, made, call(model), call(model, text="long")) == [HIT, HIT]
    clock.advance(1)
    assert await statuses(model, made, call(model), call(model, text="long")) == [MISS, HIT]
    clock.advance(50)
    assert await statuses(model, made, call(model, text="long")) == [MISS]


async def test_an_answer_that_is_older_than_a_request_wants_is_made_anew() -> None:
    clock, model = ManualClock(), Letters()
    made, fresh = in_memory(clock), ResponseCaching(max_age=5.0)
    await statuses(model, made, call(model))
    clock.advance(5)
    assert await statuses(model, made, call(model, response_caching=fresh)) == [HIT]
    clock.advance(1)
    assert await statuses(model, made, call(model, response_caching=fresh)) == [MISS]
    # It is of now again.
    assert await statuses(model, made, call(model, response_caching=fresh)) == [HIT]


async def test_namespaces_and_tenants_know_nothing_of_each_other() -> None:
    model, made = Letters(), in_memory()
    calls = [
        call(model),
        call(model, response_caching=ResponseCaching(namespace="a")),
        call(model, response_caching=ResponseCaching(namespace="b")),
        call(model, tenant="zeta"),
    ]
    assert await statuses(model, made, *calls) == [MISS] * 4
    assert await statuses(model, made, *map(copied, calls)) == [HIT] * 4


async def test_the_keys_of_a_tenant_share_what_is_stored() -> None:
    model = Letters()
    assert await statuses(model, in_memory(), call(model, key="one"), call(model, key="two")) == [MISS, HIT]


@pytest.mark.parametrize("reason", FinishReason)
async def test_an_answer_that_was_cut_short_is_not_stored(reason: FinishReason) -> None:
    model = Letters(reason=reason)
    cut = reason.name in {"TIME_LIMIT", "SHUTDOWN", "BUDGET", "CONTENT_FILTER"}
    assert await statuses(model, in_memory(), call(model), call(model)) == [MISS, MISS if cut else HIT]


async def test_a_call_that_failed_or_was_left_leaves_nothing() -> None:
    model, made = Letters(error=BackendError("broken")), in_memory()
    with pytest.raises(BackendError):
        await events_of(made.cache(model.run), call(model))
    reader = Reader(made.cache(model.run), call(model))
    await reader.read(2)
    await reader.leave()
    assert made.num_bytes == 0
    assert model.closed == 2


async def test_another_version_of_a_remote_model_has_answers_of_its_own() -> None:
    model, made = Letters(reported_version="2026-11-01"), in_memory()
    assert await statuses(model, made, call(model), call(model)) == [MISS, HIT]
    model.reported_version = "2026-12-01"
    assert await statuses(model, made, call(model), call(model)) == [MISS, HIT]


async def test_an_answer_is_stored_under_the_version_that_came_with_it() -> None:
    class Tells(Letters):
        async def run(self, made: Call) -> Events:
            self.reported_version = "2026-11-01"
            async for event in super().run(made):
                yield event

    model = Tells()
    assert await statuses(model, in_memory(), call(model), call(model)) == [MISS, HIT]


async def test_an_answer_of_a_fallback_is_stored_as_that_model_s() -> None:
    first, second = Letters(name="first"), Letters("xyz", name="second")

    async def falls_back(made: Call) -> Events:
        made.enter(made.targets[1])
        async for event in second.run(made):
            yield event

    made = in_memory()
    routed = call(first, second)
    assert text_of(await events_of(made.cache(falls_back), routed)) == "xyz"
    assert routed.model is second
    again = call(first, second)
    await events_of(made.cache(falls_back), again)
    assert again.meter.cache is MISS
    direct = call(second)
    assert text_of(await events_of(made.cache(falls_back), direct)) == "xyz"
    assert (direct.meter.cache, direct.meter.model) == (HIT, "second")


async def test_an_answer_of_a_fallback_that_promises_nothing_is_not_stored() -> None:
    first, second = Letters(name="first"), Letters(name="second", determinism=DeterminismClass.BEST_EFFORT)

    async def falls_back(made: Call) -> Events:
        made.enter(made.targets[1])
        async for event in second.run(made):
            yield event

    made = in_memory()
    await events_of(made.cache(falls_back), call(first, second))
    assert made.num_bytes == 0


async def test_scores_are_stored_too() -> None:
    model, runs = Letters(), 0

    async def scores(made: Call) -> Events:
        nonlocal runs
        runs += 1
        made.meter.begin("tests").usage = Usage(input_tokens=6, output_tokens=0)
        yield types.Scored(0, -1.5, 5)
        yield StreamEnd()

    made, scoring = in_memory(), types.Scoring()
    first = await events_of(made.cache(scores), call(model, scoring=scoring))
    assert await events_of(made.cache(scores), call(model, scoring=scoring)) == first
    assert runs == 1


async def test_what_a_shared_store_gives_that_is_no_answer_to_the_request_is_made_anew() -> None:
    class Tampered(NoStore):
        is_shared = True

        async def get(self, key: bytes) -> Any:
            return replace(stored("evil"), events=(Delta(7, "evil"),))

    model = Letters()
    made = cache(Tampered())
    first = call(model)
    assert text_of(await events_of(made.cache(model.run), first)) == "abc"
    assert first.meter.cache is MISS


async def test_an_answer_too_large_to_be_stored_is_given_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_cache, "MAX_ANSWER_BYTES", 5000)
    model, made = Letters("x" * 200), in_memory()
    assert await statuses(model, made, call(model), call(model)) == [MISS, MISS]
    assert text_of(await events_of(made.cache(model.run), call(model))) == "x" * 200
    assert made._size == 0


async def test_a_hit_costs_the_share_that_the_operator_has_set_at_today_s_price() -> None:
    model, made = Letters(), in_memory(priced=True, hit_price=0.5)
    await events_of(made.cache(model.run), call(model))
    again = call(model)
    await events_of(made.cache(model.run), again)
    assert again.meter.cost == types.Cost(
        currency="USD", charge_nanos=round(0.5 * (6 * 3 + 3 * 5)), price_id="book", estimated=False
    )


async def test_without_a_cache_nothing_is_said_of_it_and_asking_for_it_is_refused() -> None:
    model = Letters()
    plain, bypass = call(model), call(model, response_caching=ResponseCaching(enabled=False))
    for one in (plain, bypass):
        assert text_of(await events_of(without_cache(model.run), one)) == "abc"
        assert one.meter.cache is None
    with pytest.raises(UnsupportedOption) as refused:
        await events_of(without_cache(model.run), call(model, response_caching=ResponseCaching(enabled=True)))
    assert refused.value.field == "cache.response"


# --- sharing what runs -----------------------------------------------------------------------------------------------


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
        ({}, {"stopping": types.Stopping(time_limit=5.0)}),
        ({"stopping": types.Stopping(time_limit=5.0)}, {"stopping": types.Stopping(time_limit=5.0)}),
        ({"clamp_to_budget": True}, {"clamp_to_budget": True}),
        ({}, {"scheduling": types.Scheduling(latency_class=types.LatencyClass.VOICE)}),
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


async def test_an_answer_that_a_plugin_gave_in_place_of_the_model_is_stored_too() -> None:
    async def instead(made: Call) -> Events:
        yield Delta(0, "plugin")
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

    model, made = Letters(), in_memory()
    await events_of(made.cache(instead), call(model))
    assert text_of(await events_of(made.cache(model.run), call(model, sampling=GREEDY))) == "plugin"
