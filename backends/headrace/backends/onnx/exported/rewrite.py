"""Writes an exported graph anew: its weights in the bundle's file, quantised where products and look-ups allow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from headrace.backends.onnx.exported.source import ExportSource
from headrace.backends.onnx.formulations import Int8, Matrix
from headrace.backends.onnx.writer import GraphBuilder, WeightFile

_SMALL_BYTES = 1024
"""Tensors up to this size stay in the graph: ONNX Runtime wants to see shapes and the like while it loads."""


def rewrite(
    source: ExportSource,
    weights: WeightFile,
    *,
    quantized: bool,
    num_logits: int,
    tied: Mapping[str, str],
    progress: Callable[[float], None],
) -> onnx.ModelProto:
    """The same graph over tensors in ``weights``, read and written one at a time; ``quantized``: in blocks of int8.
    Inputs and outputs keep their names. ``tied`` is what ``tied_heads`` found. Raises ModelFileError.
    """
    model = source.graph
    if model.functions:
        raise source.unsupported(
            f"function {model.functions[0].name!r}; export it with optimum-onnx, which writes none"
        )
    if model.graph.sparse_initializer:
        raise source.unsupported(f"sparse tensor {model.graph.sparse_initializer[0].values.name!r}")
    return _Rewriter(source, weights, num_logits, tied, progress).run(quantized=quantized)


def tied_heads(source: ExportSource) -> Mapping[str, str]:
    """The embedding of each matrix that is one turned over: exports hold both."""
    nodes, tensors = source.graph.graph.node, source.tensors
    tables = [tensors[node.input[0]] for node in nodes if node.op_type == "Gather" and node.input[0] in tensors]
    heads = [tensors[node.input[1]] for node in nodes if node.op_type == "MatMul" and node.input[1] in tensors]
    return {head.name: table.name for head in heads for table in tables if _is_turned(source, head, table)}


def _is_turned(source: ExportSource, head: TensorProto, table: TensorProto) -> bool:
    if len(head.dims) != 2 or list(table.dims) != [*reversed(head.dims)] or table.data_type != head.data_type:
        return False
    return np.array_equal(source.read(table), source.read(head).T)


class _Rewriter:
    def __init__(
        self,
        source: ExportSource,
        weights: WeightFile,
        num_logits: int,
        tied: Mapping[str, str],
        progress: Callable[[float], None],
    ) -> None:
        self._source = source
        self._graph = GraphBuilder(weights)
        self._num_logits = num_logits
        self._tied = tied
        self._progress = progress

    def run(self, *, quantized: bool) -> onnx.ModelProto:
        nodes = self._source.graph.graph.node
        for i, node in enumerate(nodes):
            if not (quantized and self._quantize(node)):
                self._graph.copy(node)
            self._progress(0.7 * i / len(nodes))
        for name, tensor in self._source.tensors.items():
            if _is_small(tensor):
                self._graph.keep(onnx.numpy_helper.from_array(self._source.read(tensor), name))
        used = self._graph.names_used()
        rest = [name for name, tensor in self._source.tensors.items() if name in used and not _is_small(tensor)]
        for i, name in enumerate(rest):
            self._graph.stored([name], partial(self._as_it_is, name))
            self._progress(0.7 + 0.3 * i / len(rest))
        graph = self._source.graph
        inputs = [value for value in graph.graph.input if value.name not in self._source.tensors]
        versions = {opset.domain: opset.version for opset in graph.opset_import}
        return self._graph.model(inputs, graph.graph.output, versions=versions)

    def _as_it_is(self, name: str) -> list[NDArray[np.generic]]:
        return [self._source.read(self._source.tensors[name])]

    def _quantize(self, node: onnx.NodeProto) -> bool:
        """Puts an operator on int8 in a node's place, if it can have one."""
        if node.domain not in {"", "ai.onnx"}:
            return False
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        match node.op_type:
            case "MatMul" if self._is_matrix(node.input[1]):
                Int8().linear(self._graph, node.input[0], self._matrix(node.input[1], turned=True), node.output[0])
            case "Gemm" if self._is_matrix(node.input[1]) and _is_plain(attributes):
                matrix = self._matrix(node.input[1], turned=not attributes.get("transB", 0))
                bias = node.input[2] if len(node.input) > 2 else ""
                product = f"{node.output[0]}.product" if bias else node.output[0]
                Int8().linear(self._graph, node.input[0], matrix, product)
                if bias:
                    self._graph.node("Add", [product, bias], node.output[0])
            case "Gather" if self._is_embedding(node.input[0]) and attributes.get("axis", 0) == 0:
                Int8().embedding(self._graph, node.input[1], self._matrix(node.input[0], turned=False), node.output[0])
            case _:
                return False
        return True

    def _is_matrix(self, name: str) -> bool:
        tensor = self._source.tensors.get(name)
        return tensor is not None and tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2

    def _is_embedding(self, name: str) -> bool:
        """Of tokens: tables of positions are small, and sines lose what embeddings do not."""
        return self._is_matrix(name) and self._source.tensors[name].dims[0] == self._num_logits

    def _matrix(self, name: str, *, turned: bool) -> Matrix:
        """A weight as [outputs, inputs]; ``turned``: it is stored the other way round."""
        if turned and name in self._tied:
            name, turned = self._tied[name], False
        tensor = self._source.tensors[name]
        outputs, inputs = reversed(tensor.dims) if turned else tensor.dims
        return Matrix(
            f"{name}.turned" if turned else name,
            (outputs, inputs),
            partial(_read, self._source, tensor, turned=turned),
            normalized=False,
        )


def _read(source: ExportSource, tensor: TensorProto, *, turned: bool) -> NDArray[np.float32]:
    values = np.asarray(source.read(tensor), np.float32)
    if not np.isfinite(values).all():
        raise source.damaged(f"tensor {tensor.name!r} has values that are not finite")
    return np.ascontiguousarray(values.T if turned else values)


def _is_small(tensor: TensorProto) -> bool:
    itemsize: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    count: int = math.prod(tensor.dims)
    return count * itemsize <= _SMALL_BYTES


def _is_plain(attributes: Mapping[str, float]) -> bool:
    """Whether a Gemm only multiplies and adds."""
    return attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
