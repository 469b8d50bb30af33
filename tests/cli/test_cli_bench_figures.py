"""The figures that ``headrace bench`` makes of what it saw."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.bench.figures import Percentiles, percentile, summarize
from headrace.cli.bench.load import Level, Request
from headrace.cli.bench.watch import Watch
from headrace.client import Report, Timings, Usage


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.integers(1, 100))
def test_a_percentile_is_the_least_value_that_enough_values_do_not_exceed(values, percent):
    ordered = sorted(values)
    enough = [value for value in ordered if 100 * sum(other <= value for other in values) >= percent * len(values)]
    assert percentile(ordered, percent) == enough[0]


def test_percentiles_of_the_first_hundred_numbers_are_themselves():
    numbers = [float(number) for number in range(100, 0, -1)]
    assert Percentiles.of(numbers) == Percentiles(p50=50, p90=90, p99=99, mean=50.5, max=100, count=100)


def test_nothing_has_no_percentiles():
    assert Percentiles.of([]) is None


def request(intended: float, arrivals: list[float], *, code: str | None = "OK", cached: int | None = None) -> Request:
    report = Report(
        request_id="r",
        usage=Usage(input_tokens=10, cache_read_input_tokens=cached, output_tokens=len(arrivals)),
        timings=Timings(queue=0.5, prefill=0.25),
        backend="b",
        model="m",
    )
    return Request(
        prompt_tokens=10,
        max_new_tokens=3,
        intended=intended,
        sent=intended + 0.125,
        arrivals=arrivals,
        ended=None if code is None else arrivals[-1] if arrivals else intended + 1,
        code=code,
        report=report if code == "OK" else None,
    )


def test_a_summary_tells_answers_refusals_failures_and_what_was_stopped_apart():
    requests = [
        request(0.0, [1.0, 2.0, 4.0], cached=8),
        request(1.0, [3.0, 5.0]),
        request(1.0, [], code="RESOURCE_EXHAUSTED"),
        request(1.0, [], code="INTERNAL"),
        request(1.0, [], code="INTERNAL"),
        request(1.0, [], code="UNAVAILABLE"),
        request(2.0, [3.0], code=None),
    ]
    summary = summarize(Level(streams=2), requests, Watch(health=[0.001], num_unhealthy=1))
    assert (summary.num_requests, summary.num_answered, summary.num_refused, summary.num_unfinished) == (7, 2, 1, 1)
    assert summary.failed == {"INTERNAL": 2, "UNAVAILABLE": 1}
    assert summary.seconds == 5
    assert (summary.output_tokens_per_second, summary.requests_per_second) == (1.0, 0.4)
    assert (summary.prompt_tokens, summary.cached_tokens, summary.num_short) == (20, 8, 1)
    assert (summary.first_token.p50, summary.first_token.max) == (1, 2)
    assert (summary.end_to_end.p50, summary.end_to_end.max) == (4, 4)
    assert (summary.gap.count, summary.gap.max) == (3, 2)
    assert (summary.per_token.p50, summary.per_token.max) == (1.5, 2)
    assert (summary.queue.p50, summary.prefill.p50) == (0.5, 0.25)
    assert summary.num_unhealthy == 1


def test_only_a_poisson_load_can_be_sent_late():
    requests = [request(0.0, [1.0])]
    assert summarize(Level(streams=1), requests, Watch()).sent_late is None
    assert summarize(Level(streams=None, rate=1), requests, Watch()).sent_late.p50 == 0.125


def test_a_level_without_an_answer_has_no_latencies_and_no_rate():
    summary = summarize(Level(streams=1), [request(0.0, [], code=None)], Watch())
    assert (summary.first_token, summary.end_to_end, summary.output_tokens_per_second) == (None, None, 0)


@given(st.floats(0.1, 1000), st.integers(0, 2**32))
def test_arrivals_are_the_same_for_the_same_seed_and_go_forward(rate, seed):
    level = Level(streams=None, rate=rate, requests=50, seed=seed)
    times = list(level.arrivals())
    assert times == list(level.arrivals())
    assert len(times) == 50
    assert all(earlier <= later for earlier, later in itertools.pairwise([0.0, *times]))


def test_arrivals_come_at_their_rate_for_as_long_as_they_are_to():
    times = list(Level(streams=None, rate=50, duration=100).arrivals())
    assert times[-1] <= 100
    # 5,000 on average, with a standard deviation of 71; the seed is always the same.
    assert len(times) == pytest.approx(5000, abs=300)
