"""What the tests and measurements of this folder run on: a GPU, or in a dry run a stand-in for one, which is the same
graph on the processor with its one operator for CUDA alone in stock operators (``tests.onnx.paged_reference``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.api import Backend, BackendContext, Row
from headrace.backends.onnx.build import build_bundle, build_from_catalog
from headrace.backends.onnx.bundle import PAGED, Manifest, list_bundles, read_manifest
from headrace.backends.onnx.paged_model import PagedModel
from headrace.backends.onnx.paged_session import open_on
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions
from headrace.backends.onnx.providers import CPU, Device, cuda_device
from headrace.backends.tokenizer import HuggingFaceTokenizer
from tests.gpu.random_model import Shape, write_random
from tests.onnx.paged_reference import reference, stand_in

DRY_RUN = "HEADRACE_GPU_DRY_RUN"
DEVICE = "HEADRACE_GPU_DEVICE"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model, as it was built and as it is served. The two differ in a dry run."""

    built: Path
    served: Path

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.built)


@dataclass(frozen=True, slots=True)
class Rig:
    """Builds models and opens them on the device."""

    device: Device
    dry: bool

    def random(self, folder: Path, shape: Shape, quantization: str) -> Bundle:
        """A model of random weights, in ``folder``."""
        source = write_random(folder / "random.gguf", shape)
        name = f"random-{quantization}"
        build_bundle(source, name=name, models_dir=folder, quantization=quantization, progress=lambda *_: None)
        source.unlink()
        return self.take(folder / name)

    def from_catalog(self, folder: Path, name: str, quantization: str) -> Bundle:
        """A model of the catalog, downloaded if it is not there yet."""
        bundle = folder / f"{name}-{quantization}"
        if not bundle.exists():
            build_from_catalog(
                name, name=bundle.name, models_dir=folder, quantization=quantization, progress=lambda *_: None
            )
        return self.take(bundle)

    def take(self, built: Path) -> Bundle:
        """A bundle that is there."""
        if not self.dry:
            return Bundle(built, built)
        folder = built.parent / "stand-in"
        served = folder / built.name
        return Bundle(built, served if served.exists() else stand_in(built, folder))

    def open(
        self,
        bundle: Bundle,
        *,
        num_slots: int = 8,
        num_spare_slots: int = 8,
        num_tokens: int = 32768,
        captures: bool = False,
    ) -> PagedModel:
        """The model on the device, with room for ``num_tokens``; closed by the caller, or by an engine on it."""
        manifest = bundle.manifest
        return PagedModel(
            bundle.served,
            manifest,
            HuggingFaceTokenizer.from_bundle(bundle.served, manifest),
            self.device,
            num_slots=num_slots,
            num_spare_slots=num_spare_slots,
            num_kv_bytes=num_tokens * kv_bytes(manifest),
            captures=captures,
        )

    def session(self, model: onnx.ModelProto, folder: Path) -> ort.InferenceSession:
        """A graph without weights on the device, by way of a file in ``folder``."""
        path = folder / "graph.onnx"
        onnx.save(reference(model) if self.dry else model, path)
        return open_on(self.device, path)

    def backend(self, bundle: Bundle) -> Backend:
        """The bundle's folder as the plugin serves it: all of its models, on the device."""
        context = BackendContext(bundle.served.parent)
        if self.dry:
            return _StandInBackend(OnnxOptions(), context, self)
        options = OnnxOptions(
            provider="cuda", device_id=self.device.index, max_running=8, max_retained=8, kv_cache=2**30
        )
        return OnnxBackend(options, context)


def find_rig() -> Rig:
    """What the environment asks for. Raises DeviceUnavailable."""
    return Rig(find_device(), dry=is_dry())


def find_device() -> Device:
    """Raises DeviceUnavailable, with a line that says what is missing."""
    return CPU if is_dry() else cuda_device(int(os.environ.get(DEVICE, "0")))


def is_dry() -> bool:
    return os.environ.get(DRY_RUN) == "1"


def kv_bytes(manifest: Manifest) -> int:
    """What the keys and values of a token take on the device, in 16 bits."""
    return 4 * manifest.num_layers * manifest.num_kv_heads * manifest.head_size


class _StandInBackend(OnnxBackend):
    """``OnnxBackend``, but for the device."""

    def __init__(self, options: OnnxOptions, context: BackendContext, rig: Rig) -> None:
        super().__init__(options, context)
        self._rig = rig

    def load(self, name: str) -> PagedModel:
        folder = self._models_dir / name
        if name not in {manifest.name for manifest in list_bundles(self._models_dir)}:
            return super().load(name)  # and its error
        return self._rig.open(Bundle(folder, folder))


class Oracle:
    """The logits of a bundle's paged graph in float32, on the processor: nothing of it has seen a GPU, and no sequence
    has company. The ordinary tests hold this graph to the one that the processor serves.
    """

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        path = bundle.built / "oracle.onnx"  # beside the weights that it uses
        if not path.exists():
            onnx.save(reference(onnx.load(bundle.built / PAGED, load_external_data=False), float32=True), path)
        self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._cache = (1, manifest.context_length, manifest.num_kv_heads, manifest.head_size)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """[T, V]: after each of a sequence's tokens."""
        count = len(tokens)
        zeros = np.zeros(self._cache, np.float32)
        feeds: dict[str, Any] = {
            "input_ids": np.array(tokens, np.int64),
            "logits_index": np.arange(count),
            "cumulative_lengths": np.array([0, count], np.int32),
            "past_lengths": np.zeros(1, np.int32),
            "block_table": np.zeros((1, 1), np.int32),
            "slot_mapping": np.arange(count, dtype=np.int32),
            "attention_bounds": np.array([count, count, count], np.int32),
        }
        feeds |= {value.name: zeros for value in self._session.get_inputs() if "_cache." in value.name}
        (logits,) = self._session.run(["logits"], feeds)
        return logits


def random_tokens(manifest: Manifest, count: int, seed: int) -> list[int]:
    """Any but the first few, which may be special."""
    return np.random.default_rng(seed).integers(8, manifest.vocabulary_size, count).tolist()


def run_alone(model: PagedModel, slot: int, tokens: Sequence[int], num_prompt: int) -> NDArray[np.float32]:
    """Runs a sequence in an empty slot, its prompt in chunks and the rest one by one; the logits after the prompt and
    after each of the rest.
    """
    model.reserve(slot, len(tokens))
    start = 0
    while start < num_prompt:
        left = num_prompt - start
        count = left if left <= model.max_chunk else model.max_chunk // model.chunk_alignment * model.chunk_alignment
        logits = model.step([Row(slot, start, tokens[start : start + count], num_logits=1)])
        start += count
    rows = [logits.row(0).copy()]
    for place in range(num_prompt, len(tokens)):
        logits = model.step([Row(slot, place, tokens[place : place + 1], num_logits=1)])
        rows.append(logits.row(0).copy())
    model.release(slot)
    return np.array(rows)
