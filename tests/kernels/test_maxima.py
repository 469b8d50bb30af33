"""The largest logit of a row, by way of those of its spans: what ``headrace.Linear`` says of them, and ``greedy``."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from headrace.backends.onnx.top import CompiledLogits
from tests.kernels.operators import Operator, needs_operators
from tests.kernels.test_linear_operator import INPUTS, Matrix, activations

pytestmark = needs_operators

SPAN = 128


def maxima_of(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    starts = np.arange(0, rows.shape[1], SPAN)
    largest: NDArray[np.float32] = np.maximum.reduceat(rows, starts, axis=1)  # NaN where there is one
    return largest


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outputs", [1, 100, 128, 129, 1000, 4096 + 37])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_product_comes_with_the_largest_of_each_span(rows: int, outputs: int, bits: int) -> None:
    matrix = Matrix(outputs, 64, bits, 32, minima=bits == 4)
    x = activations(rows, 64)
    bias = np.random.default_rng(5).normal(size=outputs).astype(np.float32)
    constants = matrix.constants() | {"bias": bias}
    attributes = {"bits": bits, "gate": 0, "epsilon": 0.0}
    out, maxima = Operator("Linear", INPUTS, {"x": x}, constants, more=["maxima"], **attributes).all(x=x)
    alone = Operator("Linear", INPUTS, {"x": x}, constants, **attributes)(x=x)
    np.testing.assert_array_equal(out, alone)
    np.testing.assert_array_equal(maxima, maxima_of(out))


def test_a_nan_is_the_largest_of_its_span() -> None:
    matrix = Matrix(300, 64, 8, 32, minima=False)
    matrix.scales[200] = math.nan
    x = activations(2, 64)
    out, maxima = Operator(
        "Linear", INPUTS, {"x": x}, matrix.constants(), more=["maxima"], bits=8, gate=0, epsilon=0.0
    ).all(x=x)
    assert np.isnan(out).sum(axis=1).tolist() == [1, 1]
    assert np.isnan(maxima).tolist() == [[False, True, False]] * 2
    assert CompiledLogits(out, maxima).greedy([0, 1]).tolist() == [200, 200]


def test_with_a_gate_there_are_none() -> None:
    matrix, other = Matrix(32, 64, 8, 32, minima=False), Matrix(32, 64, 8, 32, minima=False, seed=1)
    x = activations(2, 64)
    gated = Operator(
        "Linear",
        INPUTS,
        {"x": x},
        matrix.constants() | other.constants("gated_"),
        more=["maxima"],
        bits=8,
        gate=1,
        epsilon=0.0,
    )
    with pytest.raises(Exception, match="with a gate there are no maxima"):
        gated.all(x=x)


NUMBERS = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1.0, 1.5, math.inf, math.nan])


@given(array=arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 400)), elements=NUMBERS))
def test_the_first_of_the_largest_is_chosen_as_numpy_does(array: NDArray[np.float32]) -> None:
    rows = list(range(len(array)))[::-1]
    found = CompiledLogits(array, maxima_of(array)).greedy(rows)
    assert found.tolist() == [int(array[row].argmax()) for row in rows]


def test_a_row_that_was_edited_is_searched_anew() -> None:
    array = np.random.default_rng(3).normal(size=(3, 1000)).astype(np.float32)
    logits = CompiledLogits(array, maxima_of(array))
    logits.row(1)[array[1].argmax()] = -np.inf
    logits.row(2)[700] = 100
    assert logits.logit(0, 5) == array[0, 5]
    assert logits.greedy([2, 0, 1]).tolist() == [700, int(array[0].argmax()), int(array[1].argmax())]


@pytest.mark.parametrize(
    ("maxima", "rows", "problem"),
    [((2, 2), [0], r"maxima must be \[2, 3\]"), ((2, 3), [2], "0 to 1"), ((2, 3), [-1], "0 to 1")],
)
def test_what_does_not_fit_is_refused(maxima: tuple[int, int], rows: list[int], problem: str) -> None:
    from headrace_kernels import greedy

    with pytest.raises(ValueError, match=problem):
        greedy(np.zeros((2, 300), np.float32), np.zeros(maxima, np.float32), np.array(rows, np.int64))
