from __future__ import annotations

import math
from collections.abc import Iterator
from mmap import PAGESIZE

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.backends.onnx.kv import _TOUCH_TOKENS, KvMemory

LAYERS, SLOTS, HEADS, CAPACITY, HEAD_SIZE = 3, 6, 2, 4096, 64
TOKEN_BYTES = LAYERS * 2 * HEADS * HEAD_SIZE * 4


def make(
    num_tokens: int = 2000,
    *,
    head_size: int = HEAD_SIZE,
    capacity: int = CAPACITY,
    dtype: type[np.generic] = np.float32,
) -> KvMemory:
    return KvMemory(
        num_layers=LAYERS,
        num_slots=SLOTS,
        num_kv_heads=HEADS,
        capacity=capacity,
        head_size=head_size,
        num_tokens=num_tokens,
        dtype=dtype,
    )


@pytest.fixture
def kv() -> Iterator[KvMemory]:
    memory = make()
    yield memory
    memory.close()


def physical_bytes(memory: KvMemory) -> int:
    """What the operating system says it has given to the mapping."""
    start, size = memory.address(0, 0, 0), len(memory._map)
    total, inside = 0, False
    with open("/proc/self/smaps") as smaps:  # noqa: PTH123  # a file of the kernel's
        for line in smaps:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                low, high = (int(part, 16) for part in first.split("-"))
                inside = low < start + size and high > start
            elif inside and first == "Rss:":
                total += int(line.split()[1]) * 1024
    return total


def rounded(num_tokens: int) -> int:
    return -(-num_tokens // _TOUCH_TOKENS) * _TOUCH_TOKENS


def test_memory_is_physical_only_where_it_is_used(kv: KvMemory) -> None:
    before = physical_bytes(kv)
    kv.reserve(2, 1000)
    assert physical_bytes(kv) == before, "a reservation takes nothing yet"
    kv.touch(2, 300)
    assert physical_bytes(kv) - before == rounded(300) * TOKEN_BYTES
    kv.touch(2, 200)
    assert physical_bytes(kv) - before == rounded(300) * TOKEN_BYTES
    kv.touch(2, 1000)
    assert physical_bytes(kv) - before == rounded(1000) * TOKEN_BYTES


def test_a_short_sequence_after_a_long_one_gives_the_rest_back(kv: KvMemory) -> None:
    before = physical_bytes(kv)
    kv.reserve(0, 1900)
    kv.touch(0, 1900)
    kv.release(0)
    assert physical_bytes(kv) - before == rounded(1900) * TOKEN_BYTES, "kept for the next sequence"
    kv.reserve(0, 100)
    assert physical_bytes(kv) - before == rounded(100) * TOKEN_BYTES
    kv.touch(0, 100)
    assert physical_bytes(kv) - before == rounded(100) * TOKEN_BYTES


def test_released_slots_give_their_pages_to_those_in_use(kv: KvMemory) -> None:
    for slot in (0, 1, 2):
        kv.reserve(slot, 600)
        kv.touch(slot, 600)
    kv._cells[:, :, 0] = 7
    kv.release(1)
    kv.release(2)
    kv.reserve(3, 1300)
    kv.touch(3, 1300)
    assert sum(kv._resident) <= 2000 + 2 * _TOUCH_TOKENS
    assert kv._resident[0] == rounded(600)
    assert (kv._cells[:, :, 0, :, :600] == 7).all(), "a slot in use keeps what it has"


def test_a_slot_keeps_its_cells_while_it_grows(kv: KvMemory) -> None:
    kv.reserve(1, 1000)
    kv.touch(1, 100)
    kv._cells[:, :, 1, :, :100] = 3
    kv.touch(1, 1000)
    assert (kv._cells[:, :, 1, :, :100] == 3).all()


def test_slots_do_not_overlap_and_follow_one_another(kv: KvMemory) -> None:
    span = HEADS * kv.capacity * HEAD_SIZE * 4
    starts = [kv.address(layer, part, slot) for layer in range(LAYERS) for part in (0, 1) for slot in range(SLOTS)]
    assert starts == [starts[0] + i * span for i in range(len(starts))]


def test_what_is_written_in_one_slot_is_in_no_other(kv: KvMemory) -> None:
    for slot in range(3):
        kv.reserve(slot, 600)
        kv.touch(slot, 600)
        kv._cells[:, :, slot, :, :600] = slot + 1
    for slot in range(3):
        assert (kv._cells[:, :, slot, :, :600] == slot + 1).all()


def int8_bytes(num_tokens: int) -> int:
    """What a slot takes: cells in whole pages, as multiples of 128 tokens are, then factors of two bytes."""
    pages = rounded(num_tokens) * HEAD_SIZE // PAGESIZE - (-rounded(num_tokens) * 2 // PAGESIZE)
    return LAYERS * 2 * HEADS * PAGESIZE * pages


def test_memory_of_int8_and_of_its_factors_is_physical_only_where_it_is_used() -> None:
    kv = make(4300, dtype=np.int8)
    before = physical_bytes(kv)
    kv.reserve(2, 4000)
    kv.touch(2, 300)
    assert physical_bytes(kv) - before == int8_bytes(300)
    kv.touch(2, 4000)
    assert physical_bytes(kv) - before == int8_bytes(4000)
    kv.release(2)
    kv.reserve(2, 100)
    assert physical_bytes(kv) - before == int8_bytes(100)
    kv.release(2)
    kv.reserve(5, 4096)
    kv.touch(5, 4096)
    assert physical_bytes(kv) - before == int8_bytes(100) + int8_bytes(4096)
    kv.reserve(3, 100)
    kv.touch(3, 100)
    assert kv._resident[2] == 0
    assert physical_bytes(kv) - before == int8_bytes(100) + int8_bytes(4096), "slot 2 gave its factors back too"
    kv.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("head_size", [16, 32, 48, 64, 72, 80, 96, 112, 128, 192, 256])
def test_every_head_size_can_be_given_back_page_by_page(head_size: int, dtype: type[np.generic]) -> None:
    kv = make(3000, head_size=head_size, capacity=1000, dtype=dtype)
    assert kv.capacity >= 1000
    assert math.prod(kv.shape) * max(np.dtype(dtype).itemsize, 2) == len(kv._map)
    kv.reserve(1, 1000)
    kv.touch(1, 1000)
    kv.reserve(2, 900)
    kv.touch(2, 900)
    for plane in kv._planes:
        plane[:, :, 2, :, :900] = 5
    kv.release(1)
    kv.reserve(1, 10)
    kv.touch(1, 10)
    for plane in kv._planes:
        assert (plane[:, :, 2, :, :900] == 5).all()
        assert not plane[:, :, 1, :, kv._resident[1] : 1000].any(), "pages that were given back are zeros"
    assert kv._resident[1] <= 512
    del plane
    kv.close()


def test_a_copy_of_int8_has_its_factors() -> None:
    kv = make(dtype=np.int8)
    cells, factors = kv._planes
    kv.reserve(0, 500)
    kv.touch(0, 500)
    cells[:, :, 0, :, :64], factors[:, :, 0, :, :64] = 3, 0.25
    cells[:, :, 0, :, 64:500], factors[:, :, 0, :, 64:500] = 4, 0.5
    kv.reserve(3, 200)
    kv.copy(0, 3, 64)
    assert (cells[:, :, 3, :, :64] == 3).all()
    assert (factors[:, :, 3, :, :64] == 0.25).all()
    assert not cells[:, :, 3, :, 64:500].any()
    assert not factors[:, :, 3, :, 64:500].any()
    del cells, factors
    kv.close()


def test_misuse_is_a_bug(kv: KvMemory) -> None:
    kv.reserve(0, 10)
    with pytest.raises(RuntimeError, match="reserved twice"):
        kv.reserve(0, 10)
    with pytest.raises(RuntimeError, match="do not fit a slot"):
        kv.reserve(1, CAPACITY + 1)


def test_closing_while_an_error_holds_on_to_a_view_leaves_the_memory_to_its_last_holder() -> None:
    kv = make()
    view = kv._cells[0, 0, 0]
    kv.close()
    view[:] = 1  # still mapped


class Accounting(RuleBasedStateMachine):
    """Whatever happens, what is resident stays within the budget, and is what the operating system gave."""

    @initialize(num_tokens=st.integers(200, 6000))
    def start(self, num_tokens: int) -> None:
        self.kv = make(num_tokens)
        self.before = physical_bytes(self.kv)
        self.reserved: dict[int, int] = {}
        self.used: dict[int, int] = {}

    @precondition(lambda self: len(self.reserved) < SLOTS)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        room = min(CAPACITY, self.kv.num_tokens - sum(self.reserved.values()))
        if room < 1:
            return
        slot = data.draw(st.sampled_from([slot for slot in range(SLOTS) if slot not in self.reserved]))
        num_tokens = data.draw(st.integers(1, room))
        self.kv.reserve(slot, num_tokens)
        self.reserved[slot], self.used[slot] = num_tokens, 0

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        num_tokens = data.draw(st.integers(self.used[slot], self.reserved[slot]))
        self.kv.touch(slot, num_tokens)
        self.kv._cells[0, 0, slot, 0, self.used[slot] : num_tokens] = slot + 1
        self.used[slot] = num_tokens

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        room = min(CAPACITY, self.kv.num_tokens - sum(self.reserved.values()) + self.reserved[slot])
        self.used[slot] = data.draw(st.integers(0, self.used[slot]))
        self.reserved[slot] = data.draw(st.integers(max(1, self.used[slot]), room))
        self.kv.resize(slot, self.reserved[slot])

    @precondition(lambda self: len(self.reserved) > 1)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        source, target = data.draw(st.permutations(sorted(self.reserved)))[:2]
        num_tokens = min(self.used[source], self.reserved[target]) // 16 * 16
        self.kv.copy(source, target, num_tokens)
        copied: np.ndarray = self.kv._cells[:, :, target, :, :num_tokens]
        assert (copied == self.kv._cells[:, :, source, :, :num_tokens]).all()
        self.used[target] = num_tokens
        self.kv._cells[0, 0, target, 0, :num_tokens] = target + 1

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        self.kv.release(slot)
        del self.reserved[slot], self.used[slot]

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "kv"):
            return
        resident = self.kv._resident
        assert sum(resident) <= self.kv.num_tokens + SLOTS * _TOUCH_TOKENS
        for slot, num_tokens in self.used.items():
            assert resident[slot] >= num_tokens
            cells: np.ndarray = self.kv._cells[0, 0, slot, 0, :num_tokens]
            assert (cells == slot + 1).all(), "a sequence lost cells"

    def teardown(self) -> None:
        if hasattr(self, "kv"):
            assert physical_bytes(self.kv) - self.before == sum(self.kv._resident) * TOKEN_BYTES
            self.kv.close()


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
