"""Runs a bundle's graph of compiled operators (``fused``): any rows of any slots in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.api import Row
from headrace.backends.onnx.kv import KvMemory
from headrace.backends.onnx.session import run_bound

KV_DTYPE = np.float16
"""Of the cache, as graphs declare it, and as it is unless OPERATOR_OPTIONS_INT8 say otherwise."""

OPERATOR_OPTIONS_INT8 = {"headrace.kv_cache_dtype": "int8"}
"""With these a session keeps int8, in the same input of the graph (backends/kernels/src/attention_op.c)."""


class FusedSession:
    """Implements ``session.Session``."""

    def __init__(self, session: ort.InferenceSession, kv: KvMemory) -> None:
        self._session = session
        self._kv = kv
        self._has_maxima = any(output.name == "maxima" for output in session.get_outputs())
        """Otherwise the bundle is older than they are."""
        self._decodes: dict[int, _Feeds] = {}

    def run(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> NDArray[np.float32] | None:
        if all(len(row.token_ids) == row.num_logits == 1 for row in rows):
            feeds = self._decodes.get(len(rows)) or self._bind_decodes(len(rows))
            feeds.input_ids[:] = [row.token_ids[0] for row in rows]
            feeds.slots[:] = [row.slot for row in rows]
            feeds.positions[:] = [row.num_cached_tokens for row in rows]
        else:
            feeds = self._bind_chunks(rows)
        if not self._has_maxima:
            run_bound(self._session, feeds.binding, logits=logits)
            return None
        from headrace_kernels import count_maxima

        maxima = np.empty((len(logits), count_maxima(logits.shape[1])), np.float32)
        run_bound(self._session, feeds.binding, logits=logits, maxima=maxima)
        return maxima

    def _bind_decodes(self, num_rows: int) -> _Feeds:
        """What a number of decodes is fed. Serving does little else: it is bound once, and written in place."""
        self._decodes[num_rows] = self._bind(
            np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32), range(num_rows)
        )
        return self._decodes[num_rows]

    def _bind_chunks(self, rows: Sequence[Row]) -> _Feeds:
        counts = [len(row.token_ids) for row in rows]
        ends = np.cumsum(counts)
        logits_index: list[int] = []
        for row, end in zip(rows, ends.tolist(), strict=True):
            logits_index += range(end - row.num_logits, end)
        return self._bind(
            np.concatenate([np.asarray(row.token_ids, np.int64) for row in rows]),
            np.repeat([row.slot for row in rows], counts).astype(np.int32),
            np.concatenate([row.num_cached_tokens + np.arange(len(row.token_ids), dtype=np.int32) for row in rows]),
            logits_index,
        )

    def _bind(
        self,
        input_ids: NDArray[np.int64],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        logits_index: Sequence[int],
    ) -> _Feeds:
        binding = self._session.io_binding()
        feeds = _Feeds(binding, input_ids, slots, positions.astype(np.int32), np.array(logits_index, np.int64))
        binding.bind_input("cache", "cpu", 0, KV_DTYPE, self._kv.shape, self._kv.address())
        for name in ("input_ids", "slots", "positions", "logits_index"):
            binding.bind_cpu_input(name, getattr(feeds, name))
        return feeds


@dataclass(frozen=True, slots=True)
class _Feeds:
    """A run's inputs, bound by pointer: they must live until the run is over."""

    binding: ort.IOBinding
    input_ids: NDArray[np.int64]
    slots: NDArray[np.int32]
    positions: NDArray[np.int32]
    logits_index: NDArray[np.int64]
