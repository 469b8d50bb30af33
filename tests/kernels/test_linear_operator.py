"""``headrace.Linear`` against numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.operators import Operator, needs_operators

pytestmark = needs_operators

INPUTS = [
    *("x", "values", "scales", "minima", "norm", "bias", "residual"),
    *("gated_values", "gated_scales", "gated_minima"),
]
RELATIVE = 1e-3
"""Of a row's root mean square. Beside weights of 8 bits activations have 15 and a sign, for what is largest in their
row; beside 4 bits ``multiplied`` says what they are.
"""


class Matrix:
    """A random quantised matrix and what it stands for."""

    def __init__(self, outputs: int, inputs: int, bits: int, block: int, *, minima: bool, seed: int = 0) -> None:
        dice = np.random.default_rng(seed)
        num_blocks = inputs // block
        integers = dice.integers(0, 2**bits, (outputs, num_blocks, block))
        if bits == 8 and not minima:
            integers = np.maximum(integers, 1)  # the format is symmetric
        self.scales = (dice.uniform(0.5, 2, (outputs, num_blocks)) / 2**bits).astype(np.float32)
        self.minima = dice.uniform(-1, 0, (outputs, num_blocks)).astype(np.float32) if minima else None
        zero = 0 if minima else 2 ** (bits - 1)
        weight = (integers - zero) * self.scales[..., None]
        if self.minima is not None:
            weight = weight + self.minima[..., None]
        self.weight = weight.reshape(outputs, inputs)
        self.values = (
            integers.astype(np.uint8) if bits == 8 else (integers[..., ::2] | integers[..., 1::2] << 4).astype(np.uint8)
        )

    def constants(self, prefix: str = "") -> dict[str, NDArray[Any]]:
        found = {f"{prefix}values": self.values, f"{prefix}scales": self.scales}
        return found | ({f"{prefix}minima": self.minima} if self.minima is not None else {})


def activations(rows: int, width: int, seed: int = 1) -> NDArray[np.float32]:
    """Rows of very different sizes, one of them zero, with a channel that stands out."""
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    x *= np.geomspace(1e-3, 1e3, rows)[:, None].astype(np.float32)
    x[:, width // 3] *= 30
    x[rows // 2] = 0 if rows > 2 else 1
    return x


def multiplied(x: NDArray[np.float32], bits: int) -> NDArray[np.float64]:
    """What stands for ``x`` in a product: beside weights of 4 bits, 7 bits and a sign for the largest in a block."""
    if bits == 8:
        return x.astype(np.float64)
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    integers = np.rint(blocks * (np.float32(127) / np.where(largest > 0, largest, 1)))
    return (integers.astype(np.float64) * largest / 127).reshape(x.shape)


def assert_close(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    """Row by row: each has a scale of its own."""
    size = np.sqrt((wanted.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
    assert (np.abs(found - wanted) <= RELATIVE * size).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 40])
@pytest.mark.parametrize(
    ("bits", "block", "minima"), [(8, 64, False), (8, 32, True), (4, 32, True), (4, 32, False), (8, 16, False)]
)
def test_a_product_is_that_of_the_weights_it_stands_for(rows: int, bits: int, block: int, minima: bool) -> None:
    matrix, x = Matrix(72, 192, bits, block, minima=minima), activations(rows, 192)
    operator = Operator("Linear", INPUTS, {"x": x}, matrix.constants(), bits=bits, gate=0, epsilon=0.0)
    assert_close(operator(x=x), multiplied(x, bits) @ matrix.weight.T)


def test_a_width_that_fills_no_whole_block_is_padded() -> None:
    matrix, x = Matrix(48, 128, 8, 64, minima=False), activations(9, 100)
    operator = Operator("Linear", INPUTS, {"x": x}, matrix.constants(), bits=8, gate=0, epsilon=0.0)
    assert_close(operator(x=x), x.astype(np.float64) @ matrix.weight[:, :100].T)


@pytest.mark.parametrize("outputs", [1, 15, 17, 33])
@pytest.mark.parametrize("width", [1, 7, 15, 24])
def test_no_width_or_number_of_outputs_is_too_odd(outputs: int, width: int) -> None:
    matrix = Matrix(outputs, math.ceil(width / 8) * 8, 8, 8, minima=True)
    x, norm = activations(8, width), np.random.default_rng(3).normal(size=width).astype(np.float32)
    x[0] += 1  # so that a width of 1 has no zero beside the one row of zeros
    constants = {**matrix.constants(), "norm": norm}
    operator = Operator("Linear", INPUTS, {"x": x}, constants, bits=8, gate=0, epsilon=1e-5)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * norm
    wanted = normed @ matrix.weight[:, :width].T
    # Of the largest addend: with few outputs a sum may all but vanish.
    size = np.abs(normed).max(axis=1, keepdims=True) * np.abs(matrix.weight).max()
    assert (np.abs(operator(x=x) - wanted) <= RELATIVE * size).all()


def test_the_largest_integers_overflow_no_sum() -> None:
    matrix = Matrix(16, 64, 4, 32, minima=True)
    matrix.values[:] = 0xFF
    for sign in (1, -1):
        x = np.full((7, 64), sign, np.float32)
        operator = Operator("Linear", INPUTS, {"x": x}, matrix.constants(), bits=4, gate=0, epsilon=0.0)
        assert matrix.minima is not None
        wanted = sign * 32 * (15 * matrix.scales + matrix.minima).sum(axis=1, dtype=np.float64)
        assert operator(x=x) == pytest.approx(np.tile(wanted, (7, 1)), rel=1e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 12, 98])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_that_is_not_finite_gives_nothing_finite_and_leaves_others_alone(
    number: float, place: int, normed: bool, bits: int
) -> None:
    matrix, x = Matrix(48, 128, bits, 32, minima=True), activations(9, 99)
    constants = matrix.constants() | ({"norm": np.ones(99, np.float32)} if normed else {})
    operator = Operator("Linear", INPUTS, {"x": x}, constants, bits=bits, gate=0, epsilon=1e-5)
    before = operator(x=x)
    x[3, place] = number
    after = operator(x=x)
    assert not np.isfinite(after[3]).any()
    assert np.delete(after, 3, axis=0).tobytes() == np.delete(before, 3, axis=0).tobytes()


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_that_all_but_vanish_count_as_zeros(bits: int) -> None:
    matrix = Matrix(48, 64, bits, 32, minima=False)
    x = np.full((2, 64), 1e-42, np.float32)
    operator = Operator("Linear", INPUTS, {"x": x}, matrix.constants(), bits=bits, gate=0, epsilon=0.0)
    assert (operator(x=x) == 0).all()


def test_norm_bias_and_residual_are_applied() -> None:
    matrix, x = Matrix(64, 192, 8, 64, minima=False), activations(11, 192)
    dice = np.random.default_rng(3)
    norm, bias = dice.normal(size=192).astype(np.float32), dice.normal(size=64).astype(np.float32)
    residual = dice.normal(size=(11, 64)).astype(np.float32)
    fed = {"x": x, "residual": residual}
    constants = {**matrix.constants(), "norm": norm, "bias": bias}
    operator = Operator("Linear", INPUTS, fed, constants, bits=8, gate=0, epsilon=1e-5)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * norm
    assert_close(operator(**fed), normed @ matrix.weight.T + bias + residual)


@pytest.mark.parametrize("gate", [1, 2], ids=["silu", "gelu_tanh"])
def test_a_gate_multiplies_the_second_product(gate: int) -> None:
    first, second = (Matrix(80, 96, 4, 32, minima=True, seed=seed) for seed in (4, 5))
    x = np.random.default_rng(6).normal(size=(10, 96)).astype(np.float32)
    constants = {**first.constants(), **second.constants("gated_")}
    operator = Operator("Linear", INPUTS, {"x": x}, constants, bits=4, gate=gate, epsilon=0.0)
    seen = multiplied(x, 4)
    g, u = seen @ first.weight.T, seen @ second.weight.T
    if gate == 1:
        activated = g / (1 + np.exp(-g))
    else:
        activated = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    assert_close(operator(x=x), activated * u)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_has_the_same_bits_whatever_rows_and_threads_are_beside_it(threads: int, bits: int) -> None:
    matrix, x = Matrix(208, 576, bits, 32, minima=bits == 4), activations(64, 576)
    attributes = {"bits": bits, "gate": 0, "epsilon": 0.0}
    alone = Operator("Linear", INPUTS, {"x": x}, matrix.constants(), threads=1, **attributes)
    operator = Operator("Linear", INPUTS, {"x": x}, matrix.constants(), threads=threads, **attributes)
    rows = [alone(x=x[i : i + 1]).tobytes() for i in range(64)]
    for first, last in ((0, 64), (3, 5), (10, 31), (7, 13), (60, 64)):
        together = operator(x=x[first:last].copy())
        assert [row.tobytes() for row in together] == rows[first:last]


def test_no_rows_give_no_rows() -> None:
    matrix, x = Matrix(32, 64, 8, 64, minima=False), np.zeros((0, 64), np.float32)
    operator = Operator("Linear", INPUTS, {"x": x}, matrix.constants(), bits=8, gate=0, epsilon=0.0)
    assert operator(x=x).shape == (0, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits must be 8 or 4"),
        ({"gate": 3}, "gate must be 0, 1 or 2"),
        ({"scales": np.ones((32, 2), np.float32)}, "scales \\[outputs, blocks\\]"),
        ({"minima": np.ones((32, 3), np.float32)}, "minima must be shaped as scales"),
        ({"bias": np.ones(31, np.float32)}, "bias must be \\[outputs\\]"),
        ({"gate": 1}, "values and scales must be initializers"),
        ({"values": np.ones((32, 64), np.uint8)}, "values must be \\[outputs, blocks, bytes\\]"),
        ({"values": np.ones((32, 1, 0), np.uint8)}, "a weight has no elements"),
        ({"values": np.ones((32, 1, 12), np.uint8)}, "a multiple of 8 weights"),
        ({"values": np.ones((32, 1, 264), np.uint8)}, "a multiple of 8 weights, at most 256"),
        ({"bits": 4}, "with 4 bits 32"),
        ({"values": np.ones((32, 1, 1, 1, 1, 1, 64), np.uint8)}, "more than 6 dimensions"),
        ({"norm": np.ones(0, np.float32)}, "a weight has no elements"),
        ({"norm": np.ones(65, np.float32)}, "norm must be \\[width\\]"),
    ],
)
def test_a_node_that_makes_no_sense_is_refused_when_it_is_loaded(changes: dict[str, Any], message: str) -> None:
    matrix, x = Matrix(32, 64, 8, 64, minima=False), np.zeros((1, 64), np.float32)
    attributes: dict[str, Any] = {"bits": 8, "gate": 0, "epsilon": 0.0}
    attributes |= {name: value for name, value in changes.items() if name in attributes}
    constants = {**matrix.constants(), **{name: value for name, value in changes.items() if name not in attributes}}
    with pytest.raises(Exception, match=message):
        Operator("Linear", INPUTS, {"x": x}, constants, **attributes)


@pytest.mark.parametrize("name", ["values", "scales", "minima", "norm", "bias"])
def test_a_weight_that_is_computed_is_refused_when_it_is_loaded(name: str) -> None:
    matrix, x = Matrix(32, 64, 8, 64, minima=True), np.zeros((1, 64), np.float32)
    weights = {**matrix.constants(), "norm": np.ones(64, np.float32), "bias": np.ones(32, np.float32)}
    fed = {"x": x, name: weights.pop(name)}
    with pytest.raises(Exception, match="every weight must be an initializer"):
        Operator("Linear", INPUTS, fed, weights, bits=8, gate=0, epsilon=0.0)


@pytest.mark.parametrize("shape", [(2, 32), (1, 31), (32,), (), (0, 32)])
def test_a_residual_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    matrix, fed = Matrix(32, 64, 8, 64, minima=False), {"x": np.zeros((1, 64), np.float32)}
    fed["residual"] = np.zeros(shape, np.float32)
    operator = Operator("Linear", INPUTS, fed, matrix.constants(), bits=8, gate=0, epsilon=0.0)
    with pytest.raises(Exception, match="residual must be"):
        operator(**fed)


def test_an_input_of_another_width_is_refused() -> None:
    matrix = Matrix(32, 64, 8, 64, minima=False)
    x = np.zeros((1, 65), np.float32)
    operator = Operator("Linear", INPUTS, {"x": x}, matrix.constants(), bits=8, gate=0, epsilon=0.0)
    with pytest.raises(Exception, match="x must be"):
        operator(x=x)
