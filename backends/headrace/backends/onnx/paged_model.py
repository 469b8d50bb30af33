"""A bundle that is served from a device's memory: its paged graph, one step at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from headrace.backends.api import DeterminismClass, Logits, Row, Tokenizer
from headrace.backends.errors import BackendUnavailable
from headrace.backends.onnx import bundle
from headrace.backends.onnx.blocks import BlockPool, block_size, num_usable_tokens
from headrace.backends.onnx.bundle import Manifest
from headrace.backends.onnx.cuda_driver import DriverError
from headrace.backends.onnx.device_logits import DeviceLogits, Search
from headrace.backends.onnx.paged_session import PagedSession
from headrace.backends.onnx.providers import Device, DeviceUnavailable, one_line

logger = logging.getLogger(__name__)

MAX_CHUNK = 2048
MAX_SCORES = 256
_MAX_LOGITS_BYTES = 64 * 2**20
"""Of the rows that chunks want: 64 of a vocabulary of 262,144."""
_CELL_BYTES = 2
"""Of an element of a key or value, as the device keeps it."""
_STEP_BYTES = 512 * 2**20
"""What a step and CUDA itself are taken to need beside weights, cache and logits. An estimate: nobody has measured."""


class PagedModel:
    """A loaded bundle; implements ``api.PrefixModel``.

    Sequences share the blocks of what they share, so prompts are cut and shared at whole blocks only: that costs
    nothing, and nothing is ever copied. Which kernels multiply depends on how many rows there are, so the last bits of
    a token's logits may depend on its company: BEST_EFFORT.
    """

    backend = "onnx"
    determinism = DeterminismClass.BEST_EFFORT
    decodes_like_chunks = False
    needed_for_strict = "the processor (provider = cpu) with the compiled operators"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        tokenizer: Tokenizer,
        device: Device,
        *,
        num_slots: int,
        num_spare_slots: int,
        num_kv_bytes: int,
        memory_limit: int | None = None,
        captures: bool = False,
        tokens_per_block: int | None = None,
    ) -> None:
        """``memory_limit``, in bytes, is for all that the model takes on the device; ``captures`` has decodes run as
        CUDA graphs; ``tokens_per_block`` is for tests: by default it is what the kernels want.

        Raises DeviceUnavailable.
        """
        self.card = manifest.card()
        self.tokenizer = tokenizer
        self.num_slots = num_slots
        self.num_spare_slots = num_spare_slots
        self.max_scores = min(MAX_SCORES, _MAX_LOGITS_BYTES // (4 * manifest.vocabulary_size))
        self.chunk_alignment = block = tokens_per_block or block_size(manifest.head_size)
        self.max_chunk = max(MAX_CHUNK, block + 1)
        self._device = device
        self._problem: str | None = None
        block_bytes = block * manifest.num_layers * 2 * manifest.num_kv_heads * manifest.head_size * _CELL_BYTES
        num_blocks = num_kv_bytes // block_bytes - 1  # one is where nobody reads
        self.num_kv_tokens = num_usable_tokens(num_blocks, block_size=block, num_slots=num_slots)
        if self.num_kv_tokens < block:
            raise DeviceUnavailable(
                f"model {manifest.name!r}: {num_slots} sequences (max_running) need at least "
                f"{_size((num_slots + 2) * block_bytes)} for keys and values, in blocks of {block} tokens, and "
                f"kv_cache is {_size(num_kv_bytes)}: raise kv_cache or lower max_running"
            )
        max_logits = num_slots + self.max_scores
        kept_bytes = (num_blocks + 1) * block_bytes + max_logits * manifest.vocabulary_size * 4
        _check_memory(manifest, device, kept_bytes=kept_bytes, limit=memory_limit)
        self._pool = BlockPool(
            num_blocks=num_blocks,
            block_size=block,
            num_slots=num_slots + num_spare_slots,
            max_tokens=manifest.context_length,
        )
        self._session = PagedSession(
            folder / bundle.PAGED,
            device,
            num_blocks=num_blocks,
            block_size=block,
            max_logits=max_logits,
            vocabulary_size=manifest.vocabulary_size,
            memory_limit=None if memory_limit is None else memory_limit - kept_bytes,
            captures=captures,
        )
        self._search = Search(folder, device, self._session.logits, self._watched)
        logger.info(
            "model %s runs on %s; its cache holds %d tokens in blocks of %d",
            manifest.name,
            device.description,
            self.num_kv_tokens,
            block,
        )
        self._warm_up(manifest)

    @property
    def captures(self) -> bool:
        """Whether decodes run as CUDA graphs: no more once a capture has failed."""
        return self._session.captures

    def reserve(self, slot: int, num_tokens: int) -> None:
        self._pool.reserve(slot, num_tokens)

    def release(self, slot: int) -> None:
        self._pool.release(slot)

    def truncate(self, slot: int, num_cached_tokens: int, num_tokens: int) -> None:
        self._pool.truncate(slot, num_cached_tokens, num_tokens)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        self._pool.share(source, target, num_tokens)

    def step(self, rows: Sequence[Row]) -> Logits:
        for row in rows:
            self._pool.extend(row.slot, row.num_cached_tokens, row.num_cached_tokens + len(row.token_ids))
        with self._watched():
            self._session.run(rows, self._pool.tables[[row.slot for row in rows]])
        return DeviceLogits(self._search, sum(row.num_logits for row in rows))

    def problem(self) -> str | None:
        return self._problem

    def close(self) -> None:
        # While an error is on its way out of a step, its frames may hold a part; the memory then goes with them.
        del self._search
        self._session.close()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Uses the device. If that fails and the device does nothing any more, nor will this model."""
        if self._problem is not None:
            raise BackendUnavailable("the model's device has failed; try again")
        try:
            yield
        except BackendUnavailable:
            if not self._session.answers():
                self._problem = f"{self._device.description} has failed: start the server again"
                logger.exception("model %s: %s", self.card.name, self._problem)
            raise

    def _warm_up(self, manifest: Manifest) -> None:
        """The largest steps that there will be, so that what they need is taken now or never: a long chunk, as many
        decodes as can run, and as many rows of logits as can be wanted.
        """
        length = min(self.max_chunk, manifest.context_length - 1, self.num_kv_tokens)
        try:
            self.reserve(0, length + 1)
            self.step([Row(0, 0, [0] * length, num_logits=min(length, self.max_scores))])
            logits = self.step([Row(0, length, [0], num_logits=1)])
            if not np.isfinite(logits.row(0)).all():
                raise DeviceUnavailable(
                    f"model {self.card.name!r} gives logits that are not finite on {self._device.description}"
                )
            self.release(0)
            num_decodes = self.num_slots  # for each of which there is a block, and one more
            for slot in range(num_decodes):
                self.reserve(slot, 1)
            self.step([Row(slot, 0, [0], num_logits=1) for slot in range(num_decodes)])
            ones, zeros = np.ones(num_decodes), np.zeros(num_decodes)
            self._search.largest(range(num_decodes), 1, ones)
            self._search.draw(range(num_decodes), ones, zeros, zeros)
            for slot in range(num_decodes):
                self.release(slot)
        except BackendUnavailable as error:
            self.close()
            raise DeviceUnavailable(
                f"model {self.card.name!r}: its first steps failed on {self._device.description}: "
                f"{one_line(error.__cause__ or error)}: if memory is short, lower kv_cache or max_running"
            ) from error
        except DeviceUnavailable:
            self.close()
            raise


def _check_memory(manifest: Manifest, device: Device, *, kept_bytes: int, limit: int | None) -> None:
    """Whether a model fits a device now, which otherwise shows in the middle of a load, or of a step. Raises
    DeviceUnavailable.
    """
    weight_bytes = manifest.files[bundle.WEIGHTS].num_bytes
    needed = weight_bytes + kept_bytes + _STEP_BYTES
    what = (
        f"model {manifest.name!r} needs about {_size(needed)} of {device.description}: {_size(weight_bytes)} for "
        f"weights, {_size(kept_bytes)} for keys and values (kv_cache) and logits, {_size(_STEP_BYTES)} for its steps"
    )
    if limit is not None and needed > limit:
        raise DeviceUnavailable(f"{what}; device_memory is {_size(limit)}")
    if device.memory is None:
        return
    try:
        memory = device.memory()
    except DriverError as error:
        raise DeviceUnavailable(str(error)) from error
    if needed > memory.free:
        raise DeviceUnavailable(
            f"{what}; {_size(memory.free)} of {_size(memory.total)} are free: lower kv_cache, or stop what else uses it"
        )


def _size(num_bytes: int) -> str:
    """In the unit that is read easily."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB"
