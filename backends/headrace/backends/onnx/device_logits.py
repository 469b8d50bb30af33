"""Logits that stay on a device: searched and drawn from there, and brought to the host only where somebody looks at a
whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.api import DrawOptions, TopLogits
from headrace.backends.errors import BackendUnavailable
from headrace.backends.logits import HostLogits
from headrace.backends.onnx.device_graphs import DRAW, LARGEST, ROWS
from headrace.backends.onnx.paged_session import DEVICE_FAILED, open_on, run_on
from headrace.backends.onnx.providers import Device

_NUM_CANDIDATES = (64, 512, 4096)
"""How many of the largest to bring to the host, until they hold what top-k and top-p keep. The whole row comes last."""
_MAX_LOGITS = 2**23
"""That are searched at once: what it needs beside them is some twenty bytes for each."""


class Search:
    """The graphs of ``device_graphs``, loaded, over one buffer of logits."""

    def __init__(
        self, folder: Path, device: Device, logits: ort.OrtValue, watched: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """``logits`` is [R, V] float32 on ``device``, and outlives this; every use of the device is ``watched``.

        Raises DeviceUnavailable.
        """
        self._watched = watched
        self.vocabulary_size: int = logits.shape()[1]
        self._graphs = {name: open_on(device, folder / name) for name in (ROWS, LARGEST, DRAW)}
        self._bindings = {}
        for name, graph in self._graphs.items():
            binding = self._bindings[name] = graph.io_binding()
            binding.bind_ortvalue_input("logits", logits)

    def rows(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """[N, V], the caller's."""
        selected: NDArray[np.float32] = self._run(ROWS, rows)[0]
        return selected

    def largest(
        self, rows: Sequence[int], k: int, temperature: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
        """The ``k`` largest logits [N, k], their ids [N, k], and the log-sum-exp of all over the temperature [N], which
        is not finite where something is wrong with a row.
        """
        scale = temperature.astype(np.float32)[:, None]
        logits, ids, sums = self._run(LARGEST, rows, k=k, temperature=scale)
        # Of small numbers, in doubles: at a low temperature the sum itself is too large for float32.
        return logits, ids, logits[:, 0].astype(np.float64) / scale[:, 0] + np.log(sums[:, 0].astype(np.float64))

    def draw(
        self,
        rows: Sequence[int],
        temperature: NDArray[np.float64],
        min_p: NDArray[np.float64],
        number: NDArray[np.float64],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """A token of each row, and its logit, which is not finite where something is wrong with the row: both [N]."""
        ids, drawn = self._run(
            DRAW,
            rows,
            temperature=temperature.astype(np.float32)[:, None],
            min_p=min_p.astype(np.float32)[:, None],
            number=number[:, None],
        )
        return ids[:, 0], drawn[:, 0]

    def _run(
        self, name: str, rows: Sequence[int], *, k: int | None = None, **columns: NDArray[Any]
    ) -> list[NDArray[Any]]:
        """The graph's outputs for all rows. ``columns`` are its inputs that have a value for each of them."""
        most = max(1, _MAX_LOGITS // self.vocabulary_size)
        parts = []
        for start in range(0, len(rows), most):
            part = slice(start, start + most)
            feeds = {"rows": np.array(rows[part], np.int64), **{key: value[part] for key, value in columns.items()}}
            if k is not None:
                feeds["k"] = np.array([k], np.int64)
            parts.append(self._run_part(name, feeds))
        return parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]

    def _run_part(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        graph, binding = self._graphs[name], self._bindings[name]
        with self._watched():
            try:
                for key, value in feeds.items():
                    binding.bind_cpu_input(key, np.ascontiguousarray(value))
                for output in graph.get_outputs():
                    binding.bind_output(output.name)
                run_on(graph, binding)
                outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
            except BackendUnavailable:
                raise
            except Exception as error:  # onnxruntime's exceptions share no base class but Exception
                raise BackendUnavailable(DEVICE_FAILED) from error
        return outputs


class DeviceLogits:
    """Implements ``api.Logits``. Of a row that was looked at, and may have been changed, the host's copy counts."""

    def __init__(self, search: Search, num_rows: int) -> None:
        self._search = search
        self._num_rows = num_rows
        self._fetched: dict[int, NDArray[np.float32]] = {}
        self._known: dict[tuple[int, int], float] = {}

    def row(self, index: int) -> NDArray[np.float32]:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"there is no row {index} of {self._num_rows}")
        if index not in self._fetched:
            self._fetched[index] = self._search.rows([index])[0].copy()
        return self._fetched[index]

    def logit(self, index: int, token_id: int) -> float:
        """One logit of a row, without the row if the token was chosen from it."""
        if index in self._fetched or (index, token_id) not in self._known:
            return float(self.row(index)[token_id])
        return self._known[index, token_id]

    def greedy(self, rows: Sequence[int]) -> NDArray[np.int64]:
        indices = np.asarray(rows, np.int64)
        on_host = self._is_fetched(indices)
        chosen = np.empty(indices.size, np.int64)
        if not on_host.all():
            there = ~on_host
            logits, ids, log_sum_exp = self._search.largest(indices[there].tolist(), 1, np.ones(int(there.sum())))
            chosen[there] = ids[:, 0]
            self._note(indices[there], ids[:, 0], logits[:, 0])
            on_host[there] = ~np.isfinite(log_sum_exp)
        if on_host.any():
            host = self._host(indices[on_host])
            chosen[on_host] = host.greedy(range(int(on_host.sum())))
        return chosen

    def top(self, rows: Sequence[int], k: int, temperature: NDArray[np.float32]) -> TopLogits:
        indices, k = np.asarray(rows, np.int64), min(k, self._search.vocabulary_size)
        on_host = self._is_fetched(indices)
        found = TopLogits(
            np.empty((indices.size, k), np.int64), np.empty((indices.size, k), np.float32), np.empty(indices.size)
        )
        if not on_host.all():
            there = ~on_host
            logits, ids, log_sum_exp = self._search.largest(
                indices[there].tolist(), k, temperature[there].astype(np.float64)
            )
            found.token_ids[there], found.logits[there], found.log_sum_exp[there] = ids, logits, log_sum_exp
            on_host[there] = ~np.isfinite(log_sum_exp)
        if on_host.any():
            host = self._host(indices[on_host]).top(range(int(on_host.sum())), k, temperature[on_host])
            found.token_ids[on_host], found.logits[on_host] = host.token_ids, host.logits
            found.log_sum_exp[on_host] = host.log_sum_exp
        return found

    def draw(self, rows: Sequence[int], options: DrawOptions) -> NDArray[np.int64]:
        indices = np.asarray(rows, np.int64)
        drawn = np.empty(indices.size, np.int64)
        on_host = self._is_fetched(indices) | (options.typical_p < 1)  # seldom asked for
        whole = ~on_host & (options.top_k >= self._search.vocabulary_size) & (options.top_p >= 1)
        if whole.any():
            some = options.of(whole)
            ids, logits = self._search.draw(indices[whole].tolist(), some.temperature, some.min_p, some.number)
            drawn[whole] = ids
            self._note(indices[whole], ids, logits)
            on_host[whole] = ~np.isfinite(logits)
        open_ = ~on_host & ~whole
        for k in _NUM_CANDIDATES:
            if k >= self._search.vocabulary_size or not open_.any():
                break
            places = np.flatnonzero(open_)
            some = options.of(open_)
            logits, ids, log_sum_exp = self._search.largest(indices[open_].tolist(), k, some.temperature)
            chosen, is_enough = draw_from_largest(logits, ids, log_sum_exp, some, self._search.vocabulary_size)
            drawn[places] = ids[np.arange(places.size), chosen]
            is_sound = np.isfinite(log_sum_exp)
            self._note(indices[places], drawn[places], logits[np.arange(places.size), chosen])
            on_host[places[~is_sound]] = True
            open_[places[is_enough | ~is_sound]] = False
        on_host |= open_
        if on_host.any():
            drawn[on_host] = self._host(indices[on_host]).draw(range(int(on_host.sum())), options.of(on_host))
        return drawn

    def _is_fetched(self, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.array([index in self._fetched for index in indices.tolist()], np.bool_)

    def _note(self, indices: NDArray[np.int64], ids: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Remembers the logits of chosen tokens."""
        keys = zip(indices.tolist(), ids.tolist(), strict=True)
        self._known.update(zip(keys, logits.tolist(), strict=True))

    def _host(self, indices: NDArray[np.int64]) -> HostLogits:
        """Whole rows on the host."""
        missing = [index for index in indices.tolist() if index not in self._fetched]
        if missing:
            self._fetched.update(zip(missing, self._search.rows(missing), strict=True))
        return HostLogits(np.stack([self._fetched[index] for index in indices.tolist()]))


def draw_from_largest(
    logits: NDArray[np.float32],
    ids: NDArray[np.int64],
    log_sum_exp: NDArray[np.float64],
    options: DrawOptions,
    vocabulary_size: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Draws from the ``k`` largest logits of each row, [N, k] and largest first, as ``HostLogits`` would from all.
    Returns which of them was drawn, and whether they were enough to say so: both [N].
    """
    k = ids.shape[1]
    temperature = options.temperature.astype(np.float32)[:, None]
    top_k, top_p = np.minimum(options.top_k, vocabulary_size)[:, None], options.top_p[:, None]
    within = np.arange(k) < top_k
    with np.errstate(all="ignore"):  # rows with something wrong are the caller's to see
        probabilities = np.where(within, np.exp(logits.astype(np.float64) / temperature - log_sum_exp[:, None]), 0)
        mass = np.where(top_k < vocabulary_size, probabilities.sum(axis=1, keepdims=True), 1.0)
        mass_before = np.cumsum(probabilities, axis=1) - probabilities
        kept = within & ((top_p >= 1) | (mass_before < top_p * mass))
        kept[:, 0] = True
        weights = np.exp((logits - logits[:, :1]) / temperature)
        weights[~kept | (weights < options.min_p[:, None])] = 0
    order = np.argsort(ids, axis=1)
    sums = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1, dtype=np.float64)
    total = sums[:, -1:]
    # Rounding can put the product at the sum of all: the last increase is the latest that counts.
    last = np.count_nonzero(sums < total, axis=1)
    place = np.minimum(np.count_nonzero(sums <= options.number[:, None] * total, axis=1), last)
    is_enough = (top_k[:, 0] <= k) | (~kept[:, -1] & (top_k[:, 0] >= vocabulary_size))
    drawn: NDArray[np.int64] = np.take_along_axis(order, place[:, None], axis=1)[:, 0]
    return drawn, is_enough
