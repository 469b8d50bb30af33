"""Builds bundles from model files. Needs the packages of the extra ``build``; serving does not."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.backends.errors import BackendError
from headrace.backends.onnx import bundle
from headrace.backends.onnx.bundle import Determinism, Manifest, ModelFileError, Operators, Quantization
from headrace.backends.onnx.catalog import CATALOG, fetch
from headrace.backends.onnx.cores import usable_cores
from headrace.backends.tokenizer import HuggingFaceTokenizer

logger = logging.getLogger(__name__)

_NUM_PROBED = 4
"""Sequences beside each other when determinism is proven."""

Progress = Callable[[str, float], None]
"""Told what is being done, and how much of all is done: 0 to 1."""


def build_from_catalog(
    entry_name: str, *, name: str, models_dir: Path, quantization: Quantization = "int8", progress: Progress
) -> Manifest:
    """Downloads a known model and builds its bundle, called ``name``. Raises ModelFileError."""
    if entry_name not in CATALOG:
        raise ModelFileError(f"no model {entry_name!r} in the catalog; there is {', '.join(map(repr, CATALOG))}")
    _check_extra()
    entry = CATALOG[entry_name]
    with fetch(entry, lambda what, done: progress(what, 0.3 * done)) as source:
        return build_bundle(
            source,
            name=name,
            models_dir=models_dir,
            quantization=quantization,
            progress=lambda what, done: progress(what, 0.3 + 0.7 * done),
            license=entry.license,
        )


def build_bundle(
    source: Path,
    *,
    name: str,
    models_dir: Path,
    quantization: Quantization = "int8",
    progress: Progress,
    license: str | None = None,  # noqa: A002  # the word that fits
) -> Manifest:
    """Builds a bundle from a GGUF file, or from a Hugging Face folder with safetensors, in place of an older one of
    that name; holds one tensor at a time.

    ``license`` overrides what the files say. Raises ModelFileError.
    """
    _check_extra()
    from headrace.backends.onnx.device_graphs import device_graphs
    from headrace.backends.onnx.formulations import FORMULATIONS, Blockwise, Pageable
    from headrace.backends.onnx.fused import can_fuse, fused_decoder
    from headrace.backends.onnx.gguf_source import open_gguf
    from headrace.backends.onnx.graph import packed_decoder, weight_shapes
    from headrace.backends.onnx.paged import can_page, paged_decoder
    from headrace.backends.onnx.rotation import rotated
    from headrace.backends.onnx.safetensors_source import open_safetensors
    from headrace.backends.onnx.source import with_vocabulary
    from headrace.backends.onnx.top import top_graph
    from headrace.backends.onnx.writer import WeightFile

    progress(f"reading {source.name}", 0.0)
    open_model = open_safetensors if source.is_dir() else open_gguf
    with open_model(source) as model, bundle.write_bundle(models_dir, name) as writer:
        tokenizer = model.tokenizer()
        (writer.folder / bundle.TOKENIZER).write_text(tokenizer.tokenizer_json, encoding="utf-8")
        if tokenizer.chat_template is not None:
            (writer.folder / bundle.CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")

        try:
            num_tokens = HuggingFaceTokenizer(
                tokenizer.tokenizer_json, model=name, backend="onnx", chat_template=tokenizer.chat_template
            ).vocabulary_size
        except ValueError as exc:
            raise ModelFileError(f"{source}: unsupported: {exc}") from exc
        num_embeddings = model.config.vocabulary_size
        if num_tokens > num_embeddings:
            raise ModelFileError(f"{source}: damaged: {num_tokens} tokens, but embeddings of {num_embeddings}")

        formulation = FORMULATIONS[quantization]
        config, weight = with_vocabulary(model.config, model.weight, num_tokens)
        num_parameters = sum(math.prod(shape) for shape in weight_shapes(config).values())
        if formulation.rotated:
            config, weight = rotated(config, weight)
        num_weights, num_read = len(weight_shapes(config)), 0

        def read(name: str) -> NDArray[np.float32]:
            nonlocal num_read
            num_read += 1
            progress(f"writing {quantization} weights", 0.05 + 0.85 * num_read / num_weights)
            return weight(name)

        with WeightFile(writer.folder / bundle.WEIGHTS) as weights:
            graph = packed_decoder(config, read, formulation, weights)
            (writer.folder / bundle.GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
            if isinstance(formulation, Blockwise) and can_fuse(config):
                graph = fused_decoder(config, read, formulation, weights)
                (writer.folder / bundle.FUSED).write_bytes(graph.SerializeToString(deterministic=True))
            if isinstance(formulation, Pageable) and can_page(config):
                graph = paged_decoder(config, read, formulation, weights)
                (writer.folder / bundle.PAGED).write_bytes(graph.SerializeToString(deterministic=True))
                for file_name, content in device_graphs().items():
                    (writer.folder / file_name).write_bytes(content)
        (writer.folder / bundle.TOP).write_bytes(top_graph())

        progress("computing digests", 0.9)
        files = bundle.hash_files(writer.folder)
        manifest = Manifest(
            name=name,
            architecture=model.architecture,
            digest=bundle.bundle_digest(files),
            quantization=quantization,
            context_length=config.context_length,
            vocabulary_size=config.vocabulary_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            parameter_count=num_parameters,
            license=license or model.license(),
            eos_token_ids=tokenizer.eos_token_ids,
            bos_token_id=tokenizer.bos_token_id,
            add_bos_token=tokenizer.add_bos_token,
            infill_token_ids=tokenizer.infill_token_ids,
            source=model.describe(),
            built_with={package: importlib.metadata.version(package) for package in ("headrace", "gguf", "onnx")},
            files=files,
        )
        progress("proving determinism", 0.93)
        manifest = manifest.model_copy(update={"determinism": _prove(writer.folder, manifest)})
        writer.commit(manifest)
    progress("done", 1.0)
    return manifest


def _prove(folder: Path, manifest: Manifest) -> Determinism | None:
    """Runs what was built on the operators that are here; ``None`` if there are none. What cannot be run is logged and
    left out: the files are what they should be, and another machine may have what it takes.
    """
    try:
        import onnxruntime as ort

        from headrace.backends.onnx.model import OnnxModel
    except ImportError:  # onnxruntime is for serving
        return None
    from headrace.backends.onnx.kv import kv_bytes_per_token
    from headrace.backends.onnx.plugin import compiled_operators

    library = compiled_operators() if bundle.FUSED in manifest.files else None
    ways: dict[Operators, tuple[Path | None, bool]] = {"stock": (None, False)}
    if library is not None:
        ways |= {"compiled": (library, False), "compiled_int8": (library, True)}
    tokenizer = HuggingFaceTokenizer.from_bundle(folder, manifest)
    classes = {}
    for name, (operators, int8_cache) in ways.items():
        try:
            model = OnnxModel(
                folder,
                manifest,
                tokenizer,
                threads=usable_cores(os.sched_getaffinity(0)),
                num_slots=_NUM_PROBED,
                num_kv_bytes=_NUM_PROBED * manifest.context_length * kv_bytes_per_token(manifest, np.float32),
                spinning=False,
                operators=operators,
                int8_cache=int8_cache,
            )
        except BackendError as error:
            logger.warning("determinism on %s operators is not proven: %s", name, error.message)
            continue
        classes[name] = model.determinism.name
        model.close()
    versions = {"onnxruntime": ort.__version__}  # its package has another name where it has CUDA
    if library is not None:
        versions["headrace-kernels"] = importlib.metadata.version("headrace-kernels")
    return Determinism.model_validate({"classes": classes, "proven_with": versions})


def _check_extra() -> None:
    try:
        import gguf  # noqa: F401
        import ml_dtypes  # noqa: F401
        import onnx  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as exc:
        raise ModelFileError(
            f"building models needs the package {exc.name!r}: install it with pip install 'headrace[build]'"
        ) from exc
