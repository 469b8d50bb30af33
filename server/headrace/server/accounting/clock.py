"""Time as the ledger counts it: nanoseconds since the epoch, and months and days of UTC."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], int]
"""Nanoseconds since the epoch."""

_NANOS = 1_000_000_000
_DAY_NANOS = 86_400 * _NANOS


class SteadyClock:
    """The time of day, which never goes back: what a step back of the machine's clock would repeat stands still. Safe
    to ask from any thread.
    """

    def __init__(self, clock: Clock = time.time_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._latest = 0

    def __call__(self) -> int:
        with self._lock:
            self._latest = max(self._latest, self._clock())
            return self._latest


def month_of(at: int) -> str:
    """Such as ``"2026-11"``."""
    return day_of(at)[:7]


def day_of(at: int) -> str:
    """Such as ``"2026-11-23"``."""
    return _day(at // _DAY_NANOS)


def month_end(month: str) -> int:
    """When the month after it begins."""
    first = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    following = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return int(following.timestamp()) * _NANOS


@functools.lru_cache(maxsize=64)
def _day(number: int) -> str:
    """Of those since the epoch; all are equally long."""
    return f"{datetime.fromtimestamp(number * 86_400, UTC):%Y-%m-%d}"
