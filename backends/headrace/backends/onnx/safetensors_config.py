"""A decoder's shape from the ``config.json`` of a Hugging Face model folder.

What the settings mean, and what they are where they are left out, is transformers' (4.57, and the names of 5). Whatever
a setting says and the graph cannot do is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backends.onnx import architectures
from headrace.backends.onnx.architectures import ARCHITECTURES
from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.graph import DecoderConfig, LayerConfig
from headrace.backends.onnx.source import Fields

_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3_text": ("gemma3", "Gemma3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
}
"""By ``model_type``: our name, and transformers' class."""

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_TIED_UNLESS_SAID = {"gemma3", "smollm3"}
_ROPE_BASES = {"gemma3": 1_000_000.0, "smollm3": 2_000_000.0}
_ROPE_BASE = 10_000.0
_MISTRAL_WINDOW = 4096
_LAYER_TYPES = {"sliding_attention": True, "full_attention": False}

_NEUTRAL = {
    "add_cross_attention": False,
    "attention_bias": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
"""Settings that change what a model computes, and the value that changes nothing."""

_HARMLESS = frozenset(
    {
        *("architectures", "model_type", "auto_map", "_name_or_path", "_model_name_or_path"),
        *("transformers_version", "transformers.js_config", "unsloth_fixed", "unsloth_version", "is_llama_config"),
        *("dtype", "torch_dtype", "initializer_range", "attention_dropout", "use_cache", "cache_implementation"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type"),
        *(
            "max_window_layers",
            "tokenizer_class",
            "chunk_size_feed_forward",
            "pruned_heads",
            "_attn_implementation_autoset",
        ),
    }
)
"""Settings that do not change what a model computes; those of tokens are the tokenizer's reader's."""


class HuggingFaceConfig:
    """What ``config.json`` at ``path`` says; ``num_tensors`` bounds the layers. Raises ModelFileError."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, num_tensors: int) -> None:
        self._path = path
        self._settings = settings
        self.architecture = self._read_architecture()
        quantization = settings.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise self._unsupported(f"the weights are quantised ({method!r}); take the model they were made from")
        self._fields = Fields(settings, damaged=self._damaged, unsupported=self._unsupported)
        self.decoder = self._read_decoder(num_tensors)
        self.query_pre_attention_scalar: float | None = None
        """Of Gemma: scores are divided by its square root."""
        if self.architecture == "gemma3":
            self.query_pre_attention_scalar = self._fields.positive("query_pre_attn_scalar")
        self._fields.refuse_unread(_HARMLESS, neutral=_NEUTRAL)

    def _read_architecture(self) -> str:
        kind = self._settings.get("model_type")
        if kind == "gemma3":
            raise self._unsupported("model_type 'gemma3' sees images; its text model alone is 'gemma3_text'")
        if not isinstance(kind, str) or kind not in _CLASSES:
            raise self._unsupported(f"model_type is {kind!r}; supported are {', '.join(map(repr, _CLASSES))}")
        architecture, class_name = _CLASSES[kind]
        classes = self._settings.get("architectures")
        if classes is not None and classes != [class_name]:
            raise self._unsupported(f"architectures is {classes!r} instead of [{class_name!r}]")
        return architecture

    def _read_decoder(self, num_tensors: int) -> DecoderConfig:
        fields, own = self._fields, ARCHITECTURES[self.architecture]
        hidden_size = fields.count("hidden_size")
        num_heads = fields.count("num_attention_heads")
        num_kv_heads = fields.count("num_key_value_heads", num_heads if self.architecture == "llama" else None)
        if num_heads % num_kv_heads:
            raise self._damaged(f"{num_heads} heads cannot share {num_kv_heads} heads of keys")
        must_say = self.architecture in {"qwen3", "gemma3"}
        head_size = fields.count("head_dim", None if must_say else hidden_size // num_heads)
        if head_size % 16:
            raise self._unsupported(f"head_dim is {head_size}: it must be a multiple of 16")
        num_layers = fields.count("num_hidden_layers")
        if num_layers > num_tensors:  # before billions of missing ones are looked for
            raise self._damaged(f"{num_layers} layers cannot be in {num_tensors} tensors")
        for key in ("hidden_act", "hidden_activation"):
            activation = fields.get(key)
            if activation is not None and _ACTIVATIONS.get(str(activation)) != own.activation:
                raise self._unsupported(f"{key} is {activation!r}")
        context_length = fields.count("max_position_embeddings")
        return DecoderConfig(
            layers=self._read_layers(num_layers, context_length, head_size),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            ffn_size=fields.count("intermediate_size"),
            vocabulary_size=fields.count("vocab_size"),
            context_length=context_length,
            norm_epsilon=fields.positive("rms_norm_eps"),
            activation=own.activation,
            qkv_bias=own.qkv_bias,
            qk_norm=own.qk_norm,
            post_norms=own.post_norms,
            tied_embeddings=fields.flag("tie_word_embeddings", default=self.architecture in _TIED_UNLESS_SAID),
        )

    # --- what differs between layers ----------------------------------------------------------------------------------

    def _read_layers(self, num_layers: int, context_length: int, head_size: int) -> tuple[LayerConfig, ...]:
        turned = self._read_turned(num_layers)
        windows = self._read_windows(num_layers, turned)
        everywhere, local = self._read_rope(head_size)
        return architectures.layer_configs(
            num_layers,
            context_length=context_length,
            windows=windows,
            frequencies=[
                None if not has_rope else everywhere if window is None else local
                for has_rope, window in zip(turned, windows, strict=True)
            ],
        )

    def _read_turned(self, num_layers: int) -> list[bool]:
        """Which layers have a rotary embedding: ``no_rope_layers`` has a 1 for them, despite its name."""
        if self.architecture != "smollm3":
            return [True] * num_layers
        interval = self._fields.count("no_rope_layer_interval", architectures.SMOLLM3_NO_ROPE_INTERVAL)
        marks = self._fields.get("no_rope_layers")
        if marks is None:
            return [(i + 1) % interval != 0 for i in range(num_layers)]
        if not isinstance(marks, list) or [mark for mark in marks if mark in (0, 1)] != marks:
            raise self._damaged("'no_rope_layers' is no list of 0 and 1")
        if len(marks) != num_layers:
            raise self._damaged(f"'no_rope_layers' is for {len(marks)} layers instead of {num_layers}")
        return [bool(mark) for mark in marks]

    def _read_windows(self, num_layers: int, turned: list[bool]) -> list[int | None]:
        fields = self._fields
        if self.architecture == "llama":
            return [None] * num_layers
        if self.architecture == "mistral":
            is_null = "sliding_window" in self._settings and "sliding_window" not in fields
            return [None if is_null else fields.count("sliding_window", _MISTRAL_WINDOW)] * num_layers
        said = self._read_layer_types(num_layers)
        is_local = [False] * num_layers
        if self.architecture == "gemma3":
            interval = fields.count("_sliding_window_pattern", architectures.GEMMA3_GLOBAL_INTERVAL)
            interval = fields.count("sliding_window_pattern", interval)
            is_local = [(i + 1) % interval != 0 for i in range(num_layers)]
        elif fields.flag("use_sliding_window", default=False) and "sliding_window" in fields:
            if self.architecture == "smollm3":
                is_local = [not has_rope for has_rope in turned]
            else:
                first = fields.count("max_window_layers")
                is_local = [i >= first for i in range(num_layers)]
        elif said is not None and any(said):
            raise self._damaged("'layer_types' has windows, but 'use_sliding_window' is not true")
        is_local = is_local if said is None else said
        window = fields.count("sliding_window") if any(is_local) else fields.get("sliding_window")
        return [window if has_window else None for has_window in is_local]

    def _read_layer_types(self, num_layers: int) -> list[bool] | None:
        """Which layers have a window, where the model says so for each."""
        types = self._fields.get("layer_types")
        if types is None:
            return None
        if not isinstance(types, list) or len(types) != num_layers:
            raise self._damaged(f"'layer_types' is not one for each of {num_layers} layers")
        for kind in types:
            if not isinstance(kind, str) or kind not in _LAYER_TYPES:
                raise self._unsupported(f"layer_types has {kind!r}")
        return [_LAYER_TYPES[kind] for kind in types]

    # --- the rotary embedding -----------------------------------------------------------------------------------------

    def _read_rope(self, head_size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The frequencies of layers that see everything, and of those with a window."""
        fields, is_gemma = self._fields, self.architecture == "gemma3"
        base = _ROPE_BASES.get(self.architecture, _ROPE_BASE)
        parameters = fields.get("rope_parameters")
        if parameters is not None:  # transformers 5
            if not is_gemma:
                everywhere = self._frequencies("rope_parameters", parameters, base, head_size)
                return everywhere, everywhere
            kinds = Fields(
                self._object("rope_parameters", parameters), damaged=self._damaged, unsupported=self._unsupported
            )
            by_kind = [
                self._frequencies(f"rope_parameters.{kind}", kinds.get(kind), kind_base, head_size)
                for kind, kind_base in (
                    ("full_attention", base),
                    ("sliding_attention", architectures.GEMMA3_LOCAL_ROPE_BASE),
                )
            ]
            kinds.refuse_unread(frozenset(), neutral={})
            return by_kind[0], by_kind[1]
        base = fields.positive("rope_theta", base)
        everywhere = self._frequencies("rope_scaling", fields.get("rope_scaling") or {}, base, head_size)
        if not is_gemma:
            return everywhere, everywhere
        local_base = fields.positive("rope_local_base_freq", architectures.GEMMA3_LOCAL_ROPE_BASE)
        return everywhere, architectures.rope_frequencies(local_base, head_size)

    def _frequencies(self, name: str, values: Any, base: float, head_size: int) -> NDArray[np.float64]:
        """What an object with the settings of a rotary embedding says; ``name`` is its own."""
        values = {f"{name}.{key}": value for key, value in self._object(name, values).items()}
        fields = Fields(values, prefix=f"{name}.", damaged=self._damaged, unsupported=self._unsupported)
        frequencies = architectures.rope_frequencies(fields.positive("rope_theta", base), head_size)
        older = fields.get("type")
        match fields.get("rope_type") or older or "default":
            case "default":
                pass
            case "linear":
                frequencies = frequencies / fields.positive("factor")
            case "llama3":
                low, high = fields.positive("low_freq_factor"), fields.positive("high_freq_factor")
                if not low < high:
                    raise self._damaged(f"'{name}.low_freq_factor' is not below '{name}.high_freq_factor'")
                frequencies = architectures.llama3_frequencies(
                    frequencies,
                    factor=fields.positive("factor"),
                    low_frequency_factor=low,
                    high_frequency_factor=high,
                    original_context_length=fields.count("original_max_position_embeddings"),
                )
            case kind:
                raise self._unsupported(f"{name}.rope_type is {kind!r}; supported are 'default', 'linear' and 'llama3'")
        fields.refuse_unread(frozenset(), neutral={"partial_rotary_factor": 1.0})
        return frequencies

    def _object(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._damaged(f"{name!r} is {value!r} instead of an object")
        return value

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: damaged: {what}")

    def _unsupported(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: unsupported: {what}")
