"""What may be done in a minute and at once, on a clock that the tests turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from server_kit import call, events_of

from headrace.backends.errors import PermissionDenied, RateLimited
from headrace.backends.events import StreamEnd
from headrace.backends.types import Call, Events, Principal
from headrace.server.accounting.accounts import Terms
from headrace.server.accounting.plans import UNLIMITED, Limits
from headrace.server.accounting.records import Account
from headrace.server.middleware.limits import MINUTE, Buckets, RateLimits

ACME, KEY = Account("acme"), Account("acme", "k1")


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Limited:
    """Limits for whoever calls, and a handler behind them that ends when it is told to."""

    terms: Terms
    clock: Clock = field(default_factory=Clock)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.limits = RateLimits(lambda _: self.terms, clock=self.clock)
        self.handler = self.limits.limit(self._inner, streams=True)
        self.counted = self.limits.limit(self._inner, streams=False)

    async def _inner(self, _call: Call) -> Events:
        await self.go.wait()
        yield StreamEnd()

    async def passes(self, *, streams: bool = True) -> None:
        self.go.set()
        await events_of(self.handler if streams else self.counted, call())

    async def refused(self, *, streams: bool = True) -> RateLimited:
        with pytest.raises(RateLimited) as limited:
            await events_of(self.handler if streams else self.counted, call())
        return limited.value


def of_tenant(**limits: int) -> Terms:
    return ((ACME, Limits(**limits)),)


def of_both(tenant: Limits, key: Limits) -> Terms:
    return (ACME, tenant), (KEY, key)


# --- requests a minute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [True, False])
async def test_calls_beyond_the_minutes_are_refused_until_the_time_that_they_are_told(streams: bool) -> None:
    limited = Limited(of_tenant(requests_per_minute=3))
    for _ in range(3):
        await limited.passes(streams=streams)
    error = await limited.refused(streams=streams)
    assert error.retry_after == pytest.approx(20)
    assert error.subject == "tenant:acme"
    assert error.message == "tenant 'acme' may have 3 calls a minute; try again in 20 s"
    limited.clock.now += error.retry_after
    await limited.passes(streams=streams)
    assert (await limited.refused(streams=streams)).retry_after == pytest.approx(20)


async def test_a_key_has_its_own_minute_within_its_tenants() -> None:
    limited = Limited(of_both(Limits(requests_per_minute=10), Limits(requests_per_minute=2)))
    await limited.passes()
    await limited.passes()
    error = await limited.refused()
    assert (error.subject, error.retry_after) == ("key:k1", pytest.approx(30))
    limited.terms = limited.terms[:1]  # another key of the tenant, or none
    for _ in range(8):
        await limited.passes()
    assert (await limited.refused()).subject == "tenant:acme"


async def test_a_call_that_is_refused_takes_nothing_of_anybodys_minute() -> None:
    limited = Limited(of_both(Limits(requests_per_minute=2), Limits(requests_per_minute=1)))
    await limited.passes()
    for _ in range(5):
        assert (await limited.refused()).subject == "key:k1"
    limited.terms = limited.terms[:1]
    await limited.passes()


async def test_who_has_no_limits_is_never_refused() -> None:
    limited = Limited(((ACME, UNLIMITED),))
    for _ in range(500):
        await limited.passes()
    limited.limits.take_tokens(limited.terms, 10**12)


# --- streams at once -----------------------------------------------------------------------------------------------


async def test_calls_at_once_are_counted_for_as_long_as_they_run() -> None:
    limited = Limited(of_tenant(max_streams=2))
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(events_of(limited.handler, call())) for _ in range(2)]
        await asyncio.sleep(0)
        error = await limited.refused()
        assert (error.subject, error.message) == (
            "tenant:acme",
            "tenant 'acme' may have 2 calls at once; try again in 1 s",
        )
        limited.go.set()
        await asyncio.wait(running)
        await limited.passes()


async def test_a_call_that_is_left_early_gives_its_place_back() -> None:
    limited = Limited(of_tenant(max_streams=1))
    task = asyncio.create_task(events_of(limited.handler, call()))
    await asyncio.sleep(0)
    await limited.refused()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await limited.passes()


async def test_calls_that_generate_nothing_need_no_place() -> None:
    limited = Limited(of_tenant(max_streams=1))
    async with aclosing(limited.handler(call())) as events:
        began = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        await limited.passes(streams=False)
        await began
        await limited.refused()


async def test_a_plan_that_changes_while_calls_run_takes_no_place_from_nobody() -> None:
    limited = Limited(of_tenant(max_streams=1))
    async with aclosing(limited.handler(call())) as events:
        began = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        limited.terms = ((ACME, UNLIMITED),)
        limited.go.set()
        await began
        await limited.passes()
    limited.terms = of_tenant(max_streams=1)
    await limited.passes()


async def test_a_full_house_refuses_without_a_request_being_counted() -> None:
    limited = Limited(of_tenant(max_streams=1, requests_per_minute=2))
    async with aclosing(limited.handler(call())) as events:
        began = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        for _ in range(5):
            assert "at once" in (await limited.refused()).message
        limited.go.set()
        await began
    await limited.passes()


# --- tokens a minute -----------------------------------------------------------------------------------------------


def test_tokens_that_were_not_used_come_back() -> None:
    limited = Limited(of_both(Limits(tokens_per_minute=600), Limits(tokens_per_minute=300)))
    limited.limits.take_tokens(limited.terms, 300)
    with pytest.raises(RateLimited) as refused:
        limited.limits.take_tokens(limited.terms, 100)
    assert (refused.value.subject, refused.value.retry_after) == ("key:k1", pytest.approx(20))
    assert not limited.limits.fits(limited.terms, 100)
    limited.limits.give_back(limited.terms, 250)
    assert limited.limits.fits(limited.terms, 250)
    limited.limits.take_tokens(limited.terms, 250)


def test_what_comes_back_late_does_not_make_a_minute_larger() -> None:
    limited = Limited(of_tenant(tokens_per_minute=600))
    limited.limits.take_tokens(limited.terms, 600)
    limited.clock.now += 2 * MINUTE
    limited.limits.give_back(limited.terms, 600)
    limited.limits.take_tokens(limited.terms, 600)
    with pytest.raises(RateLimited):
        limited.limits.take_tokens(limited.terms, 1)


def test_a_call_larger_than_a_whole_minute_is_told_that_waiting_does_not_help() -> None:
    limited = Limited(of_tenant(tokens_per_minute=100))
    with pytest.raises(PermissionDenied) as denied:
        limited.limits.take_tokens(limited.terms, 101)
    assert denied.value.message == (
        "the call may need 101 tokens, and tenant 'acme' has 100 a minute;"
        " shorten its input or lower its max_new_tokens"
    )
    assert not limited.limits.fits(limited.terms, 101)
    limited.limits.take_tokens(limited.terms, 100)


def test_whether_a_call_fits_is_asked_without_taking_anything() -> None:
    limited = Limited(of_tenant(tokens_per_minute=100, requests_per_minute=1, max_streams=1))
    for _ in range(5):
        assert limited.limits.fits(limited.terms, 100)


# --- buckets -------------------------------------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.floats(0, 90), st.integers(1, 40)), max_size=60)


@example(steps=[(84.0, 7), *[(0.0, 11)] * 12, (56.098720673363815, 1), (90.0, 11), (0.0, 11)], per_minute=11)
@given(steps=STEPS, per_minute=st.integers(1, 40))
def test_no_minute_gets_more_than_twice_its_allowance_and_whoever_waits_gets_its_own(
    steps: list[tuple[float, int]], per_minute: int
) -> None:
    clock = Clock()
    buckets = Buckets(clock)
    taken: list[tuple[float, int]] = []
    for pause, amount in steps:
        clock.now += pause
        amount = min(amount, per_minute)
        if wait := buckets.wait(ACME, amount, per_minute):
            assert 0 < wait <= MINUTE + 1e-6  # the last bits of floats
            clock.now += wait
            assert buckets.wait(ACME, amount, per_minute) == 0
        buckets.take(ACME, amount, per_minute)
        taken.append((clock.now, amount))
        for since, _ in taken:
            span = clock.now - since
            within = sum(amount for at, amount in taken if at >= since)
            assert within <= per_minute * (1 + span / MINUTE) + 1e-3


@given(steps=STEPS, per_minute=st.integers(1, 40))
def test_a_bucket_holds_what_a_counter_that_fills_up_evenly_would(
    steps: list[tuple[float, int]], per_minute: int
) -> None:
    clock = Clock()
    buckets = Buckets(clock)
    level = float(per_minute)
    for pause, amount in steps:
        clock.now += pause
        level = min(per_minute, level + pause * per_minute / MINUTE)
        wait = buckets.wait(ACME, amount, per_minute)
        assert wait == pytest.approx(max(0.0, (amount - level) * MINUTE / per_minute), abs=1e-5)
        if not wait:
            buckets.take(ACME, amount, per_minute)
            level -= amount


def test_accounts_that_call_no_more_are_forgotten() -> None:
    clock = Clock()
    buckets = Buckets(clock)
    for i in range(1000):
        buckets.take(Account(f"tenant-{i}"), 1, 60)
    assert len(buckets) == 1000
    clock.now += 2 * MINUTE
    buckets.take(ACME, 1, 60)
    assert len(buckets) == 1


async def test_each_caller_is_asked_its_own_terms() -> None:
    asked: list[Principal] = []

    def terms(principal: Principal) -> Terms:
        asked.append(principal)
        return ((Account(principal.tenant), Limits(requests_per_minute=1)),)

    async def inner(_call: Call) -> AsyncIterator[StreamEnd]:
        yield StreamEnd()

    handler = RateLimits(terms, clock=Clock()).limit(inner, streams=True)
    for tenant in ("a", "b"):
        made = call()
        made.principal = Principal(tenant)
        await events_of(handler, made)
    assert [principal.tenant for principal in asked] == ["a", "b"]
