"""What calls are likely to use, by what recent ones did."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_NUM_REMEMBERED = 200


@dataclass(slots=True)
class _Recent:
    calls: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_NUM_REMEMBERED))
    used: int = 0
    allowed: int = 0


class Expectations:
    """For each model, how much of its allowed output recent calls have used. For one thread: the event loop's."""

    def __init__(self) -> None:
        self._recent: dict[str, _Recent] = {}

    def note(self, model: str, used: int, allowed: int) -> None:
        """A call of ``model`` ended by itself, after ``used`` output tokens of ``allowed`` over all its choices."""
        if allowed <= 0:
            return
        recent = self._recent.setdefault(model, _Recent())
        if len(recent.calls) == _NUM_REMEMBERED:
            oldest_used, oldest_allowed = recent.calls.popleft()
            recent.used -= oldest_used
            recent.allowed -= oldest_allowed
        used = min(used, allowed)
        recent.calls.append((used, allowed))
        recent.used += used
        recent.allowed += allowed

    def output_tokens(self, model: str, allowed: int) -> int:
        """Output tokens to be expected where ``allowed`` may be generated: the share of all that recent calls were
        allowed which they have used. All of them where nothing is known.
        """
        recent = self._recent.get(model)
        if recent is None:
            return allowed
        return -(-allowed * recent.used // recent.allowed)
