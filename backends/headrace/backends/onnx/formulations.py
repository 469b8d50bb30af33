"""How each quantisation writes what depends on it: the products with weights, and the look-up of embeddings.

Whatever is added here must give a row the same bits however many rows are computed with it: the tests hold every
formulation to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.backends.onnx.quantize import quantize_blocks
from headrace.backends.onnx.writer import MICROSOFT, GraphBuilder

BLOCK_SIZE = 64
"""Of int8 weights, along the inputs. 32 loses less; with AVX-512 VNNI it is slower, and there 128 makes a row's bits
depend on the rows beside it."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [outputs, inputs], not read yet. Matrices of one name are stored once."""

    name: str
    shape: tuple[int, int]
    read: Callable[[], NDArray[np.float32]]


class Formulation(Protocol):
    """A way to compute with matrices."""

    def linear(self, graph: GraphBuilder, x: str, matrix: Matrix, output: str) -> str:
        """``x`` [T, inputs] times the transpose of ``matrix``: [T, outputs]. Returns ``output``."""

    def embedding(self, graph: GraphBuilder, ids: str, matrix: Matrix, output: str) -> str:
        """The rows ``ids`` [T] of ``matrix``: [T, inputs]. Returns ``output``."""


class Float32:
    """float32 throughout."""

    def linear(self, graph: GraphBuilder, x: str, matrix: Matrix, output: str) -> str:
        # Gemm, unlike MatMul, takes the weight the way round it is stored.
        return graph.node("Gemm", [x, self._stored(graph, matrix)], output, transB=1)

    def embedding(self, graph: GraphBuilder, ids: str, matrix: Matrix, output: str) -> str:
        return graph.node("Gather", [self._stored(graph, matrix), ids], output, axis=0)

    def _stored(self, graph: GraphBuilder, matrix: Matrix) -> str:
        (name,) = graph.stored([matrix.name], lambda: [matrix.read()])
        return name


class Int8:
    """int8 weights in blocks. Activations are quantised on the fly in the same blocks, and multiplied as integers."""

    def linear(self, graph: GraphBuilder, x: str, matrix: Matrix, output: str) -> str:
        outputs, inputs = matrix.shape
        return graph.node(
            "MatMulNBits",
            [x, *self._stored(graph, matrix)],
            output,
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=8,
            block_size=BLOCK_SIZE,
            accuracy_level=4,  # the one with int8 activations
        )

    def embedding(self, graph: GraphBuilder, ids: str, matrix: Matrix, output: str) -> str:
        values, scales = self._stored(graph, matrix)
        rows, width = matrix.shape
        padded_width = -(-width // BLOCK_SIZE) * BLOCK_SIZE
        # The same bytes: MatMulNBits takes the blocks as a dimension of their own, GatherBlockQuantized does not.
        table = graph.view(f"{matrix.name}.table", values, (rows, padded_width))
        found = graph.node(
            "GatherBlockQuantized",
            [table, ids, scales],
            output if padded_width == width else f"{output}.padded",
            domain=MICROSOFT,
            bits=8,
            block_size=BLOCK_SIZE,
            gather_axis=0,
            quantize_axis=1,
        )
        if padded_width == width:
            return found
        start, end, axis = (
            graph.integers(f"{output}.{k}", [v]) for k, v in (("start", 0), ("end", width), ("axis", 1))
        )
        return graph.node("Slice", [found, start, end, axis], output)

    def _stored(self, graph: GraphBuilder, matrix: Matrix) -> tuple[str, str]:
        values, scales = graph.stored(
            [f"{matrix.name}.values", f"{matrix.name}.scales"], lambda: quantize_blocks(matrix.read(), BLOCK_SIZE)
        )
        return values, scales


FORMULATIONS: dict[str, Formulation] = {"fp32": Float32(), "int8": Int8()}
"""By the manifest's ``quantization``."""
