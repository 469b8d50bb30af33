"""What is answered anew and what is replayed, on a real ledger."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import update

from headrace.backends.api import DeterminismClass
from headrace.backends.errors import (
    AnswerExpired,
    InvalidArgument,
    ModelNotFound,
)
from headrace.backends.requests import ResponseOptions
from headrace.backends.types import Call, Events, Principal, Prompt
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.schema import answers
from headrace.server.middleware.idempotency import Idempotency
from tests.accounting.ledger_kit import ManualClock
from tests.server.idempotency_kit import COST, Model, call, idempotency
from tests.server.server_kit import events_of, text_of


async def test_without_a_key_every_call_runs(keys: Idempotency) -> None:
    model = Model()
    for _ in range(2):
        assert text_of(await events_of(keys.replay(model.run), call(key=None))) == "abc"
    assert model.runs == 2


async def test_the_same_request_under_the_same_key_runs_once_and_gets_the_same(keys: Idempotency) -> None:
    model, first, second = Model(), call(), call()
    handler = keys.replay(model.run)
    events = await events_of(handler, first)
    assert await events_of(handler, second) == events
    assert model.runs == 1
    assert second.meter.usage() == first.meter.usage()
    assert second.meter.attempts == first.meter.attempts
    assert second.meter.cost == first.meter.cost == COST
    assert (first.meter.replayed, second.meter.replayed) == (False, True)
    assert first.model is not None
    assert second.model is not None
    assert second.model.card == first.model.card
    assert (second.model.backend, second.model.determinism) == ("tests", DeterminismClass.STRICT)


async def test_a_replay_has_no_timings_since_nothing_was_computed(keys: Idempotency) -> None:
    handler, second = keys.replay(Model().run), call()
    await events_of(handler, call())
    await events_of(handler, second)
    meter = second.meter
    assert (meter.started, meter.first_token, meter.first_answer_token, meter.last_token) == (None,) * 4


async def test_the_prompt_is_kept_where_it_is_echoed(keys: Idempotency) -> None:
    handler = keys.replay(Model().run)
    for key, response, prompt in (
        ("a", ResponseOptions(echo=True), Prompt("prompt", (1, 2))),
        ("b", ResponseOptions(), None),
    ):
        await events_of(handler, call(key=key, response=response))
        again = call(key=key, response=response)
        await events_of(handler, again)
        assert again.prompt == prompt


async def test_what_a_plugin_inside_has_rewritten_holds_for_replays_too(keys: Idempotency) -> None:
    async def rewriting(made: Call) -> Events:
        made.request = replace(made.request, n=1)
        async with aclosing(Model().run(made)) as events:
            async for event in events:
                yield event

    handler, again = keys.replay(rewriting), call(n=3)
    await events_of(handler, call(n=3))
    await events_of(handler, again)
    assert again.request.n == 1


async def test_another_request_under_the_key_is_refused(keys: Idempotency) -> None:
    handler = keys.replay(Model().run)
    await events_of(handler, call())
    with pytest.raises(InvalidArgument) as error:
        await events_of(handler, call("another prompt"))
    assert error.value.field == "idempotency_key"


async def test_tenants_have_keys_of_their_own(keys: Idempotency) -> None:
    model = Model()
    handler = keys.replay(model.run)
    await events_of(handler, call("one"))
    other = call("another", tenant="globex")
    await events_of(handler, other)
    assert (model.runs, other.meter.replayed) == (2, False)


async def test_a_caller_who_may_not_use_the_model_gets_no_answer_of_it(keys: Idempotency) -> None:
    handler = keys.replay(Model().run)
    await events_of(handler, call())
    poor = call()
    poor.principal = Principal("acme", models=frozenset({"small"}))
    with pytest.raises(ModelNotFound):
        await events_of(handler, poor)
    assert poor.model is None
    assert not poor.meter.attempts


@pytest.mark.parametrize("options", [{"ledger": None}, {"hours": 0.0}, {"max_bytes": 0}])
async def test_keys_are_refused_by_name_where_no_answers_are_kept(ledger: Ledger, options: dict[str, Any]) -> None:
    model = Model()
    handler = idempotency(**({"ledger": ledger} | options)).replay(model.run)
    with pytest.raises(InvalidArgument, match="keeps no answers") as error:
        await events_of(handler, call())
    assert error.value.field == "idempotency_key"
    assert text_of(await events_of(handler, call(key=None))) == "abc"


async def test_an_answer_that_is_too_old_is_expired(ledger: Ledger) -> None:
    clock, model = ManualClock(), Model()
    handler = idempotency(ledger, clock=clock, hours=1.0).replay(model.run)
    await events_of(handler, call())
    clock.advance(3600)
    with pytest.raises(AnswerExpired):
        await events_of(handler, call())
    assert model.runs == 1


async def test_an_answer_that_another_version_wrote_is_expired(ledger: Ledger, keys: Idempotency) -> None:
    handler = keys.replay(Model().run)
    await events_of(handler, call())
    await ledger.write(lambda one: one.execute(update(answers).values(events=b"\xff")))
    with pytest.raises(AnswerExpired, match="another version"):
        await events_of(handler, call())
