"""Runs a bundle's packed graph, one step at a time, on ONNX Runtime's CPU provider.

All dense work runs on the tokens of every row packed one behind the other, [T, hidden]: nothing padded is multiplied.
Only attention sees rows: ``pad_index`` [B, S] gathers packed tokens into a padded view, ``unpad_index`` [T] gathers
them back. ``query_seqlens`` [B] says how many of a row's S tokens are real (0 marks an idle row), ``seqlens_k`` [B] is
the number of tokens in the cache after the step, less one. Past and present are bound to the same memory, so the
operator appends in place. A batch is a range of neighbouring slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.api import DeterminismClass, Logits, Row, Tokenizer
from headrace.backends.errors import BackendError
from headrace.backends.onnx import bundle
from headrace.backends.onnx.bundle import Manifest
from headrace.backends.onnx.kv import KvMemory
from headrace.backends.onnx.top import OnnxLogits, Top

MAX_CHUNK = 128
CHUNK_ALIGNMENT = 16
_MAX_PADDING = 2.0
"""Rows join one run as long as its padded view holds at most this many cells per real token."""


class OnnxModel:
    """A loaded bundle; implements ``api.StepModel``."""

    backend = "onnx"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        tokenizer: Tokenizer,
        *,
        threads: int,
        num_slots: int,
        num_kv_tokens: int,
        spinning: bool,
    ) -> None:
        self.card = manifest.card()
        self.tokenizer = tokenizer
        self.num_slots = num_slots
        self.num_kv_tokens = num_kv_tokens
        self.max_chunk = MAX_CHUNK
        self.chunk_alignment = CHUNK_ALIGNMENT
        self._manifest = manifest
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        self._session = ort.InferenceSession(folder / bundle.GRAPH, options, providers=["CPUExecutionProvider"])
        self._top = Top(folder / bundle.TOP)
        self._kv = KvMemory(
            num_layers=manifest.num_layers,
            num_slots=num_slots,
            num_kv_heads=manifest.num_kv_heads,
            capacity=manifest.context_length,
            head_size=manifest.head_size,
            num_tokens=num_kv_tokens,
        )
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._decodes: dict[tuple[int, int], _BoundRun] = {}
        self._logits = np.empty((num_slots, manifest.vocabulary_size), np.float32)
        self.determinism = self._warm_up()

    def reserve(self, slot: int, num_tokens: int) -> None:
        self._kv.reserve(slot, num_tokens)

    def release(self, slot: int) -> None:
        self._kv.release(slot)

    def step(self, rows: Sequence[Row]) -> Logits:
        wanted = sum(row.wants_logits for row in rows)
        done = 0
        order: list[int] = []
        for group in _group_neighbours(rows):
            count = sum(rows[i].wants_logits for i in group)
            self._run([rows[i] for i in group], self._logits[done : done + count])
            order += [i for i in group if rows[i].wants_logits]
            done += count
        logits = self._logits[:wanted]
        if order != sorted(order):
            logits = logits[np.argsort(order)]
        return OnnxLogits(logits, self._top)

    def problem(self) -> str | None:
        return None

    def close(self) -> None:
        self._bindings.clear()
        self._decodes.clear()
        del self._session, self._top
        self._kv.close()

    def _run(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> None:
        """One run of the graph over neighbouring slots, ascending; writes the wanted logits to ``logits``."""
        first, last = rows[0].slot, rows[-1].slot
        num_rows = last - first + 1
        for row in rows:
            self._kv.touch(row.slot, row.num_cached_tokens + len(row.token_ids))
        if len(rows) == num_rows and all(len(row.token_ids) == 1 and row.wants_logits for row in rows):
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
        run.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(run.binding)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise BackendError("the model's graph failed to run") from error

    def _bind_decode(self, first: int, num_rows: int) -> _BoundRun:
        """A run of one token in each of neighbouring slots. Serving does little else: what it is fed is bound once, and
        written in place.
        """
        rows = [Row(slot, 0, [0], wants_logits=True) for slot in range(first, first + num_rows)]
        run = _BoundRun(self._bind_cache(first, num_rows), _feeds(rows, first, num_rows))
        self._decodes[first, num_rows] = run
        return run

    def _bind_cache(self, first: int, num_rows: int) -> ort.IOBinding:
        """A binding of the cache of neighbouring slots. Making one takes longer than using it."""
        binding = self._session.io_binding()
        shape = (num_rows, self._manifest.num_kv_heads, self._kv.capacity, self._manifest.head_size)
        for layer in range(self._manifest.num_layers):
            for part, name in enumerate("kv"):
                where = ("cpu", 0, np.float32, shape, self._kv.address(layer, part, first))
                binding.bind_input(f"past_{name}.{layer}", *where)
                binding.bind_output(f"present_{name}.{layer}", *where)
        return binding

    def _warm_up(self) -> DeterminismClass:
        """Runs the graph in the shapes that serving uses, and finds out on the way whether this processor and runtime
        give a sequence the same bits however its prompt is cut and whoever runs beside it.

        Where they do not, prompts are cut at fixed places and the model is BEST_EFFORT.
        """
        size = self._manifest.vocabulary_size
        prompt = [(i * i * 7919 + 104_729) % size for i in range(87)]

        def generate(cuts: Sequence[int], slot: int, neighbours: Sequence[int]) -> list[bytes]:
            seen = []
            for start, end in itertools.pairwise(cuts):
                rows = [Row(slot, start, prompt[start:end], wants_logits=True)]
                rows += [Row(n, 0, prompt[n : n + 5 + 9 * n], wants_logits=True) for n in neighbours]
                seen.append(self._bits(rows, slot))
            for position in range(len(prompt), len(prompt) + 2):
                rows = [Row(slot, position, [prompt[0]], wants_logits=True)]
                rows += [Row(n, 5 + 9 * n, [prompt[n]], wants_logits=True) for n in neighbours]
                seen.append(self._bits(rows, slot))
            return seen[-3:]

        num_tokens = len(prompt) + 2
        slots = range(min(4, self.num_slots))
        for slot in slots:
            self._kv.reserve(slot, num_tokens)
        alone = generate([0, 87], 0, [])
        same = [
            generate([0, 64, 87], 0, slots[1:]) == alone,
            generate([0, 16, 48, 87], slots[-1], slots[:-1]) == alone,
        ]
        for slot in slots:
            self._kv.release(slot)
        if all(same):
            return DeterminismClass.BIT_EXACT
        self.chunk_alignment = 4 * CHUNK_ALIGNMENT
        self.max_chunk = self.chunk_alignment + 1
        return DeterminismClass.BEST_EFFORT

    def _bits(self, rows: Sequence[Row], slot: int) -> bytes:
        """The bits of one row's logits after a step."""
        index = [row.slot for row in rows].index(slot)
        return self.step(rows).row(index).tobytes()


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
            [starts[row.slot - first] + len(row.token_ids) - 1 for row in rows if row.wants_logits], np.int64
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
