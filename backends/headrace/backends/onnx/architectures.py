"""The architectures that can be built, whatever file a model comes from, and what they have of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.backends.onnx.graph import Activation, DecoderConfig, LayerConfig, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What every model of an architecture has; the fields are those of ``DecoderConfig``."""

    activation: Activation = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False


ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(qkv_bias=True),
    "qwen3": Architecture(qk_norm=True),
    "gemma3": Architecture(activation="gelu_tanh", qk_norm=True, post_norms=True),
    "smollm3": Architecture(),
}

SMOLLM3_NO_ROPE_INTERVAL = 4
"""Every so manieth layer of SmolLM3 has no rotary embedding, unless the model says otherwise."""

GEMMA3_GLOBAL_INTERVAL = 6
"""Every so manieth layer of Gemma 3 sees all tokens, the others a window, unless the model says otherwise."""

GEMMA3_LOCAL_ROPE_BASE = 10000.0
"""Of the layers with a window, unless the model says otherwise."""


def layer_configs(
    num_layers: int,
    *,
    context_length: int,
    windows: Sequence[int | None],
    frequencies: Sequence[NDArray[np.float64] | None],
) -> tuple[LayerConfig, ...]:
    """One layer for each entry of ``windows`` and ``frequencies``. A window as long as the context is none."""
    return tuple(
        LayerConfig(
            window=None if window is None or window >= context_length else window,
            rope_frequencies=None if turns is None else tuple(turns.tolist()),
        )
        for _, window, turns in zip(range(num_layers), windows, frequencies, strict=True)
    )


# --- rotary embeddings: radians per position, for each pair of a head ------------------------------------------------


def rope_frequencies(base: float, head_size: int) -> NDArray[np.float64]:
    """As published (RoFormer, arXiv 2104.09864): [head_size / 2]."""
    return np.asarray(base ** (-np.arange(0, head_size, 2) / head_size), np.float64)


def llama3_frequencies(
    frequencies: NDArray[np.float64],
    *,
    factor: float,
    low_frequency_factor: float,
    high_frequency_factor: float,
    original_context_length: int,
) -> NDArray[np.float64]:
    """Llama 3.1's stretch to longer contexts: waves longer than the original context / ``low_frequency_factor`` are
    ``factor`` times longer, those shorter than it / ``high_frequency_factor`` stay, and between it goes over smoothly.
    """
    waves_in_context = original_context_length * frequencies / (2 * math.pi)
    kept = (waves_in_context - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)
    kept = np.clip(kept, 0, 1)
    return np.asarray(frequencies * (kept + (1 - kept) / factor), np.float64)


# --- weights -------------------------------------------------------------------------------------------------------


def gemma_weights(
    config: DecoderConfig, weights: Weights, *, norm_offset: float, query_pre_attention_scalar: float
) -> Weights:
    """Weights of Gemma, from those of its files, with everything folded in that other decoders do not have: norms whose
    scale is ``norm_offset`` plus the weight, embeddings times sqrt(hidden_size), and scores over
    sqrt(``query_pre_attention_scalar``) instead of sqrt(head_size).
    """
    embedding_scale = np.float32(math.sqrt(config.hidden_size))
    query_scale = np.float32(math.sqrt(config.head_size / query_pre_attention_scalar))

    def read(name: str) -> NDArray[np.float32]:
        weight = weights(name)
        part = name.rpartition(".")[2]
        if part.endswith("norm"):
            weight = weight + np.float32(norm_offset)
        match part:
            case "embedding":
                return weight * embedding_scale
            case "final_norm" if config.tied_embeddings:  # the head has the scale in it, too
                return weight / embedding_scale
            case "q_norm":
                return weight * query_scale
            case _:
                return weight

    return read
