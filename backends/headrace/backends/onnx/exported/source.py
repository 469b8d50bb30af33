"""Reads a folder that ``optimum-cli export onnx`` made: ``config.json``, ``model.onnx`` and the tokenizer's files.

Whoever made the folder must not choose what else is read here: weights beside the graph are in files of this folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from headrace.backends.onnx import bundle
from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.safetensors_file import read_json
from headrace.backends.onnx.safetensors_tokenizer import OPTIONAL_FILES, TOKENIZER, read_tokenizer
from headrace.backends.onnx.source import Fields, SourceTokenizer

CONFIG = "config.json"
GRAPH = "model.onnx"

_OLDER_GRAPHS = ("decoder_model_merged.onnx", "decoder_with_past_model.onnx", "decoder_model.onnx")
_PAIRS = {"Gather", "Gemm", "MatMul"}
_CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length")
"""What models call it."""


class ExportSource:
    """An export. Raises ModelFileError from every method, and where there is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not (folder / CONFIG).exists():
            raise ModelFileError(f"{folder}: not an export of Optimum: it has no {CONFIG}")
        self._config = read_json(folder / CONFIG)
        self._fields = Fields(self._config, damaged=self._damaged_config, unsupported=self._damaged_config)
        self.graph = self._read_graph()
        """Its tensors that lie in other files are not read yet."""
        self.tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in self.graph.graph.initializer}
        self._external = sorted({file.name for file in map(self._file_of, self.tensors.values()) if file is not None})
        for node in self.graph.graph.node:
            if node.op_type in _PAIRS and len(node.input) < 2:
                raise self.damaged(f"node {node.name!r}, a {node.op_type}, has {len(node.input)} inputs instead of 2")
        for tensor in _inner_tensors(self.graph.graph):
            if tensor.data_location == TensorProto.EXTERNAL:
                raise self.unsupported(f"tensor {tensor.name!r}, which a node holds, lies in another file")

    @property
    def architecture(self) -> str:
        kind = self._config.get("model_type")
        if not isinstance(kind, str) or not kind:
            raise self._damaged_config(f"'model_type' is {kind!r} instead of a name")
        return kind

    def context_length(self, wanted: int | None) -> int:
        """``wanted``, or if that is ``None`` as many tokens as the model can take."""
        key = next((key for key in _CONTEXT_LENGTHS if key in self._fields), None)
        if key is None:
            if wanted is None:
                names = ", ".join(_CONTEXT_LENGTHS)
                raise self._damaged_config(f"it says no context length ({names}): say it with --context-length")
            return wanted
        most = self._fields.count(key)
        if wanted is not None and wanted > most:
            raise ModelFileError(f"{self._folder / CONFIG}: {key!r} is {most}: a context of {wanted} would be longer")
        return wanted or most

    def tokenizer(self, num_logits: int) -> SourceTokenizer:
        """The tokenizer of a model with so many logits."""
        return read_tokenizer(self._folder, self._config, num_logits)

    def describe(self) -> bundle.Source:
        """The folder's name, and one digest of all files that were read, made as a bundle's is."""
        optional = [name for name in OPTIONAL_FILES if (self._folder / name).exists()]
        names = [CONFIG, GRAPH, TOKENIZER, *optional, *self._external]
        digest = bundle.bundle_digest({name: bundle.hash_file(self._folder / name) for name in names})
        return bundle.Source(file_name=self._folder.resolve().name, sha256=digest.removeprefix("sha256:"))

    def read(self, tensor: TensorProto) -> NDArray[np.generic]:
        """The values of a tensor. Those of other files are mapped: each is read when it is used."""
        path = self._file_of(tensor)
        try:
            if path is None:
                array: NDArray[np.generic] = onnx.numpy_helper.to_array(tensor)
                return array
            dtype, shape = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
            offset = int(next((entry.value for entry in tensor.external_data if entry.key == "offset"), "0"))
        except (ValueError, TypeError, KeyError) as exc:
            raise self.damaged(f"tensor {tensor.name!r} cannot be read: {' '.join(str(exc).split())}") from exc
        if min(offset, *shape, 0) < 0 or offset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
            raise self.damaged(f"tensor {tensor.name!r} does not lie within {path.name}")
        return np.memmap(path, dtype, "r", offset, shape) if math.prod(shape) else np.empty(shape, dtype)

    def damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._folder / GRAPH}: damaged: {what}")

    def unsupported(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._folder / GRAPH}: unsupported: {what}")

    def _damaged_config(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._folder / CONFIG}: damaged: {what}")

    def _read_graph(self) -> onnx.ModelProto:
        path = self._folder / GRAPH
        if not path.exists():
            older = next((name for name in _OLDER_GRAPHS if (self._folder / name).exists()), None)
            what = f"{older} is of an older Optimum" if older else f"it has no {GRAPH}"
            raise ModelFileError(f"{self._folder}: {what}; export the model with optimum-onnx 0.1 or newer")
        try:
            return onnx.load_model(path, load_external_data=False)
        except OSError as exc:
            raise ModelFileError(f"cannot read {path}: {exc.strerror or exc}") from exc
        except Exception as exc:  # protobuf's DecodeError, which has no other base
            raise self.damaged("it is no ONNX model") from exc

    def _file_of(self, tensor: TensorProto) -> Path | None:
        """The file beside the graph that a tensor lies in, ``None`` for one in the graph."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return None
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        path = self._folder / location
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", location) or path.is_symlink() or not path.is_file():
            raise self.damaged(f"tensor {tensor.name!r} lies in {location!r}, which is no file of this folder")
        return path


def _inner_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """The tensors that nodes hold, and those of the graphs in them."""
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from inner.initializer
                yield from _inner_tensors(inner)
