"""The built-in backend ``onnx``: model bundles on ONNX Runtime's CPU provider."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from headrace.backends.api import API_VERSION, Backend, BackendContext, ModelCard, StepModel
from headrace.backends.errors import BackendError
from headrace.backends.hookspecs import hookimpl
from headrace.backends.onnx.bundle import list_bundles
from headrace.backends.onnx.cores import usable_cores


class OnnxOptions(BaseModel):
    """``[backends.onnx]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    threads: int = Field(default_factory=lambda: usable_cores(os.sched_getaffinity(0)), ge=1)
    """Threads that run a step; by default one for each physical core this process may use, within its CPU quota."""
    max_running: int = Field(32, ge=1, le=1024)
    """Sequences that run at once, per model."""
    kv_cache: ByteSize = Field(ByteSize(2**30), ge=2**20)
    """Memory for keys and values, per model, such as "1GiB"."""
    spinning: bool = True
    """Whether threads wait for the next operator actively: a fifth faster at one stream, also beside a client on the
    same processors; turn it off where several models run at once on few."""
    compiled_operators: bool = True
    """Whether to use the operators of the package headrace-kernels, where it is installed, the processor has AVX2 and
    the bundle's quantization is made of blocks."""


class OnnxBackend:
    """Serves the bundles in the operator's model folder."""

    name: ClassVar[str] = "onnx"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = OnnxOptions

    def __init__(self, options: OnnxOptions, context: BackendContext) -> None:
        self._options = options
        self._models_dir = context.models_dir

    def list_models(self) -> Sequence[ModelCard]:
        return [manifest.card() for manifest in list_bundles(self._models_dir)]

    def load(self, name: str) -> StepModel:
        # onnxruntime is loaded with the first model: listing bundles does not need it.
        from headrace.backends.onnx.model import OnnxModel
        from headrace.backends.tokenizer import HuggingFaceTokenizer

        manifest = next((m for m in list_bundles(self._models_dir) if m.name == name), None)
        if manifest is None:
            raise BackendError(f"model {name!r} is no longer there")
        options = self._options
        try:
            tokenizer = HuggingFaceTokenizer.from_bundle(self._models_dir / name, manifest)
        except (OSError, ValueError) as error:
            raise BackendError(f"model {name!r}: its tokenizer cannot be read") from error
        return OnnxModel(
            self._models_dir / name,
            manifest,
            tokenizer,
            threads=options.threads,
            num_slots=options.max_running,
            num_kv_bytes=int(options.kv_cache),
            spinning=options.spinning,
            operators=compiled_operators() if options.compiled_operators else None,
        )


def compiled_operators() -> Path | None:
    """The library of headrace-kernels, if that is installed and made for this processor."""
    try:
        import headrace_kernels
    except ImportError:
        return None
    return headrace_kernels.library()


@hookimpl
def headrace_backends() -> Sequence[type[Backend]]:
    return [OnnxBackend]
