"""The pool of blocks: tables, shared beginnings, and no block lost or used twice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.backends.onnx.blocks import NO_BLOCK, BlockPool, block_size, num_usable_tokens

BLOCK = 16


def pool(num_blocks: int = 8, num_slots: int = 3, max_tokens: int = 64) -> BlockPool:
    return BlockPool(num_blocks=num_blocks, block_size=BLOCK, num_slots=num_slots, max_tokens=max_tokens)


def test_blocks_are_taken_as_tokens_come_and_not_before() -> None:
    blocks = pool()
    blocks.reserve(0, 60)
    assert blocks.num_free_blocks == 8
    blocks.extend(0, 0, 17)
    assert blocks.num_free_blocks == 6
    blocks.extend(0, 17, 32)
    assert blocks.num_free_blocks == 6
    assert len(set(blocks.blocks(0))) == 2
    assert blocks.tables[0, 2:].tolist() == [NO_BLOCK, NO_BLOCK]


def test_a_shared_beginning_is_the_same_blocks_and_the_last_of_its_slots_frees_them() -> None:
    blocks = pool()
    blocks.reserve(0, 40)
    blocks.extend(0, 0, 40)
    blocks.reserve(1, 64)
    blocks.share(0, 1, 32)
    assert blocks.blocks(1) == blocks.blocks(0)[:2]
    assert blocks.num_free_blocks == 5
    blocks.extend(1, 32, 50)
    assert not set(blocks.blocks(1)[2:]) & set(blocks.blocks(0))
    blocks.release(0)
    assert blocks.num_free_blocks == 8 - 4
    blocks.release(1)
    assert blocks.num_free_blocks == 8


def test_what_is_cut_off_is_free_and_what_is_left_goes_on() -> None:
    blocks = pool()
    blocks.reserve(0, 40)
    blocks.extend(0, 0, 40)
    first = blocks.blocks(0)[:1]
    blocks.truncate(0, 16, 64)
    assert blocks.blocks(0) == first
    blocks.extend(0, 16, 64)
    assert blocks.blocks(0)[:1] == first
    assert blocks.num_free_blocks == 4


@pytest.mark.parametrize("start", [0, 16, 31])
def test_nobody_writes_to_a_block_that_others_have(start: int) -> None:
    blocks = pool()
    blocks.reserve(0, 40)
    blocks.extend(0, 0, 40)
    blocks.reserve(1, 64)
    blocks.share(0, 1, 32)
    for slot in (0, 1):
        with pytest.raises(RuntimeError, match="others have"):
            blocks.extend(slot, start, 40)


def test_mistakes_of_the_caller_are_called_bugs() -> None:
    blocks = pool()
    blocks.reserve(0, 20)
    blocks.extend(0, 0, 20)
    blocks.reserve(1, 20)
    for mistake in (
        lambda: blocks.reserve(0, 10),
        lambda: blocks.reserve(2, 65),
        lambda: blocks.share(0, 1, 17),  # no whole block
        lambda: blocks.share(0, 1, 32),  # more than the target has room for
        lambda: blocks.share(1, 2, 16),  # the source has no tokens
        lambda: blocks.share(0, 0, 16),  # the target has some
        lambda: blocks.extend(0, 20, 21),
        lambda: blocks.extend(1, 16, 20),  # nothing is there before
        lambda: blocks.truncate(1, 16, 20),
    ):
        with pytest.raises(RuntimeError, match="This is a bug"):
            mistake()
    assert blocks.num_free_blocks == 6


def test_blocks_that_run_out_are_a_bug_of_whoever_reserved() -> None:
    blocks = pool(num_blocks=1)
    blocks.reserve(0, 20)
    with pytest.raises(RuntimeError, match="no free blocks"):
        blocks.extend(0, 0, 20)
    blocks.release(0)
    assert blocks.num_free_blocks == 1


@pytest.mark.parametrize(("head_size", "size"), [(32, 256), (64, 256), (96, 128), (128, 128), (256, 64)])
def test_a_block_holds_whole_tiles_of_the_kernel(head_size: int, size: int) -> None:
    assert block_size(head_size) == size


class Blocks(RuleBasedStateMachine):
    """Against a reference that keeps what lies in each cell of the cache, and what each slot should find there."""

    NUM_SLOTS, NUM_RUNNING, LONGEST = 5, 3, 80

    @initialize(num_blocks=st.integers(5, 16))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(
            num_blocks=num_blocks, block_size=BLOCK, num_slots=self.NUM_SLOTS, max_tokens=self.LONGEST
        )
        self.num_tokens = num_usable_tokens(num_blocks, block_size=BLOCK, num_slots=self.NUM_RUNNING)
        self.cells: dict[tuple[int, int], int] = {}
        self.running: dict[int, list[int]] = {}
        """What each slot in use holds."""
        self.room: dict[int, int] = {}
        self.kept: dict[int, list[int]] = {}
        """Of slots that are over: whole blocks."""
        self.written = 0

    def _num_reserved(self) -> int:
        return sum(self.room.values()) + sum(map(len, self.kept.values()))

    @precondition(lambda self: len(self.running) < self.NUM_RUNNING)
    @rule(data=st.data())
    def begin(self, data: Any) -> None:
        most = min(self.LONGEST, self.num_tokens - self._num_reserved())
        empty = [slot for slot in range(self.NUM_SLOTS) if slot not in self.running and slot not in self.kept]
        if most < 1 or not empty:
            return
        slot = data.draw(st.sampled_from(empty))
        self.room[slot] = data.draw(st.integers(1, most))
        self.pool.reserve(slot, self.room[slot])
        self.running[slot] = []

    @precondition(lambda self: any(not held for held in self.running.values()))
    @rule(data=st.data())
    def begin_like_another(self, data: Any) -> None:
        target = data.draw(st.sampled_from([slot for slot, held in self.running.items() if not held]))
        source = data.draw(st.sampled_from(sorted({*self.running, *self.kept} - {target}) or [target]))
        held = self.running.get(source) or self.kept.get(source) or []
        most = min(len(held), self.room[target]) // BLOCK
        if source == target or not most:
            return
        count = BLOCK * data.draw(st.integers(1, most))
        self.pool.share(source, target, count)
        self.running[target] = held[:count]

    @precondition(lambda self: any(len(held) < self.room[slot] for slot, held in self.running.items()))
    @rule(data=st.data())
    def run(self, data: Any) -> None:
        slots = [slot for slot, held in self.running.items() if len(held) < self.room[slot]]
        slot = data.draw(st.sampled_from(slots))
        held = self.running[slot]
        end = data.draw(st.integers(len(held) + 1, self.room[slot]))
        self.pool.extend(slot, len(held), end)
        for position in range(len(held), end):
            self.written += 1
            self.cells[self._cell(slot, position)] = self.written
            held.append(self.written)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(sorted(self.running)))
        count = BLOCK * data.draw(st.integers(0, len(self.running[slot]) // BLOCK))
        held = self.running.pop(slot)
        del self.room[slot]
        if count:
            self.pool.truncate(slot, count, count)
            self.kept[slot] = held[:count]
        else:
            self.pool.release(slot)

    @precondition(lambda self: self.kept and len(self.running) < self.NUM_RUNNING)
    @rule(data=st.data())
    def take_over(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(sorted(self.kept)))
        held = self.kept[slot]
        most = min(self.LONGEST, self.num_tokens - self._num_reserved() + len(held))
        if most <= len(held):
            return
        count = BLOCK * data.draw(st.integers(1, len(held) // BLOCK))
        del self.kept[slot]
        self.room[slot] = data.draw(st.integers(count + 1, most)) if most > count else most
        self.pool.truncate(slot, count, self.room[slot])
        self.running[slot] = held[:count]

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def give_up(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(sorted(self.kept)))
        del self.kept[slot]
        self.pool.release(slot)

    def _cell(self, slot: int, position: int) -> tuple[int, int]:
        return int(self.pool.tables[slot, position // BLOCK]), position % BLOCK

    @invariant()
    def every_slot_finds_what_it_wrote_or_shares(self) -> None:
        for slot, held in {**self.running, **self.kept}.items():
            assert [self.cells[self._cell(slot, i)] for i in range(len(held))] == held

    @invariant()
    def no_block_is_lost_or_free_while_it_is_used(self) -> None:
        used = [block for slot in range(self.NUM_SLOTS) for block in self.pool.blocks(slot)]
        assert self.pool.num_free_blocks + len(set(used)) == self.pool.num_blocks
        assert all(self.pool.num_holders(block) == used.count(block) for block in range(self.pool.num_blocks))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
