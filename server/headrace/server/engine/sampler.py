"""Chooses the next token of every row of a step.

The stages, in order: logit bias, penalties, logits processors, tokens that may not come yet, those that a constraint
refuses; then temperature, top-k, top-p, min-p and typical-p. Log-probabilities are those of the model, before any of
these.

Drawing itself is done where the logits lie (``api.Logits.draw``). A choice gives it one number per token, from its own
stream, so what it gets depends on its seed and its own logits alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.backends.api import DrawOptions, Logits
from headrace.backends.components import LogitsProcessor
from headrace.backends.errors import BackendError
from headrace.backends.requests import Sampling
from headrace.server.engine.masks import TokenMask

_EVERY_TOKEN = 2**63 - 1
# What is closer to 0 is taken for these: it would overflow float32, and chooses no differently.
_MIN_TEMPERATURE = 1e-9
_MIN_REPETITION_PENALTY = 1e-9

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; log-probabilities (natural) where they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class SamplingState:
    """What sampling one choice needs to know, and what it remembers from token to token."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        default_temperature: float,
        seed: int,
        choice: int,
        prompt_ids: Sequence[int],
        num_logprobs: int | None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        """``num_logprobs`` is how many of the likeliest tokens to report; ``None``: no log-probabilities at all."""
        temperature = default_temperature if sampling.temperature is None else sampling.temperature
        self.temperature = max(temperature, _MIN_TEMPERATURE) if temperature else 0.0
        self.top_k = min(sampling.top_k or _EVERY_TOKEN, _EVERY_TOKEN)
        self.top_p = sampling.top_p
        self.min_p = sampling.min_p
        self.typical_p = sampling.typical_p
        self.num_logprobs = num_logprobs
        self.forced: deque[int] = deque()
        """Tokens that come next whatever the logits say."""
        self._seed = (seed, choice)
        self._random: np.random.Generator | None = None
        self._bias_ids = np.fromiter(sampling.logit_bias.keys(), np.int64, len(sampling.logit_bias))
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias))
        self._penalties = _Penalties(sampling, prompt_ids) if _Penalties.wanted(sampling) else None
        self._processors = processors
        self._prompt_ids = prompt_ids
        self._output_ids: list[int] = []
        """What processors are shown; empty without any."""

    @property
    def edits(self) -> bool:
        """Whether ``edit`` changes anything."""
        return self._penalties is not None or self._bias_ids.size > 0 or bool(self._processors)

    def edit(self, row: Floats) -> None:
        """Applies bias, penalties and processors to a row of logits, in place. Raises what a processor raises."""
        if self._bias_ids.size:
            row[self._bias_ids] += self._bias
        if self._penalties:
            self._penalties.apply(row)
        for processor in self._processors:
            processor.process(self._prompt_ids, self._output_ids, row)
            if not math.isfinite(row.max()):  # so that the message can name it: `sample` would find it too
                raise BackendError(
                    f"logits processor {processor.name!r} forbade every token, or made one infinite or NaN"
                )

    def draw(self) -> float:
        """The next number of the choice's stream, in [0, 1)."""
        if self._random is None:  # made late: a greedy choice needs none
            self._random = np.random.Generator(np.random.Philox(key=np.array(self._seed, np.uint64)))
        return self._random.random()

    def accept(self, token_id: int) -> None:
        """Remembers that a token was chosen."""
        if self._penalties:
            self._penalties.count(token_id)
        if self._processors:
            self._output_ids.append(token_id)


class _Penalties:
    """The tokens that occurred in prompt and output, and what they are penalised with."""

    def __init__(self, sampling: Sampling, prompt_ids: Iterable[int]) -> None:
        self._repetition = np.float32(max(sampling.repetition_penalty, _MIN_REPETITION_PENALTY))
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        seen = (
            np.unique(np.fromiter(prompt_ids, np.int64)) if sampling.repetition_penalty != 1 else np.empty(0, np.int64)
        )
        # Arrays with room to grow: the tokens, and what is subtracted from the logit of each.
        self._ids = np.resize(seen, max(64, 2 * seen.size)) if seen.size else np.zeros(64, np.int64)
        self._subtracted = np.zeros(self._ids.size, np.float32)
        self._counts = [0] * seen.size
        """How often each came in the output."""
        self._index = {int(token_id): i for i, token_id in enumerate(seen)}

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)

    def apply(self, row: Floats) -> None:
        ids = self._ids[: len(self._counts)]
        logits = row[ids]
        if self._repetition != 1:
            # A positive logit is divided, a negative one multiplied: above 1 the smaller is right, below it the larger.
            choose = np.minimum if self._repetition > 1 else np.maximum
            logits = choose(logits / self._repetition, logits * self._repetition)
        logits -= self._subtracted[: ids.size]
        row[ids] = logits

    def count(self, token_id: int) -> None:
        i = self._index.setdefault(token_id, len(self._counts))
        if i == len(self._counts):
            if i == self._ids.size:
                self._ids = np.resize(self._ids, 2 * i)
                self._subtracted = np.concatenate([self._subtracted, np.zeros(i, np.float32)])
            self._ids[i] = token_id
            self._counts.append(0)
        self._counts[i] += 1
        self._subtracted[i] = self._presence + self._frequency * self._counts[i]


def sample(
    logits: Logits,
    indices: Sequence[int],
    states: Sequence[SamplingState],
    forbidden: Sequence[Sequence[int]],
    masks: Sequence[TokenMask | None] | None = None,
) -> list[Sampled | Exception]:
    """Chooses a token for each of the rows ``indices``. ``forbidden`` lists, row by row, the tokens that may not come
    yet; ``masks`` are those of the rows that have a grammar. A row whose logits processors fail gets what they raised;
    one that leaves nothing to choose, a BackendError.
    """
    masks = masks or [None] * len(indices)
    edited = [
        state.edits or len(tokens) > 0 or mask is not None
        for state, tokens, mask in zip(states, forbidden, masks, strict=True)
    ]
    reports = _report_logprobs(logits, indices, states, edited)
    failures: dict[int, Exception] = {}
    for i, state in enumerate(states):
        if edited[i]:
            row = logits.row(indices[i])
            try:
                state.edit(row)
            except Exception as error:  # noqa: BLE001  # a plugin may raise anything; it fails its own row
                failures[i] = error
            row[list(forbidden[i])] = -np.inf
            if mask := masks[i]:
                mask.apply(row)
    results: list[Sampled | Exception] = []
    for i, token_id in enumerate(_choose(logits, indices, states)):
        if states[i].forced and i not in failures:
            token_id = states[i].forced.popleft()
        elif i not in failures and not math.isfinite(_logit(logits, indices[i], token_id)):
            failures[i] = BackendError("the model gave no token: a logit is NaN or infinite, or all are forbidden")
        if i in failures:
            results.append(failures[i])
        else:
            states[i].accept(token_id)
            report = reports[i]
            results.append(report.of(token_id) if report else Sampled(token_id))
    return results


def _logit(logits: Logits, index: int, token_id: int) -> float:
    """One logit of a row, without the row where that is somewhere else."""
    known = getattr(logits, "logit", None)
    logit: float = logits.row(index)[token_id] if known is None else known(index, token_id)
    return logit


def _choose(logits: Logits, indices: Sequence[int], states: Sequence[SamplingState]) -> list[int]:
    """A token for each row."""
    chosen = np.zeros(len(states), np.int64)
    drawn = [i for i, state in enumerate(states) if state.temperature > 0]
    if drawn:
        options = _draw_options([states[i] for i in drawn])
        chosen[drawn] = logits.draw([indices[i] for i in drawn], options)
    greedy = [i for i, state in enumerate(states) if state.temperature == 0]
    if greedy:
        chosen[greedy] = logits.greedy([indices[i] for i in greedy])
    ids: list[int] = chosen.tolist()
    return ids


def _draw_options(states: Sequence[SamplingState]) -> DrawOptions:
    """Their temperatures are above 0."""
    return DrawOptions(
        temperature=np.array([state.temperature for state in states]),
        top_k=np.array([state.top_k for state in states], np.int64),
        top_p=np.array([state.top_p for state in states]),
        min_p=np.array([state.min_p for state in states]),
        typical_p=np.array([state.typical_p for state in states]),
        number=np.array([state.draw() for state in states]),
    )


# --- log-probabilities ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Report:
    """What is needed to report one row's log-probabilities after its token is known."""

    raw: Floats
    log_sum_exp: float
    top: Sequence[tuple[int, float]]

    def of(self, token_id: int) -> Sampled:
        top = tuple((other, logit - self.log_sum_exp) for other, logit in self.top)
        return Sampled(token_id, float(self.raw[token_id]) - self.log_sum_exp, top)


def _report_logprobs(
    logits: Logits, indices: Sequence[int], states: Sequence[SamplingState], edited: Sequence[bool]
) -> list[_Report | None]:
    """Takes down what the rows that want log-probabilities will need, before those that are ``edited`` are."""
    rows = [i for i, state in enumerate(states) if state.num_logprobs is not None]
    reports: list[_Report | None] = [None] * len(states)
    if rows:
        most = max(states[i].num_logprobs or 0 for i in rows)
        top = logits.top([indices[i] for i in rows], max(1, most), np.ones(len(rows), np.float32))
        columns = zip(rows, top.log_sum_exp.tolist(), top.token_ids.tolist(), top.logits.tolist(), strict=True)
        for i, log_sum_exp, ids, largest in columns:
            num_top = states[i].num_logprobs or 0
            raw = logits.row(indices[i])
            raw = raw.copy() if edited[i] else raw
            reports[i] = _Report(raw, log_sum_exp, list(zip(ids[:num_top], largest[:num_top], strict=True)))
    return reports
