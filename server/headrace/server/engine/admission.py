"""Refuses at once what would wait in vain. Pure: no clock of its own."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from headrace.backends.errors import QueueFull
from headrace.server.engine.fairness import Load
from headrace.server.engine.sequence import Sequence

_NUM_REMEMBERED = 64
_NUM_NEEDED = 8
"""Sequences that must have been served before anything is foretold."""
_DOUBT = 2.0
"""How many times too late the foretold time must be: rates are of other prompts, and loads change."""
_SHORTEST_RETRY, _LONGEST_RETRY = 0.1, 30.0


@dataclass(frozen=True, slots=True)
class _Served:
    num_prompt_tokens: int
    prompt_seconds: float
    """From its start to its first token."""
    num_new_tokens: int
    """That it might have had."""
    output_seconds: float
    """From its first token to its last."""


class Admission:
    """Foretells, from the sequences that were served last, when another would get its first token.

    What is foretold is less than what is likely: of the queue it counts only what surely comes first, and nothing of
    those that run.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._served: deque[_Served] = deque(maxlen=_NUM_REMEMBERED)

    def saw(self, sequence: Sequence) -> None:
        """Learns from a sequence that is over and got its first token."""
        meter = sequence.call.meter
        if meter.started is None or meter.first_token is None or meter.last_token is None:
            return
        self._served.append(
            _Served(
                sequence.num_prompt_tokens,
                meter.first_token - meter.started,
                sequence.max_new_tokens,
                meter.last_token - meter.first_token,
            )
        )

    def refusal(self, sequence: Sequence, before: Load, num_shared_tokens: int, now: float) -> QueueFull | None:
        """The error of a sequence that would start, or get its first token, clearly after it is allowed to. ``before``
        it comes so much; ``num_shared_tokens`` of its prompt need not be computed.
        """
        if not before.num_sequences or len(self._served) < _NUM_NEEDED:
            return None  # it may start at once; or nobody knows
        seconds_per_prompt_token, seconds_per_new_token = self._rates()
        work = before.num_prompt_tokens * seconds_per_prompt_token + before.num_new_tokens * seconds_per_new_token
        wait = work / self._num_slots
        first = wait + (sequence.num_prompt_tokens - num_shared_tokens) * seconds_per_prompt_token
        for what, seconds, until in (
            ("start", wait, sequence.queue_until),
            ("get its first token", first, sequence.call.deadline),
        ):
            left = math.inf if until is None else until - now
            if 0 < left < seconds / _DOUBT:
                late = f"it would {what} in about {seconds:.1f} s, and has {left:.1f} s"
                retry_after = min(_LONGEST_RETRY, max(_SHORTEST_RETRY, seconds - left))
                return QueueFull(f"{before.num_sequences} wait before it: {late}", retry_after=retry_after)
        return None

    def _rates(self) -> tuple[float, float]:
        """Seconds that a sequence keeps its slot, by tokens of its prompt and by tokens that it may have."""
        return (
            sum(served.prompt_seconds for served in self._served)
            / sum(served.num_prompt_tokens for served in self._served),
            sum(served.output_seconds for served in self._served)
            / sum(served.num_new_tokens for served in self._served),
        )
