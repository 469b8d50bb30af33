"""Chooses the next token of every row of a step.

The stages, in order: logit bias, penalties, logits processors, tokens that may not come yet; then temperature, top-k,
top-p, min-p and typical-p. Log-probabilities are those of the model, before any stage.

The work is done on the largest logits of each row, and is exact: where the kept tokens may reach beyond them, or the
drawn number falls beyond them, more are looked at, and in the end the whole row. A choice draws one number per token
from its own stream, so what it gets depends on its seed and its own logits alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.backends.api import Logits, TopLogits
from headrace.backends.components import LogitsProcessor
from headrace.backends.errors import BackendError
from headrace.backends.types import Sampling

_NUM_CANDIDATES = (64, 512, 4096)
"""How many candidates to look at, first for all rows, then for those that need more. The whole row comes last."""
# What is closer to 0 is taken for these: it would overflow float32, and chooses no differently.
_MIN_TEMPERATURE = 1e-9
_MIN_REPETITION_PENALTY = 1e-9

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


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
        self.top_k = sampling.top_k
        self.top_p = sampling.top_p
        self.min_p = sampling.min_p
        self.typical_p = sampling.typical_p
        self.num_logprobs = num_logprobs
        self._random = np.random.Generator(np.random.Philox(key=np.array([seed, choice], np.uint64)))
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
            # Drawing from a row of nothing, or of NaN, would give a token that nobody chose.
            if not row.max() > -np.inf:
                raise BackendError(f"logits processor {processor.name!r} forbade every token, or made one NaN")

    def draw(self) -> float:
        """The next number of the choice's stream, in [0, 1)."""
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
        self._presence = np.float32(sampling.presence_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        seen = (
            np.unique(np.fromiter(prompt_ids, np.int64)) if sampling.repetition_penalty != 1 else np.empty(0, np.int64)
        )
        self._size = seen.size
        self._ids = np.resize(seen, max(64, 2 * seen.size)) if seen.size else np.zeros(64, np.int64)
        self._counts = np.zeros(self._ids.size, np.float32)
        self._index = {int(token_id): i for i, token_id in enumerate(seen)}

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)

    def apply(self, row: Floats) -> None:
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        logits = row[ids]
        logits = np.where(logits > 0, logits / self._repetition, logits * self._repetition)
        row[ids] = logits - self._presence * (counts > 0) - self._frequency * counts

    def count(self, token_id: int) -> None:
        i = self._index.get(token_id)
        if i is None:
            if self._size == self._ids.size:
                self._ids = np.resize(self._ids, 2 * self._size)
                self._counts = np.concatenate([self._counts, np.zeros(self._size, np.float32)])
            i = self._index[token_id] = self._size
            self._ids[i] = token_id
            self._size += 1
        self._counts[i] += 1


def sample(
    logits: Logits, states: Sequence[SamplingState], forbidden: Sequence[Sequence[int]]
) -> list[Sampled | Exception]:
    """Chooses a token for each row. ``forbidden`` lists, row by row, the tokens that may not come yet. A row whose
    logits processors fail gets what they raised.
    """
    reports = _report_logprobs(logits, states)
    failures: dict[int, Exception] = {}
    for i, (state, tokens) in enumerate(zip(states, forbidden, strict=True)):
        if state.edits or tokens:
            row = logits.row(i)
            try:
                state.edit(row)
            except Exception as error:  # noqa: BLE001  # a plugin may raise anything; it fails its own row
                failures[i] = error
                row[:] = 0
            row[list(tokens)] = -np.inf
    drawn = [i for i, state in enumerate(states) if state.temperature > 0]
    chosen = [0] * len(states) if len(drawn) == len(states) else logits.greedy().tolist()
    if drawn:
        for i, token_id in zip(drawn, _draw(logits, drawn, [states[i] for i in drawn]), strict=True):
            chosen[i] = token_id
    for state, token_id in zip(states, chosen, strict=True):
        state.accept(token_id)
    return [
        failures.get(i) or (report.of(token_id) if report else Sampled(token_id))
        for i, (report, token_id) in enumerate(zip(reports, chosen, strict=True))
    ]


def _draw(logits: Logits, rows: Sequence[int], states: Sequence[SamplingState]) -> list[int]:
    """Draws a token for each of ``rows``, whose temperatures are above 0."""
    numbers = [state.draw() for state in states]
    chosen: dict[int, int] = {}
    for num_candidates in _NUM_CANDIDATES:
        left = [i for i, state in enumerate(states) if i not in chosen and state.typical_p == 1]
        if left:
            drawn = _draw_from_candidates(
                logits, [rows[i] for i in left], [states[i] for i in left], [numbers[i] for i in left], num_candidates
            )
            chosen |= {i: token_id for i, token_id in zip(left, drawn, strict=True) if token_id is not None}
    for i, state in enumerate(states):
        if i not in chosen:
            chosen[i] = _draw_from_row(logits.row(rows[i]), state, numbers[i])
    return [chosen[i] for i in range(len(states))]


def _draw_from_candidates(
    logits: Logits,
    rows: Sequence[int],
    states: Sequence[SamplingState],
    numbers: Sequence[float],
    num_candidates: int,
) -> list[int | None]:
    """Draws from the largest logits of each row; ``None`` where they are not the whole story."""
    temperature = np.array([state.temperature for state in states], np.float32)
    top = logits.top(rows, num_candidates, temperature)
    num_candidates = top.token_ids.shape[1]
    probabilities = np.exp(top.logits.astype(np.float64) / temperature[:, None] - top.log_sum_exp[:, None])
    top_k = np.array([state.top_k or np.inf for state in states])
    kept = _kept(
        probabilities,
        total=np.ones(len(states)),
        top_k=top_k,
        top_p=np.array([state.top_p for state in states]),
        min_p=np.array([state.min_p for state in states]),
    )
    sums = np.cumsum(np.where(kept, probabilities, 0.0), axis=1)
    # Where top-k reaches beyond the candidates, or nothing but their number ends them, they are not the whole story.
    open_ended = np.where(np.isinf(top_k), kept[:, -1], top_k > num_candidates)
    open_ended &= num_candidates < logits.row(rows[0]).size
    drawn: list[int | None] = []
    for i, (state, number) in enumerate(zip(states, numbers, strict=True)):
        if not open_ended[i]:
            drawn.append(int(top.token_ids[i, _position(sums[i], number * sums[i, -1])]))
        elif state.top_p == 1 and state.min_p == 0 and state.top_k is None and number < sums[i, -1]:
            # Everything is kept, so the sums are those of the whole distribution.
            drawn.append(int(top.token_ids[i, _position(sums[i], number)]))
        else:
            drawn.append(None)
    return drawn


def _kept(
    probabilities: Doubles, *, total: Doubles, top_k: Doubles, top_p: Doubles, min_p: Doubles
) -> NDArray[np.bool_]:
    """Which of each row's tokens, likeliest first, top-k, top-p and min-p keep. [R, K]; the options are [R]."""
    ranks = np.arange(probabilities.shape[1])
    within_k = ranks < top_k[:, None]
    # Each stage renormalises: top-p is a share of what top-k keeps (of `total` where top-k keeps all).
    mass_of_k = np.where(np.isinf(top_k), total, np.where(within_k, probabilities, 0.0).sum(axis=1))
    mass_before = np.cumsum(probabilities, axis=1) - probabilities
    kept = within_k & ((mass_before < (top_p * mass_of_k)[:, None]) | (top_p[:, None] == 1))
    kept &= probabilities >= min_p[:, None] * probabilities[:, :1]
    kept[:, 0] = True
    result: NDArray[np.bool_] = kept
    return result


def _draw_from_row(row: Floats, state: SamplingState, u: float) -> int:
    """Draws from a whole row of logits, [V]."""
    order = np.argsort(-row, kind="stable")
    scaled = row[order].astype(np.float64) / state.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    kept = _kept(
        probabilities[None],
        total=np.ones(1),
        top_k=np.array([state.top_k or np.inf]),
        top_p=np.array([state.top_p]),
        min_p=np.array([state.min_p]),
    )[0]
    if state.typical_p < 1:
        kept &= _typical(np.where(kept, probabilities, 0.0), state.typical_p)
    sums = np.cumsum(np.where(kept, probabilities, 0.0))
    return int(order[_position(sums, u * sums[-1])])


def _typical(probabilities: Doubles, typical_p: float) -> NDArray[np.bool_]:
    """Which tokens locally typical sampling keeps (Meister et al. 2022, arXiv 2202.00666). Zeros are never kept."""
    p = probabilities / probabilities.sum()
    surprise = -np.log(p, out=np.full_like(p, np.inf), where=p > 0)
    entropy = float((p[p > 0] * surprise[p > 0]).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    mass_before = np.cumsum(p[order]) - p[order]
    kept = np.zeros(p.size, np.bool_)
    kept[order] = mass_before < typical_p
    result: NDArray[np.bool_] = kept & (p > 0)
    return result


def _position(sums: Doubles, target: float) -> int:
    """Where a running sum first exceeds ``target``, at the last increase at most."""
    last = int(np.searchsorted(sums, sums[-1], side="left"))
    return min(int(np.searchsorted(sums, target, side="right")), last)


# --- log-probabilities ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Report:
    """What is needed to report one row's log-probabilities after its token is known."""

    raw: Floats
    top: TopLogits
    index: int
    num_top: int

    def of(self, token_id: int) -> Sampled:
        norm = float(self.top.log_sum_exp[self.index])
        ids, logits = self.top.token_ids[self.index], self.top.logits[self.index]
        top = tuple((int(ids[j]), float(logits[j]) - norm) for j in range(min(self.num_top, ids.size)))
        return Sampled(token_id, float(self.raw[token_id]) - norm, top)


def _report_logprobs(logits: Logits, states: Sequence[SamplingState]) -> list[_Report | None]:
    """Takes down, before any edit, what the rows that want log-probabilities will need."""
    rows = [i for i, state in enumerate(states) if state.num_logprobs is not None]
    reports: list[_Report | None] = [None] * len(states)
    if rows:
        most = max(states[i].num_logprobs or 0 for i in rows)
        top = logits.top(rows, max(1, most), np.ones(len(rows), np.float32))
        for index, i in enumerate(rows):
            # A copy: `sample` may edit the row.
            reports[i] = _Report(logits.row(i).copy(), top, index, states[i].num_logprobs or 0)
    return reports
