"""What calls are likely to use."""

from __future__ import annotations

import random
from collections import deque

from headrace.server.accounting.expectations import Expectations


def test_all_that_is_allowed_is_expected_where_nothing_is_known() -> None:
    assert Expectations().output_tokens("m", 256) == 256


def test_the_share_that_recent_calls_have_used_is_expected_rounded_up() -> None:
    expectations = Expectations()
    expectations.note("m", 10, 100)
    expectations.note("m", 90, 100)
    assert [expectations.output_tokens("m", allowed) for allowed in (100, 3, 1)] == [50, 2, 1]
    assert expectations.output_tokens("other", 100) == 100


def test_never_more_is_expected_than_is_allowed() -> None:
    expectations = Expectations()
    expectations.note("m", 120, 100)
    assert expectations.output_tokens("m", 50) == 50


def test_calls_that_generate_nothing_say_nothing() -> None:
    expectations = Expectations()
    expectations.note("m", 0, 0)
    assert expectations.output_tokens("m", 8) == 8


def test_the_last_two_hundred_calls_count() -> None:
    expectations, recent, dice = Expectations(), deque[tuple[int, int]](maxlen=200), random.Random(1)
    for _ in range(700):
        allowed = dice.randint(1, 500)
        recent.append((dice.randint(0, allowed), allowed))
        expectations.note("m", *recent[-1])
        used, of = sum(used for used, _ in recent), sum(allowed for _, allowed in recent)
        assert expectations.output_tokens("m", 1000) == -(-1000 * used // of)
