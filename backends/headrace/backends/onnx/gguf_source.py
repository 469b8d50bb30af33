"""Reads a decoder from a GGUF file: its shape, and its weights under our names.

What the keys and tensors mean, and what files leave to their reader, is llama.cpp's:
https://github.com/ggml-org/llama.cpp/tree/master/src/models.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backends.onnx import architectures, bundle
from headrace.backends.onnx.architectures import ARCHITECTURES
from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.gguf_file import GgufFile
from headrace.backends.onnx.gguf_tokenizer import read_tokenizer
from headrace.backends.onnx.graph import DecoderConfig, LayerConfig, Weights, weight_shapes
from headrace.backends.onnx.source import Fields, SourceTokenizer

_SUPPORTED = ("llama", "qwen2", "qwen3", "gemma3", "smollm3")
"""Mistral's models call themselves llama in GGUF, as they compute the same."""

_LAYER_TENSORS = {
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "q_bias": "attn_q.bias",
    "q_norm": "attn_q_norm.weight",
    "k": "attn_k.weight",
    "k_bias": "attn_k.bias",
    "k_norm": "attn_k_norm.weight",
    "v": "attn_v.weight",
    "v_bias": "attn_v.bias",
    "o": "attn_output.weight",
    "attention_post_norm": "post_attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "ffn_post_norm": "post_ffw_norm.weight",
}
_TENSORS = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
_ROPE_DIVISORS = "rope_freqs.weight"

_INTERLEAVED = {"llama", "smollm3"}
"""Architectures whose queries and keys GGUF stores for a rotary embedding of neighbours."""

_NEUTRAL = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scale_linear": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
}
"""Metadata that changes what a model computes, and the value that changes nothing."""

_HARMLESS = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"}
)
"""Metadata that does not change what the model computes, given the rest."""

_LICENSES = {"apache-2.0": "Apache-2.0", "mit": "MIT", "gemma": "LicenseRef-Gemma"}
"""GGUF files have the Hugging Face hub's names of licences; these are SPDX's."""


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[GgufSource]:
    """Opens a model. Raises ModelFileError."""
    with GgufFile(path) as file:
        yield GgufSource(file)


class GgufSource:
    """The model in an open file; implements ``source.ModelSource``. Raises ModelFileError where the file is of a kind
    that the graph cannot express.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.architecture = self._read_architecture()
        if file.metadata.get("split.count", 1) != 1:
            raise self._unsupported("it is one of several parts of a model")
        self._has_rope_divisors = self.architecture == "llama" and _ROPE_DIVISORS in file.tensors
        self._fields = Fields(
            file.metadata, prefix=f"{self.architecture}.", damaged=self._damaged, unsupported=self._unsupported
        )
        self.config = self._read_config()
        self._fields.refuse_unread(_HARMLESS, neutral=_NEUTRAL)
        self._check_tensors()
        self._weights: Weights = self._plain_weight
        if self.architecture == "gemma3":
            # The norms' offset is in the file's weights. Gemma 3 27B, alone, divides scores by sqrt(hidden / heads).
            is_27b = self.config.num_layers == 62
            scalar = self.config.hidden_size // self.config.num_heads if is_27b else self.config.head_size
            self._weights = architectures.gemma_weights(
                self.config, self._plain_weight, norm_offset=0.0, query_pre_attention_scalar=scalar
            )

    def weight(self, name: str) -> NDArray[np.float32]:
        return self._weights(name)

    def tokenizer(self) -> SourceTokenizer:
        return read_tokenizer(self._file.path, self._file.metadata)

    def license(self) -> str | None:
        name = self._file.metadata.get("general.license")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9.+-]{1,64}", name):
            return None
        return _LICENSES.get(name.lower(), name)

    def describe(self) -> bundle.Source:
        return bundle.Source(file_name=self._file.path.name, sha256=bundle.hash_file(self._file.path).sha256)

    def _plain_weight(self, name: str) -> NDArray[np.float32]:
        weight = self._file.read(_tensor_name(name))
        if self.architecture in _INTERLEAVED:
            if name.endswith(".q"):
                return _split_halves(weight, self.config.num_heads)
            if name.endswith(".k"):
                return _split_halves(weight, self.config.num_kv_heads)
        return weight

    def _read_architecture(self) -> str:
        name = self._file.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise self._damaged("'general.architecture' is missing")
        if name not in _SUPPORTED:
            raise ModelFileError(
                f"{self._file.path}: unsupported architecture {name!r}; supported are "
                f"{', '.join(map(repr, _SUPPORTED))}"
            )
        return name

    def _read_config(self) -> DecoderConfig:
        fields, tensors = self._fields, self._file.tensors
        own = ARCHITECTURES[self.architecture]
        hidden_size = fields.count("embedding_length")
        num_heads = fields.count("attention.head_count")
        num_kv_heads = fields.count("attention.head_count_kv", num_heads)
        head_size = fields.count("attention.key_length", hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise self._damaged(f"{num_heads} heads cannot share {num_kv_heads} heads of keys")
        for key in ("attention.value_length", "rope.dimension_count"):
            if fields.count(key, head_size) != head_size:
                raise self._unsupported(f"{self.architecture}.{key} is not the head size")
        if head_size % 16:
            raise self._unsupported(f"head size {head_size}: it must be a multiple of 16")
        embedding = tensors.get(_tensor_name("embedding"))
        if embedding is None:
            raise self._missing(_tensor_name("embedding"))
        num_layers = fields.count("block_count")
        if num_layers > len(tensors):  # before billions of missing ones are looked for
            raise self._damaged(f"{num_layers} layers cannot be in {len(tensors)} tensors")
        context_length = fields.count("context_length")
        return DecoderConfig(
            layers=self._read_layers(num_layers, context_length, head_size),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            ffn_size=fields.count("feed_forward_length"),
            vocabulary_size=embedding.shape[0],
            context_length=context_length,
            norm_epsilon=fields.positive("attention.layer_norm_rms_epsilon"),
            activation=own.activation,
            qkv_bias=own.qkv_bias,
            qk_norm=own.qk_norm,
            post_norms=own.post_norms,
            tied_embeddings=_tensor_name("head") not in tensors,
        )

    def _read_layers(self, num_layers: int, context_length: int, head_size: int) -> tuple[LayerConfig, ...]:
        fields = self._fields
        base = fields.positive("rope.freq_base", 10000.0)
        turns = architectures.rope_frequencies(base, head_size) / self._rope_divisors(head_size)
        windows: list[int | None] = [None] * num_layers
        frequencies: list[NDArray[np.float64] | None] = [turns] * num_layers
        if self.architecture == "gemma3" and "attention.sliding_window" in fields:
            window = fields.count("attention.sliding_window")
            interval = fields.count("attention.sliding_window_pattern", architectures.GEMMA3_GLOBAL_INTERVAL)
            local_base = fields.positive("rope.freq_base_swa", architectures.GEMMA3_LOCAL_ROPE_BASE)
            local_turns = architectures.rope_frequencies(local_base, head_size)
            is_global = [(i + 1) % interval == 0 for i in range(num_layers)]
            windows = [None if everything else window for everything in is_global]
            frequencies = [turns if everything else local_turns for everything in is_global]
        elif self.architecture == "smollm3":
            interval = architectures.SMOLLM3_NO_ROPE_INTERVAL
            frequencies = [None if (i + 1) % interval == 0 else turns for i in range(num_layers)]
        return architectures.layer_configs(
            num_layers, context_length=context_length, windows=windows, frequencies=frequencies
        )

    def _rope_divisors(self, head_size: int) -> Any:
        """What the frequencies of the rotary embedding are divided by, to reach further than the model was trained."""
        kind = self._fields.get("rope.scaling.type")
        if kind not in (None, "none", "linear"):  # not every value of a file has a hash
            raise self._unsupported(f"{self.architecture}.rope.scaling.type is {kind!r}")
        factor = self._fields.positive("rope.scaling.factor", 1.0)
        if kind != "linear" and factor != 1:
            raise self._unsupported(f"{self.architecture}.rope.scaling.factor is {factor!r} without a type")
        if not self._has_rope_divisors:
            return factor
        divisors = self._file.read(_ROPE_DIVISORS)
        if divisors.shape != (head_size // 2,) or not (divisors > 0).all():
            raise self._damaged(f"tensor {_ROPE_DIVISORS!r} does not hold {head_size // 2} positive numbers")
        return factor * divisors.astype(np.float64)

    def _check_tensors(self) -> None:
        expected = {_tensor_name(name): shape for name, shape in weight_shapes(self.config).items()}
        for name, shape in expected.items():
            if name not in self._file.tensors:
                raise self._missing(name)
            found = self._file.tensors[name].shape
            if found != shape:
                raise self._damaged(f"tensor {name!r} has shape {list(found)} instead of {list(shape)}")
        # A bias, an expert: whatever is not known would be left out of the sum.
        for name in self._file.tensors:
            if name not in expected and not (name == _ROPE_DIVISORS and self._has_rope_divisors):
                raise self._unsupported(f"tensor {name!r}")

    def _missing(self, tensor: str) -> ModelFileError:
        return self._damaged(f"tensor {tensor!r} is missing")

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._file.path}: damaged GGUF file: {what}")

    def _unsupported(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._file.path}: unsupported: {what}")


def _tensor_name(name: str) -> str:
    if name in _TENSORS:
        return _TENSORS[name]
    layer, part = name.split(".")
    return f"blk.{layer}.{_LAYER_TENSORS[part]}"


def _split_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undoes GGUF's order of the rows of queries and keys, which suits a rotary embedding of neighbours. ONNX Runtime
    rotates the two halves of a head, as the model was trained.
    """
    outputs, inputs = weight.shape
    return weight.reshape(num_heads, outputs // num_heads // 2, 2, inputs).swapaxes(1, 2).reshape(outputs, inputs)
