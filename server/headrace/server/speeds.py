"""How fast recent calls of each model were, as their callers saw it."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from headrace.backends.types import Call

_NUM_REMEMBERED = 200


@dataclass(slots=True)
class _Recent:
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_REMEMBERED))
    tokens_per_second: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_REMEMBERED))


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """Of one model. ``None``: nothing was measured."""

    first_token_p50: float | None = None
    """Seconds from arrival to the first output token: the median over recent generations."""
    first_token_p99: float | None = None
    """… which 99 of 100 did not exceed."""
    tokens_per_second: float | None = None
    """Of one choice: the median over recent generations."""


class RecentSpeeds:
    """For one thread: the event loop's."""

    def __init__(self) -> None:
        self._models: dict[str, _Recent] = {}

    def saw(self, call: Call) -> None:
        """Takes note of a generation that is over, however it ended."""
        meter = call.meter
        if call.model is None or call.request.scoring is not None or meter.first_token is None:
            return
        recent = self._models.setdefault(call.model.card.name, _Recent())
        recent.first_token_seconds.append(max(0.0, meter.first_token - call.arrived))
        per_choice = (meter.usage().output_tokens or 0) / call.request.n
        if per_choice > 1 and meter.last_token is not None and meter.last_token > meter.first_token:
            recent.tokens_per_second.append((per_choice - 1) / (meter.last_token - meter.first_token))

    def of(self, model: str) -> ModelSpeed:
        recent = self._models.get(model)
        if recent is None:
            return ModelSpeed()
        seconds = sorted(recent.first_token_seconds)
        return ModelSpeed(
            first_token_p50=statistics.median(seconds),
            first_token_p99=seconds[min(len(seconds) - 1, len(seconds) * 99 // 100)],
            tokens_per_second=statistics.median(recent.tokens_per_second) if recent.tokens_per_second else None,
        )
