"""The largest logit of a row, by way of those of its spans: what ``headrace.Linear`` says of them, and ``greedy``."""

from __future__ import annotations

import math
from typing import Any

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


@given(array=arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 400)), elements=NUMBERS))
def test_they_are_found_for_the_rows_that_are_stale(array: NDArray[np.float32]) -> None:
    from headrace_kernels import KnownRows, greedy

    found, is_stale = np.zeros_like(maxima_of(array)), np.arange(len(array)) > 0
    greedy(KnownRows(array, found, is_stale), np.arange(len(array))[1:])
    np.testing.assert_array_equal(found[1:], maxima_of(array)[1:])
    assert (found[0] == 0).all()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("logits", np.zeros((2, 300)), "logits must be float32"),
        ("logits", np.zeros((2, 600), np.float32)[:, ::2], "contiguous"),
        ("logits", np.zeros((2, 0), np.float32), "V from 1"),
        ("maxima", np.zeros((2, 2), np.float32), r"maxima must be \(2, 3\)"),
        ("is_stale", np.zeros(3, np.bool_), r"is_stale must be bool, \[2\]"),
        ("is_stale", np.zeros(2), "is_stale must be bool"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Any, problem: str) -> None:
    from headrace_kernels import KnownRows

    good = {
        "logits": np.zeros((2, 300), np.float32),
        "maxima": np.zeros((2, 3), np.float32),
        "is_stale": np.zeros(2, np.bool_),
    }
    assert KnownRows(**good).size == 300
    with pytest.raises(ValueError, match=problem):
        KnownRows(**{**good, name: value})
