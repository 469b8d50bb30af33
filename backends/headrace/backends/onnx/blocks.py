"""Which blocks of a device's cache hold which sequence's keys and values: tables and reference counts, no memory.

The cache of every layer is a row of blocks of ``block_size`` tokens (after PagedAttention, arXiv 2309.06180). A slot's
table says in which blocks its tokens lie, in order. A block may be in several tables: sequences that begin alike share
the blocks of what they share, and nothing is copied. Only whole blocks are shared and nobody writes to those, so a
block that is written to is in one table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NO_BLOCK = -1
"""What a table has behind its last block."""

_SMALLEST_BLOCK = 64


def block_size(head_size: int) -> int:
    """Tokens of a block. The attention kernel reads whole tiles of keys, whose length hangs on the head size; with
    blocks that do not hold whole tiles the operator gathers everything into a dense buffer first (the CUDA kernels of
    ONNX Runtime 1.31).
    """
    if head_size <= 64:
        return 4 * _SMALLEST_BLOCK
    return 2 * _SMALLEST_BLOCK if head_size <= 128 else _SMALLEST_BLOCK


def num_usable_tokens(num_blocks: int, *, block_size: int, num_slots: int) -> int:
    """For how many tokens sequences in ``num_slots`` slots, and any number that hold whole blocks alone, can be given
    room for certain: the last block of each may be all but empty. 0 or less if there are too few blocks.
    """
    return (num_blocks - num_slots) * block_size


class BlockPool:
    """The tables of all slots. A slot is empty until it is reserved and when it is released.

    Blocks are taken as tokens are run, not when room for them is reserved. That there is one then is the caller's to
    see to: ``num_usable_tokens`` bounds what may be reserved. Used by one thread.
    """

    def __init__(self, *, num_blocks: int, block_size: int, num_slots: int, max_tokens: int) -> None:
        """``max_tokens`` is what a slot can hold at most."""
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.tables: NDArray[np.int32] = np.full((num_slots, -(-max_tokens // block_size)), NO_BLOCK, np.int32)
        """[slots, blocks of the longest sequence]; ``NO_BLOCK`` behind a slot's last. To be read only."""
        self._counts = [0] * num_slots
        """Blocks of each slot."""
        self._reserved = [0] * num_slots
        """Tokens for which each slot has room; 0: it is empty."""
        self._holders = [0] * num_blocks
        """Tables that each block is in."""
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def blocks(self, slot: int) -> list[int]:
        """The blocks of a slot, in order."""
        blocks: list[int] = self.tables[slot, : self._counts[slot]].tolist()
        return blocks

    def num_holders(self, block: int) -> int:
        """How many slots have a block."""
        return self._holders[block]

    def reserve(self, slot: int, num_tokens: int) -> None:
        """Makes room for ``num_tokens`` in an empty slot."""
        if self._reserved[slot]:
            raise RuntimeError(f"slot {slot} is reserved twice. This is a bug.")
        self._set_room(slot, num_tokens)

    def release(self, slot: int) -> None:
        """Empties a slot. Blocks that no other has are free."""
        self._drop(slot, keep=0)
        self._reserved[slot] = 0

    def truncate(self, slot: int, num_cached_tokens: int, num_tokens: int) -> None:
        """Keeps the blocks of the first ``num_cached_tokens`` tokens, and makes room for ``num_tokens`` in all."""
        keep = -(-num_cached_tokens // self.block_size)
        if keep > self._counts[slot]:
            raise RuntimeError(f"slot {slot} has no {num_cached_tokens} tokens to keep. This is a bug.")
        self._drop(slot, keep=keep)
        self._set_room(slot, num_tokens)

    def share(self, source: int, target: int, num_tokens: int) -> None:
        """Lets ``target``, which has no tokens yet, begin with the first ``num_tokens`` of ``source``, whole blocks."""
        count, rest = divmod(num_tokens, self.block_size)
        if rest or self._counts[source] < count or self._counts[target] or self._reserved[target] < num_tokens:
            raise RuntimeError(f"slot {target} cannot begin with {num_tokens} tokens of slot {source}. This is a bug.")
        self.tables[target, :count] = self.tables[source, :count]
        self._counts[target] = count
        for block in self.blocks(target):
            self._holders[block] += 1

    def extend(self, slot: int, start: int, end: int) -> None:
        """Makes the cells of a slot's tokens from ``start`` to before ``end`` ready to be written."""
        first, count = start // self.block_size, self._counts[slot]
        if end > self._reserved[slot] or first > count:
            raise RuntimeError(f"tokens {start} to {end} are not slot {slot}'s to run. This is a bug.")
        if any(self._holders[block] > 1 for block in self.tables[slot, first:count].tolist()):
            raise RuntimeError(f"token {start} of slot {slot} lies in a block that others have. This is a bug.")
        for place in range(count, -(-end // self.block_size)):
            if not self._free:
                raise RuntimeError("there are no free blocks, though there was room. This is a bug.")
            block = self._free.pop()
            self._holders[block] = 1
            self.tables[slot, place] = block
            self._counts[slot] = place + 1

    def _set_room(self, slot: int, num_tokens: int) -> None:
        if num_tokens > self.tables.shape[1] * self.block_size:
            raise RuntimeError(f"{num_tokens} tokens do not fit a slot. This is a bug.")
        self._reserved[slot] = num_tokens

    def _drop(self, slot: int, *, keep: int) -> None:
        """Takes a slot's blocks behind the first ``keep`` from it."""
        for block in reversed(self.blocks(slot)[keep:]):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)
        self.tables[slot, keep : self._counts[slot]] = NO_BLOCK
        self._counts[slot] = min(keep, self._counts[slot])
