"""When the clients send a call again that failed before it gave anything."""

from __future__ import annotations

import grpc
import pytest

from headrace.client import errors
from headrace.client.retries import FIRST_WAIT, MAX_RETRIES, MAX_WAIT, Retries

UNAVAILABLE = errors.UnavailableError(grpc.StatusCode.UNAVAILABLE, "gone")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def retries(timeout: float | None = None, number: float = 0.0, clock: Clock | None = None) -> Retries:
    return Retries(timeout, clock=clock or Clock(), number=lambda: number)


def overloaded(retry_after: float | None) -> errors.HeadraceError:
    return errors.OverloadedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after=retry_after)


def test_waits_double_and_end_after_the_last_retry() -> None:
    one = retries()
    waits = [one.wait_after(UNAVAILABLE) for _ in range(MAX_RETRIES + 1)]
    assert waits == [FIRST_WAIT, FIRST_WAIT * 2, FIRST_WAIT * 4, None]


def test_a_call_that_got_on_has_all_its_retries_again() -> None:
    one = retries()
    for _ in range(MAX_RETRIES):
        one.wait_after(UNAVAILABLE)
    one.renew()
    assert one.wait_after(UNAVAILABLE) == FIRST_WAIT


def test_what_the_server_asks_for_is_waited_and_a_little_more_so_that_not_all_come_at_once() -> None:
    assert retries().wait_after(overloaded(0.5)) == 0.5
    assert retries(number=1.0).wait_after(overloaded(0.5)) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "error",
    [
        overloaded(None),
        overloaded(MAX_WAIT + 1),
        errors.BudgetSpentError(grpc.StatusCode.RESOURCE_EXHAUSTED, "spent"),
        errors.ServerError(grpc.StatusCode.INTERNAL, "broken"),
        errors.DeadlineExceededError(grpc.StatusCode.DEADLINE_EXCEEDED, "late"),
        errors.InvalidArgumentError(grpc.StatusCode.INVALID_ARGUMENT, "wrong"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error.retry_after}",
)
def test_what_another_try_would_not_mend_is_final(error: errors.HeadraceError) -> None:
    assert retries().wait_after(error) is None


def test_no_wait_goes_beyond_the_timeout_of_the_call() -> None:
    clock = Clock()
    one = retries(1.0, clock=clock)
    assert one.timeout() == 1.0
    clock.now += 0.9
    assert one.timeout() == pytest.approx(0.1)
    assert one.wait_after(UNAVAILABLE) is None
    clock.now += 5.0
    assert one.timeout() == 0.0
