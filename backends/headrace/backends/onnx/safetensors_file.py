"""A folder of weights in the format of ``safetensors``: one file, or several and an index."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Teaches numpy the type bfloat16, which safetensors asks it for.
import ml_dtypes  # noqa: F401
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from headrace.backends.onnx.bundle import ModelFileError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}


class SafetensorsFolder:
    """The open files of a folder. Raises ModelFileError from every method."""

    def __init__(self, folder: Path, tensors: dict[str, Any], files: tuple[str, ...]) -> None:
        self._folder = folder
        self._tensors = tensors
        self.names = files
        """The names of all files that were opened."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, file in tensors.items():
            view = file.get_slice(name)
            if view.get_dtype() not in _FLOATS:
                raise ModelFileError(f"{folder}: unsupported: tensor {name!r} has type {view.get_dtype()}")
            self.shapes[name] = tuple(view.get_shape())

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32, whatever it is stored as."""
        try:
            values = np.ascontiguousarray(self._tensors[name].get_tensor(name), np.float32)
        except SafetensorError as exc:
            raise ModelFileError(f"{self._folder}: damaged: tensor {name!r}: {_one_line(exc)}") from exc
        if not np.isfinite(values).all():
            raise ModelFileError(f"{self._folder}: damaged: tensor {name!r} has values that are not finite")
        return values


@contextlib.contextmanager
def open_safetensors_files(folder: Path) -> Iterator[SafetensorsFolder]:
    """Opens the weights of a folder as ``transformers`` would find them. Raises ModelFileError."""
    with contextlib.ExitStack() as stack:
        if (folder / _SINGLE).exists():
            file = stack.enter_context(_open(folder / _SINGLE))
            yield SafetensorsFolder(folder, dict.fromkeys(file.keys(), file), (_SINGLE,))
            return
        if not (folder / _INDEX).exists():
            raise ModelFileError(f"{folder}: it has neither {_SINGLE} nor {_INDEX}")
        places = _weight_map(folder)
        shards = {name: stack.enter_context(_open(folder / name)) for name in sorted(set(places.values()))}
        held = {name: set(file.keys()) for name, file in shards.items()}
        for tensor, name in places.items():
            if tensor not in held[name]:
                raise ModelFileError(f"{folder / _INDEX}: damaged: {name} has no tensor {tensor!r}")
        tensors = {tensor: shards[name] for tensor, name in places.items()}
        yield SafetensorsFolder(folder, tensors, (_INDEX, *shards))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelFileError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as exc:
        raise ModelFileError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ModelFileError(f"{path}: damaged: it is no JSON: {_one_line(exc)}") from exc
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: damaged: it is no JSON object")
    return value


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / _INDEX
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelFileError(f"{path}: damaged: 'weight_map' does not name a file for each tensor")
    for name in places.values():
        # Whoever made the index must not choose what else is read here.
        if not re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", name):
            raise ModelFileError(f"{path}: damaged: {name!r} is not the name of a file in this folder")
    return places


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except OSError as exc:
        raise ModelFileError(f"cannot read {path}: {exc.strerror or _one_line(exc)}") from exc
    except SafetensorError as exc:
        raise ModelFileError(f"{path}: damaged safetensors file: {_one_line(exc)}") from exc


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split())
