"""Makes bundles of exports. Needs the packages of the extras ``serve`` and ``build``, and neither torch nor Optimum."""

from __future__ import annotations

import importlib.metadata
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from headrace.backends.errors import BackendError
from headrace.backends.evaluation.errors import EvaluationError
from headrace.backends.evaluation.quality import measure_quality
from headrace.backends.evaluation.text import cut_windows, shipped_text
from headrace.backends.onnx import bundle
from headrace.backends.onnx.bundle import BundleWriter, ExportQuantization, Manifest, ModelFileError
from headrace.backends.onnx.cores import usable_cores
from headrace.backends.onnx.exported.interface import read_interface
from headrace.backends.onnx.exported.model import ExportedModel
from headrace.backends.onnx.exported.rewrite import rewrite, tied_heads
from headrace.backends.onnx.exported.source import ExportSource
from headrace.backends.onnx.kv import kv_bytes_per_token
from headrace.backends.onnx.top import top_graph
from headrace.backends.onnx.writer import WeightFile
from headrace.backends.tokenizer import HuggingFaceTokenizer

Progress = Callable[[str, float], None]
"""As ``build.Progress``."""

MAX_DIVERGENCE = 0.05
"""In nats, from float32: what ``int8_dynamic`` may lose. w8a8 loses as much of SmolLM2, blocks of int8 an eighth."""
_NUM_MEASURED = 256
"""Predictions that are compared."""


def add_export(
    folder: Path,
    *,
    name: str,
    models_dir: Path,
    quantization: ExportQuantization = "int8",
    license: str | None = None,  # noqa: A002  # the word that fits
    context_length: int | None = None,
    max_divergence: float = MAX_DIVERGENCE,
    progress: Progress,
) -> Manifest:
    """Makes a bundle of an export, in place of an older one of that name; it is seen to run before it is put there.

    ``context_length`` is for exports that do not say it, or say more than is wanted. Raises ModelFileError: also where
    ``int8_dynamic`` loses more than ``max_divergence``.
    """
    if quantization == "int8_dynamic":
        return _add_dynamic(
            folder,
            name=name,
            models_dir=models_dir,
            license=license,
            context_length=context_length,
            max_divergence=max_divergence,
            progress=progress,
        )
    progress(f"reading {folder.name}", 0.0)
    source = ExportSource(folder)
    interface = read_interface(source)
    tokenizer = source.tokenizer(interface.num_logits)
    tied = tied_heads(source)
    with bundle.write_bundle(models_dir, name) as writer:
        (writer.folder / bundle.TOKENIZER).write_text(tokenizer.tokenizer_json, encoding="utf-8")
        if tokenizer.chat_template is not None:
            (writer.folder / bundle.CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
        try:
            num_tokens = HuggingFaceTokenizer(
                tokenizer.tokenizer_json, model=name, backend="onnx", chat_template=tokenizer.chat_template
            ).vocabulary_size
        except ValueError as exc:
            raise ModelFileError(f"{folder}: unsupported: {exc}") from exc
        if num_tokens > interface.num_logits:
            raise ModelFileError(f"{folder}: damaged: {num_tokens} tokens, but logits of {interface.num_logits}")
        with WeightFile(writer.folder / bundle.WEIGHTS) as weights:
            graph = rewrite(
                source,
                weights,
                quantized=quantization == "int8",
                num_logits=interface.num_logits,
                tied=tied,
                progress=lambda done: progress(f"writing {quantization} weights", 0.05 + 0.75 * done),
            )
        (writer.folder / bundle.GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
        (writer.folder / bundle.TOP).write_bytes(top_graph())

        progress("computing digests", 0.8)
        files = bundle.hash_files(writer.folder)
        manifest = Manifest(
            name=name,
            architecture=source.architecture,
            digest=bundle.bundle_digest(files),
            quantization=quantization,
            graph="exported",
            context_length=source.context_length(context_length),
            vocabulary_size=num_tokens,
            num_layers=interface.num_layers,
            num_kv_heads=interface.num_kv_heads,
            head_size=interface.head_size,
            parameter_count=sum(
                math.prod(tensor.dims)
                for tensor in source.tensors.values()
                if tensor.data_type == TensorProto.FLOAT and tensor.name not in tied
            ),
            license=license,
            eos_token_ids=tokenizer.eos_token_ids,
            bos_token_id=tokenizer.bos_token_id,
            add_bos_token=tokenizer.add_bos_token,
            infill_token_ids=tokenizer.infill_token_ids,
            source=source.describe(),
            built_with={package: importlib.metadata.version(package) for package in ("headrace", "onnx")},
            files=files,
        )
        progress("trying it out", 0.9)
        with _loaded(writer.folder, manifest):
            writer.commit(manifest)
    progress("done", 1.0)
    return manifest


def _add_dynamic(
    folder: Path,
    *,
    name: str,
    models_dir: Path,
    license: str | None,  # noqa: A002
    context_length: int | None,
    max_divergence: float,
    progress: Progress,
) -> Manifest:
    """With ONNX Runtime's own quantiser, measured against float32 before it is put in its place."""
    with tempfile.TemporaryDirectory(prefix="headrace-dynamic-") as temporary:
        reference = add_export(
            folder,
            name=name,
            models_dir=Path(temporary),
            quantization="fp32",
            license=license,
            context_length=context_length,
            progress=lambda what, done: progress(what, 0.4 * done),
        )
        with bundle.write_bundle(models_dir, name) as writer:
            progress("writing int8_dynamic weights", 0.4)
            _quantize_dynamic(Path(temporary) / name, writer)
            files = bundle.hash_files(writer.folder)
            manifest = reference.model_copy(
                update={"quantization": "int8_dynamic", "files": files, "digest": bundle.bundle_digest(files)}
            )
            loss = _divergence(
                [(Path(temporary) / name, reference), (writer.folder, manifest)],
                progress=lambda done: progress("comparing predictions with float32", 0.6 + 0.4 * done),
            )
            if loss > max_divergence:
                raise ModelFileError(
                    f"{folder}: int8_dynamic loses {loss:.3g} nats of this model's predictions, and {max_divergence:g} "
                    "is the most that is served: take int8"
                )
            writer.commit(manifest)
    progress("done", 1.0)
    return manifest


def _quantize_dynamic(reference: Path, writer: BundleWriter) -> None:
    """Writes the files of the bundle at ``reference`` with products quantised by ONNX Runtime."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for path in reference.iterdir():
        if path.name not in {bundle.MANIFEST, bundle.GRAPH, bundle.WEIGHTS}:
            (writer.folder / path.name).write_bytes(path.read_bytes())
    # uint8 by uint8: on processors without VNNI, int8 weights would saturate.
    quantize_dynamic(reference / bundle.GRAPH, writer.folder / bundle.GRAPH, weight_type=QuantType.QUInt8)
    model = onnx.load_model(writer.folder / bundle.GRAPH)
    onnx.save_model(
        model,
        writer.folder / bundle.GRAPH,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=bundle.WEIGHTS,
        size_threshold=1024,
    )


def _divergence(bundles: Sequence[tuple[Path, Manifest]], *, progress: Callable[[float], None]) -> float:
    """How far the second's predictions are from the first's, in nats."""
    with ExitStack() as stack:
        models = [stack.enter_context(_loaded(folder, manifest)) for folder, manifest in bundles]
        try:
            windows = cut_windows(
                shipped_text(),
                models[0].tokenizer,
                num_positions=_NUM_MEASURED,
                context_length=models[0].card.context_length,
            )
            return measure_quality(models, windows, progress=progress)[1].kl_divergence
        except EvaluationError as exc:
            raise ModelFileError(f"what int8_dynamic loses cannot be measured: {exc}; take int8") from exc


@contextmanager
def _loaded(folder: Path, manifest: Manifest) -> Iterator[ExportedModel]:
    """The model of a bundle that is being written, which has run. Raises ModelFileError if it does not."""
    try:
        model = ExportedModel(
            folder,
            manifest,
            HuggingFaceTokenizer.from_bundle(folder, manifest),
            threads=usable_cores(os.sched_getaffinity(0)),
            num_slots=2,
            num_kv_bytes=2 * manifest.context_length * kv_bytes_per_token(manifest, np.float32),
            spinning=False,
            has_compiled_top=False,
        )
    except BackendError as exc:
        cause = f": {' '.join(str(exc.__cause__).split())}" if exc.__cause__ else ""
        raise ModelFileError(f"{manifest.name}: unsupported: {exc.message}{cause}") from exc
    with closing(model):
        yield model
