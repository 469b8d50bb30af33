"""Logits in host memory: the implementation of ``api.Logits`` for every backend that has them as a numpy array."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.backends.api import DrawOptions, TopLogits

_NUM_CANDIDATES = (64, 512, 4096)
"""How many of the largest to look at, until they hold what top-k and top-p keep. The whole row comes last."""

Doubles = NDArray[np.float64]


class HostLogits:
    """``array`` is [R, V] float32, C-contiguous, writable, and lent by the backend until its next step.

    Every result is a function of the row alone, never of the rows beside it.
    """

    def __init__(self, array: NDArray[np.float32]) -> None:
        self._array = array

    def row(self, index: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._array[index]
        return row

    def greedy(self, rows: Sequence[int]) -> NDArray[np.int64]:
        return np.array([self._array[index].argmax() for index in rows], np.int64)

    def top(self, rows: Sequence[int], k: int, temperature: NDArray[np.float32]) -> TopLogits:
        num_rows, size = len(rows), self._array.shape[1]
        k = min(k, size)
        ids = np.empty((num_rows, k), np.int64)
        logits = np.empty((num_rows, k), np.float32)
        log_sum_exp = np.empty(num_rows, np.float64)
        scratch = np.empty(size, np.float32)
        for i, (index, t) in enumerate(zip(rows, temperature, strict=True)):
            row = self._array[index]
            if np.isnan(row.max()):
                row = np.where(np.isnan(row), np.float32(-np.inf), row)  # it would be neither above nor below anything
            ids[i] = top_ids(row, k)
            logits[i] = row[ids[i]]
            with np.errstate(invalid="ignore"):  # of an infinite logit, or of none but -inf, there is no sum
                log_sum_exp[i] = _log_sum_exp(row, float(logits[i, 0]), float(t), scratch)
        return TopLogits(ids, logits, log_sum_exp)

    def draw(self, rows: Sequence[int], options: DrawOptions) -> NDArray[np.int64]:
        fields = (options.temperature, options.top_k, options.top_p, options.min_p, options.typical_p, options.number)
        each = zip(rows, *(field.tolist() for field in fields), strict=True)
        return np.array([self._draw(*one) for one in each], np.int64)

    def _draw(
        self, index: int, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float, number: float
    ) -> int:
        row = self._array[index]
        largest = row.max()
        if not np.isfinite(largest):
            return int(row.argmax())  # of a NaN, if there is one
        kept = self._kept(index, temperature, top_k, top_p) if top_k < row.size or top_p < 1 else None
        with np.errstate(over="ignore"):  # to -inf, whose weight is 0
            weights = np.exp(((row if kept is None else row[kept]) - largest) / np.float32(temperature))
        weights[weights < min_p] = 0
        if typical_p < 1:
            weights[~_typical(weights.astype(np.float64), typical_p)] = 0
        sums = np.cumsum(weights, dtype=np.float64)
        # Rounding can put the product at the sum of all: the last increase is the latest that counts.
        last = int(np.searchsorted(sums, sums[-1], side="left"))
        drawn = min(int(np.searchsorted(sums, number * sums[-1], side="right")), last)
        return drawn if kept is None else int(kept[drawn])

    def _kept(self, index: int, temperature: float, top_k: int, top_p: float) -> NDArray[np.int64]:
        """The ids that top-k and top-p keep, ascending."""
        size = self._array.shape[1]
        top_k = min(top_k, size)
        for k in (*(k for k in _NUM_CANDIDATES if k < size), size):
            if k < top_k < size:
                continue
            top = self.top([index], k, np.array([temperature], np.float32))
            scaled = top.logits[0].astype(np.float64) / np.float32(temperature)
            probabilities = np.exp(scaled - top.log_sum_exp[0])[:top_k]
            mass = probabilities.sum() if top_k < size else 1.0
            mass_before = np.cumsum(probabilities) - probabilities
            num_kept = max(1, int(np.count_nonzero(mass_before < top_p * mass))) if top_p < 1 else top_k
            if num_kept < probabilities.size or k >= top_k:
                return np.sort(top.token_ids[0, :num_kept])
        raise AssertionError("This is a bug: the whole row is enough")


def _typical(weights: Doubles, typical_p: float) -> NDArray[np.bool_]:
    """Which tokens locally typical sampling keeps; of equally typical ones those with the lowest ids. Zeros never."""
    p = weights / weights.sum()
    surprise = -np.log(p, out=np.full_like(p, -np.inf), where=p > 0)
    entropy = float((p[p > 0] * surprise[p > 0]).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    mass_before = np.cumsum(p[order]) - p[order]
    kept = np.zeros(p.size, np.bool_)
    kept[order] = mass_before < typical_p
    result: NDArray[np.bool_] = kept & (p > 0)
    return result


_LARGEST_EXPONENT = 60.0
"""exp of it, a million times over, is still a float32, and exp of its negative is no denormal."""


def _log_sum_exp(row: NDArray[np.float32], largest: float, temperature: float, scratch: NDArray[np.float32]) -> float:
    """Of ``row / temperature``. ``scratch`` is as long as ``row``; every pass over them counts."""
    if abs(largest) <= _LARGEST_EXPONENT * temperature:
        scaled = row if temperature == 1 else np.multiply(row, np.float32(1 / temperature), out=scratch)
        return math.log(np.exp(scaled, out=scratch).sum())
    np.subtract(row, np.float32(largest), out=scratch)
    np.divide(scratch, np.float32(temperature), out=scratch)
    return largest / temperature + math.log(np.exp(scratch, out=scratch).sum())


def top_ids(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The ids of the ``k`` largest values of ``row`` [V], largest first, equal ones by id.

    A partition of the whole row takes half a millisecond at a vocabulary of 49,152. So the row is laid out as
    [lanes, V / lanes] and reduced to the maximum of each column first: the columns of the ``k`` largest maxima hold
    the ``k`` largest values, and only those are partitioned.
    """
    lanes = 64 if k <= 64 else 16  # fewer columns are quick to search, more hold fewer others
    columns = row.size // lanes
    if columns <= 2 * k:
        candidates = np.arange(row.size)
    else:
        body = columns * lanes
        maxima = row[:body].reshape(lanes, columns).max(axis=0)
        # Every column that ties with the k-th largest maximum, so that ties fall by id and not by partition order.
        best = np.flatnonzero(maxima >= np.partition(maxima, columns - k)[columns - k])
        candidates = np.concatenate(
            [
                (best[:, None] + np.arange(lanes) * columns).ravel(),
                np.arange(body, row.size),
            ]
        )
    values = row[candidates]
    threshold = np.partition(values, values.size - k)[values.size - k]
    candidates = candidates[values >= threshold]
    order = np.lexsort((candidates, -row[candidates]))
    best_first: NDArray[np.int64] = candidates[order[:k]]
    return best_first
