"""Reads a llama-like decoder from a GGUF file: its shape, and its weights under our names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.gguf_file import GgufFile
from headrace.backends.onnx.graph import DecoderConfig, weight_shapes

ARCHITECTURE = "llama"

_LAYER_TENSORS = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_TENSORS = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}

_NEUTRAL = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "expert_count": 0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.causal": True,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
}
"""Metadata that changes what the model computes, and the value that changes nothing; any other is refused."""


class GgufDecoder:
    """The decoder in an open file. Raises ModelFileError where the file is of a kind that the graph cannot express."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        architecture = self._text("general.architecture")
        if architecture != ARCHITECTURE:
            raise ModelFileError(
                f"{file.path}: unsupported architecture {architecture!r}; supported is {ARCHITECTURE!r}"
            )
        if file.metadata.get("split.count", 1) != 1:
            raise ModelFileError(f"{file.path}: unsupported: it is one of several parts of a model")
        for key, neutral in _NEUTRAL.items():
            value = file.metadata.get(f"{ARCHITECTURE}.{key}", neutral)
            if value != neutral:
                raise ModelFileError(f"{file.path}: unsupported: {ARCHITECTURE}.{key} is {value!r}")
        self.config = self._read_config()
        self._check_tensors()

    @property
    def parameter_count(self) -> int:
        """Number of weights."""
        return sum(int(np.prod(shape)) for shape in weight_shapes(self.config).values())

    def weight(self, name: str) -> NDArray[np.float32]:
        """A weight by its name in ``weight_shapes``."""
        weight = self._file.read(_tensor_name(name))
        if name.endswith(".q"):
            return _split_halves(weight, self.config.num_heads)
        if name.endswith(".k"):
            return _split_halves(weight, self.config.num_kv_heads)
        return weight

    def _read_config(self) -> DecoderConfig:
        hidden_size = self._count("embedding_length")
        num_heads = self._count("attention.head_count")
        num_kv_heads = self._count("attention.head_count_kv", num_heads)
        head_size = self._count("attention.key_length", hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise self._damaged(f"{num_heads} heads cannot share {num_kv_heads} heads of keys")
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._count(key, head_size) != head_size:
                raise ModelFileError(f"{self._file.path}: unsupported: {ARCHITECTURE}.{key} is not the head size")
        if head_size % 8:
            raise ModelFileError(f"{self._file.path}: unsupported head size {head_size}: it must be a multiple of 8")
        embedding = self._file.tensors.get(_tensor_name("embedding"))
        if embedding is None:
            raise self._missing(_tensor_name("embedding"))
        num_layers = self._count("block_count")
        if num_layers > len(self._file.tensors):  # before billions of missing ones are looked for
            raise self._damaged(f"{num_layers} layers cannot be in {len(self._file.tensors)} tensors")
        return DecoderConfig(
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            ffn_size=self._count("feed_forward_length"),
            vocabulary_size=embedding.shape[0],
            context_length=self._count("context_length"),
            rope_base=self._positive("rope.freq_base", 10000.0),
            norm_epsilon=self._positive("attention.layer_norm_rms_epsilon"),
            tied_embeddings=_tensor_name("head") not in self._file.tensors,
        )

    def _check_tensors(self) -> None:
        expected = {_tensor_name(name): shape for name, shape in weight_shapes(self.config).items()}
        for name, shape in expected.items():
            if name not in self._file.tensors:
                raise self._missing(name)
            found = self._file.tensors[name].shape
            if found != shape:
                raise self._damaged(f"tensor {name!r} has shape {list(found)} instead of {list(shape)}")
        # A bias, a factor of the rotary embedding, an expert: whatever is not known would be left out of the sum.
        for name in self._file.tensors:
            if name not in expected:
                raise ModelFileError(f"{self._file.path}: unsupported tensor {name!r}")

    def _text(self, key: str) -> str:
        value = self._file.metadata.get(key)
        if not isinstance(value, str):
            raise self._damaged(f"metadata {key!r} is missing")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._number(key, default)
        if not isinstance(value, int) or value < 1:
            raise self._damaged(f"metadata '{ARCHITECTURE}.{key}' is {value!r} instead of a positive integer")
        return value

    def _positive(self, key: str, default: float | None = None) -> float:
        value = self._number(key, default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self._damaged(f"metadata '{ARCHITECTURE}.{key}' is {value!r} instead of a positive number")
        return value

    def _number(self, key: str, default: float | None) -> Any:
        value = self._file.metadata.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise self._damaged(f"metadata '{ARCHITECTURE}.{key}' is missing")
        return value

    def _missing(self, tensor: str) -> ModelFileError:
        return self._damaged(f"tensor {tensor!r} is missing")

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._file.path}: damaged GGUF file: {what}")


def _tensor_name(name: str) -> str:
    if name in _TENSORS:
        return f"{_TENSORS[name]}.weight"
    layer, part = name.split(".")
    return f"blk.{layer}.{_LAYER_TENSORS[part]}.weight"


def _split_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """GGUF interleaves the rows of llama's queries and keys for a rotary embedding of neighbours. ONNX Runtime rotates
    the two halves of a head, as the model was trained.
    """
    outputs, inputs = weight.shape
    return weight.reshape(num_heads, outputs // num_heads // 2, 2, inputs).swapaxes(1, 2).reshape(outputs, inputs)
