"""A circuit breaker: leaves a model alone that keeps failing, and lets one call find out whether it is well again.

closed ──failures──> open ──cool-down──> half-open ──the probe is answered──> closed
                      ^                      └──the probe fails──> open
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable

from headrace.server.routing.routes import BreakerOptions

MAX_PAUSE_SECONDS = 3600.0
"""A provider that asks for more is asked again by then."""
_PROBE_SECONDS = 1.0
"""How long a probe takes, nobody knows."""


class State(enum.Enum):
    """Whether calls are let through."""

    CLOSED = "closed"
    """All are."""
    HALF_OPEN = "half_open"
    """One is."""
    OPEN = "open"
    """None is."""


class Trial:
    """One call that was let through. Tells the probe from calls that began before the breaker opened."""

    __slots__ = ()


class Breaker:
    """Of one model. For one thread: the event loop's."""

    def __init__(self, options: BreakerOptions, *, clock: Callable[[], float]) -> None:
        """``clock`` gives monotonic seconds."""
        self.failures_in_a_row = 0
        self._options = options
        self._clock = clock
        self._failed: deque[bool] = deque(maxlen=options.num_calls)
        """Of the last calls, whether each has."""
        self._open_until: float | None = None
        """``None``: closed."""
        self._paused_until = -float("inf")
        self._probe: Trial | None = None

    @property
    def state(self) -> State:
        now = self._clock()
        if now < self._paused_until or (self._open_until is not None and now < self._open_until):
            return State.OPEN
        return State.CLOSED if self._open_until is None else State.HALF_OPEN

    def wait(self) -> float:
        """Seconds until a call may be let through; 0: now."""
        state = self.state
        if state is State.OPEN:
            now = self._clock()
            return max(self._paused_until, now if self._open_until is None else self._open_until) - now
        return _PROBE_SECONDS if state is State.HALF_OPEN and self._probe is not None else 0.0

    def enter(self) -> Trial | None:
        """Lets a call through, or gives ``None``. Whoever gets a trial ends it by ``leave``, after it has said what
        came of it, if anything did.
        """
        if self.wait():
            return None
        trial = Trial()
        if self.state is State.HALF_OPEN:
            self._probe = trial
        return trial

    def answered(self, trial: Trial) -> None:
        """The first of an answer has come: a probe need not say more."""
        if trial is self._probe:
            self._close()

    def succeeded(self, trial: Trial) -> None:
        if trial is self._probe:
            self._close()
        elif self._open_until is None:
            self.failures_in_a_row = 0
            self._failed.append(False)

    def failed(self, trial: Trial) -> None:
        if trial is self._probe:
            self.failures_in_a_row += 1
            self._open()
        elif self._open_until is None:
            self.failures_in_a_row += 1
            self._failed.append(True)
            options, num_failed = self._options, sum(self._failed)
            if self.failures_in_a_row >= options.failures_in_a_row or (
                len(self._failed) == options.num_calls and num_failed >= options.failure_rate * options.num_calls
            ):
                self._open()

    def leave(self, trial: Trial) -> None:
        """The call is over. One that nothing was said of, such as a cancelled one, counts for nothing."""
        if trial is self._probe:
            self._probe = None

    def pause(self, seconds: float) -> None:
        """No call is let through for so long: the provider has asked for that."""
        self._paused_until = max(self._paused_until, self._clock() + min(seconds, MAX_PAUSE_SECONDS))

    def _open(self) -> None:
        self._open_until = self._clock() + self._options.cool_down_seconds
        self._probe = None

    def _close(self) -> None:
        self._open_until = self._probe = None
        self.failures_in_a_row = 0
        self._failed.clear()
