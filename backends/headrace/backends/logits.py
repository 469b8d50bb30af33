"""Logits in host memory: the implementation of ``api.Logits`` for every backend that has them as a numpy array."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.backends.api import TopLogits


class HostLogits:
    """``array`` is [R, V] float32, C-contiguous, writable, and lent by the backend until its next step.

    Every result is a function of the row alone, never of the rows beside it.
    """

    def __init__(self, array: NDArray[np.float32]) -> None:
        self._array = array

    def row(self, index: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._array[index]
        return row

    def greedy(self) -> NDArray[np.int64]:
        best: NDArray[np.int64] = self._array.argmax(axis=1)
        return best

    def top(self, rows: Sequence[int], k: int, temperature: NDArray[np.float32]) -> TopLogits:
        num_rows, size = len(rows), self._array.shape[1]
        k = min(k, size)
        ids = np.empty((num_rows, k), np.int64)
        logits = np.empty((num_rows, k), np.float32)
        log_sum_exp = np.empty(num_rows, np.float64)
        scratch = np.empty(size, np.float32)
        for i, (index, t) in enumerate(zip(rows, temperature, strict=True)):
            row = self._array[index]
            ids[i] = top_ids(row, k)
            logits[i] = row[ids[i]]
            log_sum_exp[i] = _log_sum_exp(row, float(logits[i, 0]), float(t), scratch)
        return TopLogits(ids, logits, log_sum_exp)


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
