"""Log-probabilities of tokens that are given, from the logits of the runs that they pass through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from headrace.backends.api import Logits
from headrace.backends.errors import BackendError
from headrace.backends.events import Scored, ScoredToken, TopLogprob

_ROWS_AT_ONCE = 16
"""Rows whose normalisers are worked out together: some implementations copy them."""


@dataclass(slots=True, eq=False)
class TokenScores:
    """What is known of the log-probabilities of tokens that follow ``num_given`` others.

    That of a token comes from the logits after the one before it, so the last token never runs.
    """

    token_ids: Sequence[int]
    """At least one."""
    num_given: int
    """At least one."""
    in_chunks: bool
    """Whether the model gives the logits of several tokens of a chunk, so that the sequence has all from the start;
    otherwise each is run when the one before it is scored."""
    num_top: int | None = None
    """How many of the likeliest tokens to report in each place; ``None``: no tokens at all."""
    tokens: list[ScoredToken] = field(default_factory=list)
    """Those that are to be reported, so far."""
    _logprobs: list[float] = field(default_factory=list)

    @property
    def next_place(self) -> int:
        """The place in the sequence after whose token logits are needed next."""
        return self.num_given - 1 + len(self._logprobs)

    @property
    def is_complete(self) -> bool:
        return len(self._logprobs) == len(self.token_ids)

    def take(self, logits: Logits, rows: range, token_bytes: Callable[[int], bytes]) -> int | None:
        """Scores the next tokens by the rows, one at least, that a run gave for them. Returns the token that is to be
        run next, if it is not among those that the sequence has. Raises BackendError.
        """
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            top = logits.top(part, max(1, self.num_top or 0), np.ones(len(part), np.float32))
            columns = zip(part, top.log_sum_exp.tolist(), top.token_ids.tolist(), top.logits.tolist(), strict=True)
            for index, log_sum_exp, top_ids, top_logits in columns:
                token_id = self.token_ids[len(self._logprobs)]
                logit = float(logits.row(index)[token_id])
                if math.isnan(logit) or not math.isfinite(log_sum_exp):
                    raise BackendError("the model gave no probabilities: a logit is NaN or infinite")
                self._logprobs.append(logit - log_sum_exp)
                if self.num_top is None:
                    continue
                others = [
                    TopLogprob(other, token_bytes(other), other_logit - log_sum_exp)
                    for other, other_logit in zip(top_ids[: self.num_top], top_logits[: self.num_top], strict=True)
                ]
                self.tokens.append(ScoredToken(token_id, token_bytes(token_id), self._logprobs[-1], tuple(others)))
        return None if self.in_chunks or self.is_complete else self.token_ids[len(self._logprobs) - 1]

    def result(self, choice: int) -> Scored:
        """Of a text that is complete."""
        return Scored(choice, math.fsum(self._logprobs), len(self._logprobs), tuple(self.tokens))
