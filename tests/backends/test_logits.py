from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.backends.logits import HostLogits, top_ids

SIZES = st.sampled_from([1, 2, 63, 64, 65, 127, 500, 4096, 5000, 8191, 20_001])


@settings(max_examples=300)
@given(SIZES, st.integers(1, 200), st.integers(1, 10_000), st.integers(0, 2**32 - 1), st.booleans())
def test_top_ids_are_the_first_of_a_stable_sort(size: int, k: int, num_values: int, seed: int, edited: bool) -> None:
    """``num_values`` different values at most: the fewer, the more ties."""
    random = np.random.default_rng(seed)
    row = (random.integers(0, num_values, size) - num_values // 2).astype(np.float32) / 7
    if edited:
        row[random.integers(0, size, size // 2)] = -np.inf
    k = min(k, size)
    assert top_ids(row, k).tolist() == np.argsort(-row, kind="stable")[:k].tolist()


def test_top_ids_find_the_largest_wherever_they_are() -> None:
    # All in one column of the layout, in the rest that is in none, at both ends.
    size = 64 * 300 + 5
    for places in ([i * 300 + 17 for i in range(64)], [size - 1, size - 3], [0, size - 1], list(range(64))):
        row = np.random.default_rng(0).normal(size=size).astype(np.float32)
        row[places] += 100
        assert set(top_ids(row, len(places)).tolist()) == set(places)


@pytest.mark.parametrize("size", [10, 64, 5000])
def test_more_than_there_are_gives_all(size: int) -> None:
    array = np.random.default_rng(1).normal(size=(3, size)).astype(np.float32)
    top = HostLogits(array).top([2, 0], size + 1, np.ones(2, np.float32))
    assert top.token_ids.shape == top.logits.shape == (2, size)
    assert top.token_ids[0].tolist() == np.argsort(-array[2], kind="stable").tolist()
    assert top.logits[1].tolist() == np.sort(array[0])[::-1].tolist()


@pytest.mark.parametrize("temperature", [1e-6, 0.01, 1.0, 100.0])
def test_probabilities_from_the_normaliser_sum_to_one(temperature: float) -> None:
    array = (np.random.default_rng(2).normal(size=(4, 1000)) * 15 + 20).astype(np.float32)
    top = HostLogits(array).top([0, 3], 1000, np.full(2, temperature, np.float32))
    scaled = top.logits.astype(np.float64) / np.float32(temperature) - top.log_sum_exp[:, None]
    assert np.exp(scaled).sum(axis=1) == pytest.approx(1, rel=1e-5)


def test_each_row_has_its_own_temperature() -> None:
    row = np.random.default_rng(3).normal(size=100)
    top = HostLogits(np.tile(row, (2, 1)).astype(np.float32)).top([0, 1], 5, np.array([0.5, 2.0], np.float32))
    for i, temperature in enumerate([0.5, 2.0]):
        assert top.log_sum_exp[i] == pytest.approx(np.log(np.exp(row / temperature).sum()), rel=1e-5)


def test_a_rows_numbers_do_not_depend_on_the_rows_beside_it() -> None:
    array = np.random.default_rng(4).normal(size=(32, 49_152)).astype(np.float32)
    temperature = np.linspace(0.5, 1.5, 32, dtype=np.float32)
    together = HostLogits(array).top(range(32), 64, temperature)
    for i in (0, 7, 31):
        alone = HostLogits(array[i : i + 1].copy()).top([0], 64, temperature[i : i + 1])
        assert alone.token_ids[0].tobytes() == together.token_ids[i].tobytes()
        assert alone.log_sum_exp[0].tobytes() == together.log_sum_exp[i].tobytes()


def test_edits_of_a_row_are_seen_and_the_lowest_id_wins_a_tie() -> None:
    logits = HostLogits(np.zeros((2, 70), np.float32))
    logits.row(1)[[5, 69]] = 1.0
    assert logits.greedy().tolist() == [0, 5]
    assert logits.top([1], 3, np.ones(1, np.float32)).token_ids.tolist() == [[5, 69, 0]]
