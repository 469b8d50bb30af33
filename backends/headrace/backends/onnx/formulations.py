"""How each quantisation writes what depends on it: the products with weights, and the look-up of embeddings.

Whatever is added here must give a row the same bits however many rows are computed with it: the tests hold every
formulation to that, on the CPU. Of what ``Pageable.on_device`` returns nothing of the kind is known: the CUDA provider
chooses its kernels by the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.quantize import ZERO_POINT, quantize_blocks, quantize_channels, quantize_minima
from headrace.backends.onnx.writer import MICROSOFT, GraphBuilder

BLOCK_SIZE = 64
"""Of ``Int8``'s weights, along the inputs. 32 loses less; with AVX-512 VNNI it is slower, and there 128 makes a row's
bits depend on the rows beside it."""

_SMALL_BLOCK_SIZE = 32
"""Of ``Int4``'s weights: that of most files of 4 bits."""

_NORMALIZED_LARGEST = 4.2
"""Where rotated rows of unit root mean square are clipped. They are all but normally distributed, so that one value in
40,000 lies outside; 4.0 to 4.5 lose the same."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [outputs, inputs], not read yet. Matrices of one name are stored once."""

    name: str
    shape: tuple[int, int]
    read: Callable[[], NDArray[np.float32]]
    normalized: bool
    """Whether the rows it is multiplied with come out of a norm: their root mean square is then that of its scale."""


class Formulation(Protocol):
    """A way to compute with matrices."""

    @property
    def rotated(self) -> bool:
        """Whether it relies on weights that ``rotation.rotated`` has rewritten."""

    @property
    def activations(self) -> int:
        """The type, of ``TensorProto``, of what is multiplied with matrices, and of what comes out."""

    def linear(self, graph: GraphBuilder, x: str, matrix: Matrix, output: str) -> str:
        """``x`` [T, inputs] times the transpose of ``matrix``: [T, outputs]. Returns ``output``."""

    def embedding(self, graph: GraphBuilder, ids: str, matrix: Matrix, output: str) -> str:
        """The rows ``ids`` [T] of ``matrix``: [T, inputs]. Returns ``output``."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A stored matrix of integers in blocks: names of tensors."""

    bits: int
    values: str
    """uint8 [outputs, blocks, block_size × bits / 8]; zero is 2^(bits - 1), or 0 with minima."""
    scales: str
    """float32 [outputs, blocks]"""
    minima: str
    """Shaped as ``scales``; empty if there are none."""


@runtime_checkable
class Blockwise(Formulation, Protocol):
    """A formulation whose matrices the operators of ``headrace-kernels`` can read."""

    def blocks(self, graph: GraphBuilder, matrix: Matrix) -> Blocks:
        """Stores ``matrix``, or finds it stored."""


@runtime_checkable
class Pageable(Formulation, Protocol):
    """A formulation that the operators of ONNX Runtime's CUDA provider can compute with."""

    def on_device(self) -> Formulation:
        """The same, of the same stored tensors, with activations of 16 bits."""


class Float32:
    """float32 throughout."""

    rotated = False
    activations = TensorProto.FLOAT

    def linear(self, graph: GraphBuilder, x: str, matrix: Matrix, output: str) -> str:
        # Gemm, unlike MatMul, takes the weight the way round it is stored.
        return graph.node("Gemm", [x, self._stored(graph, matrix)], output, transB=1)

    def embedding(self, graph: GraphBuilder, ids: str, matrix: Matrix, output: str) -> str:
        return graph.node("Gather", [self._stored(graph, matrix), ids], output, axis=0)

    def _stored(self, graph: GraphBuilder, matrix: Matrix) -> str:
        (name,) = graph.stored([matrix.name], lambda: [matrix.read()])
        return name


@dataclass(frozen=True, slots=True)
class Half:
    """Weights of 16 bits. Without a device they become float32 when the graph is loaded, in twice the memory that they
    have on disk, and all is computed in that.
    """

    dtype: np.dtype[Any]
    stored: int
    """``dtype`` as a type of ``TensorProto``."""
    activations: int = TensorProto.FLOAT

    @property
    def rotated(self) -> bool:
        return False

    def linear(self, graph: GraphBuilder, x: str, matrix: Matrix, output: str) -> str:
        return graph.node("Gemm", [x, self._weight(graph, matrix)], output, transB=1)

    def embedding(self, graph: GraphBuilder, ids: str, matrix: Matrix, output: str) -> str:
        return graph.node("Gather", [self._weight(graph, matrix), ids], output, axis=0)

    def on_device(self) -> Formulation:
        return replace(self, activations=self.stored)

    def _weight(self, graph: GraphBuilder, matrix: Matrix) -> str:
        (name,) = graph.stored([matrix.name], lambda: [self._rounded(matrix)])
        return name if self.activations == self.stored else graph.as_type(name, self.activations)

    def _rounded(self, matrix: Matrix) -> NDArray[Any]:
        weight = matrix.read()
        with np.errstate(over="ignore"):
            rounded = weight.astype(self.dtype)
        if not np.isfinite(rounded).all():
            raise ModelFileError(
                f"{matrix.name} has weights of up to {np.abs(weight).max():.3g}, which {self.dtype} cannot hold: "
                "take bf16 or fp32"
            )
        return rounded


@dataclass(frozen=True, slots=True)
class Int8:
    """int8 weights in blocks. Activations are quantised on the fly in the same blocks, and multiplied as integers; but
    not on a device.
    """

    activations: int = TensorProto.FLOAT

    @property
    def rotated(self) -> bool:
        return False

    def linear(self, graph: GraphBuilder, x: str, matrix: Matrix, output: str) -> str:
        return _linear8(graph, x, matrix, output, BLOCK_SIZE, self.activations)

    def embedding(self, graph: GraphBuilder, ids: str, matrix: Matrix, output: str) -> str:
        return _embedding(graph, ids, matrix, output, BLOCK_SIZE, self.activations)

    def on_device(self) -> Formulation:
        return Int8(TensorProto.FLOAT16)

    def blocks(self, graph: GraphBuilder, matrix: Matrix) -> Blocks:
        values, scales = _stored_blocks(graph, matrix, BLOCK_SIZE)
        return Blocks(8, values, scales, "")


@dataclass(frozen=True, slots=True)
class Int4:
    """int4 weights in blocks with minima, but for embeddings and head, which are int8.

    What comes from a file of such blocks stays what it was.
    """

    activations: int = TensorProto.FLOAT

    @property
    def rotated(self) -> bool:
        return False

    def linear(self, graph: GraphBuilder, x: str, matrix: Matrix, output: str) -> str:
        if matrix.name in _TABLES:
            return _linear8(graph, x, matrix, output, _SMALL_BLOCK_SIZE, self.activations)
        values, scales, minima = self._stored(graph, matrix)
        # MatMulNBits takes 8 for zero. What that leaves out of a block is one number times the sum of its inputs. (Zero
        # points that are no integers say the same, but then the CUDA provider expands the matrix for every product.)
        weights = (values, converted(graph, scales, self.activations))
        product = _product(graph, x, weights, matrix, f"{output}.symmetric", 4, _SMALL_BLOCK_SIZE, self.activations)
        eight = graph.scalar("eight", np.float32(8))
        offsets = graph.node("Mul", [scales, eight], f"{matrix.name}.offsets")
        left_out = graph.node("Add", [minima, offsets], f"{matrix.name}.left_out")
        left_out = converted(graph, left_out, self.activations)
        sums = self._block_sums(graph, x, matrix.shape[1], f"{matrix.name}.inputs")
        return graph.node("Gemm", [sums, left_out, product], output, transB=1)

    def embedding(self, graph: GraphBuilder, ids: str, matrix: Matrix, output: str) -> str:
        return _embedding(graph, ids, matrix, output, _SMALL_BLOCK_SIZE, self.activations)

    def on_device(self) -> Formulation:
        return Int4(TensorProto.FLOAT16)

    def blocks(self, graph: GraphBuilder, matrix: Matrix) -> Blocks:
        if matrix.name in _TABLES:
            values, scales = _stored_blocks(graph, matrix, _SMALL_BLOCK_SIZE)
            return Blocks(8, values, scales, "")
        return Blocks(4, *self._stored(graph, matrix))

    @staticmethod
    def _block_sums(graph: GraphBuilder, x: str, width: int, name: str) -> str:
        """[T, blocks]"""
        if missing := -width % _SMALL_BLOCK_SIZE:
            x = graph.node("Pad", [x, graph.integers(f"pad_{missing}", [0, 0, 0, missing])], f"{name}.padded")
        shape = graph.integers("block_shape", [0, -1, _SMALL_BLOCK_SIZE])
        blocks = graph.node("Reshape", [x, shape], f"{name}.blocks")
        return graph.node("ReduceSum", [blocks, graph.integers("last_axis", [-1])], f"{name}.sums", keepdims=0)

    @staticmethod
    def _stored(graph: GraphBuilder, matrix: Matrix) -> tuple[str, str, str]:
        values, scales, minima = graph.stored(
            [f"{matrix.name}.{part}" for part in ("values", "scales", "minima")],
            lambda: quantize_minima(matrix.read(), _SMALL_BLOCK_SIZE),
        )
        return values, scales, minima


class ChannelInt8:
    """int8 weights with a scale for each output, and uint8 activations: plain integer products, the fastest there are.

    One step for a whole row of activations is only good enough because the weights are rotated: that leaves no
    outliers in what a norm puts out, whose step can be the same for every row and model. Other rows get their own.
    Embeddings are those of ``Int8``.
    """

    rotated = True
    activations = TensorProto.FLOAT

    def linear(self, graph: GraphBuilder, x: str, matrix: Matrix, output: str) -> str:
        weights = graph.stored(
            [f"{matrix.name}.values", f"{matrix.name}.scales"], lambda: quantize_channels(matrix.read())
        )
        if matrix.normalized:
            return self._product(graph, x, _NORMALIZED_LARGEST, matrix.name, weights, output)
        # Rows are divided by their largest magnitude, and the product is multiplied by it. A row of zeros becomes
        # 0 / 0, then some integer or other, and then zeros again.
        magnitudes = graph.node("Abs", [x], f"{matrix.name}.magnitudes")
        last = graph.integers("last_axis", [-1])
        largest = graph.node("ReduceMax", [magnitudes, last], f"{matrix.name}.largest", keepdims=1)
        divided = graph.node("Div", [x, largest], f"{matrix.name}.divided")
        product = self._product(graph, divided, 1.0, matrix.name, weights, f"{output}.divided")
        return graph.node("Mul", [product, largest], output)

    def embedding(self, graph: GraphBuilder, ids: str, matrix: Matrix, output: str) -> str:
        return _embedding(graph, ids, matrix, output, BLOCK_SIZE, self.activations)

    @staticmethod
    def _product(graph: GraphBuilder, x: str, largest: float, name: str, weights: Sequence[str], output: str) -> str:
        """The product of ``x``, between ``-largest`` and ``largest``; what lies outside is clipped."""
        values, scales = weights
        step = graph.scalar(f"step_{largest}", np.float32(largest / 127))
        zero_point = graph.scalar("zero_point", np.uint8(ZERO_POINT))
        # Matrices that share an x quantise it once: ONNX Runtime merges equal nodes.
        quantized = graph.node("QuantizeLinear", [x, step, zero_point], f"{name}.quantized")
        return graph.node(
            "MatMulIntegerToFloat", [quantized, values, step, scales, zero_point], output, domain=MICROSOFT
        )


_TABLES = frozenset({"embedding", "head"})


def _stored_blocks(graph: GraphBuilder, matrix: Matrix, block_size: int) -> Sequence[str]:
    """A matrix in int8 blocks: its values and its scales."""
    return graph.stored(
        [f"{matrix.name}.values", f"{matrix.name}.scales"], lambda: quantize_blocks(matrix.read(), block_size)
    )


def _linear8(graph: GraphBuilder, x: str, matrix: Matrix, output: str, block_size: int, activations: int) -> str:
    """``Formulation.linear`` with a matrix in int8 blocks."""
    values, scales = _stored_blocks(graph, matrix, block_size)
    weights = (values, converted(graph, scales, activations))
    return _product(graph, x, weights, matrix, output, 8, block_size, activations)


def _product(
    graph: GraphBuilder,
    x: str,
    weights: tuple[str, str],
    matrix: Matrix,
    output: str,
    bits: int,
    block_size: int,
    activations: int,
) -> str:
    """The product with values and scales of a matrix in blocks, without its minima."""
    outputs, inputs = matrix.shape
    # 4 is the level with int8 activations. Those of 16 bits are multiplied as they are.
    level = {"accuracy_level": 4} if activations == TensorProto.FLOAT else {}
    return graph.node(
        "MatMulNBits",
        [x, *weights],
        output,
        domain=MICROSOFT,
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=block_size,
        **level,
    )


def converted(graph: GraphBuilder, tensor: str, activations: int) -> str:
    """A stored float32 tensor in the type of activations; ``quantize`` makes scales and minima that float16 holds."""
    return tensor if activations == TensorProto.FLOAT else graph.as_type(tensor, activations)


def _embedding(graph: GraphBuilder, ids: str, matrix: Matrix, output: str, block_size: int, activations: int) -> str:
    """``Formulation.embedding`` of a matrix in int8 blocks."""
    values, stored = _stored_blocks(graph, matrix, block_size)
    scales = converted(graph, stored, activations)
    rows, width = matrix.shape
    padded_width = -(-width // block_size) * block_size
    # The same bytes: MatMulNBits takes the blocks as a dimension of their own, GatherBlockQuantized does not.
    table = graph.view(f"{matrix.name}.table", values, (rows, padded_width))
    found = graph.node(
        "GatherBlockQuantized",
        [table, ids, scales],
        output if padded_width == width else f"{output}.padded",
        domain=MICROSOFT,
        bits=8,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    if padded_width == width:
        return found
    start, end, axis = (graph.integers(f"{output}.{k}", [v]) for k, v in (("start", 0), ("end", width), ("axis", -1)))
    return graph.node("Slice", [found, start, end, axis], output)


FORMULATIONS: dict[str, Formulation] = {
    "fp32": Float32(),
    "fp16": Half(np.dtype(np.float16), TensorProto.FLOAT16),
    "bf16": Half(np.dtype(ml_dtypes.bfloat16), TensorProto.BFLOAT16),
    "int8": Int8(),
    "int4": Int4(),
    "w8a8": ChannelInt8(),
}
"""By the manifest's ``quantization``."""
