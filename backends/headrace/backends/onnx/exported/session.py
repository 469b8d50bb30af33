"""Runs a graph that Optimum exported: dense, [B, S], with the past as an input and the whole present as an output.

Rows of different lengths share a run. Each row's past ends, and its new tokens begin, at the same column; padding lies
before the past and behind the new tokens, where the attention mask hides it:

    row 0   . . p p p p | n n n
    row 1   p p p p p p | n . .

So a row's tokens are neighbours, whatever a model makes of columns: a distance (ALiBi, windows), or a position counted
from the mask, where it has no ``position_ids``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.api import Row
from headrace.backends.onnx.kv import KvMemory
from headrace.backends.onnx.session import run_bound

KV_DTYPE = np.float32
_MAX_PADDING = 2.0
"""Rows join one run as long as it computes at most this many tokens for each real one."""
_MAX_LOGITS_BYTES = 64 * 2**20
"""The graph computes logits of every token, wanted or not. One row alone may take more."""


class ExportedSession:
    """Implements ``session.Session``. A row wants one row of logits, or none."""

    def __init__(self, session: ort.InferenceSession, kv: KvMemory, *, num_weight_bytes: int, num_logits: int) -> None:
        """``num_logits`` is the graph's vocabulary, padding included."""
        self._session = session
        self._kv = kv
        self._num_logits = num_logits
        self._has_positions = any(value.name == "position_ids" for value in session.get_inputs())
        layers, parts, _, heads, _, head_size = kv.shape
        # Another run reads all weights once more; padding is cheaper until it moves as much.
        self._max_padding_tokens = num_weight_bytes // (4 * layers * parts * heads * head_size)
        self._past, self._present, self._logits = _Scratch(), _Scratch(), _Scratch()

    def run(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> None:
        places = np.cumsum([0, *(row.num_logits for row in rows)]).tolist()
        for group in self._groups(rows):
            computed = self._run([rows[i] for i in group])
            for b, i in enumerate(group):
                if rows[i].num_logits:
                    logits[places[i]] = computed[b, len(rows[i].token_ids) - 1, : logits.shape[1]]

    def _run(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """One run of the graph: [B, S, V], valid until the next."""
        starts = np.array([row.num_cached_tokens for row in rows])
        counts = np.array([len(row.token_ids) for row in rows])
        past_width, width = int(starts.max()), int(counts.max())
        columns = np.arange(-past_width, width)
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.zeros((len(rows), width), np.int64),
            "attention_mask": ((columns >= -starts[:, None]) & (columns < counts[:, None])).astype(np.int64),
        }
        for b, row in enumerate(rows):
            feeds["input_ids"][b, : counts[b]] = row.token_ids
        if self._has_positions:
            # Padding stands where the last token does: a table of positions may end there.
            feeds["position_ids"] = starts[:, None] + np.minimum(np.arange(width), counts[:, None] - 1)

        layers, parts, _, heads, _, head_size = self._kv.shape
        past = self._past.take((layers, parts, len(rows), heads, past_width, head_size))
        present = self._present.take((layers, parts, len(rows), heads, past_width + width, head_size))
        logits = self._logits.take((len(rows), width, self._num_logits))
        for b, row in enumerate(rows):
            hidden = past_width - row.num_cached_tokens
            past[:, :, b, :, :hidden] = 0  # hidden is not enough: a NaN would show through the mask
            past[:, :, b, :, hidden:] = self._kv.cells(row.slot)[..., : row.num_cached_tokens, :]
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for layer in range(layers):
            for part, name in enumerate(("key", "value")):
                _bind(binding.bind_input, f"past_key_values.{layer}.{name}", past[layer, part])
                _bind(binding.bind_output, f"present.{layer}.{name}", present[layer, part])
        run_bound(self._session, binding, logits=logits)
        for b, row in enumerate(rows):
            end = row.num_cached_tokens + counts[b]
            new = present[:, :, b, :, past_width : past_width + counts[b]]
            self._kv.cells(row.slot)[..., row.num_cached_tokens : end, :] = new
        return logits

    def _groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """Splits rows into runs: indices of rows, those of like length together."""
        groups: list[list[int]] = []
        for i in sorted(range(len(rows)), key=lambda i: (rows[i].num_cached_tokens, len(rows[i].token_ids))):
            if groups and self._may_share([rows[j] for j in (*groups[-1], i)]):
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def _may_share(self, rows: Sequence[Row]) -> bool:
        counts = [len(row.token_ids) for row in rows]
        starts = [row.num_cached_tokens for row in rows]
        computed = len(rows) * max(counts)
        return (
            computed <= _MAX_PADDING * sum(counts)
            and computed * self._num_logits * 4 <= _MAX_LOGITS_BYTES
            and len(rows) * max(starts) - sum(starts) <= self._max_padding_tokens
        )


class _Scratch:
    """Memory that is used again: fresh pages would be touched for the first time in every step."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.float32)

    def take(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array with whatever was in it. What was taken before is lost."""
        size = int(np.prod(shape))
        if size > self._memory.size:
            self._memory = np.empty(0, np.float32)  # before more is asked for
            self._memory = np.empty(size + size // 4, np.float32)
        return self._memory[:size].reshape(shape)


def _bind(bind: Any, name: str, array: NDArray[np.float32]) -> None:
    bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
