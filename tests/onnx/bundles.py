"""Bundles of the tiny model, and what is loaded from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.backends.onnx.build import build_bundle
from headrace.backends.onnx.bundle import read_manifest
from headrace.backends.onnx.model import OnnxModel
from headrace.backends.onnx.plugin import compiled_operators
from headrace.backends.tokenizer import HuggingFaceTokenizer
from tests.onnx import tiny

_REASON = "headrace-kernels is not installed, or this processor lacks AVX2"
needs_operators = pytest.mark.skipif(compiled_operators() is None, reason=_REASON)


def build(folder: Path, *, quantization: str = "int8", name: str = "tiny") -> Path:
    """The tiny model's bundle, ``folder / name``."""
    source = tiny.write_gguf(folder / f"{name}.gguf")
    build_bundle(source, name=name, models_dir=folder, quantization=quantization, progress=tiny.quietly)
    return folder / name


def load(
    bundle: Path,
    *,
    compiled: bool = True,
    int8_cache: bool = False,
    num_slots: int = 4,
    num_spare_slots: int = 2,
    num_kv_bytes: int = 2**24,
) -> OnnxModel:
    """Closed by the engine that runs it. Skips the test if it takes the compiled operators and they are not there."""
    if compiled and compiled_operators() is None:
        pytest.skip(_REASON)
    manifest = read_manifest(bundle)
    return OnnxModel(
        bundle,
        manifest,
        HuggingFaceTokenizer.from_bundle(bundle, manifest),
        threads=2,
        num_slots=num_slots,
        num_kv_bytes=num_kv_bytes,
        spinning=False,
        operators=compiled_operators() if compiled else None,
        num_spare_slots=num_spare_slots,
        int8_cache=int8_cache,
    )
