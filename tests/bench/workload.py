"""What the load asks for: unique prompts of about a given length, in words that are one token each."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

_TEXT = (
    "the of and to in is that for on with as are at be this from or have an they which one all were there can more"
    " about people when some would time other into only could new them see him now out up first way also after water"
    " any between work day where most through back much long great world year state still own"
)
_WORDS = _TEXT.split()


def prompt(number: int, num_tokens: int) -> str:
    """Prompt ``number``: the same words for the same number, others for any other."""
    return " ".join(random.Random(number).choices(_WORDS, k=num_tokens))


@dataclass(slots=True)
class Answer:
    """One streamed answer; it can be watched while it grows. Times are seconds on the monotonic clock."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    """When each piece of text came; nearly always one token."""
    num_input_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]
