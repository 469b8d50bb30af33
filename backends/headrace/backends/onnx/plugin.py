"""The built-in backend ``onnx``: model bundles on ONNX Runtime's CPU provider."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationInfo, field_validator

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
    max_retained: int = Field(32, ge=0, le=1024)
    """Sequences that are over and kept for others to begin with, per model, beside those that run. They have what of
    kv_cache is not in use."""
    spinning: bool = True
    """Whether threads wait for the next operator actively: a fifth faster at one stream, also beside a client on the
    same processors; turn it off where several models run at once on few."""
    compiled_operators: bool = True
    """Whether to use the operators of the package headrace-kernels, where it is installed, the processor has AVX2 and
    the bundle's quantization is made of blocks."""
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """What keys and values are kept as: "int8" has room for nearly twice as many tokens in the same memory and is read
    faster, at a small loss of quality, but needs the compiled operators; "auto" is float16 on these, else float32."""

    @field_validator("kv_cache_dtype")
    @classmethod
    def _check_int8(cls, value: str, info: ValidationInfo) -> str:
        if value == "int8" and not info.data.get("compiled_operators"):
            raise ValueError("int8 needs compiled_operators")
        if value == "int8" and compiled_operators() is None:
            raise ValueError("int8 needs the compiled operators: install headrace-kernels, on a processor with AVX2")
        return value


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
        from headrace.backends.onnx.exported.model import ExportedModel
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
        operators = compiled_operators() if options.compiled_operators else None
        if manifest.graph == "exported":
            if options.kv_cache_dtype == "int8":
                raise BackendError(
                    f'model {name!r}: kv_cache_dtype = "int8" needs a packed graph, and this one was exported: leave '
                    'kv_cache_dtype at "auto"'
                )
            return ExportedModel(
                self._models_dir / name,
                manifest,
                tokenizer,
                threads=options.threads,
                num_slots=options.max_running,
                num_kv_bytes=int(options.kv_cache),
                spinning=options.spinning,
                has_compiled_top=operators is not None,
            )
        return OnnxModel(
            self._models_dir / name,
            manifest,
            tokenizer,
            threads=options.threads,
            num_slots=options.max_running,
            num_spare_slots=options.max_retained,
            num_kv_bytes=int(options.kv_cache),
            spinning=options.spinning,
            operators=operators,
            int8_cache=options.kv_cache_dtype == "int8",
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
