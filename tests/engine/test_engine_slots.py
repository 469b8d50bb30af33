"""Slots and what they share, against dictionaries of token lists."""

from __future__ import annotations

import random
import threading
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.server.engine.prefix import PrefixTree
from headrace.server.engine.slots import Slots

BLOCK = 4
TENANTS = ("red", "blue")


def tokens_of(blocks: list[int]) -> list[int]:
    """So few different blocks that beginnings are often the same."""
    return [token for block in blocks for token in (block, 0, 1, block)]


def shared(a: list[int], b: list[int], limit: int) -> int:
    """Tokens that two lists begin with, in whole blocks."""
    same = 0
    while same < min(len(a), len(b), limit) and a[same] == b[same]:
        same += 1
    return same // BLOCK * BLOCK


beginnings = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tokens_of)


class SlotsAgainstReference(RuleBasedStateMachine):
    """The reference: for each slot in use or retained, its tenant, its tokens, and how many it counts for."""

    @initialize(num_slots=st.integers(1, 6), num_tokens=st.integers(40, 160))
    def start(self, num_slots: int, num_tokens: int) -> None:
        self.num_slots, self.num_tokens = num_slots, num_tokens
        self.slots = Slots(num_slots=num_slots, num_tokens=num_tokens, block=BLOCK)
        self.in_use: dict[int, tuple[str, list[int], int]] = {}
        self.retained: dict[int, tuple[str, list[int]]] = {}
        """The least recently used first."""

    @rule(tenant=st.sampled_from(TENANTS), tokens=beginnings, more=st.integers(1, 20), data=st.data())
    def take(self, tenant: str, tokens: list[int], more: int, data: st.DataObject) -> None:
        spare = data.draw(st.sampled_from([None, *self.retained]))
        num_tokens = len(tokens) + more
        expected = self.given_up(num_tokens, 1, spare)
        taken = self.slots.take(num_tokens, spare=spare)
        if expected is None:
            assert taken is None
            return
        assert taken is not None
        slot, given_up = taken
        assert given_up == expected
        self.forget(given_up)
        assert slot == min(set(range(self.num_slots)) - self.in_use.keys() - self.retained.keys())
        self.slots.put(slot, tenant, tokens)
        self.in_use[slot] = tenant, tokens, num_tokens

    @precondition(lambda self: self.retained)
    @rule(tokens=beginnings, more=st.integers(1, 20), data=st.data())
    def resume(self, tokens: list[int], more: int, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.retained)))
        tenant, kept = self.retained[slot]
        same = shared(kept, tokens, len(tokens))
        num_tokens = len(tokens) + more
        expected = self.given_up(num_tokens - len(kept), 0, slot)
        assert self.slots.resume(slot, num_tokens) == expected
        if expected is not None:
            self.forget(expected)
            del self.retained[slot]
            self.slots.put(slot, tenant, tokens[:same])
            self.slots.put(slot, tenant, tokens)
            self.in_use[slot] = tenant, tokens, num_tokens

    @precondition(lambda self: self.in_use)
    @rule(output=beginnings, data=st.data())
    def retain(self, output: list[int], data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.in_use)))
        tenant, tokens, num_tokens = self.in_use[slot]
        kept = (tokens + output)[: max(BLOCK, num_tokens // BLOCK * BLOCK)]
        num_blocks = len(kept) // BLOCK
        kept = kept[: data.draw(st.sampled_from([num_blocks, num_blocks, num_blocks // 2, 0])) * BLOCK]
        if not kept or len(kept) > num_tokens:
            self.slots.free(slot)
            del self.in_use[slot]
            return
        del self.in_use[slot]
        self.leave(slot, tenant, kept)

    def leave(self, slot: int, tenant: str, kept: list[int]) -> None:
        """A slot is retained, unless another has as much; those that have less are given up."""
        same = {s for s, (t, other) in self.retained.items() if t == tenant and other[: len(kept)] == kept}
        less = {s for s, (t, other) in self.retained.items() if t == tenant and kept[: len(other)] == other}
        given_up = self.slots.retain(slot, tenant, kept)
        if same:
            assert given_up == [slot]
            self.use(min(same))
        else:
            assert given_up == sorted(less)
            self.forget(given_up)
            self.retained[slot] = tenant, kept

    @rule(tenant=st.sampled_from(TENANTS), tokens=beginnings)
    def come_and_go(self, tenant: str, tokens: list[int]) -> None:
        """Most do, and are kept."""
        taken = self.slots.take(len(tokens))
        if taken is not None:
            self.forget(taken[1])
            self.leave(taken[0], tenant, tokens)

    @precondition(lambda self: len(self.retained) > 1)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([*self.retained, *range(self.num_slots)]))
        self.slots.touch(slot)
        if slot in self.retained:
            self.use(slot)

    @rule(tenant=st.sampled_from([*TENANTS, "nobody"]), tokens=beginnings, limit=st.integers(-2, 30))
    def look_up(self, tenant: str, tokens: list[int], limit: int) -> None:
        limit = min(limit, len(tokens))
        holders = {slot: (t, held) for slot, (t, held, _) in self.in_use.items()} | self.retained
        expected = {slot: shared(held, tokens, limit) for slot, (t, held) in holders.items() if t == tenant}
        assert self.slots.common(tenant, tokens, limit) == {slot: n for slot, n in expected.items() if n}

    @precondition(lambda self: len(self.retained) > 2)
    @rule()
    def give_up_all(self) -> None:
        assert self.slots.give_up_all() == list(self.retained)
        self.retained.clear()

    def given_up(self, num_tokens: int, num_slots: int, spare: int | None) -> list[int] | None:
        """What has to be given up for so much room: the least recently used, and no more than is needed."""
        others = [slot for slot in self.retained if slot != spare]
        for count in range(len(others) + 1):
            tokens = self.num_free_tokens() + sum(len(self.retained[slot][1]) for slot in others[:count])
            slots = self.num_slots - len(self.in_use) - len(self.retained) + count
            if tokens >= num_tokens and slots >= num_slots:
                return others[:count]
        return None

    def num_free_tokens(self) -> int:
        used = sum(num_tokens for _, _, num_tokens in self.in_use.values())
        return self.num_tokens - used - sum(len(tokens) for _, tokens in self.retained.values())

    def forget(self, slots: list[int]) -> None:
        for slot in slots:
            del self.retained[slot]

    def use(self, slot: int) -> None:
        self.retained[slot] = self.retained.pop(slot)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "slots"):
            return
        assert self.slots.num_free_tokens == self.num_free_tokens() >= 0
        assert self.slots.num_used_tokens == sum(num_tokens for _, _, num_tokens in self.in_use.values())
        assert self.slots.num_retained_tokens == sum(len(tokens) for _, tokens in self.retained.values())
        assert list(self.slots._retained) == list(self.retained), "the least recently used first"
        for slot in range(self.num_slots):
            kept = self.slots.num_kept(slot)
            assert kept == (len(self.retained[slot][1]) if slot in self.retained else None)

    def teardown(self) -> None:
        """Nothing is left of anybody."""
        if not hasattr(self, "slots"):
            return
        for slot in self.in_use:
            self.slots.free(slot)
        self.slots.give_up_all()
        assert self.slots.num_free_tokens == self.num_tokens
        assert sorted(self.slots._free) == list(range(self.num_slots))
        assert not self.slots._tree._roots
        assert not self.slots._tree._paths


TestSlotsAgainstReference = SlotsAgainstReference.TestCase
TestSlotsAgainstReference.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_no_tenant_ever_finds_what_another_has_sent() -> None:
    """100,000 prompts of two tenants, so much alike that one's own are found all the time."""
    dice = random.Random(0)
    trees = PrefixTree(16)
    owner: dict[int, str] = {}
    num_own = 0
    for i in range(100_000):
        tenant = dice.choice(TENANTS)
        tokens = [dice.randrange(2)] * 16 + [dice.randrange(3)] * 16 + [dice.randrange(4)] * 16
        found = trees.common(tenant, tokens, len(tokens))
        assert all(owner[slot] == tenant for slot in found)
        num_own += bool(found)
        slot = i % 32
        trees.drop(slot)
        trees.put(slot, tenant, tokens)
        owner[slot] = tenant
    assert num_own > 50_000


def test_any_thread_may_ask_what_is_there_while_the_tree_changes() -> None:
    tree, dice, over = PrefixTree(4), random.Random(7), threading.Event()
    stays = tuple(range(64))
    tree.put(0, "red", stays)

    def change() -> None:
        for _ in range(20_000):
            slot, tenant = dice.randrange(1, 8), dice.choice(("red", "blue"))
            tree.drop(slot)
            shared = dice.randrange(0, 65)
            tree.put(slot, tenant, stays[:shared] + tuple(dice.randrange(3) for _ in range(dice.randrange(32))))
        over.set()

    thread = threading.Thread(target=change)
    thread.start()
    found: Counter[int] = Counter()
    while not over.is_set():
        assert tree.longest("red", stays) == 64
        assert tree.longest("green", stays) == 0
        found[tree.longest("blue", stays)] += 1
    thread.join()
    assert len(found) > 1
    assert all(length % 4 == 0 and length <= 64 for length in found)
    common = tree.common("blue", stays, 64)
    assert tree.longest("blue", stays) == max(common.values(), default=0)
