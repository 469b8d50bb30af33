"""How much a server asks of a provider at once, and in a minute; whoever has to wait stands in line."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable

from headrace.backends.errors import ProviderLimited, ProviderStatus

_MINUTE = 60.0
_RETRY_SECONDS = 1.0


class Gate:
    """The way to one provider. The most urgent go first; of equals, who came first. Used on one event loop at a time,
    of which nothing is kept while nobody waits.
    """

    def __init__(
        self, provider: str, *, max_concurrent: int, requests_per_minute: int | None, clock: Callable[[], float]
    ) -> None:
        """``clock`` is in seconds."""
        self._provider = provider
        self._max_concurrent = max_concurrent
        self._requests_per_minute = requests_per_minute
        self._clock = clock
        self._num_running = 0
        self._started: deque[float] = deque()
        """Calls of the last minute, where that matters."""
        self._line: list[tuple[tuple[int, int], int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_waiting(self) -> int:
        return sum(not admitted.done() for _, _, admitted in self._line)

    async def enter(self, rank: tuple[int, int] = (0, 0), *, patience: float) -> None:
        """Waits for a turn; ``leave`` ends it. The lowest ``rank`` goes first. Raises ProviderLimited at once if that
        would take more than ``patience`` seconds for sure; the caller gives up when they are over (``refusal``).
        """
        if not self._line and self._wait() == 0.0:
            self._admit()
            return
        if self._minutes_wait() > patience:
            raise self.refusal()
        admitted = asyncio.get_running_loop().create_future()
        heapq.heappush(self._line, (rank, next(self._order), admitted))
        self._advance()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.cancelled():
                self._advance()
            else:  # its turn came while it gave up
                self.leave()
            raise

    def leave(self) -> None:
        self._num_running -= 1
        self._advance()

    def refusal(self) -> ProviderLimited:
        """The error for a call that waited in vain."""
        wait = max(self._minutes_wait(), _RETRY_SECONDS)
        error = ProviderLimited(
            f"this server has as many calls at provider {self._provider!r} as it may; try again", retry_after=wait
        )
        error.provider_status = ProviderStatus(self._provider)
        return error

    def _admit(self) -> None:
        self._num_running += 1
        if self._requests_per_minute is not None:
            self._started.append(self._clock())

    def _wait(self) -> float:
        """Seconds until the next call may start; infinite: until one ends."""
        return float("inf") if self._num_running >= self._max_concurrent else self._minutes_wait()

    def _minutes_wait(self) -> float:
        """Seconds until the minute's share allows another: never more of them in any 60 seconds."""
        if self._requests_per_minute is None:
            return 0.0
        now = self._clock()
        while self._started and self._started[0] <= now - _MINUTE:
            self._started.popleft()
        if len(self._started) < self._requests_per_minute:
            return 0.0
        return self._started[0] + _MINUTE - now

    def _advance(self) -> None:
        """Lets in whoever may."""
        while self._line:
            if self._line[0][2].done():  # it gave up
                heapq.heappop(self._line)
                continue
            if (wait := self._wait()) > 0.0:
                self._look_again(wait)
                return
            _, _, admitted = heapq.heappop(self._line)
            self._admit()
            admitted.set_result(None)
        self._look_again(float("inf"))

    def _look_again(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds != float("inf"):
            self._timer = asyncio.get_running_loop().call_later(seconds, self._advance)
