"""Writes an ONNX graph and, one tensor at a time, the file of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

HEADRACE = "headrace"
"""The domain of the operators in the package ``headrace-kernels``."""

_PAGE_BYTES = 4096
_OPSETS = {"": 21, MICROSOFT: 1, HEADRACE: 1}
_IR_VERSION = 10


class WeightFile:
    """Appends tensors to the file of weights; a context manager. Each tensor starts at a page."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._stored: dict[str, TensorProto] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def store(self, names: Sequence[str], make: Callable[[], Sequence[NDArray[Any]]]) -> list[TensorProto]:
        """References to the tensors ``names``. They are made and written the first time they are asked for: several
        graphs, and several nodes of one, can use the same ones.
        """
        if names[0] not in self._stored:
            for name, array in zip(names, make(), strict=True):
                self._stored[name] = self._append(name, array)
        return [self._stored[name] for name in names]

    def view(self, name: str, stored: str, shape: Sequence[int]) -> TensorProto:
        """Another reference to the bytes of a stored tensor, of another shape."""
        tensor = TensorProto()
        tensor.CopyFrom(self._stored[stored])
        tensor.name = name
        tensor.dims[:] = shape
        return tensor

    def _append(self, name: str, array: NDArray[Any]) -> TensorProto:
        self._file.write(bytes(-self._file.tell() % _PAGE_BYTES))
        tensor = TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": self._path.name, "offset": self._file.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        # As bytes: bfloat16 has no buffers of its own.
        self._file.write(np.ascontiguousarray(array).view(np.uint8).data)
        return tensor


class GraphBuilder:
    """Collects the nodes of a graph and the tensors they use."""

    def __init__(self, weights: WeightFile) -> None:
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._converted: set[str] = set()

    def node(self, op: str, inputs: Sequence[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node. Returns the name of its first output."""
        self._nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def copy(self, node: onnx.NodeProto) -> None:
        """Adds a node of another graph."""
        self._nodes.append(node)

    def keep(self, tensor: TensorProto) -> None:
        """Uses a tensor of another graph, kept in this one."""
        self._initializers[tensor.name] = tensor

    def stored(self, names: Sequence[str], make: Callable[[], Sequence[NDArray[Any]]]) -> Sequence[str]:
        """Uses tensors of the weight file (``WeightFile.store``). Returns their names."""
        self._initializers |= zip(names, self._weights.store(names, make), strict=True)
        return names

    def view(self, name: str, stored: str, shape: Sequence[int]) -> str:
        """Uses the bytes of a stored tensor in another shape. Returns ``name``."""
        self._initializers[name] = self._weights.view(name, stored, shape)
        return name

    def as_type(self, tensor: str, element: int) -> str:
        """A stored float32 or 16-bit tensor, or what is computed from such alone, as another type of ``TensorProto``:
        ONNX Runtime converts it once, when it loads the graph. Returns the result's name.
        """
        name = f"{tensor}.{TensorProto.DataType.Name(element).lower()}"
        if name not in self._converted:
            self._converted.add(name)
            self.node("Cast", [tensor], name, to=element)
        return name

    def integers(self, name: str, values: Sequence[int]) -> str:
        """Uses a few integers, kept in the graph: ONNX Runtime wants to see shapes while it loads. Returns ``name``."""
        self._initializers[name] = onnx.numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def scalar(self, name: str, value: np.generic) -> str:
        """Uses a number, kept in the graph. Returns ``name``."""
        self._initializers[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def names_used(self) -> set[str]:
        """Of what the nodes read: tensors and other nodes' outputs."""
        return {name for node in self._nodes for name in _names_used(node)}

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        versions: Mapping[str, int] = MappingProxyType({}),
    ) -> onnx.ModelProto:
        """The finished model. ``versions`` are of the sets of operators that copied nodes were written for."""
        # A tensor may have been asked for only to be viewed in another shape.
        used = self.names_used()
        initializers = [tensor for name, tensor in self._initializers.items() if name in used]
        graph = helper.make_graph(self._nodes, "decoder", inputs, outputs, initializers)
        domains = {"", *(node.domain for node in self._nodes)}
        ours = {domain: version for domain, version in _OPSETS.items() if domain in domains}
        opsets = [helper.make_opsetid(domain, version) for domain, version in {**ours, **versions}.items()]
        model: onnx.ModelProto = helper.make_model(
            graph, ir_version=_IR_VERSION, opset_imports=opsets, producer_name="headrace"
        )
        return model


def _names_used(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads: also what the graphs in it, the branches of an If, take from around them."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _names_used(inner)
            yield from (output.name for output in graph.output)
