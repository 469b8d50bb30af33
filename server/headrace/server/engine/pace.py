"""How many prompt tokens a step may take on without making the running streams wait too long, whether its decodes and
chunks can share a run of the model, and what a guessed token costs.
"""

from __future__ import annotations

import math

_SMOOTHING = 0.2
_MAX_STRETCH = 1.4
"""A step with chunks may take this much longer than the decodes alone, beyond their own time: with the smallest chunk's
overhead the gap between two tokens stays within three times the usual one."""

_FEW_DECODES = 8
_UNNOTICED_SECONDS = 0.04
"""What chunks may take beside fewer streams than that, however short their own steps are: text still comes faster than
it is read, and who waits for a first token waits much less."""

_CROWD_SECONDS = 0.25
"""What chunks may take while more sequences wait for their first token than for their next one: then holding up the
few serves the many, and larger chunks serve all."""

_MIXED_IN_A_ROW = 31


class Pacer:
    """Learns from the steps that ran: seconds in, tokens out."""

    def __init__(self, *, smallest: int, largest: int) -> None:
        """Budgets are between ``smallest`` and ``largest`` tokens."""
        self._smallest = smallest
        self._largest = largest
        self._decode_seconds: float | None = None
        self._num_decodes = 0
        """How many they were for."""
        self._num_mixed = 0
        """Runs since then that had decodes and more."""
        self._waited = False
        self._seconds_per_token: float | None = None
        self._seconds_per_draft: float | None = None

    def saw_decodes(self, num_decodes: int, seconds: float) -> None:
        if self._is_near(num_decodes):
            self._decode_seconds = _smooth(self._decode_seconds, seconds)
        else:
            self._decode_seconds, self._num_decodes = seconds, num_decodes
        self._num_mixed = 0

    def saw_chunks(self, num_tokens: int, seconds: float) -> None:
        self._seconds_per_token = _smooth(self._seconds_per_token, seconds / num_tokens)

    def saw_both(self, num_tokens: int, seconds: float) -> None:
        """A run of decodes, as many as ``can_mix`` was asked for, and ``num_tokens`` of prompts."""
        self._num_mixed += 1
        self.saw_chunks(num_tokens, max(seconds - (self._decode_seconds or 0), 0))

    def saw_drafts(self, num_drafts: int, seconds: float) -> None:
        """A run of decodes, as many as ``can_mix`` was asked for, and ``num_drafts`` guessed tokens."""
        self._num_mixed += 1
        beyond = max(seconds - (self._decode_seconds or 0), 0)
        self._seconds_per_draft = _smooth(self._seconds_per_draft, beyond / num_drafts)

    def draft_price(self, num_decodes: int) -> float | None:
        """What a guessed token costs beside so many decodes: the tokens that these alone would give in that time. None
        if it is not known.
        """
        seconds, token_seconds = self._seconds_per_draft or self._seconds_per_token, self.token_seconds(num_decodes)
        return seconds / token_seconds if seconds and token_seconds else None

    def token_seconds(self, num_decodes: int) -> float | None:
        """What a token of so many decodes takes; None if it is not known."""
        if not self._decode_seconds or not self._is_near(num_decodes):
            return None
        return self._decode_seconds / num_decodes

    def can_mix(self, num_decodes: int) -> bool:
        """Whether the next run may have decodes and more: it is known what so many take alone. What such a run says of
        its chunks, or its drafts, is worth no more than that, so now and then there must be one of decodes alone.
        Never twice in a row: however the number of decodes goes up and down, prompts go on.
        """
        known = self._num_mixed < _MIXED_IN_A_ROW and self._is_near(num_decodes)
        self._waited = not (known or self._waited)
        return not self._waited

    def _is_near(self, num_decodes: int) -> bool:
        if self._decode_seconds is None:
            return False
        return abs(num_decodes - self._num_decodes) <= max(1, self._num_decodes // 8)

    def chunk_budget(self, num_decodes: int, num_prompts: int, most_seconds: float = math.inf) -> int:
        """Prompt tokens for the next step, beside ``num_decodes`` running streams, if so many prompts are under way and
        the step may take ``most_seconds``.
        """
        if num_decodes == 0:
            seconds = most_seconds
        elif self._decode_seconds:
            seconds = _MAX_STRETCH * self._decode_seconds
            if num_decodes < _FEW_DECODES:
                seconds = max(seconds, _UNNOTICED_SECONDS)
            if num_prompts > num_decodes:
                seconds = max(seconds, _CROWD_SECONDS)
            seconds = min(seconds, most_seconds - self._decode_seconds)
        else:  # not measured, or by a clock that stands still
            return self._smallest
        if seconds == math.inf or not self._seconds_per_token:
            return self._smallest if num_decodes else self._largest
        return max(self._smallest, min(int(seconds / self._seconds_per_token), self._largest))


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else average + _SMOOTHING * (value - average)
