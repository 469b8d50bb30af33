"""The figures of one level, from its requests. Times are in seconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from headrace.cli.bench.load import OK, REFUSED, Level, Request
from headrace.cli.bench.watch import Watch


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest of ``ordered`` values that at least ``percent`` of them do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(percent * len(ordered) / 100) - 1)]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """How values are spread."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """``None`` for no values."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
        return cls(p50, p90, p99, math.fsum(ordered) / len(ordered), ordered[-1], len(ordered))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One level. Latencies and rates are over the requests that were answered."""

    name: str
    seconds: float
    """From when the first request was to be sent until the last one ended."""
    num_requests: int
    num_answered: int
    num_refused: int
    """With RESOURCE_EXHAUSTED: the server said that it has no room."""
    failed: Mapping[str, int]
    """Other errors, by their code."""
    num_unfinished: int
    """Stopped by Ctrl-C."""
    num_other_lengths: int
    """Answered requests whose prompt had, as the server counts, another length than it was made for."""
    num_short: int
    """Answered requests with fewer new tokens than they asked for."""
    prompt_tokens: int
    cached_tokens: int | None
    """Of the prompts' tokens; None where the server reports none."""
    output_tokens: int
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    requests_per_second: float
    first_token: Percentiles | None
    """Until the first piece of text, from when the request was to be sent, as is the end."""
    gap: Percentiles | None
    """Between one piece of text and the next."""
    per_token: Percentiles | None
    """The mean gap of each request, per token after the first."""
    end_to_end: Percentiles | None
    queue: Percentiles | None
    """As the server reports, as is the prefill."""
    prefill: Percentiles | None
    lateness: Percentiles | None
    """Of the load's own event loop."""
    sent_late: Percentiles | None
    """How much later than intended requests were sent; of a Poisson process only."""
    health: Percentiles | None
    num_unhealthy: int


def summarize(level: Level, requests: Sequence[Request], watch: Watch) -> Summary:
    answered = [request for request in requests if request.code == OK]
    reports = [request.report for request in answered if request.report is not None]
    codes = Counter(request.code for request in requests if request.code not in (None, OK, REFUSED))
    cached = [r.usage.cache_read_input_tokens for r in reports if r.usage.cache_read_input_tokens is not None]
    seconds = _span(requests)
    prompt_tokens = sum(report.usage.input_tokens or 0 for report in reports)
    output_tokens = sum(report.usage.output_tokens or 0 for report in reports)
    return Summary(
        name=level.name,
        seconds=seconds,
        num_requests=len(requests),
        num_answered=len(answered),
        num_refused=sum(request.code == REFUSED for request in requests),
        failed={str(code): count for code, count in sorted(codes.items(), key=str)},
        num_unfinished=sum(request.code is None for request in requests),
        num_other_lengths=sum(
            request.report is not None and request.report.usage.input_tokens not in (None, request.prompt_tokens)
            for request in answered
        ),
        num_short=sum(_num_output(request) < request.max_new_tokens for request in answered),
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(cached) if cached else None,
        output_tokens=output_tokens,
        output_tokens_per_second=_rate(output_tokens, seconds),
        prompt_tokens_per_second=_rate(prompt_tokens, seconds),
        requests_per_second=_rate(len(answered), seconds),
        first_token=Percentiles.of([r.arrivals[0] - r.intended for r in answered if r.arrivals]),
        gap=Percentiles.of([gap for request in answered for gap in gaps(request)]),
        per_token=Percentiles.of(
            [
                (r.arrivals[-1] - r.arrivals[0]) / (_num_output(r) - 1)
                for r in answered
                if _num_output(r) > 1 and r.arrivals
            ]
        ),
        end_to_end=Percentiles.of([r.ended - r.intended for r in answered if r.ended is not None]),
        queue=Percentiles.of([report.timings.queue for report in reports if report.timings.queue is not None]),
        prefill=Percentiles.of([report.timings.prefill for report in reports if report.timings.prefill is not None]),
        lateness=Percentiles.of(watch.lateness),
        sent_late=None if level.rate is None else Percentiles.of([r.sent - r.intended for r in requests]),
        health=Percentiles.of(watch.health),
        num_unhealthy=watch.num_unhealthy,
    )


def gaps(request: Request) -> list[float]:
    """The times between one piece of a request's text and the next."""
    return [later - earlier for earlier, later in zip(request.arrivals, request.arrivals[1:], strict=False)]


def _num_output(request: Request) -> int:
    return 0 if request.report is None else request.report.usage.output_tokens or 0


def _span(requests: Sequence[Request]) -> float:
    ends = [request.ended for request in requests if request.ended is not None]
    return max(ends) - min(request.intended for request in requests) if ends else 0.0


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
