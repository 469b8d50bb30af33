"""``headrace_kernels.top`` against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from tests.kernels.operators import needs_operators, unknown

pytestmark = needs_operators


def top(
    rows: NDArray[np.float32], k: int, temperatures: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """Of all rows, whose maxima nobody has told."""
    import headrace_kernels

    return headrace_kernels.top(unknown(rows), np.arange(len(rows)), k, temperatures)


def check(rows: NDArray[np.float32], k: int, temperature: float) -> None:
    values, ids, log_sum_exp = top(rows, k, np.full(len(rows), temperature, np.float32))
    for i, row in enumerate(rows):
        order = np.lexsort((np.arange(row.size), -row))[:k]
        assert ids[i].tolist() == order.tolist()
        assert values[i].tolist() == row[order].tolist()
        scaled = row.astype(np.float64) / np.float32(temperature)
        wanted = scaled.max() + np.log(np.exp(scaled - scaled.max()).sum())
        assert log_sum_exp[i] == pytest.approx(wanted, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("k", [1, 5, 64, 100, 512, 4096])
@pytest.mark.parametrize("size", [4099, 49_152], ids=["an odd size", "a vocabulary"])
def test_the_largest_come_first_and_equal_ones_by_place(size: int, k: int) -> None:
    rows = np.random.default_rng(k).normal(size=(3, size)).astype(np.float32) * 4
    rows[1] = np.round(rows[1])  # ties
    rows[2, size // 2 :] = -np.inf  # tokens that may not come
    check(rows, k, 0.7)


@given(
    row=arrays.arrays(np.float32, st.integers(1, 3000), elements=st.floats(-50, 50, width=16, allow_subnormal=False)),
    share=st.floats(0, 1),
    temperature=st.floats(0.1, 10),
)
def test_any_row_of_any_size(row: NDArray[np.float32], share: float, temperature: float) -> None:
    check(row[None], max(1, round(share * row.size)), temperature)


def test_a_low_temperature_overflows_nothing() -> None:
    row = np.array([[3.0, 2.0, 1.0, -80.0]], np.float32)
    values, _, log_sum_exp = top(row, 1, np.array([1e-9], np.float32))
    assert log_sum_exp[0] == pytest.approx(values[0, 0] / np.float32(1e-9), rel=1e-6)


def test_nan_counts_as_the_least() -> None:
    row = np.array([[np.nan, 1.0, np.nan, 2.0, -1.0]], np.float32)
    _, ids, log_sum_exp = top(row, 3, np.ones(1, np.float32))
    assert ids.tolist() == [[3, 1, 4]]
    assert log_sum_exp[0] == pytest.approx(np.log(np.exp([1.0, 2.0, -1.0]).sum()))


@pytest.mark.parametrize("nothing", [np.nan, -np.inf])
@pytest.mark.parametrize("size", [5, 4099])
def test_a_row_of_nothing_has_its_first_places(size: int, nothing: float) -> None:
    values, ids, _ = top(np.full((1, size), nothing, np.float32), 3, np.ones(1, np.float32))
    assert ids.tolist() == [[0, 1, 2]]
    assert (values == -np.inf).all()


@pytest.mark.parametrize("k", [0, 6])
def test_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="k must be 1 to 5"):
        top(np.zeros((1, 5), np.float32), k, np.ones(1, np.float32))
