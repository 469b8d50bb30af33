"""Paged models on the CPU: the same bundle, session and model as on a GPU, with the one operator that is CUDA's alone
in stock operators (``paged_reference``).
"""

from __future__ import annotations

from pathlib import Path

from headrace.backends.onnx.bundle import MANIFEST, Manifest
from headrace.backends.onnx.model import OnnxModel
from headrace.backends.onnx.paged_model import PagedModel
from headrace.backends.onnx.providers import CPU, Device
from headrace.backends.tokenizer import HuggingFaceTokenizer
from tests.onnx import bundles
from tests.onnx.paged_reference import stand_in

BLOCK = 16


def build(folder: Path, *, quantization: str = "fp16", float32: bool = True) -> Path:
    """The tiny model. With ``float32`` its paged graph computes in that: what differs then is no rounding."""
    bundle = bundles.build(folder, quantization=quantization)
    (folder / "stand-in").mkdir()
    return stand_in(bundle, folder / "stand-in", float32=float32)


def manifest_of(bundle: Path) -> Manifest:
    """A stand-in's graph is not the one in its manifest, so files are not compared."""
    return Manifest.model_validate_json((bundle / MANIFEST).read_text())


def on_processor(bundle: Path) -> OnnxModel:
    """What the stand-in ``bundle`` was made from, on the processor's own graph. Closed as ``load``'s."""
    return bundles.load(bundle.parent.parent / bundle.name, compiled=False)


def load(
    bundle: Path,
    *,
    device: Device = CPU,
    num_slots: int = 4,
    num_spare_slots: int = 2,
    num_kv_bytes: int = 2**22,
    memory_limit: int | None = None,
    captures: bool = False,
) -> PagedModel:
    """Closed by the engine that runs it, or by the test."""
    manifest = manifest_of(bundle)
    return PagedModel(
        bundle,
        manifest,
        HuggingFaceTokenizer.from_bundle(bundle, manifest),
        device,
        num_slots=num_slots,
        num_spare_slots=num_spare_slots,
        num_kv_bytes=num_kv_bytes,
        memory_limit=memory_limit,
        captures=captures,
        tokens_per_block=BLOCK,
    )
