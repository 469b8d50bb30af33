"""Computes many products and attentions, and prints which instruction set they were computed with and a digest of each.
A program, since a process settles on one instruction set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import headrace_kernels
import numpy as np
from numpy.typing import NDArray

from tests.kernels.operators import Operator
from tests.kernels.test_attention_operator import Layer
from tests.kernels.test_linear_operator import INPUTS, Matrix, activations

ROWS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 15, 16, 17, 18, 31, 32, 33, 65, 100)
"""Around what methods compute together."""


def products() -> Iterator[tuple[str, NDArray[np.float32]]]:
    shapes = [
        (8, 64, False),
        (8, 64, True),
        (8, 32, False),
        (8, 32, True),
        (8, 16, False),
        (8, 128, True),
        (4, 32, True),
    ]
    for bits, block, minima in shapes:
        for halves in (False, True):
            first, second = (_matrix(96, 3 * max(block, 64), bits, block, minima, halves, seed) for seed in (1, 2))
            for gate in (0, 1, 2):
                for rows in ROWS:
                    name = f"{bits} bits, blocks of {block}, minima {minima}, halves {halves}, gate {gate}, {rows} rows"
                    yield name, _product(first, second, bits, gate, rows)
    # As large as a model's: many tiles, and several groups of rows.
    large = _matrix(1_000, 576, 8, 64, False, True, 3)
    for rows in (1, 8, 32, 200):
        yield f"1,000 outputs, {rows} rows", _product(large, large, 8, 0, rows)


def _matrix(outputs: int, inputs: int, bits: int, block: int, minima: bool, halves: bool, seed: int) -> Matrix:
    matrix = Matrix(outputs, inputs, bits, block, minima=minima, seed=seed)
    if halves:
        matrix.scales = matrix.scales.astype(np.float16).astype(np.float32)
        matrix.minima = None if matrix.minima is None else matrix.minima.astype(np.float16).astype(np.float32)
    return matrix


def _product(first: Matrix, second: Matrix, bits: int, gate: int, rows: int) -> NDArray[np.float32]:
    outputs, inputs = first.weight.shape
    dice = np.random.default_rng(rows)
    x = activations(rows, inputs - 5, seed=rows)
    if rows > 3:
        x[1, 7], x[3, 9] = np.nan, np.inf
    fed = {"x": x, "residual": dice.normal(size=(rows, outputs)).astype(np.float32)}
    constants: dict[str, NDArray[Any]] = first.constants() | {"norm": dice.normal(size=inputs - 5).astype(np.float32)}
    if gate:
        constants |= second.constants("gated_")
    out = Operator("Linear", INPUTS, fed, constants, bits=bits, gate=gate, epsilon=1e-5)(**fed)
    out[np.isnan(out)] = np.nan  # which of the many is nobody's concern
    return out


def attentions() -> Iterator[tuple[str, NDArray[np.float32]]]:
    for cells in ("float16", "int8"):
        for heads, kv_heads, size, window in (
            (9, 3, 64, 0),
            (4, 4, 16, 0),
            (16, 1, 128, 20),
            (14, 2, 80, 0),
            (5, 1, 256, 70),
        ):
            layer = Layer(heads, kv_heads, size, cells=cells, window=window, norms=size == 128)
            tokens = layer.sequence(200, seed=size)
            pieces = [(0, 0, tokens[:130]), (1, 0, tokens[:17]), (2, 0, tokens[:64])]
            for number, out in enumerate(
                layer.run(*pieces) + layer.run((0, 130, tokens[130:]), (1, 17, tokens[17:18]))
            ):
                yield f"{heads} heads of {size} over {kv_heads}, window {window}, {cells}, piece {number}", out


if __name__ == "__main__":
    digests = {
        name: hashlib.sha256(out.tobytes()).hexdigest() for cases in (products(), attentions()) for name, out in cases
    }
    print(json.dumps({"instruction_set": headrace_kernels.instruction_set(), "digests": digests}))
