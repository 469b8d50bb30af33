"""Medians, percentiles and intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from headrace.cli.bench import figures as bench_figures


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least ``percent`` of the values do not exceed."""
    return bench_figures.percentile(sorted(values), percent)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """An interval for the median of what ``values`` are drawn from, from their order alone, so that it holds whatever
    their distribution. ``None`` for fewer values than it takes: 6 at 95 %.

    The k-th smallest and k-th largest of n values miss the median if fewer than k of n fair coins fall on one side.
    """
    n = len(values)
    miss, k = 0.0, 0
    while miss + 2 * math.comb(n, k) / 2**n <= 1 - confidence:
        miss += 2 * math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        return None
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def with_interval(values: Sequence[float], digits: int = 2) -> str:
    """The median and its 95 % interval, to be read by people."""
    median = f"{statistics.median(values):.{digits}f}"
    interval = median_interval(values)
    if interval is None:
        return f"{median} [too few for an interval]"
    return f"{median} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def spread(values: Sequence[float]) -> float:
    """How noisy values are: half the range of the middle half, as a share of the median."""
    half_range = (percentile(values, 75) - percentile(values, 25)) / 2
    return half_range / statistics.median(values)
