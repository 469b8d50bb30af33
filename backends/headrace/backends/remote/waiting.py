"""How long a call waits for what others do: as long as it can itself, and no longer than its provider is trusted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
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
        self._call = call
        self._time_limit = math.inf if limit is None else call.arrived + limit
        self._provider = provider
        self._clock = clock

    async def until(self, when: float, start: Callable[[], Awaitable[T]], too_late: Callable[[], HeadraceError]) -> T:
        """Starts something and waits for it. Raises DeadlineExceeded or TimeLimitPassed when the call's time is over,
        ``too_late()`` when it is ``when`` before that, and a BackendError for what goes wrong on the way.
        """
        if self._clock() >= self._end:
            raise self._call_is_late()
        try:
            async with asyncio.timeout(None) as limit:
                with self._ending(limit, when):
                    return await start()
        except failures.TRANSPORT_ERRORS as error:  # TimeoutError is one
            if not limit.expired():
                raise failures.unreachable(self._provider, error)  # noqa: B904 -- it has its cause
        raise too_late() if when < self._end else self._call_is_late()

    @contextmanager
    def _ending(self, limit: asyncio.Timeout, when: float) -> Iterator[None]:
        """Lets ``limit`` pass at the end of the call, or ``when`` it is before that. The end may move away meanwhile:
        somebody else may come to read the call, who has more time.
        """
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal timer
            left = min(when, self._end) - self._clock()
            if left <= 0.0:
                limit.reschedule(loop.time())
            elif left != math.inf:
                timer = loop.call_later(left, look)

        look()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    @property
    def _deadline(self) -> float:
        return math.inf if self._call.deadline is None else self._call.deadline

    @property
    def _end(self) -> float:
        return min(self._time_limit, self._deadline)

    def _call_is_late(self) -> Exception:
        if self._time_limit < self._deadline:
            return TimeLimitPassed()
        return DeadlineExceeded("the deadline passed before the answer was complete")
