"""Who has which slot of a model, and what of it others can begin with. Pure: it says what is to be done."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from headrace.server.engine.prefix import PrefixTree


class Slots:
    """Slots are free, in use by a sequence that runs, or retained with the beginning of one that is over.

    Sequences in use have as many tokens as were taken for them, retained ones as many as they keep; all together never
    more than there are. What is retained is given up, the least recently used first, whenever room is wanted. Slots
    are given lowest first, which keeps a batch's slots close to each other.
    """

    def __init__(self, *, num_slots: int, num_tokens: int, block: int) -> None:
        """``block``: tokens that are shared or not as one; 0 if nothing is shared at all."""
        self.num_free_tokens = num_tokens
        """Neither in use nor retained."""
        self.num_retained_tokens = 0
        self._num_tokens = num_tokens
        self._free = list(range(num_slots))
        self._in_use: dict[int, int] = {}
        """How many tokens were taken for each."""
        self._retained: dict[int, int] = {}
        """How many tokens each keeps, the least recently used first."""
        self._tree = PrefixTree(block)

    @property
    def num_used_tokens(self) -> int:
        return self._num_tokens - self.num_free_tokens - self.num_retained_tokens

    @property
    def num_obtainable_tokens(self) -> int:
        """Free now, or once all that is retained is given up."""
        return self.num_free_tokens + self.num_retained_tokens

    def num_kept(self, slot: int) -> int | None:
        """Tokens that a retained slot keeps; ``None`` if it is not retained."""
        return self._retained.get(slot)

    def take(self, num_tokens: int, *, spare: int | None = None) -> tuple[int, list[int]] | None:
        """A slot with room for ``num_tokens``, and the retained ones that had to be given up for it, never ``spare``.
        ``None``, and nothing has changed, if there is no room.
        """
        given_up = self._make_room(num_tokens, num_slots=1, spare=spare)
        if given_up is None:
            return None
        slot = heapq.heappop(self._free)
        self._use(slot, num_tokens)
        return slot, given_up

    def resume(self, slot: int, num_tokens: int) -> list[int] | None:
        """Takes a retained slot over, with room for ``num_tokens``; returns the others that had to be given up, or
        ``None`` as ``take`` does.
        """
        given_up = self._make_room(num_tokens - self._retained[slot], num_slots=0, spare=slot)
        if given_up is None:
            return None
        self._unretain(slot)
        self._use(slot, num_tokens)
        return given_up

    def put(self, slot: int, tenant: str, tokens: Sequence[int]) -> None:
        """Lets others know what a slot in use begins with, or will; what was known of it must agree."""
        self._tree.put(slot, tenant, tokens)

    def common(self, tenant: str, tokens: Sequence[int], limit: int) -> dict[int, int]:
        """``PrefixTree.common``, of slots in use as far as they will be filled."""
        return self._tree.common(tenant, tokens, limit)

    def longest(self, tenant: str, tokens: Sequence[int]) -> int:
        """``PrefixTree.longest``; from any thread."""
        return self._tree.longest(tenant, tokens)

    def touch(self, slot: int) -> None:
        """Notes that a slot was used, if it is retained."""
        if slot in self._retained:
            self._retained[slot] = self._retained.pop(slot)

    def retain(self, slot: int, tenant: str, tokens: Sequence[int]) -> list[int]:
        """Ends the use of a slot that has ``tokens``, whole blocks. It is kept for others, and the retained ones that
        it makes superfluous are given up: or it is, if another has all that it has. Returns what is given up.
        """
        self._tree.put(slot, tenant, tokens)
        better = self._tree.beyond(slot) & self._retained.keys()
        if better:
            self.touch(min(better))
            self.free(slot)
            return [slot]
        superfluous = sorted(self._tree.within(slot) & self._retained.keys())
        for other in superfluous:
            self._give_up(other)
        self.num_free_tokens += self._in_use.pop(slot) - len(tokens)
        self.num_retained_tokens += len(tokens)
        self._retained[slot] = len(tokens)
        return superfluous

    def free(self, slot: int) -> None:
        """Ends the use of a slot; nothing of it is kept."""
        self.num_free_tokens += self._in_use.pop(slot)
        self._tree.drop(slot)
        heapq.heappush(self._free, slot)

    def give_up_all(self) -> list[int]:
        """Frees all that is retained, and returns which those were."""
        slots = list(self._retained)
        for slot in slots:
            self._give_up(slot)
        return slots

    def _use(self, slot: int, num_tokens: int) -> None:
        self._in_use[slot] = num_tokens
        self.num_free_tokens -= num_tokens

    def _make_room(self, num_tokens: int, *, num_slots: int, spare: int | None) -> list[int] | None:
        """Gives up what is retained until so many tokens and slots are free; returns what."""
        others = [slot for slot in self._retained if slot != spare]
        obtainable = self.num_free_tokens + sum(self._retained[slot] for slot in others)
        if obtainable < num_tokens or len(self._free) + len(others) < num_slots:
            return None
        given_up = []
        for slot in others:
            if self.num_free_tokens >= num_tokens and len(self._free) >= num_slots:
                break
            self._give_up(slot)
            given_up.append(slot)
        return given_up

    def _unretain(self, slot: int) -> None:
        num_tokens = self._retained.pop(slot)
        self.num_retained_tokens -= num_tokens
        self.num_free_tokens += num_tokens

    def _give_up(self, slot: int) -> None:
        self._unretain(slot)
        self._tree.drop(slot)
        heapq.heappush(self._free, slot)
