"""The circuit breaker, beside a reference that keeps everything that ever happened."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.server.routing.breaker import MAX_PAUSE_SECONDS, Breaker, State, Trial
from headrace.server.routing.routes import BreakerOptions


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def breaker_of(**options: Any) -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(BreakerOptions(**options), clock=clock), clock


def entered(breaker: Breaker) -> Trial:
    trial = breaker.enter()
    assert trial is not None
    return trial


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        trial = entered(breaker)
        breaker.failed(trial)
        breaker.leave(trial)


def succeed(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        trial = entered(breaker)
        breaker.succeeded(trial)
        breaker.leave(trial)


def test_it_opens_after_so_many_failures_in_a_row_and_a_success_starts_the_count_anew() -> None:
    breaker, _ = breaker_of(failures_in_a_row=3)
    fail(breaker, 2)
    succeed(breaker)
    fail(breaker, 2)
    assert breaker.state is State.CLOSED
    fail(breaker)
    assert (breaker.state, breaker.enter(), breaker.failures_in_a_row) == (State.OPEN, None, 3)


def test_it_opens_at_a_rate_of_failures_once_there_are_enough_calls() -> None:
    breaker, _ = breaker_of(failures_in_a_row=100, failure_rate=0.5, num_calls=6)
    for _ in range(2):
        fail(breaker)
        succeed(breaker)
    fail(breaker)
    assert breaker.state is State.CLOSED  # 3 of 5
    succeed(breaker)
    assert breaker.state is State.CLOSED  # a success opens nothing, at 3 of 6 either
    fail(breaker)
    assert breaker.state is State.OPEN


def test_after_the_cool_down_one_call_tries_and_a_failure_opens_it_for_as_long_again() -> None:
    breaker, clock = breaker_of(failures_in_a_row=1, cool_down_seconds=10)
    fail(breaker)
    clock.now += 9.5
    assert (breaker.state, breaker.wait()) == (State.OPEN, 0.5)
    clock.now += 0.5
    assert (breaker.state, breaker.wait()) == (State.HALF_OPEN, 0)
    probe = entered(breaker)
    assert breaker.enter() is None
    assert breaker.wait() > 0
    breaker.failed(probe)
    breaker.leave(probe)
    assert (breaker.state, breaker.wait(), breaker.failures_in_a_row) == (State.OPEN, 10, 2)


def test_a_probe_closes_it_with_the_first_of_its_answer_and_may_fail_later_like_any_other() -> None:
    breaker, clock = breaker_of(failures_in_a_row=2, cool_down_seconds=10)
    fail(breaker, 2)
    clock.now += 10
    probe = entered(breaker)
    breaker.answered(probe)
    assert (breaker.state, breaker.failures_in_a_row) == (State.CLOSED, 0)
    assert breaker.enter() is not None
    breaker.failed(probe)
    assert (breaker.state, breaker.failures_in_a_row) == (State.CLOSED, 1)


def test_a_probe_that_is_given_up_leaves_its_place_to_the_next() -> None:
    breaker, clock = breaker_of(failures_in_a_row=1, cool_down_seconds=10)
    fail(breaker)
    clock.now += 10
    breaker.leave(entered(breaker))
    assert breaker.state is State.HALF_OPEN
    succeed(breaker)
    assert breaker.state is State.CLOSED


def test_calls_from_before_it_opened_say_nothing_of_how_the_model_is_now() -> None:
    breaker, clock = breaker_of(failures_in_a_row=2, cool_down_seconds=10)
    early = [entered(breaker) for _ in range(4)]
    breaker.failed(early[0])
    breaker.failed(early[1])
    breaker.succeeded(early[2])
    assert breaker.state is State.OPEN
    clock.now += 10
    breaker.answered(early[2])
    breaker.failed(early[3])
    assert breaker.state is State.HALF_OPEN
    assert breaker.enter() is not None


def test_a_pause_keeps_calls_away_for_as_long_as_was_asked_and_no_probe_is_needed_then() -> None:
    breaker, clock = breaker_of()
    breaker.pause(30)
    breaker.pause(5)
    assert (breaker.state, breaker.wait(), breaker.enter()) == (State.OPEN, 30, None)
    clock.now += 30
    assert breaker.state is State.CLOSED
    assert all(breaker.enter() is not None for _ in range(3))


def test_a_pause_has_an_end_whatever_was_asked() -> None:
    breaker, _ = breaker_of()
    breaker.pause(1e12)
    assert breaker.wait() == MAX_PAUSE_SECONDS


class BreakerMachine(RuleBasedStateMachine):
    """Random calls that begin, answer, succeed, fail and are given up, as time goes on."""

    @initialize(in_a_row=st.integers(1, 4), rate=st.sampled_from((0.25, 0.5, 1.0)), num_calls=st.integers(1, 6))
    def start(self, in_a_row: int, rate: float, num_calls: int) -> None:
        self.options = BreakerOptions(
            failures_in_a_row=in_a_row, failure_rate=rate, num_calls=num_calls, cool_down_seconds=10
        )
        self.clock = Clock()
        self.breaker = Breaker(self.options, clock=self.clock)
        self.running: list[Trial] = []
        # The reference: what happened since it was last closed, when it opened, and which trial is the probe.
        self.outcomes: list[bool] = []
        self.opened_at: float | None = None
        self.paused_until = 0.0
        self.probe: Trial | None = None

    def expected(self) -> State:
        if self.clock.now < self.paused_until:
            return State.OPEN
        if self.opened_at is None:
            return State.CLOSED
        return State.OPEN if self.clock.now < self.opened_at + 10 else State.HALF_OPEN

    @rule(seconds=st.sampled_from((0.0, 1.0, 5.0, 10.0)))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(seconds=st.sampled_from((0.5, 20.0)))
    def is_asked_to_pause(self, seconds: float) -> None:
        self.breaker.pause(seconds)
        self.paused_until = max(self.paused_until, self.clock.now + seconds)

    @rule()
    def begin(self) -> None:
        state, trial = self.expected(), self.breaker.enter()
        may = state is State.CLOSED or (state is State.HALF_OPEN and self.probe is None)
        assert (trial is not None) == may
        if trial is not None:
            self.running.append(trial)
            if state is State.HALF_OPEN:
                self.probe = trial

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(("answered", "succeeded", "failed", "leave")))
    def goes_on(self, data: Any, how: str) -> None:
        trial = data.draw(st.sampled_from(self.running))
        getattr(self.breaker, how)(trial)
        if how in ("succeeded", "failed"):
            self.breaker.leave(trial)
        if how != "answered":
            self.running.remove(trial)
        if trial is self.probe:
            self.probe = None
            if how == "failed":
                self.opened_at = self.clock.now
            elif how != "leave":
                self.opened_at, self.outcomes = None, []
        elif self.opened_at is None and how in ("succeeded", "failed"):
            self.outcomes.append(how == "failed")
            if how == "failed" and self.is_too_much():
                self.opened_at = self.clock.now

    def is_too_much(self) -> bool:
        options, last = self.options, self.outcomes[-self.options.num_calls :]
        in_a_row = self.outcomes[-options.failures_in_a_row :]
        return (len(in_a_row) == options.failures_in_a_row and all(in_a_row)) or (
            len(last) == options.num_calls and sum(last) / len(last) >= options.failure_rate
        )

    @invariant()
    def is_in_the_state_of_the_reference(self) -> None:
        assert self.breaker.state is self.expected()
        assert (self.breaker.wait() > 0) == (
            self.expected() is State.OPEN or (self.expected() is State.HALF_OPEN and self.probe is not None)
        )


BreakerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_it_does_what_the_reference_does = pytest.mark.timeout(60)(BreakerMachine.TestCase)
