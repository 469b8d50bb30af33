"""The memory that holds the keys and values of every slot."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from headrace.backends.onnx.bundle import Manifest

# Python names it from 3.13 on; Linux has used this number on every common architecture.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)

_KEY_BLOCK = 16
"""The compiled operators keep the keys of so many positions together."""

_TOUCH_TOKENS = 128
"""Pages are made ready in steps of about this many tokens, ahead of use: a page fault inside a step costs up to ten
times the attention it serves."""


def kv_bytes_per_token(manifest: Manifest, dtype: DTypeLike) -> int:
    """Memory for the keys and values of one token, over all layers."""
    return manifest.num_layers * 2 * manifest.num_kv_heads * manifest.head_size * np.dtype(dtype).itemsize


class KvMemory:
    """Keys and values, contiguous per slot, physical only where used.

    One anonymous mapping is laid out as [layer, key or value, slot, kv head, position, head size] with room for
    ``capacity`` positions in every slot. The operating system gives it pages as they are touched, so a long sequence
    can live beside short ones without anybody reserving its length for all (the idea of vAttention, arXiv 2405.04437).
    Pages of a released slot stay for its next sequence, as long as all slots together hold at most ``num_tokens``.

    Used by one thread.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        capacity: int,
        head_size: int,
        num_tokens: int,
        dtype: DTypeLike,
    ) -> None:
        token_bytes = head_size * np.dtype(dtype).itemsize
        # Only whole pages can be given back: so many tokens of a head fill some.
        per_pages = math.lcm(mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, token_bytes), _KEY_BLOCK)
        self._touch_tokens = _round_up(_TOUCH_TOKENS, per_pages)
        self.capacity = _round_up(capacity, per_pages)
        self.num_tokens = num_tokens
        size = num_slots * self.capacity * num_layers * 2 * num_kv_heads * token_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, size, flags=flags)
        # A huge page would make 2 MiB of every head's range physical at the first token.
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        shape = (num_layers, 2, num_slots, num_kv_heads, self.capacity, head_size)
        self._cells: NDArray[Any] = np.frombuffer(self._map, dtype).reshape(shape)
        self._reserved = [0] * num_slots
        self._resident = [0] * num_slots
        """Per slot, the tokens whose pages are physical."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[layers, 2, slots, kv heads, capacity, head size]"""
        return self._cells.shape

    def address(self, layer: int = 0, part: int = 0, slot: int = 0) -> int:
        """Where the cells of a slot begin; ``part`` is 0 for keys, 1 for values. Slots follow one another."""
        address: int = self._cells[layer, part, slot].ctypes.data
        return address

    def reserve(self, slot: int, num_tokens: int) -> None:
        if self._reserved[slot]:
            raise RuntimeError(f"slot {slot} is reserved twice. This is a bug.")
        if num_tokens > self.capacity:
            raise RuntimeError(f"{num_tokens} tokens do not fit a slot of {self.capacity}. This is a bug.")
        self._reserved[slot] = num_tokens
        self._drop(slot, keep=num_tokens)

    def release(self, slot: int) -> None:
        self._reserved[slot] = 0

    def touch(self, slot: int, num_tokens: int) -> None:
        """Makes the pages of the first ``num_tokens`` tokens physical, and some ahead."""
        resident = self._resident[slot]
        if num_tokens <= resident:
            return
        wanted = min(_round_up(num_tokens, self._touch_tokens), self.capacity)
        spare = self.num_tokens - sum(self._resident) - (wanted - resident)
        for other in reversed(range(len(self._resident))):
            if spare >= 0:
                break
            if not self._reserved[other]:
                spare += self._drop(other, keep=0)
        self._cells[:, :, slot, :, resident:wanted] = 0
        self._resident[slot] = wanted

    def _drop(self, slot: int, *, keep: int) -> int:
        """Gives a slot's pages beyond ``keep`` tokens back; returns how many tokens' pages that were."""
        keep = _round_up(keep, self._touch_tokens)
        surplus = self._resident[slot] - keep
        if surplus <= 0:
            return 0
        head_bytes = self._cells.shape[-1] * self._cells.itemsize
        base = self._cells.ctypes.data
        for layer in self._cells[:, :, slot].reshape(-1, *self._cells.shape[3:]):
            for head in layer:
                self._map.madvise(mmap.MADV_DONTNEED, head.ctypes.data - base + keep * head_bytes, surplus * head_bytes)
        self._resident[slot] = keep
        return surplus

    def close(self) -> None:
        """Unmaps the memory. No session may be using it."""
        del self._cells
        self._map.close()


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
