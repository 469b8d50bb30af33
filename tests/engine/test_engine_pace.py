from __future__ import annotations

import random

import pytest

from headrace.server.engine.pace import Pacer


def test_without_streams_a_step_takes_as_many_prompt_tokens_as_it_may() -> None:
    assert Pacer(smallest=16, largest=256).chunk_budget(0, 1) == 256


def test_before_anything_was_measured_streams_get_the_smallest_chunk_beside_them() -> None:
    pacer = Pacer(smallest=16, largest=256)
    assert pacer.chunk_budget(1, 1) == 16
    pacer.saw_decodes(8, 0.02)
    assert pacer.chunk_budget(1, 1) == 16


def test_a_step_with_chunks_takes_at_most_three_times_as_long_as_one_without() -> None:
    pacer = Pacer(smallest=16, largest=256)
    for _ in range(50):
        pacer.saw_decodes(8, 0.040)
        pacer.saw_chunks(100, 0.080)
    budget = pacer.chunk_budget(8, 1)
    assert 0.040 + budget * 0.0008 <= 3 * 0.040
    assert budget > 50, "and is not timid either"


def test_beside_a_few_streams_chunks_may_take_what_nobody_notices() -> None:
    pacer = Pacer(smallest=16, largest=256)
    for _ in range(50):
        pacer.saw_decodes(8, 0.008)
        pacer.saw_chunks(100, 0.080)
    assert pacer.chunk_budget(1, 1) == pacer.chunk_budget(7, 1) == 50
    assert pacer.chunk_budget(8, 1) == 16


def test_where_more_wait_for_a_first_token_than_for_a_next_one_chunks_take_longer() -> None:
    pacer = Pacer(smallest=16, largest=512)
    for _ in range(50):
        pacer.saw_decodes(8, 0.020)
        pacer.saw_chunks(100, 0.090)
    assert pacer.chunk_budget(8, 8) == 31, "1.4 times 20 ms, at 0.9 ms a token"
    assert pacer.chunk_budget(8, 9) == 277, "a quarter of a second"


def test_a_step_takes_no_longer_than_it_may_whoever_waits() -> None:
    pacer = Pacer(smallest=16, largest=512)
    assert pacer.chunk_budget(0, 3, 0.1) == 512, "nothing is known"
    for _ in range(50):
        pacer.saw_decodes(32, 0.060)
        pacer.saw_chunks(100, 0.090)
    assert pacer.chunk_budget(0, 3, 0.1) == 111
    assert pacer.chunk_budget(32, 40, 0.1) == 44, "40 ms are left"
    assert pacer.chunk_budget(32, 40, 0.05) == 16


def test_budgets_stay_within_their_bounds_and_follow_what_is_measured() -> None:
    pacer = Pacer(smallest=16, largest=256)
    pacer.saw_decodes(8, 1.0)
    pacer.saw_chunks(100, 0.001)
    assert pacer.chunk_budget(1, 1) == 256
    for _ in range(50):
        pacer.saw_chunks(16, 10.0)
    assert pacer.chunk_budget(1, 1) == 16


def test_a_clock_that_stands_still_is_no_trouble() -> None:
    pacer = Pacer(smallest=16, largest=256)
    pacer.saw_decodes(8, 0.0)
    pacer.saw_chunks(100, 0.0)
    assert pacer.chunk_budget(1, 1) == 16


def can_mix(measured: int, asked: int) -> bool:
    """Whether so many decodes can share a run with chunks where another number of them was measured."""
    pacer = Pacer(smallest=16, largest=256)
    pacer.saw_decodes(measured, 0.02)
    return pacer.can_mix(asked)


def test_decodes_and_chunks_share_a_run_only_when_it_is_known_what_the_decodes_take() -> None:
    assert not Pacer(smallest=16, largest=256).can_mix(1)
    assert can_mix(8, 8)
    assert can_mix(8, 9)
    assert not can_mix(8, 10), "two more may take longer than was measured"
    assert can_mix(32, 28)
    assert not can_mix(32, 8)


def test_chunks_wait_one_step_at_most_however_the_number_of_decodes_changes() -> None:
    pacer, dice = Pacer(smallest=16, largest=256), random.Random(0)
    waited = False
    for _ in range(500):
        num_decodes = dice.choice([1, 2, 8, 20, 32])
        if pacer.can_mix(num_decodes):
            pacer.saw_both(16, 0.03)
            waited = False
        else:
            assert not waited
            pacer.saw_decodes(num_decodes, 0.02)
            waited = True


def test_now_and_then_decodes_run_alone_so_that_what_they_take_stays_known() -> None:
    pacer = Pacer(smallest=16, largest=256)
    pacer.saw_decodes(8, 0.02)
    mixed = 0
    while pacer.can_mix(8):
        pacer.saw_both(48, 0.06)
        mixed += 1
    assert 10 < mixed < 100
    pacer.saw_decodes(8, 0.02)
    assert pacer.can_mix(8)


def test_what_a_run_of_both_takes_beyond_its_decodes_is_what_chunks_take() -> None:
    pacer = Pacer(smallest=16, largest=256)
    pacer.saw_decodes(8, 0.02)
    for _ in range(20):
        pacer.saw_both(40, 0.06)
    assert pacer.chunk_budget(8, 1) == 28, "1.4 times 20 ms, at 1 ms a token"
    pacer.saw_both(40, 0.01)  # faster than the decodes alone: a clock is no measure of that
    assert pacer.chunk_budget(8, 1) >= 28


def test_a_guess_costs_what_the_decodes_would_give_in_its_time() -> None:
    pacer = Pacer(smallest=16, largest=256)
    assert pacer.draft_price(1) is None, "nothing was measured"
    pacer.saw_decodes(1, 0.010)
    assert pacer.draft_price(1) is None
    pacer.saw_chunks(100, 0.2)
    assert pacer.draft_price(1) == pytest.approx(0.2), "for want of better a prompt's token, 2 ms of 10"
    pacer.saw_drafts(4, 0.014)
    assert pacer.draft_price(1) == pytest.approx(0.1)
    assert pacer.draft_price(8) is None, "nobody knows what eight take"
    pacer.saw_decodes(8, 0.016)
    assert pacer.draft_price(8) == pytest.approx(0.5)


def test_after_many_runs_with_guesses_comes_one_without() -> None:
    pacer = Pacer(smallest=16, largest=256)
    pacer.saw_decodes(1, 0.010)
    num_drafted = 0
    while pacer.can_mix(1):
        pacer.saw_drafts(4, 0.014)
        num_drafted += 1
    assert num_drafted == 31
    assert pacer.can_mix(1)
