from __future__ import annotations

import random

import pytest

from headrace.server.engine.drafts import Draft, PromptLookup

CHEAP = 0.01


def proposed(tokens: list[int], *, price: float = CHEAP, longest: int = 4) -> list[int]:
    draft = PromptLookup().propose(tokens, price, longest)
    return [] if draft is None else list(draft.token_ids)


def test_what_followed_the_same_tokens_before_is_proposed() -> None:
    assert proposed([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3]) == [4, 5, 6, 7]
    assert proposed([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3], longest=2) == [4, 5]


def test_a_text_that_never_ended_so_before_gets_no_draft() -> None:
    assert proposed([1, 2, 3, 4, 5]) == []
    assert proposed([]) == []
    assert proposed([1]) == []
    assert proposed([1, 2, 1]) == [], "one token alone says little"


def test_the_longest_match_wins_and_then_the_latest() -> None:
    assert proposed([1, 2, 3, 4, 8, 8, 5, 2, 3, 9, 7, 1, 2, 3], longest=1) == [4], "1, 2, 3 before 2, 3"
    assert proposed([2, 3, 4, 8, 2, 3, 9, 7, 2, 3], longest=1) == [9]


def test_a_text_that_repeats_itself_is_continued_beyond_its_end() -> None:
    assert proposed([7, 8, 7, 8, 7, 8], longest=5) == [7, 8, 7, 8, 7]
    assert proposed([5, 5, 5], longest=3) == [5, 5, 5]


def test_a_draft_is_as_long_as_its_tokens_are_likely_to_be_worth_their_price() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 1, 2, 3, 4]
    lengths = [len(proposed(text, price=price, longest=16)) for price in (0.01, 0.2, 0.5, 0.74, 0.76, 1.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 16
    assert lengths[3] == 1
    assert lengths[4] == lengths[5] == 0


def test_drafts_that_are_turned_down_are_made_no_more_and_those_that_are_accepted_grow() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 1, 2, 3, 4]
    for accepted, grows in ((0, False), (4, True)):
        lookup = PromptLookup()
        before = lookup.propose(text, 0.3, 16)
        assert before is not None
        for _ in range(20):
            lookup.learn(Draft(before.token_ids[:4], before.match), accepted)
        after = lookup.propose(text, 0.3, 16)
        assert (after is not None and len(after.token_ids) > len(before.token_ids)) is grows
        assert grows or after is None


def test_a_text_that_grows_is_read_on_from_where_it_ended() -> None:
    text = [1, 2, 3, 4, 5, 1, 2]
    lookup = PromptLookup()
    assert lookup.propose(text, CHEAP, 2) == Draft([3, 4], 2)
    text += [3, 9, 9, 1, 2, 3]
    assert lookup.propose(text, CHEAP, 2) == Draft([9, 9], 3)


def test_drafts_that_were_given_up_are_tried_again_after_a_while() -> None:
    text, lookup = [1, 2, 3, 4, 1, 2], PromptLookup()
    for _ in range(50):
        lookup.learn(Draft([3], 2), 0)
    tries = [lookup.propose(text, 0.2, 4) is not None for _ in range(100)]
    assert not any(tries[:20])
    assert tries[-1]


@pytest.mark.parametrize("seed", range(3))
def test_a_proposal_is_what_a_plain_search_finds(seed: int) -> None:
    dice = random.Random(seed)
    text: list[int] = []
    lookup = PromptLookup()
    for _ in range(300):
        text.append(dice.randrange(4))
        draft = lookup.propose(text, CHEAP, 3)
        wanted = searched(text, 3)
        assert (None if draft is None else (list(draft.token_ids), draft.match)) == wanted


def searched(text: list[int], longest: int) -> tuple[list[int], int] | None:
    for match in (4, 3, 2):
        if len(text) <= match:
            continue
        tail = text[-match:]
        for end in range(len(text) - 1, match - 1, -1):
            if text[end - match : end] == tail:
                follows = list(text)
                for i in range(longest):
                    follows.append(follows[end + i])
                return follows[len(text) :], match
    return None
