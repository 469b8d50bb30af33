"""Each layer of the chain, in the App that puts them together."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest
from server_kit import TwoTenants, app_with, call, events_of, reason_of, text_of, until

from headrace.backends.errors import (
    Draining,
    InvalidArgument,
    ModelNotFound,
    Overloaded,
    Unauthenticated,
    UnsupportedOption,
)
from headrace.backends.events import Delta, FinishReason, StreamEnd
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    InfillInput,
    ResponseOptions,
    Role,
    Sampling,
    Stopping,
    TokenIdsInput,
)
from headrace.backends.types import ANONYMOUS, Call, Credentials, Events, Principal
from headrace.server.accounting.accounts import Accounts
from headrace.server.middleware.authentication import AllowAnonymous, authenticate
from headrace.server.middleware.ceilings import CallCeiling
from headrace.server.middleware.limits import RateLimits

BOTH = {"letters": {}, "whole": {"kind": "call", "answer": "Hello"}}


async def refused(app: Any, made: Call, kind: type[Exception]) -> Any:
    with pytest.raises(kind) as error:
        await events_of(app.generate, made)
    return error.value


# --- ceilings


async def waits_forever(made: Call) -> Events:
    yield Delta(0, "first")
    await asyncio.Event().wait()


async def test_calls_beyond_the_ceiling_are_refused_at_once_until_one_ends() -> None:
    handler = CallCeiling(2, lambda: False).limit(waits_forever)
    first, second = handler(call()), handler(call())
    await anext(first)
    await anext(second)
    with pytest.raises(Overloaded) as full:
        await anext(handler(call()))
    assert full.value.retry_after > 0
    await first.aclose()
    third = handler(call())
    await anext(third)
    await second.aclose()
    await third.aclose()


async def test_one_ceiling_counts_over_all_handlers_and_forgets_calls_that_fail() -> None:
    async def fails(made: Call) -> Events:
        raise InvalidArgument("text", "is wrong")
        yield

    ceiling = CallCeiling(1, lambda: False)
    handlers = [ceiling.limit(waits_forever), ceiling.limit(fails)]
    for _ in range(3):
        with pytest.raises(InvalidArgument):
            await anext(handlers[1](call()))
    async with aclosing(handlers[0](call())) as running:
        await anext(running)
        with pytest.raises(Overloaded):
            await anext(handlers[1](call()))


async def test_a_stopping_server_takes_no_new_calls_and_finishes_those_it_has() -> None:
    async with app_with() as app:
        running = app.generate(call(stopping=Stopping(max_new_tokens=20)))
        events = [await anext(running)]
        app.draining = True
        assert (await refused(app, call(), Draining)).retry_after > 0
        events += [event async for event in running]
        assert len(text_of(events)) == 20


# --- authentication


async def test_whoever_calls_is_known_by_the_credentials_alone() -> None:
    async with app_with(authenticator=TwoTenants()) as app:
        for key, tenant in (("a", "tenant-a"), ("b", "tenant-b")):
            made = call(metadata={"authorization": f"Bearer {key}"})
            await events_of(app.generate, made)
            assert made.principal == Principal(tenant)
        for metadata in ({}, {"authorization": "Bearer c"}, {"tenant": "tenant-a"}):
            await refused(app, call(metadata=metadata), Unauthenticated)


async def test_without_an_authenticator_everybody_is_the_anonymous_tenant() -> None:
    async with app_with() as app:
        await events_of(app.generate, made := call(metadata={"authorization": "Bearer a"}))
    assert made.principal == ANONYMOUS
    assert await AllowAnonymous().authenticate(Credentials()) == ANONYMOUS


async def test_strangers_learn_nothing_of_the_models() -> None:
    async with app_with(authenticator=TwoTenants()) as app:
        await refused(app, call(model="no such model"), Unauthenticated)


async def test_a_full_server_does_not_ask_who_calls() -> None:
    async with app_with(authenticator=TwoTenants(), max_calls=1) as app:
        running = app.generate(call(metadata={"authorization": "Bearer a"}))
        await anext(running)
        await refused(app, call(), Overloaded)
        await running.aclose()


async def test_a_layer_closes_what_it_iterates() -> None:
    closed = asyncio.Event()

    async def inner(made: Call) -> Events:
        try:
            yield Delta(0, "first")
            yield StreamEnd()
        finally:
            closed.set()

    accounts = Accounts(ledger=None, plans={}, default_plan=None, clock=time.time_ns)
    limited = RateLimits(accounts.terms, clock=time.monotonic).limit(
        CallCeiling(1, lambda: False).limit(inner), streams=True
    )
    handler = authenticate(limited, authenticator=AllowAnonymous(), accounts=accounts)
    events = handler(call())
    await anext(events)
    await events.aclose()
    assert closed.is_set()


# --- resolve


async def test_a_call_gets_the_model_it_names_or_the_default() -> None:
    async with app_with(BOTH, default_model="whole") as app:
        for name, expected in ((None, "whole"), ("whole", "whole"), ("letters", "letters")):
            await events_of(app.generate, made := call(model=name))
            assert made.model is not None
            assert made.model.card.name == expected


async def test_without_a_setting_the_first_model_is_the_default() -> None:
    async with app_with(BOTH) as app:
        await events_of(app.generate, made := call())
        assert made.model is not None
        assert made.model.card.name == "letters"


async def test_an_unknown_model_is_refused_with_the_names_of_those_there_are() -> None:
    async with app_with(BOTH) as app:
        error = await refused(app, call(model="gpt"), ModelNotFound)
    assert str(error) == "model 'gpt' not found; there is 'letters', 'whole'"


async def test_an_option_that_a_model_lacks_is_refused_by_name() -> None:
    async with app_with(BOTH) as app:
        made = call(model="whole", sampling=Sampling(top_k=3), options=frozenset({"text", "sampling.top_k"}))
        error = await refused(app, made, UnsupportedOption)
        assert (error.field, error.model, error.backend) == ("sampling.top_k", "whole", "scripted")
        made = call(options=frozenset({"text", "structured_output.regex", "budget"}))
        assert (await refused(app, made, UnsupportedOption)).field == "budget"
        # What the engine honours is not refused.
        made = call(sampling=Sampling(top_k=3), options=frozenset({"text", "sampling.top_k"}))
        assert isinstance((await events_of(app.generate, made))[-1], StreamEnd)


async def test_an_extension_that_nobody_knows_is_refused_by_name() -> None:
    async with app_with() as app:
        error = await refused(app, call(extensions={"vllm": {"x": 1}}), UnsupportedOption)
    assert error.field == "extensions['vllm']"


async def test_more_choices_or_log_probabilities_than_a_model_gives_are_refused() -> None:
    async with app_with(BOTH) as app:
        error = await refused(app, call(model="whole", n=2), InvalidArgument)
        assert (error.field, error.problem) == ("n", "must be at most 1 for 'whole', got 2")
        response = ResponseOptions(logprobs=True, top_logprobs=1)
        error = await refused(app, call(model="whole", response=response), InvalidArgument)
        assert error.field == "response.top_logprobs"


# --- tokenize


async def test_text_chats_and_tokens_become_the_prompt() -> None:
    async with app_with() as app:
        for source, text in (
            ("héllo", "héllo"),
            (TokenIdsInput(tuple(b"abc")), "abc"),
            (ChatInput((ChatMessage(Role.USER, "hi"),)), "user: hi\nassistant: "),
        ):
            await events_of(app.generate, made := call(source))
            assert made.prompt is not None
            assert (made.prompt.text, made.prompt.token_ids) == (text, tuple(text.encode()))
            assert made.meter.usage().input_tokens == len(text.encode())


@pytest.mark.parametrize(
    ("source", "field", "problem"),
    [
        (TokenIdsInput((1, 257)), "token_ids.ids[1]", "must be below the vocabulary size 257, got 257"),
        (TokenIdsInput((2**32 - 1,)), "token_ids.ids[0]", "must be below the vocabulary size 257, got 4294967295"),
        (TokenIdsInput(()), "token_ids.ids", "must have at least one token id"),
        ("", "input", "must give at least one token"),
        ("p" * 100, "input", "has 100 tokens; the context holds 100, one of them new"),
        (TokenIdsInput((1,) * 101), "input", "has 101 tokens; the context holds 100, one of them new"),
    ],
)
async def test_a_prompt_that_cannot_be_is_refused(source: Any, field: str, problem: str) -> None:
    async with app_with({"small": {"context_length": 100}}) as app:
        error = await refused(app, made := call(source), InvalidArgument)
        assert (error.field, error.problem) == (field, problem)
        assert made.meter.attempts == []


async def test_a_hole_in_the_text_is_not_supported() -> None:
    async with app_with() as app:
        assert (await refused(app, call(InfillInput("a", "b")), UnsupportedOption)).field == "infill"


async def test_token_ids_in_options_must_be_in_the_vocabulary() -> None:
    async with app_with() as app:
        error = await refused(app, call(sampling=Sampling(logit_bias={256: 1.0, 257: 1.0})), InvalidArgument)
        assert (error.field, "257" in error.problem) == ("sampling.logit_bias", True)
        error = await refused(app, call(stopping=Stopping(stop_token_ids=(1, 300))), InvalidArgument)
        assert error.field == "stopping.stop_token_ids[1]"


@pytest.mark.parametrize(
    ("prompt_length", "stopping", "expected"),
    [
        (10, Stopping(), 50),
        (70, Stopping(), 30),
        (99, Stopping(), 1),
        (10, Stopping(max_new_tokens=90), 90),
        (10, Stopping(max_new_tokens=3), 3),
        (10, Stopping(min_new_tokens=60), 60),
    ],
)
async def test_the_number_of_new_tokens_is_what_was_asked_or_the_default_within_the_context(
    prompt_length: int, stopping: Stopping, expected: int
) -> None:
    async with app_with({"small": {"context_length": 100}}, default_max_new_tokens=50) as app:
        events = await events_of(app.generate, made := call("p" * prompt_length, stopping=stopping))
    assert made.max_new_tokens == expected == len(text_of(events))
    assert reason_of(events) is FinishReason.MAX_TOKENS


async def test_more_new_tokens_than_the_context_leaves_are_refused() -> None:
    async with app_with({"small": {"context_length": 100}}) as app:
        error = await refused(app, call("p" * 10, stopping=Stopping(max_new_tokens=91)), InvalidArgument)
    assert (error.field, error.problem) == (
        "stopping.max_new_tokens",
        "must be at most 90 after 10 prompt tokens, got 91",
    )


async def test_the_cache_bounds_the_context_too() -> None:
    async with app_with({"small": {"context_length": 100, "num_kv_tokens": 40}}) as app:
        await refused(app, call("p" * 40), InvalidArgument)
        assert len(text_of(await events_of(app.generate, call("p" * 30)))) == 10


async def test_a_caller_that_goes_away_while_its_prompt_is_tokenized_leaves_nothing() -> None:
    async with app_with() as app:
        app._executor.shutdown()
        app._executor = ThreadPoolExecutor(1)
        task = asyncio.ensure_future(events_of(app.generate, made := call()))
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert made.meter.attempts == []
        (served,) = app.registry
        assert served.engine is not None
        await until(lambda: served.engine.runner.num_running == served.engine.num_queued == 0)
