"""How fast prompts and choices have gone lately."""

from __future__ import annotations

import statistics
from collections import deque

from headrace.server.engine.sequence import Sequence

_NUM_REMEMBERED = 64


class Speeds:
    """Written by the runner's thread, read by any."""

    def __init__(self) -> None:
        self._prefill: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._decode: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Median over recent prompts, waiting for other streams' steps included."""
        return statistics.median(self._prefill) if self._prefill else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Median over recent choices."""
        return statistics.median(self._decode) if self._decode else None

    def saw(self, sequence: Sequence) -> None:
        """Takes note of a choice that is complete and never made room for another."""
        meter = sequence.call.meter
        if meter.started is None or meter.first_token is None or meter.last_token is None:
            return
        if meter.first_token > meter.started:
            num_computed = sequence.num_prompt_tokens - sequence.num_reused_tokens
            self._prefill.append(num_computed / (meter.first_token - meter.started))
        if sequence.num_output_tokens > 1 and meter.last_token > meter.first_token:
            self._decode.append((sequence.num_output_tokens - 1) / (meter.last_token - meter.first_token))

    def patience(self, num_waiting: int, num_slots: int) -> float:
        """Seconds until a refused call is worth another try: a tenth of those that wait should have gone by then."""
        rate = self.decode_tokens_per_second
        if rate is None:
            return 1.0
        seconds_per_choice = 100 / rate
        return min(30.0, max(0.1, num_waiting / 10 * seconds_per_choice / num_slots))
