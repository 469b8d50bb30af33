"""Runs a bundle's packed graph (``graph``) on ONNX Runtime's own operators.

All dense work runs on the tokens of every row packed one behind the other, [T, hidden]: nothing padded is multiplied.
Only attention sees rows: ``pad_index`` [B, S] gathers packed tokens into a padded view, ``unpad_index`` [T] gathers
them back. ``query_seqlens`` [B] says how many of a row's S tokens are real (0 marks an idle row), ``seqlens_k`` [B] is
the number of tokens in the cache after the step, less one. Past and present are bound to the same memory, so the
operator appends in place. A batch is a range of neighbouring slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.api import Row
from headrace.backends.onnx.kv import KvMemory
from headrace.backends.onnx.session import run_bound

KV_DTYPE = np.float32
_MAX_PADDING = 2.0
"""Rows join one run as long as its padded view holds at most this many cells per real token."""


class StockSession:
    """Implements ``session.Session``."""

    def __init__(self, session: ort.InferenceSession, kv: KvMemory) -> None:
        self._session = session
        self._kv = kv
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._decodes: dict[tuple[int, int], _BoundRun] = {}

    def run(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> None:
        places = np.cumsum([0, *(row.num_logits for row in rows)]).tolist()
        order: list[int] = []
        """The place of each row of logits that is computed."""
        for group in _group_neighbours(rows):
            wanted = [place for i in group for place in range(places[i], places[i + 1])]
            self._run([rows[i] for i in group], logits[len(order) : len(order) + len(wanted)])
            order += wanted
        if order != sorted(order):
            logits[:] = logits[np.argsort(order)]

    def _run(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> None:
        """One run of the graph over neighbouring slots, ascending."""
        first, last = rows[0].slot, rows[-1].slot
        num_rows = last - first + 1
        if len(rows) == num_rows and all(len(row.token_ids) == row.num_logits == 1 for row in rows):
            run = self._decodes.get((first, num_rows)) or self._bind_decode(first, num_rows)
            run.feeds["input_ids"][:] = [row.token_ids[0] for row in rows]
            ends = [row.num_cached_tokens + 1 for row in rows]
            run.feeds["seqlens_k"][:] = ends
            run.feeds["seqlens_k"] -= 1
            run.feeds["total_len"][()] = max(ends)
        else:
            if (first, num_rows) not in self._bindings:
                self._bindings[first, num_rows] = self._bind_cache(first, num_rows)
            run = _BoundRun(self._bindings[first, num_rows], _feeds(rows, first, num_rows))
        run_bound(self._session, run.binding, logits=logits)

    def _bind_decode(self, first: int, num_rows: int) -> _BoundRun:
        """A run of one token in each of neighbouring slots. Serving does little else: what it is fed is bound once, and
        written in place.
        """
        rows = [Row(slot, 0, [0], num_logits=1) for slot in range(first, first + num_rows)]
        run = _BoundRun(self._bind_cache(first, num_rows), _feeds(rows, first, num_rows))
        self._decodes[first, num_rows] = run
        return run

    def _bind_cache(self, first: int, num_rows: int) -> ort.IOBinding:
        """A binding of the cache of neighbouring slots. Making one takes longer than using it."""
        binding = self._session.io_binding()
        num_layers, _, _, *cells = self._kv.shape
        shape = (num_rows, *cells)
        for layer in range(num_layers):
            for part, name in enumerate("kv"):
                where = ("cpu", 0, KV_DTYPE, shape, self._kv.address(layer, part, first))
                binding.bind_input(f"past_{name}.{layer}", *where)
                binding.bind_output(f"present_{name}.{layer}", *where)
        return binding


@dataclass(frozen=True, slots=True)
class _BoundRun:
    """What one run of the graph is fed, bound to it by pointer: ``feeds`` must live until the run is over."""

    binding: ort.IOBinding
    feeds: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        for name, value in self.feeds.items():
            self.binding.bind_cpu_input(name, value)


def _feeds(rows: Sequence[Row], first: int, num_rows: int) -> dict[str, NDArray[Any]]:
    """The graph's inputs but for the cache, for rows of ``num_rows`` neighbouring slots from ``first``."""
    counts = np.zeros(num_rows, np.int32)
    ends = np.ones(num_rows, np.int32)  # an idle row must have a cell to look at
    for row in rows:
        counts[row.slot - first] = len(row.token_ids)
        ends[row.slot - first] = row.num_cached_tokens + len(row.token_ids)
    starts = np.cumsum(counts) - counts
    columns = np.arange(counts.max())
    real = columns < counts[:, None]
    return {
        "input_ids": np.concatenate([np.asarray(row.token_ids, np.int64) for row in rows]),
        "pad_index": np.where(real, starts[:, None] + columns, 0),
        "unpad_index": np.flatnonzero(real),
        "logits_index": np.array(
            [starts[row.slot - first] + len(row.token_ids) - i for row in rows for i in range(row.num_logits, 0, -1)],
            np.int64,
        ),
        "seqlens_k": ends - 1,
        "total_len": np.array(ends.max(), np.int32),
        "query_seqlens": counts,
    }


def _group_neighbours(rows: Sequence[Row]) -> list[list[int]]:
    """Splits rows into runs over neighbouring slots: indices of rows, ascending by slot. Idle rows between two slots
    are cheap for decodes, and cost a chunk's whole width for chunks.
    """
    groups: list[list[int]] = []
    tokens, width = 0, 0
    for i in sorted(range(len(rows)), key=lambda i: rows[i].slot):
        length = len(rows[i].token_ids)
        if groups:
            span = rows[i].slot - rows[groups[-1][0]].slot + 1
            joined = span * max(width, length)
            if width == length == 1 or joined <= _MAX_PADDING * (tokens + length):
                groups[-1].append(i)
                tokens, width = tokens + length, max(width, length)
                continue
        groups.append([i])
        tokens, width = length, length
    return groups
