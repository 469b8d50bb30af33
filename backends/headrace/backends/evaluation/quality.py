"""How far models' predictions are from those of a reference.

Every model reads the same windows of a text, in lockstep, by the path that serves: the context of each window as a
prompt, in chunks; then a token of every window per step, as decodes. Each decode's logits predict the next token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.backends.api import Row, StepModel
from headrace.backends.evaluation.errors import EvaluationError
from headrace.backends.evaluation.prompt import reserved, run_prompt
from headrace.backends.evaluation.text import Windows

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Means over ``num_positions`` predictions."""

    num_positions: int
    perplexity: float
    """exp of the mean surprisal of the text's own tokens."""
    kl_divergence: float
    """From the reference's distribution to the model's, in nats."""
    kl_interval_95: tuple[float, float] | None
    """By bootstrap over windows, since neighbouring positions are alike; ``None`` if there is one window alone."""
    top1_agreement: float
    """Share of positions where the likeliest token is the reference's."""


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """A softmax over the vocabulary."""

    shifted: NDArray[np.float32]
    """[V]: logits, less the largest."""
    weights: NDArray[np.float32]
    """[V]: exp of ``shifted``; over ``total`` they are probabilities."""
    total: float
    best: int
    """The likeliest token; the lowest id among equals."""

    @classmethod
    def of(cls, logits: NDArray[np.float32]) -> Distribution:
        best = int(logits.argmax())
        shifted = logits - logits[best]
        weights = np.exp(shifted)
        return cls(shifted, weights, float(weights.sum(dtype=np.float64)), best)

    def surprisal(self, token_id: int) -> float:
        """Minus the logarithm of a token's probability, in nats."""
        return math.log(self.total) - float(self.shifted[token_id])

    def divergence(self, other: Distribution) -> float:
        """The Kullback-Leibler divergence from here to ``other``, in nats. Exactly 0 for equal logits."""
        # Σ p (log p - log q), where the logarithms of the totals come out of the sum.
        apart = float(np.dot(self.weights, self.shifted - other.shifted))
        return apart / self.total + math.log(other.total / self.total)


def measure_quality(
    models: Sequence[StepModel], windows: Windows, *, progress: Callable[[float], None]
) -> tuple[Quality, ...]:
    """Compares models with the first of them, which is the reference, and so has a divergence of 0.

    ``progress`` is told how much is done, 0 to 1. Raises EvaluationError if the models cannot be compared.
    """
    num_windows, length = windows.token_ids.shape
    batch = min(min(model.num_slots, model.num_kv_tokens // length) for model in models)
    if batch == 0:
        raise EvaluationError(f"a model has no room for a window of {length} tokens: give it more memory for its cache")
    scores = np.empty((len(models), _NUM_SCORES, num_windows, length - windows.num_context - 1))
    for first in range(0, num_windows, batch):
        ids = windows.token_ids[first : first + batch]
        with ExitStack() as stack:
            for model in models:
                for slot in stack.enter_context(reserved(model, len(ids), length)):
                    run_prompt(model, slot, ids[slot, : windows.num_context].tolist())
            for i, position in enumerate(range(windows.num_context, length - 1)):
                scores[:, :, first : first + len(ids), i] = _score_step(models, ids, position)
                progress((first + len(ids) * (i + 1) / scores.shape[-1]) / num_windows)
    return tuple(_summary(model, of_model) for model, of_model in zip(models, scores, strict=True))


_SURPRISAL, _DIVERGENCE, _AGREEMENT = range(3)
_NUM_SCORES = 3


def _score_step(models: Sequence[StepModel], ids: NDArray[np.int64], position: int) -> NDArray[np.float64]:
    """Feeds the tokens at one position of every window. Returns [models, scores, windows]."""
    rows = [Row(slot, position, [int(ids[slot, position])], num_logits=1) for slot in range(len(ids))]
    logits = [model.step(rows) for model in models]
    result = np.empty((len(models), _NUM_SCORES, len(ids)))
    for slot in range(len(ids)):
        target = int(ids[slot, position + 1])
        reference = Distribution.of(logits[0].row(slot))
        for i, model in enumerate(models):
            one = Distribution.of(logits[i].row(slot)) if i else reference
            if one.shifted.shape != reference.shifted.shape:
                raise EvaluationError(
                    f"{model.card.name!r} has {one.shifted.size} logits, and {models[0].card.name!r} has "
                    f"{reference.shifted.size}: they cannot be compared"
                )
            result[i, :, slot] = one.surprisal(target), reference.divergence(one), one.best == reference.best
    return result


def _summary(model: StepModel, scores: NDArray[np.float64]) -> Quality:
    """``scores`` is [scores, windows, positions]."""
    if not np.isfinite(scores).all():
        raise EvaluationError(f"{model.card.name!r} gives logits that are not finite")
    return Quality(
        num_positions=scores[_DIVERGENCE].size,
        perplexity=math.exp(scores[_SURPRISAL].mean()),
        kl_divergence=float(scores[_DIVERGENCE].mean()),
        kl_interval_95=_interval_of_mean(scores[_DIVERGENCE].mean(axis=1)),
        top1_agreement=float(scores[_AGREEMENT].mean()),
    )


def _interval_of_mean(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of ``values``, by a bootstrap of percentiles."""
    if values.size == 1:
        return None
    picked = np.random.default_rng(0).integers(values.size, size=(_RESAMPLES, values.size))
    low, high = np.percentile(values[picked].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
