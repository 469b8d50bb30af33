"""How long a call waits for what others do: as long as it can itself, and no longer than its provider is trusted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from headrace.backends.errors import DeadlineExceeded, HeadraceError
from headrace.backends.remote import failures
from headrace.backends.types import Call

T = TypeVar("T")


class TimeLimitPassed(Exception):
    """``stopping.time_limit`` has passed."""


class Waiting:
    """Of one call. Times are seconds on the server's clock."""

    def __init__(self, call: Call, provider: str, clock: Callable[[], float]) -> None:
        limit = call.request.stopping.time_limit
        self._time_limit = math.inf if limit is None else call.arrived + limit
        self._deadline = math.inf if call.deadline is None else call.deadline
        self._end = min(self._time_limit, self._deadline)
        self._provider = provider
        self._clock = clock

    async def until(self, when: float, start: Callable[[], Awaitable[T]], too_late: Callable[[], HeadraceError]) -> T:
        """Starts something and waits for it. Raises DeadlineExceeded or TimeLimitPassed when the call's time is over,
        ``too_late()`` when it is ``when`` before that, and a BackendError for what goes wrong on the way.
        """
        now = self._clock()
        if now >= self._end:
            raise self._call_is_late()
        soonest = min(when, self._end)
        try:
            async with asyncio.timeout(None if soonest == math.inf else soonest - now) as limit:
                return await start()
        except failures.TRANSPORT_ERRORS as error:  # TimeoutError is one
            if not limit.expired():
                raise failures.unreachable(self._provider, error)  # noqa: B904 -- it has its cause
        raise too_late() if when < self._end else self._call_is_late()

    def _call_is_late(self) -> Exception:
        if self._time_limit < self._deadline:
            return TimeLimitPassed()
        return DeadlineExceeded("the deadline passed before the answer was complete")
