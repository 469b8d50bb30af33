"""Runs a bundle's graph straight on ONNX Runtime: what the graph promises, without the runtime around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.onnx.bundle import Manifest, read_manifest

CAPACITY = 256


class Runner:
    """A batch of slots. ``copy_slot`` lets a sequence go on in another batch."""

    def __init__(self, folder: Path, num_slots: int, session: ort.InferenceSession | None = None) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        self.session = session or ort.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        shape = (num_slots, self.manifest.num_kv_heads, CAPACITY, self.manifest.head_size)
        self.cache = {
            f"{part}.{i}": np.full(shape, 0.25, np.float32) for i in range(self.manifest.num_layers) for part in "kv"
        }
        self.lengths = np.zeros(num_slots, np.int32)

    def step(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Appends tokens to each slot (none: it is idle); the logits after every token, packed."""
        counts = np.array([len(row) for row in tokens], np.int32)
        after = self.lengths + counts
        ends = np.maximum(after, 1)
        real = np.arange(counts.max()) < counts[:, None]
        pad_index = np.zeros(real.shape, np.int64)
        pad_index[real] = np.arange(counts.sum())
        feeds = {
            "input_ids": np.concatenate([np.asarray(row, np.int64) for row in tokens]),
            "pad_index": pad_index,
            "unpad_index": np.flatnonzero(real),
            "logits_index": np.arange(counts.sum(), dtype=np.int64),
            "seqlens_k": ends - 1,
            "total_len": np.array(ends.max(), np.int32),
            "query_seqlens": counts,
        }
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name, memory in self.cache.items():
            where = ("cpu", 0, np.float32, memory.shape, memory.ctypes.data)
            binding.bind_input(f"past_{name}", *where)
            binding.bind_output(f"present_{name}", *where)
        logits = np.empty((counts.sum(), self.manifest.vocabulary_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        self.lengths = after
        return logits

    def with_slots(self, num_slots: int) -> Runner:
        """Another batch on the same session."""
        return Runner(self.folder, num_slots, self.session)

    def copy_slot(self, slot: int, other: Runner, other_slot: int) -> None:
        """Takes over a sequence."""
        for name, memory in self.cache.items():
            memory[slot] = other.cache[name][other_slot]
        self.lengths[slot] = other.lengths[other_slot]
