"""The memory that holds the keys and values of every slot."""

from __future__ import annotations

import contextlib
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


_FACTOR = np.dtype(np.float16)
"""In a cache of int8, what a head's key or value of a token is multiplied by."""


def kv_bytes_per_token(manifest: Manifest, dtype: DTypeLike) -> int:
    """Memory for the keys and values of one token, over all layers."""
    return manifest.num_layers * 2 * manifest.num_kv_heads * _vector_bytes(manifest.head_size, dtype)


def _vector_bytes(head_size: int, dtype: DTypeLike) -> int:
    """Of a token's key, or value, of one head."""
    dtype = np.dtype(dtype)
    return head_size * dtype.itemsize + (_FACTOR.itemsize if dtype == np.int8 else 0)


class KvMemory:
    """Keys and values, contiguous per slot, physical only where used.

    One anonymous mapping is laid out as [layer, key or value, slot, kv head, position, head size] with room for
    ``capacity`` positions in every slot. The operating system gives it pages as they are touched, so a long sequence
    can live beside short ones without anybody reserving its length for all (the idea of vAttention, arXiv 2405.04437).
    Pages of a released slot stay for its next sequence, as long as all slots together hold at most ``num_tokens``.

    A key or value of int8 has a factor: those of a head in a slot follow its cells, on pages of their own. Were each
    beside its cell, pages would be whole only every 2,048 tokens, and a short sequence would take as many.

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
        dtype = np.dtype(dtype)
        cell_bytes, vector_bytes = head_size * dtype.itemsize, _vector_bytes(head_size, dtype)
        # Only whole pages can be given back: so many tokens of a head fill some.
        per_pages = math.lcm(_tokens_in_pages(cell_bytes), _KEY_BLOCK)
        self._touch_tokens = _round_up(_TOUCH_TOKENS, per_pages)
        if dtype == np.int8:
            # Graphs declare halves: a head has whole rows of them.
            row_bytes = head_size * np.dtype(np.float16).itemsize
            per_pages = math.lcm(per_pages, _tokens_in_pages(vector_bytes, row_bytes))
        self.capacity = _round_up(capacity, per_pages)
        self.num_tokens = num_tokens
        head_bytes = self.capacity * vector_bytes
        places = (num_layers, 2, num_slots, num_kv_heads)
        self.shape = (*places, head_bytes // (head_size * max(dtype.itemsize, 2)), head_size)
        """As graphs are fed: [layers, 2, slots, kv heads, capacity, head size]; in place of int8, what it takes in
        halves."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, math.prod(places) * head_bytes, flags=flags)
        # A huge page would make 2 MiB of every head's range physical at the first token.
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        heads = np.frombuffer(self._map, np.uint8).reshape(*places, head_bytes)
        factors_at = self.capacity * cell_bytes
        self._cells: NDArray[Any] = heads[..., :factors_at].view(dtype).reshape(*places, self.capacity, head_size)
        """[layers, 2, slots, kv heads, capacity, head size]"""
        self._planes = [self._cells]
        """What is of tokens: [layers, 2, slots, kv heads, capacity, …]"""
        if dtype == np.int8:
            self._planes.append(heads[..., factors_at:].view(_FACTOR))
        self._reserved = [0] * num_slots
        self._resident = [0] * num_slots
        """Per slot, the tokens whose pages are physical."""

    def address(self, layer: int = 0, part: int = 0, slot: int = 0) -> int:
        """Where the cells of a slot begin; ``part`` is 0 for keys, 1 for values. Slots follow one another."""
        address: int = self._cells[layer, part, slot].ctypes.data
        return address

    def cells(self, slot: int) -> NDArray[Any]:
        """What a slot holds: a view [layers, 2, kv heads, capacity, head size]."""
        return self._cells[:, :, slot]

    def reserve(self, slot: int, num_tokens: int) -> None:
        if self._reserved[slot]:
            raise RuntimeError(f"slot {slot} is reserved twice. This is a bug.")
        if num_tokens > self.capacity:
            raise RuntimeError(f"{num_tokens} tokens do not fit a slot of {self.capacity}. This is a bug.")
        self._reserved[slot] = num_tokens
        self._drop(slot, keep=num_tokens)

    def release(self, slot: int) -> None:
        self._reserved[slot] = 0

    def resize(self, slot: int, num_tokens: int) -> None:
        """Changes for how many tokens a slot is reserved; what it holds of them stays."""
        if num_tokens > self.capacity:
            raise RuntimeError(f"{num_tokens} tokens do not fit a slot of {self.capacity}. This is a bug.")
        self._reserved[slot] = num_tokens

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Puts the first ``num_tokens`` of a slot, a multiple of 16, into another."""
        self.touch(target, num_tokens)
        for plane in self._planes:
            plane[:, :, target, :, :num_tokens] = plane[:, :, source, :, :num_tokens]

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
            spare += self._drop(other, keep=self._reserved[other])
        for plane in self._planes:
            plane[:, :, slot, :, resident:wanted] = 0
        self._resident[slot] = wanted

    def _drop(self, slot: int, *, keep: int) -> int:
        """Gives a slot's pages beyond ``keep`` tokens back; returns how many tokens' pages that were."""
        keep = _round_up(keep, self._touch_tokens)
        surplus = self._resident[slot] - keep
        if surplus <= 0:
            return 0
        base = self._cells.ctypes.data
        for plane in self._planes:
            for layer in plane[:, :, slot]:
                for part in layer:
                    for head in part:
                        # Beyond what is resident nothing lies on the last page.
                        tokens = head.ctypes.data - base
                        start = _round_up(tokens + keep * head.strides[0], mmap.PAGESIZE)
                        end = _round_up(tokens + (keep + surplus) * head.strides[0], mmap.PAGESIZE)
                        if start < end:
                            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
        self._resident[slot] = keep
        return surplus

    def close(self) -> None:
        """Unmaps the memory. No session may be using it."""
        del self._cells, self._planes
        # While an error is on its way out of a step, its frames may hold a view; the memory then goes with them.
        with contextlib.suppress(BufferError):
            self._map.close()


def _tokens_in_pages(token_bytes: int, other: int = 1) -> int:
    """The least number of tokens whose bytes are whole pages, and whole multiples of ``other``."""
    whole = math.lcm(mmap.PAGESIZE, other)
    return whole // math.gcd(whole, token_bytes)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
