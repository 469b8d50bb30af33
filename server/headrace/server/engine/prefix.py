"""Which slots hold which beginnings of sequences: a radix tree over blocks of tokens, one for each tenant.

A node is a block in its place after others; the slots that hold it hold all before it. Tenants share no node, so none
can find what another has sent. (After RadixAttention, arXiv 2312.07104.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Block = tuple[int, ...]


class PrefixTree:
    """Knows slots by the tokens that were put down for them, in whole blocks of ``block`` tokens."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._roots: dict[str, _Node] = {}
        self._paths: dict[int, list[_Node]] = {}
        """For each slot its tenant's root, then its blocks."""

    def put(self, slot: int, tenant: str, tokens: Sequence[int]) -> None:
        """Puts down whole blocks of ``tokens`` for ``slot``, in place of what there is; both must agree as far as both
        go, so that only the difference is touched. A slot is one tenant's until it is dropped.
        """
        if slot not in self._paths:
            self._paths[slot] = [self._roots.setdefault(tenant, _Node())]
            self._paths[slot][0].slots.add(slot)
        path, length = self._paths[slot], 1 + len(tokens) // self._block
        while len(path) > length:
            self._leave(slot, path)
        while len(path) < length:
            start = (len(path) - 1) * self._block
            key = tuple(tokens[start : start + self._block])
            node = path[-1].children.get(key)
            if node is None:
                node = path[-1].children[key] = _Node(key)
            node.slots.add(slot)
            path.append(node)

    def drop(self, slot: int) -> None:
        """Forgets a slot, known or not."""
        path = self._paths.pop(slot, None)
        if path is None:
            return
        while len(path) > 1:
            self._leave(slot, path)
        path[0].slots.discard(slot)
        if not path[0].slots:
            self._roots = {tenant: root for tenant, root in self._roots.items() if root is not path[0]}

    def common(self, tenant: str, tokens: Sequence[int], limit: int) -> dict[int, int]:
        """For each slot of the tenant that begins like ``tokens``, how many tokens they share; ``limit`` at most, and
        whole blocks.
        """
        node, path = self._roots.get(tenant), []
        for end in range(self._block, limit + 1, self._block):
            node = node and node.children.get(tuple(tokens[end - self._block : end]))
            if node is None:
                break
            path.append(node)
        found: dict[int, int] = {}
        for depth in range(len(path), 0, -1):
            slots = path[depth - 1].slots
            if len(slots) > len(found):
                found |= dict.fromkeys(slots - found.keys(), depth * self._block)
        return found

    def longest(self, tenant: str, tokens: Sequence[int]) -> int:
        """How many tokens, in whole blocks, the tenant's slots have of ``tokens`` from their beginning.

        Safe to ask from any thread while the owner's changes the tree: it takes one item of one dictionary at a time by
        its key, which is atomic, and iterates over nothing. What it finds may have been dropped a moment before.
        """
        if not self._block:
            return 0
        node, length = self._roots.get(tenant), 0
        while node is not None and length + self._block <= len(tokens):
            node = node.children.get(tuple(tokens[length : length + self._block]))
            if node is not None:
                length += self._block
        return length

    def num_tokens(self, slot: int) -> int:
        """Tokens that are put down for a slot."""
        return (len(self._paths[slot]) - 1) * self._block

    def within(self, slot: int) -> set[int]:
        """The other slots whose blocks are all among those of ``slot``."""
        path = self._paths[slot]
        return {
            other
            for other, theirs in self._paths.items()
            if other != slot and len(theirs) <= len(path) and theirs[-1] is path[len(theirs) - 1]
        }

    def beyond(self, slot: int) -> set[int]:
        """The other slots that have all blocks of ``slot``."""
        return self._paths[slot][-1].slots - {slot}

    def _leave(self, slot: int, path: list[_Node]) -> None:
        """Takes a slot from the last node of its path."""
        node = path.pop()
        node.slots.discard(slot)
        if not node.slots:
            del path[-1].children[node.key]


@dataclass(slots=True, eq=False)
class _Node:
    key: Block = ()
    children: dict[Block, _Node] = field(default_factory=dict)
    slots: set[int] = field(default_factory=set)
