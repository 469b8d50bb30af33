"""What is tried, where and when, until somebody answers: with a clock that only those who sleep move on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from headrace.backends.errors import (
    BackendError,
    BackendUnavailable,
    HeadraceError,
    InvalidArgument,
    Overloaded,
    ProviderLimited,
    ProviderRefused,
    UnsupportedOption,
)
from headrace.backends.events import Delta
from headrace.backends.requests import Stopping
from headrace.backends.types import Call
from headrace.backends.usage import AttemptOutcome
from headrace.server.routing.breaker import State
from headrace.server.routing.judgement import Judgement, judge
from headrace.server.routing.routes import BreakerOptions, RetryOptions
from tests.server.routing_kit import Chain, chain_of, route
from tests.server.server_kit import call, events_of, text_of

TWO = {"assistant": route("a", "b")}
NO_RETRIES = RetryOptions(max_retries=0)


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """Captured: tracebacks of what fails on purpose take long to be written."""
    with capture_logs():
        yield


def made(model: str | None = "assistant", **options: Any) -> Call:
    one = call(model=model, **options)
    one.arrived = 1000.0
    return one


async def refused(chain: Chain, one: Call) -> Any:
    with pytest.raises(Exception) as error:  # noqa: PT011  # the caller asserts which
        await events_of(chain.handler, one)
    return error.value


def tried(one: Call) -> list[tuple[str, AttemptOutcome | None]]:
    return [(each.model, each.outcome) for each in one.meter.attempts]


BEHAVIOUR = [
    # error, tries at the model, whether the next one is asked, whether it counts as a failure of the model
    ("BackendUnavailable", 2, True, True),
    ("BackendUnavailable 1.0", 2, True, True),
    ("BackendUnavailable 60", 1, True, True),
    ("ProviderLimited 1.0", 2, True, False),
    ("ProviderLimited 60", 1, True, False),
    ("ProviderLimited", 2, True, False),
    ("ProviderRefused", 1, True, True),
    ("BackendError", 1, True, True),
    ("RuntimeError", 1, True, True),
    ("QueueFull", 1, True, False),
    ("QueueTimeout", 1, True, False),
    ("Overloaded", 1, True, False),
    ("Loading", 1, True, False),
    ("UnsupportedOption", 1, True, False),
    ("InvalidArgument", 1, False, False),
    ("PermissionDenied", 1, False, False),
    ("DeadlineExceeded", 1, False, False),
]


@pytest.mark.parametrize(("step", "num_tries", "falls_back", "is_failure"), BEHAVIOUR)
async def test_each_error_is_retried_falls_back_and_counts_as_the_table_says(
    step: str, num_tries: int, falls_back: bool, is_failure: bool
) -> None:
    async with chain_of({"a": [step], "b": ["says hi"]}, TWO) as chain:
        one = made()
        if falls_back:
            assert text_of(await events_of(chain.handler, one)) == "hi"
            assert one.model is chain.model("b")
        else:
            assert type(await refused(chain, one)).__name__ == step.split(maxsplit=1)[0]
        assert chain.num_calls("a", "b") == [num_tries, int(falls_back)]
        assert chain.router.breaker("a").failures_in_a_row == (num_tries if is_failure else 0)


def test_the_table_has_every_error_that_backends_raise_and_others_are_the_callers_own() -> None:
    """A new class of error must be decided on."""
    kinds, todo = set[type[HeadraceError]](), [HeadraceError]
    while todo:
        kind = todo.pop()
        if kind.__module__ == HeadraceError.__module__:
            kinds.add(kind)
            todo += kind.__subclasses__()
    about_callers = {
        "HeadraceError", "ModelNotFound", "Unauthenticated", "RateLimited", "BudgetHeld", "BudgetSpent", "Draining",
        "StreamNotFound", "StreamAborted", "AnswerExpired", "ReceiptNotFound", "NoLedger", "LedgerUnavailable",
    }  # fmt: skip
    assert {kind.__name__ for kind in kinds} - about_callers == {step.split()[0] for step, *_ in BEHAVIOUR} - {
        "RuntimeError"
    }
    for kind in kinds:
        if kind.__name__ in about_callers:
            judgement = judge(kind.__new__(kind))
            assert judgement == Judgement(), kind


async def test_whoever_answers_first_is_asked_alone() -> None:
    async with chain_of({"a": ["says hi there"], "b": []}, TWO) as chain:
        one = made()
        assert text_of(await events_of(chain.handler, one)) == "hithere"
        assert tried(one) == [("a", AttemptOutcome.COMPLETED)]
        assert chain.clock.slept == []


async def test_after_the_first_event_there_is_no_other_try_and_what_was_sent_stays_counted() -> None:
    async with chain_of({"a": ["breaks one two"], "b": ["says hi"]}, TWO) as chain:
        one = made()
        async with aclosing(chain.handler(one)) as stream:
            assert [(await anext(stream)).text for _ in range(2)] == ["one", "two"]
            with pytest.raises(BackendUnavailable, match="the connection broke"):
                await anext(stream)
        assert tried(one) == [("a", AttemptOutcome.FAILED)]
        assert one.meter.usage().output_tokens == 2
        assert chain.num_calls("a", "b") == [1, 0]
        assert chain.router.breaker("a").failures_in_a_row == 1


async def test_events_that_nobody_counts_are_sent_all_the_same() -> None:
    async with chain_of({"a": [], "b": ["says hi"]}, TWO) as chain:

        async def breaks(_: Call) -> Any:
            yield Delta(0, "one")
            raise BackendUnavailable("the connection broke")

        chain.router.registry.look_up("a").handler = breaks
        assert isinstance(await refused(chain, made()), BackendUnavailable)
        assert chain.num_calls("b") == [0]


async def test_a_try_that_has_used_output_is_the_last_one_since_only_one_is_held_for() -> None:
    async with chain_of({"a": ["thinks"], "b": ["says hi"]}, TWO) as chain:
        assert isinstance(await refused(chain, made()), BackendUnavailable)
        assert chain.num_calls("a", "b") == [1, 0]


async def test_waits_double_and_chance_takes_up_to_half_off() -> None:
    retries = RetryOptions(max_retries=4, first_wait_seconds=0.5, max_wait_seconds=2.0)
    for number, expected in ((0.0, [0.5, 1.0, 2.0, 2.0]), (0.5, [0.375, 0.75, 1.5, 1.5])):
        async with chain_of({"a": ["BackendUnavailable"] * 4 + ["says hi"]}, {}, retries=retries) as chain:
            chain.clock.number = number
            assert text_of(await events_of(chain.handler, made("a"))) == "hi"
            assert chain.clock.slept == expected


async def test_a_provider_that_says_when_to_come_back_is_not_asked_before() -> None:
    async with chain_of({"a": ["ProviderLimited 1.5", "says hi"]}, TWO | {"alone": route("a")}) as chain:
        assert text_of(await events_of(chain.handler, made("alone"))) == "hi"
        assert chain.clock.slept == [1.75]


async def test_meanwhile_other_calls_of_a_route_are_not_sent_there() -> None:
    async with chain_of({"a": ["ProviderLimited 60", "says a"], "b": ["says b"]}, TWO) as chain:
        answers = [text_of(await events_of(chain.handler, made())) for _ in range(3)]
        assert (answers, chain.num_calls("a", "b")) == (["b", "b", "b"], [1, 3])
        chain.clock.now += 60
        assert text_of(await events_of(chain.handler, made())) == "a"


async def test_our_own_limits_at_a_provider_do_not_keep_others_away() -> None:
    async with chain_of({"a": ["OwnLimit", "OwnLimit", "says a"], "b": ["says b"]}, TWO) as chain:
        assert text_of(await events_of(chain.handler, made())) == "b"
        assert chain.router.breaker("a").state is State.CLOSED
        assert text_of(await events_of(chain.handler, made())) == "a"


async def test_nobody_waits_beyond_the_deadline_or_the_time_limit() -> None:
    scripts = {"a": ["BackendUnavailable 1.0", "says late"], "b": ["says hi"]}
    for options, deadline in (({}, 1001.25), ({"stopping": Stopping(time_limit=1.25)}, None)):
        for model, expected in (("assistant", "hi"), ("a", None)):
            async with chain_of(scripts, TWO) as chain:
                one = made(model, **options)
                one.deadline = deadline
                if expected is None:
                    assert isinstance(await refused(chain, one), BackendUnavailable)
                else:
                    assert text_of(await events_of(chain.handler, one)) == expected
                assert chain.clock.slept == []
        async with chain_of(scripts, TWO) as chain:
            one = made("a", **options)
            one.deadline = None if deadline is None else deadline + 0.01
            one.arrived += 0.01
            assert text_of(await events_of(chain.handler, one)) == "late"


async def test_tries_are_bounded_and_every_target_gets_one_before_another_gets_a_second() -> None:
    away = ["BackendUnavailable"]
    for max_attempts, expected in ((1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (4, [2, 1, 1]), (9, [2, 2, 2])):
        routes = {"assistant": route("a", "b", "c", max_attempts=max_attempts)}
        async with chain_of(dict.fromkeys("abc", away), routes) as chain:
            assert isinstance(await refused(chain, made()), BackendUnavailable)
            assert chain.num_calls("a", "b", "c") == expected


async def test_a_model_that_says_itself_that_it_cannot_serve_is_not_waited_for() -> None:
    async with chain_of({"a": ["BackendUnavailable"], "b": ["says hi"]}, TWO) as chain:
        handler = chain.handler
        one = made("a")
        async with aclosing(handler(one)) as stream:
            chain.model("a").script = ["BackendUnavailable"]
            begin = chain.model("a").generate

            async def breaks(given: Call) -> Any:
                chain.model("a").unhealthy = True
                async for event in begin(given):
                    yield event

            chain.router.registry.look_up("a").handler = breaks
            with pytest.raises(BackendUnavailable):
                await anext(stream)
        assert chain.clock.slept == []


async def test_one_targets_error_is_raised_as_it_is() -> None:
    async with chain_of({"a": ["ProviderRefused"]}, {"alone": route("a")}) as chain:
        for model in ("a", "alone"):
            error = await refused(chain, made(model))
            assert type(error) is ProviderRefused
            assert error.message == "a is refused"


@pytest.mark.parametrize(
    ("first", "second", "kind", "retry_after"),
    [
        ("ProviderRefused", "ProviderRefused", ProviderRefused, None),
        ("ProviderRefused", "BackendError", BackendError, None),
        ("ProviderRefused", "QueueFull", BackendUnavailable, 0.5),
        ("ProviderLimited 30", "ProviderLimited 20", Overloaded, 20),
        ("ProviderLimited 30", "BackendUnavailable", BackendUnavailable, 30),
        ("UnsupportedOption", "UnsupportedOption", UnsupportedOption, None),
        ("RuntimeError", "BackendError", BackendError, None),
    ],
)
async def test_when_all_have_failed_the_error_says_why_of_each_and_whether_it_may_pass(
    first: str, second: str, kind: type[HeadraceError], retry_after: float | None
) -> None:
    async with chain_of({"a": [first], "b": [second]}, TWO, retries=NO_RETRIES) as chain:
        error = await refused(chain, made())
    assert type(error) is kind
    assert getattr(error, "retry_after", None) == retry_after
    assert "secret" not in str(error)
    if kind is not UnsupportedOption:
        assert "a: " in str(error)
        assert "b: " in str(error)
    if "Limited" in first:
        assert error.provider_status.status == 429


async def test_a_model_that_was_tried_twice_is_named_once() -> None:
    async with chain_of({"a": ["BackendUnavailable"], "b": ["BackendError"]}, TWO) as chain:
        error = await refused(chain, made())
    assert error.message == "no model of 'assistant' can answer now: a: a is away; b: b failed"


async def test_what_the_caller_did_wrong_is_the_error_whatever_was_tried_before() -> None:
    async with chain_of({"a": ["BackendError"], "b": ["InvalidArgument"]}, TWO) as chain:
        assert type(await refused(chain, made())) is InvalidArgument


async def test_a_cancel_during_a_wait_ends_the_call_at_once_with_what_was_tried() -> None:
    async with chain_of({"a": ["BackendUnavailable", "says late"]}, {}) as chain:
        asleep = chain.clock.stay_asleep()
        one = made("a")
        task = asyncio.create_task(events_of(chain.handler, one))
        await asleep.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tried(one) == [("a", AttemptOutcome.FAILED)]
        assert chain.num_calls("a") == [1]


async def test_a_call_that_is_given_up_is_no_failure_of_its_model() -> None:
    async with chain_of({"a": ["waits"]}, {"alone": route("a")}) as chain:
        one = made("alone")
        task = asyncio.create_task(events_of(chain.handler, one))
        await chain.model("a").began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tried(one) == [("a", AttemptOutcome.CANCELLED)]
        assert chain.router.breaker("a").failures_in_a_row == 0
        assert chain.router.tries == {("alone", "a", "given_up"): 1}


async def test_a_model_that_keeps_failing_is_left_alone_and_one_call_finds_out_when_it_is_well_again() -> None:
    breaker = BreakerOptions(failures_in_a_row=3, cool_down_seconds=10)
    scripts = {"a": ["BackendError"] * 4 + ["says a"], "b": ["says b"]}
    async with chain_of(scripts, TWO, breaker=breaker) as chain:

        async def answer() -> str:
            return text_of(await events_of(chain.handler, made()))

        assert [await answer() for _ in range(5)] == ["b"] * 5
        assert chain.num_calls("a") == [3]  # then it was left alone
        chain.clock.now += 10
        assert await answer() == "b"  # the probe failed
        assert await answer() == "b"
        assert chain.num_calls("a") == [4]
        chain.clock.now += 10
        assert [await answer() for _ in range(2)] == ["a", "a"]


async def test_while_a_probe_runs_the_others_go_elsewhere_until_it_is_answered() -> None:
    breaker = BreakerOptions(failures_in_a_row=1, cool_down_seconds=10)
    async with chain_of({"a": ["BackendError", "says x y"], "b": ["says b"]}, TWO, breaker=breaker) as chain:
        await events_of(chain.handler, made())
        chain.clock.now += 10
        probe = chain.router.breaker("a").enter()
        assert probe is not None
        assert text_of(await events_of(chain.handler, made())) == "b"
        chain.router.breaker("a").leave(probe)  # given up
        async with aclosing(chain.handler(made())) as stream:
            await anext(stream)  # the first event will do
            assert chain.router.breaker("a").state is State.CLOSED


async def test_a_probe_that_is_cancelled_leaves_its_place_to_the_next_call() -> None:
    breaker = BreakerOptions(failures_in_a_row=1, cool_down_seconds=10)
    scripts = {"a": ["BackendError", "waits", "says a"], "b": ["says b"]}
    async with chain_of(scripts, TWO, breaker=breaker) as chain:
        await events_of(chain.handler, made())
        chain.clock.now += 10
        chain.model("a").began.clear()
        task = asyncio.create_task(events_of(chain.handler, made()))
        await chain.model("a").began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert text_of(await events_of(chain.handler, made())) == "a"


async def test_a_model_that_says_nothing_until_time_is_over_is_neither_well_nor_failing() -> None:
    breaker = BreakerOptions(failures_in_a_row=2, cool_down_seconds=10)
    scripts = {"a": ["BackendError", "dawdles", "BackendError", "dawdles", "says a"], "b": ["says b"]}
    async with chain_of(scripts, TWO, breaker=breaker) as chain:
        for _ in range(3):
            await events_of(chain.handler, made())
        assert chain.router.breaker("a").failures_in_a_row == 2  # in a row, though there was an end between them
        chain.clock.now += 10
        await events_of(chain.handler, made())
        assert chain.router.breaker("a").state is State.HALF_OPEN
        assert text_of(await events_of(chain.handler, made())) == "a"
        assert chain.router.breaker("a").state is State.CLOSED


async def test_nobody_waits_for_a_model_that_is_left_alone_by_then() -> None:
    breaker = BreakerOptions(failures_in_a_row=1, cool_down_seconds=10)
    async with chain_of({"a": ["BackendUnavailable"], "b": ["says b"]}, TWO, breaker=breaker) as chain:
        assert text_of(await events_of(chain.handler, made())) == "b"
        assert (chain.clock.slept, chain.num_calls("a")) == ([], [1])


async def test_when_every_target_is_left_alone_the_error_says_when_to_come_back() -> None:
    breaker = BreakerOptions(failures_in_a_row=1, cool_down_seconds=10)
    async with chain_of({"a": ["BackendError"], "b": ["BackendError"]}, TWO, breaker=breaker) as chain:
        await refused(chain, made())
        chain.clock.now += 4
        error = await refused(chain, made())
        assert type(error) is BackendUnavailable
        assert error.retry_after == 6
        assert chain.num_calls("a", "b") == [1, 1]
        assert chain.router.problem("assistant") is not None


async def test_by_its_own_name_a_model_is_tried_whatever_was_seen_of_it() -> None:
    breaker = BreakerOptions(failures_in_a_row=1, cool_down_seconds=10)
    async with chain_of({"a": ["BackendError", "says a"], "b": ["says b"]}, TWO, breaker=breaker) as chain:
        await events_of(chain.handler, made())
        assert text_of(await events_of(chain.handler, made("a"))) == "a"


async def test_a_fallback_is_counted_and_its_answer_has_its_own_times() -> None:
    async with chain_of({"a": ["BackendError"], "b": ["says hi"]}, TWO) as chain:
        one = made()
        one.meter.first_token = one.meter.started = 1.0
        one.meter.sent_output_tokens = 0
        await events_of(chain.handler, one)
        assert chain.router.tries == {("assistant", "a", "failed"): 1, ("assistant", "b", "completed"): 1}
        assert chain.router.fallbacks == {("assistant", "a"): 1}
        assert (one.meter.first_token, one.meter.started, one.meter.sent_output_tokens) == (None, None, None)
        assert (one.route, one.meter.model) == ("assistant", "b")


async def test_an_attempt_that_a_backend_leaves_open_is_a_failed_one() -> None:
    async with chain_of({"a": ["says a"], "b": ["says b"]}, TWO) as chain:

        async def forgets(given: Call) -> Any:
            given.meter.begin("flaky").usage.input_tokens = 5
            raise ProviderLimited("full", retry_after=60)
            yield

        chain.router.registry.look_up("a").handler = forgets
        one = made()
        await events_of(chain.handler, one)
        assert tried(one) == [("a", AttemptOutcome.FAILED), ("b", AttemptOutcome.COMPLETED)]


_steps = st.sampled_from(
    [step for step, *_ in BEHAVIOUR] + ["says hi there", "says", "breaks one", "thinks", "OwnLimit"]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scripts=st.lists(st.lists(_steps, min_size=1, max_size=4), min_size=1, max_size=3),
    max_attempts=st.integers(1, 5),
    max_retries=st.integers(0, 2),
    num_calls=st.integers(1, 4),
)
def test_whatever_models_do_a_call_has_one_answer_at_most_and_that_is_its_last_try(
    scripts: list[list[str]], max_attempts: int, max_retries: int, num_calls: int
) -> None:
    async def run() -> None:
        names = "abc"[: len(scripts)]
        routes = {"assistant": route(*names, max_attempts=max_attempts)}
        retries, breaker = RetryOptions(max_retries=max_retries), BreakerOptions(failures_in_a_row=3)
        async with chain_of(dict(zip(names, scripts, strict=True)), routes, retries=retries, breaker=breaker) as chain:
            for _ in range(num_calls):
                one, texts, failed = made(), [], False
                one.arrived = chain.clock.now
                try:
                    async for event in chain.handler(one):
                        texts += [event.text] if isinstance(event, Delta) else []
                except Exception:  # noqa: BLE001  # the table of errors has a test of its own
                    failed = True
                attempts = one.meter.attempts
                assert len(attempts) <= max_attempts
                assert all(len([1 for each in attempts if each.model == name]) <= 1 + max_retries for name in names)
                order = [each.model for each in attempts]
                assert order == sorted(order)  # nobody goes back
                assert not any(each.usage.output_tokens for each in attempts[:-1])
                assert all(each.outcome is AttemptOutcome.FAILED for each in attempts[: None if failed else -1])
                if texts:
                    assert attempts[-1].usage.output_tokens == len(texts)
                if not failed:
                    assert (attempts[-1].outcome, attempts[-1].model) == (AttemptOutcome.COMPLETED, one.meter.model)
            tries = chain.router.tries.total()
            assert tries == sum(chain.num_calls(*names))

    asyncio.run(run())
