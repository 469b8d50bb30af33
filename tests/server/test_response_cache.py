"""The middleware that answers equal requests once: what it stores, and who gets it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from headrace.backends.api import DeterminismClass
from headrace.backends.errors import BackendError, UnsupportedOption
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, Scored, StreamEnd
from headrace.backends.requests import ResponseCaching, Sampling, Scoring
from headrace.backends.types import Call, Events
from headrace.backends.usage import Cost, Usage
from headrace.server.middleware import response_cache
from headrace.server.middleware.response_cache import without_cache
from tests.server.cache_kit import (
    BYPASS,
    GREEDY,
    HIT,
    MISS,
    ManualClock,
    NoStore,
    cache,
    call,
    copied,
    in_memory,
    statuses,
    stored,
)
from tests.server.letters_kit import Letters, Reader
from tests.server.server_kit import events_of, text_of


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
        yield Scored(0, -1.5, 5)
        yield StreamEnd()

    made, scoring = in_memory(), Scoring()
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
    assert again.meter.cost == Cost(
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


async def test_an_answer_that_a_plugin_gave_in_place_of_the_model_is_stored_too() -> None:
    async def instead(made: Call) -> Events:
        yield Delta(0, "plugin")
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

    model, made = Letters(), in_memory()
    await events_of(made.cache(instead), call(model))
    assert text_of(await events_of(made.cache(model.run), call(model, sampling=GREEDY))) == "plugin"
