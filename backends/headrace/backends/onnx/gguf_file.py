"""The container format of GGUF: metadata, and where each tensor lies.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length in the file is checked against the file's size
before it is used, so that a damaged or hostile file ends in an error, never in a hang or a huge allocation (the reader
in the ``gguf`` package trusts them).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from headrace.backends.onnx.bundle import ModelFileError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NESTING = 2  # of arrays; the format allows more, no model uses it

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
"""Type number: its struct format."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is stored."""

    shape: tuple[int, ...]
    """Slowest dimension first, as numpy has it."""
    kind: Any
    """A ``GGMLQuantizationType``."""
    offset: int
    """From the beginning of the file."""
    num_bytes: int


class GgufFile:
    """An open GGUF file; a context manager. Raises ModelFileError from every method."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as exc:
            raise ModelFileError(f"cannot read {path}: {exc.strerror}") from exc
        except ValueError:
            raise ModelFileError(f"{path}: not a GGUF file: it is empty") from None
        try:
            self.metadata, self.tensors = _Parser(path, self._data).parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmaps the file."""
        self._data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32, whatever it is stored as."""
        info = self.tensors[name]
        # Copied, so that no array outlives the mapping.
        raw = np.frombuffer(self._data[info.offset : info.offset + info.num_bytes], np.uint8)
        block_size, block_bytes = GGML_QUANT_SIZES[info.kind]
        row_bytes = info.shape[-1] // block_size * block_bytes
        try:
            values: NDArray[np.float32] = dequantize(raw.reshape(*info.shape[:-1], row_bytes), info.kind)
        except NotImplementedError as exc:
            raise ModelFileError(f"{self.path}: tensor {name!r} has unsupported type {info.kind.name}") from exc
        values = np.ascontiguousarray(values, np.float32).reshape(info.shape)
        if not np.isfinite(values).all():
            raise ModelFileError(f"{self.path}: damaged: tensor {name!r} has values that are not finite")
        return values


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._position = 0
        self._end = len(data)

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self._take(len(_MAGIC)) != _MAGIC:
            raise ModelFileError(f"{self._path}: not a GGUF file")
        version = self._scalar("<I")
        if version not in _VERSIONS:
            what = "big-endian" if version & 0xFFFF == 0 else f"of version {version}, not {_VERSIONS[-1]}"
            raise ModelFileError(f"{self._path}: unsupported GGUF file: it is {what}")
        num_tensors, num_fields = self._scalar("<Q"), self._scalar("<Q")

        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"metadata {key!r} occurs twice")
            metadata[key] = self._value(self._scalar("<I"))

        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged("general.alignment is no power of two")
        headers = [self._tensor_header() for _ in range(num_tensors)]
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in headers:
            if name in tensors:
                raise self._damaged(f"tensor {name!r} occurs twice")
            tensors[name] = self._tensor(name, shape, kind, data_start + offset)
        return metadata, tensors

    def _tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._scalar("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(reversed([int(self._scalar("<Q")) for _ in range(num_dimensions)]))
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind_number: int, offset: int) -> TensorInfo:
        try:
            kind = GGMLQuantizationType(kind_number)
        except ValueError:
            raise ModelFileError(f"{self._path}: tensor {name!r} has unknown type {kind_number}") from None
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block_size:
            raise self._damaged(f"tensor {name!r} has shape {list(shape)}, which {kind.name} cannot store")
        num_bytes = math.prod(shape) // block_size * block_bytes
        if offset + num_bytes > self._end:
            raise self._damaged(f"tensor {name!r} lies beyond the end of the file; is it cut short?")
        return TensorInfo(shape, kind, offset, num_bytes)

    def _value(self, kind: int, nesting: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(nesting)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        raise self._damaged(f"metadata has unknown type {kind}")

    def _array(self, nesting: int) -> list[Any]:
        kind, length = self._scalar("<I"), self._scalar("<Q")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            values: list[Any] = np.frombuffer(self._take(length * dtype.itemsize), dtype).tolist()
            return values
        if nesting == _MAX_NESTING:
            raise self._damaged("metadata has arrays too deep in arrays")
        return [self._value(kind, nesting + 1) for _ in range(length)]

    def _string(self) -> str:
        try:
            return str(self._take(self._scalar("<Q")), "utf-8")
        except UnicodeDecodeError:
            raise self._damaged("metadata has text that is not UTF-8") from None

    def _scalar(self, layout: str) -> Any:
        (value,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return value

    def _take(self, num_bytes: int) -> bytes:
        start = self._position
        if num_bytes > self._end - start:
            raise self._damaged("it ends too early")
        self._position = start + num_bytes
        return self._data[start : self._position]

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: damaged GGUF file: {what}")
