"""Runs a bundle's paged graph (``paged.onnx``) on a device: rows of any lengths, packed one behind the other, each
with a table of the blocks that hold its keys and values.

Weights, keys and values, and logits stay in the device's memory. What travels in a step is a token id, a cell and a
few lengths for each token, and the tables; nothing comes back but what somebody asks of the logits.

Decodes can be captured as CUDA graphs, which saves the time to launch each kernel on its own. A captured graph has
fixed shapes and addresses, so that decodes are run in buckets: rows are filled up with ones that write to a block of
their own, which nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.api import Row
from headrace.backends.errors import BackendUnavailable
from headrace.backends.onnx.blocks import NO_BLOCK
from headrace.backends.onnx.providers import CPU, Device, DeviceUnavailable, one_line

logger = logging.getLogger(__name__)

_ELEMENT_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16, "tensor(int8)": 3}
"""ONNX's numbers of what a cache may be made of."""
_ELEMENT_BYTES = {"tensor(float)": 4, "tensor(float16)": 2, "tensor(bfloat16)": 2, "tensor(int8)": 1}
_STORED_AS = {1: np.uint8, 2: np.uint16, 4: np.uint32}

_NOT_CAPTURED = "-1"
"""The ``gpu_graph_id`` of runs that are neither captured nor replayed."""

DEVICE_FAILED = "the model failed on its device; try again"


def open_on(
    device: Device, graph: Path, *, memory_limit: int | None = None, captures: bool = False
) -> ort.InferenceSession:
    """Loads a graph to a device. ``memory_limit``, in bytes, is for its weights and what a step needs; ``captures``
    allows CUDA graphs.

    Raises DeviceUnavailable.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # It remembers a plan for every combination of lengths that it has ever seen.
    options.enable_mem_pattern = False
    providers: list[Any] = [device.provider]
    if device.name == "cuda":
        choices = {
            "device_id": str(device.index),
            # By default memory is taken in powers of two: up to twice what is needed.
            "arena_extend_strategy": "kSameAsRequested",
            # By default norms of 16 bits sum squares in 16 bits, which some models' overflow.
            "enable_skip_layer_norm_strict_mode": "1",
        }
        if memory_limit is not None:
            choices["gpu_mem_limit"] = str(memory_limit)
        if captures:
            choices["enable_cuda_graph"] = "1"
        providers = [(device.provider, choices)]
    try:
        # Without the fallback of the Python package, which would print the error and take the CPU.
        session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise DeviceUnavailable(f"{graph.name} cannot be loaded to {device.description}: {one_line(error)}") from error
    if device.provider not in session.get_providers():
        raise DeviceUnavailable(
            f"onnxruntime {ort.__version__} left {graph.name} to the processor, and does not say why"
        )
    return session


def run_on(session: ort.InferenceSession, binding: ort.IOBinding, options: ort.RunOptions | None = None) -> None:
    """Runs what is bound. Raises BackendUnavailable."""
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise BackendUnavailable(DEVICE_FAILED) from error


def on_device(array: NDArray[Any], device: Device) -> ort.OrtValue:
    """A copy of an array in a device's memory. Raises DeviceUnavailable."""
    try:
        # What is on the CPU is not copied, and lives as long as the value.
        return ort.OrtValue.ortvalue_from_numpy(array, device.name, device.index)
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise DeviceUnavailable(
            f"{array.nbytes / 2**20:.0f} MiB cannot be taken on {device.description}: {one_line(error)}"
        ) from error


class PagedSession:
    """A loaded graph, its caches and its logits. Used by one thread."""

    def __init__(
        self,
        graph: Path,
        device: Device,
        *,
        num_blocks: int,
        block_size: int,
        max_logits: int,
        vocabulary_size: int,
        memory_limit: int | None = None,
        captures: bool = False,
    ) -> None:
        """``num_blocks`` is of those that tables may name; ``max_logits`` is how many rows of logits a run may want.

        Raises DeviceUnavailable.
        """
        self._device = device
        self._block_size = block_size
        self._spare_block = num_blocks
        """Where rows write that only fill a bucket up."""
        self._session = open_on(device, graph, memory_limit=memory_limit, captures=captures)
        self.captures = captures
        """Whether decodes are captured: no more once that has failed."""
        self._caches = self._take_caches(num_blocks + 1)
        self.logits = on_device(np.zeros((max_logits, vocabulary_size), np.float32), device)
        """[max_logits, V] float32: those of the last run come first."""
        self._token = on_device(np.zeros(1, np.float32), device)
        """What ``answers`` sends to the device and back: taken now, since there may be no room for it then."""
        self._binding = self._bind()
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    def run(self, rows: Sequence[Row], tables: NDArray[np.int32]) -> None:
        """Computes rows whose cells are ready, and leaves their logits, in order, in ``logits``. ``tables``
        [rows, blocks of the longest sequence] are theirs. Raises BackendUnavailable.
        """
        if self.captures and all(len(row.token_ids) == row.num_logits == 1 for row in rows):
            try:
                self._run_bucket(rows, tables)
            except BackendUnavailable as error:
                # Another thread's use of the device spoils a capture, for one. What was written is written again.
                if not self.answers():
                    raise
                logger.warning(
                    "decodes on %s go on without CUDA graphs: %s",
                    self._device.description,
                    one_line(error.__cause__ or error),
                )
                self.captures = False
                self._buckets.clear()
            else:
                return
        feeds = paged_feeds(rows, tables, self._block_size)
        try:
            for name, value in feeds.items():  # to the device at once
                self._binding.bind_cpu_input(name, value)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise BackendUnavailable(DEVICE_FAILED) from error
        self._bind_logits(self._binding, len(feeds["logits_index"]))
        run_on(self._session, self._binding, self._run_options(_NOT_CAPTURED))

    def answers(self) -> bool:
        """Whether the device still does anything: after some failures nothing works any more in this process."""
        try:
            self._token.update_inplace(np.zeros(1, np.float32))
            self._token.numpy()
        except Exception:  # noqa: BLE001  # onnxruntime's exceptions share no base class
            return False
        return True

    def close(self) -> None:
        """Gives the device's memory back. No run is under way."""
        self._buckets.clear()
        del self._binding, self._session, self._caches, self._token, self.logits

    def _run_bucket(self, rows: Sequence[Row], tables: NDArray[np.int32]) -> None:
        """Decodes, filled up to a shape that is captured once and then replayed."""
        width = _width(rows, tables, self._block_size)
        key = _round_up_rows(len(rows)), width
        bucket = self._buckets.get(key) or self._make_bucket(*key)
        num_missing = key[0] - len(rows)
        feeds = paged_feeds(rows, tables[:, :width], self._block_size)
        filled = {
            "input_ids": _filled(feeds["input_ids"], num_missing, 0),
            "past_lengths": _filled(feeds["past_lengths"], num_missing, 0),
            "block_table": np.pad(feeds["block_table"], ((0, num_missing), (0, 0)), constant_values=NO_BLOCK),
            "slot_mapping": _filled(feeds["slot_mapping"], num_missing, self._spare_block * self._block_size),
        }
        filled["block_table"][len(rows) :, 0] = self._spare_block
        try:
            for name, value in filled.items():
                bucket.inputs[name].update_inplace(value)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise BackendUnavailable(DEVICE_FAILED) from error
        run_on(self._session, bucket.binding, bucket.options)

    def _make_bucket(self, num_rows: int, width: int) -> _Bucket:
        binding, device = self._bind(), self._device
        inputs = {
            "input_ids": on_device(np.zeros(num_rows, np.int64), device),
            "logits_index": on_device(np.arange(num_rows, dtype=np.int64), device),
            "cumulative_lengths": on_device(np.arange(num_rows + 1, dtype=np.int32), device),
            "past_lengths": on_device(np.zeros(num_rows, np.int32), device),
            "block_table": on_device(np.full((num_rows, width), NO_BLOCK, np.int32), device),
            "slot_mapping": on_device(np.zeros(num_rows, np.int32), device),
            # Read when the graph is captured, and never again: they must hold for every replay.
            "attention_bounds": on_device(np.array([1, width * self._block_size, 0], np.int32), CPU),
        }
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        self._bind_logits(binding, num_rows)
        bucket = _Bucket(inputs, binding, self._run_options(str(len(self._buckets) + 1)))
        self._buckets[num_rows, width] = bucket
        return bucket

    def _run_options(self, graph_id: str) -> ort.RunOptions:
        options = ort.RunOptions()
        if self._device.name == "cuda":
            options.add_run_config_entry("gpu_graph_id", graph_id)
        return options

    def _take_caches(self, num_blocks: int) -> dict[str, ort.OrtValue]:
        """Zeros: what was left in the memory may be NaN, which a weight of 0 does not hide."""
        caches = {}
        for value in self._session.get_inputs():
            if value.name.partition(".")[0] in {"key_cache", "value_cache"}:
                shape = (num_blocks, self._block_size, *value.shape[2:])
                caches[value.name] = self._take_zeros(shape, value.type)
        return caches

    def _take_zeros(self, shape: tuple[int, ...], element: str) -> ort.OrtValue:
        zeros = np.zeros(shape, _STORED_AS[_ELEMENT_BYTES[element]])
        try:
            cache = ort.OrtValue.ortvalue_from_shape_and_type(
                shape, _ELEMENT_TYPES[element], self._device.name, self._device.index
            )
            cache.update_inplace(zeros)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise DeviceUnavailable(
                f"{zeros.nbytes / 2**20:.0f} MiB of keys or values cannot be taken on {self._device.description}: "
                f"{one_line(error)}"
            ) from error
        return cache

    def _bind(self) -> ort.IOBinding:
        """A binding of the caches: read, and written in place."""
        binding = self._session.io_binding()
        outputs = [value.name for value in self._session.get_outputs()[1:]]
        for output, (name, cache) in zip(outputs, self._caches.items(), strict=True):
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(output, cache)
        return binding

    def _bind_logits(self, binding: ort.IOBinding, count: int) -> None:
        shape = (count, self.logits.shape()[1])
        binding.bind_output("logits", self._device.name, self._device.index, np.float32, shape, self.logits.data_ptr())


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Decodes of one shape, at addresses that stay."""

    inputs: Mapping[str, ort.OrtValue]
    binding: ort.IOBinding
    options: ort.RunOptions


def paged_feeds(rows: Sequence[Row], tables: NDArray[np.int32], block_size: int) -> dict[str, NDArray[Any]]:
    """The graph's inputs but for the caches. At least one row of logits is computed, wanted or not: some kernels take
    no empty input.
    """
    counts = np.array([len(row.token_ids) for row in rows], np.int32)
    past = np.array([row.num_cached_tokens for row in rows], np.int32)
    ends = np.cumsum(counts, dtype=np.int32)
    owners = np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(counts.sum()) - np.repeat(ends - counts, counts) + past[owners]
    wanted = [range(end - row.num_logits, end) for row, end in zip(rows, ends.tolist(), strict=True)]
    logits_index = [place for places in wanted for place in places] or [0]
    longest = int((past + counts).max())
    return {
        "input_ids": np.concatenate([np.asarray(row.token_ids, np.int64) for row in rows]),
        "logits_index": np.array(logits_index, np.int64),
        "cumulative_lengths": np.concatenate([np.zeros(1, np.int32), ends]),
        "past_lengths": past,
        "block_table": np.ascontiguousarray(tables[:, : _width(rows, tables, block_size)]),
        "slot_mapping": (tables[owners, positions // block_size] * block_size + positions % block_size).astype(
            np.int32
        ),
        # The longest row of new tokens; the longest sequence, from above and from below.
        "attention_bounds": np.array([counts.max(), longest, longest], np.int32),
    }


def _width(rows: Sequence[Row], tables: NDArray[np.int32], block_size: int) -> int:
    """How many blocks of each table the graph is given: a power of two, or all, so that shapes are few."""
    longest = max(row.num_cached_tokens + len(row.token_ids) for row in rows)
    num_blocks = -(-longest // block_size)
    return int(min(1 << (num_blocks - 1).bit_length(), tables.shape[1]))


def _round_up_rows(count: int) -> int:
    """Powers of two up to 8, then multiples of 8."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def _filled(values: NDArray[Any], count: int, value: int) -> NDArray[Any]:
    return np.concatenate([values, np.full(count, value, values.dtype)])
