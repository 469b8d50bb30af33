from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.backends.api import Logits
from headrace.backends.logits import HostLogits, top_ids
from headrace.backends.onnx.top import OnnxLogits, Top, top_graph

Make = Callable[[NDArray[np.float32]], Logits]

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


@pytest.fixture(params=["numpy", "ONNX Runtime"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes logits of an array: each implementation must pass what follows."""
    if request.param == "numpy":
        return HostLogits
    (tmp_path / "top.onnx").write_bytes(top_graph())
    top = Top(tmp_path / "top.onnx")
    return lambda array: OnnxLogits(array, top)


@pytest.mark.parametrize("size", [10, 64, 5000])
def test_more_than_there_are_gives_all(make: Make, size: int) -> None:
    array = np.random.default_rng(1).normal(size=(3, size)).astype(np.float32)
    top = make(array).top([2, 0], size + 1, np.ones(2, np.float32))
    assert top.token_ids.shape == top.logits.shape == (2, size)
    assert top.token_ids[0].tolist() == np.argsort(-array[2], kind="stable").tolist()
    assert top.logits[1].tolist() == np.sort(array[0])[::-1].tolist()


@pytest.mark.parametrize("temperature", [1e-6, 0.01, 1.0, 100.0])
def test_probabilities_from_the_normaliser_sum_to_one(make: Make, temperature: float) -> None:
    array = (np.random.default_rng(2).normal(size=(4, 1000)) * 15 + 20).astype(np.float32)
    top = make(array).top([0, 3], 1000, np.full(2, temperature, np.float32))
    scaled = top.logits.astype(np.float64) / np.float32(temperature) - top.log_sum_exp[:, None]
    assert np.exp(scaled).sum(axis=1) == pytest.approx(1, rel=1e-5)


def test_each_row_has_its_own_temperature(make: Make) -> None:
    row = np.random.default_rng(3).normal(size=100)
    top = make(np.tile(row, (2, 1)).astype(np.float32)).top([0, 1], 5, np.array([0.5, 2.0], np.float32))
    for i, temperature in enumerate([0.5, 2.0]):
        assert top.log_sum_exp[i] == pytest.approx(np.log(np.exp(row / temperature).sum()), rel=1e-5)


def test_a_rows_numbers_do_not_depend_on_the_rows_beside_it(make: Make) -> None:
    array = np.random.default_rng(4).normal(size=(32, 49_152)).astype(np.float32)
    temperature = np.linspace(0.5, 1.5, 32, dtype=np.float32)
    together = make(array).top(range(32), 64, temperature)
    for i in (0, 7, 31):
        alone = make(array[i : i + 1].copy()).top([0], 64, temperature[i : i + 1])
        assert alone.token_ids[0].tobytes() == together.token_ids[i].tobytes()
        assert alone.log_sum_exp[0].tobytes() == together.log_sum_exp[i].tobytes()


def test_edits_of_a_row_are_seen_and_the_lowest_id_wins_a_tie(make: Make) -> None:
    logits = make(np.zeros((2, 70), np.float32))
    logits.row(1)[[5, 69]] = 1.0
    assert logits.greedy([0, 1]).tolist() == [0, 5]
    assert logits.greedy([1]).tolist() == [5]
    assert logits.top([1], 3, np.ones(1, np.float32)).token_ids.tolist() == [[5, 69, 0]]


def test_tokens_that_are_forbidden_have_no_share(make: Make) -> None:
    array = np.full((1, 100), -np.inf, np.float32)
    array[0, [7, 9]] = 3.0
    top = make(array).top([0], 3, np.ones(1, np.float32))
    assert top.token_ids[0, :2].tolist() == [7, 9]
    assert top.log_sum_exp[0] == pytest.approx(3.0 + np.log(2))


def test_both_find_the_same_in_a_real_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "top.onnx").write_bytes(top_graph())
    array = (np.random.default_rng(5).normal(size=(5, 49_152)) * 3).astype(np.float32).round(2)  # with ties
    temperature = np.linspace(0.3, 1.5, 4, dtype=np.float32)
    rows = [4, 0, 2, 3]
    one = HostLogits(array).top(rows, 512, temperature)
    other = OnnxLogits(array, Top(tmp_path / "top.onnx")).top(rows, 512, temperature)
    assert (one.token_ids == other.token_ids).all()
    assert (one.logits == other.logits).all()
    scaled = array[rows].astype(np.float64) / temperature[:, None]
    exact = np.log(np.exp(scaled - scaled.max(axis=1, keepdims=True)).sum(axis=1)) + scaled.max(axis=1)
    assert one.log_sum_exp == pytest.approx(exact, abs=1e-5)
    assert other.log_sum_exp == pytest.approx(exact, abs=1e-5)
