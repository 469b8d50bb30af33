"""Guesses what comes next, for the model to check many tokens in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SHORTEST_MATCH = 2
_LONGEST_MATCH = 4
_FIRST_ACCEPTANCE = {2: 0.4, 3: 0.6, 4: 0.75}
"""By length of the match, before anything is known of a sequence: texts that repeat themselves more than this gain a
few steps late, others lose little."""
_SMOOTHING = 0.15
_FORGETTING = 0.02
"""How far, with each draft that did not seem worth its price, its likely acceptance goes back to what it was at first:
a text may begin to repeat itself late."""
_FIRST_FORCED_ACCEPTANCE = 0.9


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next."""

    token_ids: Sequence[int]
    match: int | None
    """How many of the last tokens led to them; ``None``: a second model did (``draft_model``), or a constraint."""
    forced: bool = False
    """Whether a constraint leaves nothing else (``constraint``)."""


class PromptLookup:
    """Drafts what followed when the text last ended as it does now: free of a second model, and good where an answer
    copies from its prompt or repeats itself (prompt lookup; LLMA, arXiv 2304.04487).

    It learns how much of its drafts, by length of the match, the model goes along with.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        """Where the last occurrence of so many tokens in a row ended, but for the ones at the end of the text."""
        self._num_indexed = 0
        self._acceptance = dict(_FIRST_ACCEPTANCE)

    def propose(self, tokens: Sequence[int], price: float, longest: int) -> Draft | None:
        """A draft of at most ``longest`` tokens after ``tokens``, which only ever grow at their end; None if there is
        nothing worth its price. It goes as far as a token's chance, to be accepted like all before, is above ``price``.
        """
        self._index(tokens)
        for match in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            end = self._ends.get(tuple(tokens[-match:]))
            if end is None:
                continue
            acceptance = self._acceptance[match]
            depth = _depth(acceptance, price, longest)
            if not depth:
                self._acceptance[match] += _FORGETTING * (_FIRST_ACCEPTANCE[match] - acceptance)
            # What it copies may reach into the draft itself, when a text repeats itself in short turns.
            follows = [*tokens[end : end + depth]]
            while follows and len(follows) < depth:
                follows.append(follows[len(follows) - (len(tokens) - end)])
            return Draft(follows, match) if follows else None
        return None

    def learn(self, draft: Draft, num_accepted: int) -> None:
        """Takes note of how many tokens of one of its drafts were what the model chose."""
        assert draft.match is not None
        self._acceptance[draft.match] = _learnt(self._acceptance[draft.match], draft, num_accepted)

    def _index(self, tokens: Sequence[int]) -> None:
        """Takes down all that ends before the last token."""
        for end in range(max(self._num_indexed, _SHORTEST_MATCH), len(tokens)):
            for match in range(_SHORTEST_MATCH, min(_LONGEST_MATCH, end) + 1):
                self._ends[tuple(tokens[end - match : end])] = end
        self._num_indexed = len(tokens)


class ForcedTokens:
    """Drafts the only text that a constraint leaves. What is forced is its characters: the model may still cut them
    into other tokens, and how often it does is learnt.
    """

    def __init__(self) -> None:
        self._acceptance = _FIRST_FORCED_ACCEPTANCE

    def propose(self, token_ids: Sequence[int], price: float, longest: int) -> Draft | None:
        """The first of ``token_ids``, at most ``longest``, as far as a token's chance is above ``price``."""
        depth = _depth(self._acceptance, price, min(longest, len(token_ids)))
        if token_ids and not depth:
            self._acceptance += _FORGETTING * (_FIRST_FORCED_ACCEPTANCE - self._acceptance)
        return Draft(token_ids[:depth], None, forced=True) if depth else None

    def learn(self, draft: Draft, num_accepted: int) -> None:
        """Takes note of how many tokens of a draft were what the model chose."""
        self._acceptance = _learnt(self._acceptance, draft, num_accepted)


def _depth(acceptance: float, price: float, longest: int) -> int:
    """How many tokens to draft: each comes true with a chance of ``acceptance``, if all before it did."""
    depth, chance = 0, acceptance
    while depth < longest and chance > price:
        depth, chance = depth + 1, chance * acceptance
    return depth


def _learnt(acceptance: float, draft: Draft, num_accepted: int) -> float:
    """An acceptance after one more draft."""
    tried = min(num_accepted + 1, len(draft.token_ids))
    weight = 1 - (1 - _SMOOTHING) ** tried
    return acceptance + weight * (num_accepted / tried - acceptance)
