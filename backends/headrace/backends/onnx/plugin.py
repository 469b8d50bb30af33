"""The built-in backend ``onnx``: model bundles on ONNX Runtime, on the processor or a GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationInfo, field_validator

from headrace.backends.api import API_VERSION, Backend, BackendContext, ModelCard, StepModel, Tokenizer
from headrace.backends.errors import BackendError
from headrace.backends.hookspecs import hookimpl
from headrace.backends.onnx import bundle
from headrace.backends.onnx.bundle import Manifest, list_bundles
from headrace.backends.onnx.cores import usable_cores
from headrace.backends.onnx.providers import DeviceUnavailable, ProviderSetting, cuda_device, has_cuda_package

logger = logging.getLogger(__name__)


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
    """On the processor, what keys and values are kept as: "int8" has room for nearly twice as many tokens in the same
    memory and is read faster, at a small loss of quality, but needs the compiled operators; "auto" is float16 on these,
    else float32."""

    provider: ProviderSetting = "auto"
    """Where models run: "cuda" is a GPU, and a model that cannot run there is not loaded; "auto" is a GPU where that
    can be, and else the processor, with a line in the log that says what is missing. It needs the extra cuda."""
    device_id: int = Field(0, ge=0)
    """Which GPU, as NVIDIA's driver counts those that CUDA_VISIBLE_DEVICES leaves."""
    device_memory: ByteSize | None = Field(None, ge=2**20)
    """What a model may take of the GPU's memory in all, kv_cache among it; by default what is free when it is loaded.
    Give each its share where several use one GPU."""
    cuda_graphs: bool = False
    """Whether decodes run as CUDA graphs, which saves the time to launch each kernel. Only where one model uses the
    GPU: another's work spoils the recording of a graph, and decodes then go on without."""

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
        from headrace.backends.tokenizer import HuggingFaceTokenizer

        manifest = next((m for m in list_bundles(self._models_dir) if m.name == name), None)
        if manifest is None:
            raise BackendError(f"model {name!r} is no longer there")
        try:
            tokenizer = HuggingFaceTokenizer.from_bundle(self._models_dir / name, manifest)
        except (OSError, ValueError) as error:
            raise BackendError(f"model {name!r}: its tokenizer cannot be read") from error
        if (model := self._load_on_device(manifest, tokenizer)) is not None:
            return model
        return self._load_on_processor(manifest, tokenizer)

    def _load_on_device(self, manifest: Manifest, tokenizer: Tokenizer) -> StepModel | None:
        """``None``: it runs on the processor. Raises BackendError where it must not."""
        options = self._options
        if options.provider == "cpu" or (options.provider == "auto" and not has_cuda_package()):
            return None
        from headrace.backends.onnx.paged_model import PagedModel

        try:
            if bundle.PAGED not in manifest.files:
                raise DeviceUnavailable(
                    f"model {manifest.name!r} has no graph for a GPU: build it again, as fp16, bf16, int8 or int4"
                )
            return PagedModel(
                self._models_dir / manifest.name,
                manifest,
                tokenizer,
                cuda_device(options.device_id),
                num_slots=options.max_running,
                num_spare_slots=options.max_retained,
                num_kv_bytes=int(options.kv_cache),
                memory_limit=None if options.device_memory is None else int(options.device_memory),
                captures=options.cuda_graphs,
            )
        except DeviceUnavailable as error:
            if options.provider == "cuda":
                raise BackendError(str(error)) from error
            logger.warning("model %s runs on the processor: %s", manifest.name, error)
            return None

    def _load_on_processor(self, manifest: Manifest, tokenizer: Tokenizer) -> StepModel:
        from headrace.backends.onnx.exported.model import ExportedModel
        from headrace.backends.onnx.model import OnnxModel

        options = self._options
        operators = compiled_operators() if options.compiled_operators else None
        if manifest.graph == "exported":
            if options.kv_cache_dtype == "int8":
                raise BackendError(
                    f'model {manifest.name!r}: kv_cache_dtype = "int8" needs a packed graph, and this one was '
                    'exported: leave kv_cache_dtype at "auto"'
                )
            return ExportedModel(
                self._models_dir / manifest.name,
                manifest,
                tokenizer,
                threads=options.threads,
                num_slots=options.max_running,
                num_kv_bytes=int(options.kv_cache),
                spinning=options.spinning,
                has_compiled_top=operators is not None,
            )
        return OnnxModel(
            self._models_dir / manifest.name,
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
    """The library of headrace-kernels, if that is installed and made for this processor. Raises BackendError."""
    try:
        import headrace_kernels
    except ImportError:
        return None
    try:
        return headrace_kernels.library()
    except ValueError as error:  # what the environment says of it
        raise BackendError(str(error)) from error


@hookimpl
def headrace_backends() -> Sequence[type[Backend]]:
    return [OnnxBackend]
