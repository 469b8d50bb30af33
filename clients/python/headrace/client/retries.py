"""When a call that failed before it gave anything is sent again: the same for both clients.

gRPC's own retries are switched off: where a server is killed while gRPC sends a stream again, the call can wait for
ever (seen with grpcio 1.82 and 1.85, once in some hundred kills).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

import grpc

from headrace.client import errors

MAX_RETRIES: Final = 3
FIRST_WAIT: Final = 0.2
"""Seconds; each next wait is twice as long."""
MAX_WAIT: Final = 5.0
"""Seconds. A server that asks for more patience is not asked again: its caller decides."""
_JITTER: Final = 0.2


class Retries:
    """Decides for one call, whose ``timeout`` (seconds, ``None``: none) covers all that is sent for it."""

    def __init__(
        self,
        timeout: float | None,
        *,
        max_retries: int = MAX_RETRIES,
        clock: Callable[[], float] = time.monotonic,
        number: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._number = number
        self._deadline = None if timeout is None else clock() + timeout
        self._most = max_retries
        self._num_retries = 0

    def timeout(self) -> float | None:
        """Seconds that are left of the call's timeout."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def wait_after(self, error: errors.HeadraceError) -> float | None:
        """Seconds to wait before the call is sent again; ``None``: the error is what it ends with."""
        if self._num_retries >= self._most:
            return None
        seconds = error.retry_after
        if error.code is grpc.StatusCode.UNAVAILABLE:
            seconds = FIRST_WAIT * 2**self._num_retries if seconds is None else seconds
        elif error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            return None
        # Without a time, such as for a budget that is spent, another try does not help.
        if seconds is None or seconds > MAX_WAIT:
            return None
        seconds *= 1 + _JITTER * self._number()
        if self._deadline is not None and self._clock() + seconds >= self._deadline:
            return None
        self._num_retries += 1
        return seconds

    def renew(self) -> None:
        """The call got on; what is sent next has all its tries."""
        self._num_retries = 0
