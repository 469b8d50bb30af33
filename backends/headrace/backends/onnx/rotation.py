"""Rewrites a decoder's weights so that it computes the same from activations that are easy to quantise.

In a trained decoder a few channels of the residual stream are far larger than the rest, and a step that holds them is
too coarse for all others. Turned by an orthogonal matrix, the stream spreads them over all channels; matrices that read
it are turned the other way, and nothing else changes, for a norm without scales does not see a rotation (QuaRot,
arXiv 2404.00456). The scales of norms move into the matrices behind them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.graph import DecoderConfig, Weights

_NORMS = {"q": "attention_norm", "k": "attention_norm", "v": "attention_norm", "gate": "ffn_norm", "up": "ffn_norm"}
"""The norm before each matrix that reads the residual stream."""


def rotated(config: DecoderConfig, weights: Weights) -> tuple[DecoderConfig, Weights]:
    """The same decoder with its residual stream turned. The head is no longer the embedding.

    Raises ModelFileError for decoders that normalise what a layer adds to the stream: the scales of those norms have no
    matrix behind them to move into.
    """
    if config.post_norms:
        raise ModelFileError("w8a8 cannot be had for models with norms behind their layers, such as Gemma 3; take int8")
    rotation = randomized_hartley(config.hidden_size)

    def turned(reader: NDArray[np.float32], norm: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray((reader * norm) @ rotation, np.float32)

    def read(name: str) -> NDArray[np.float32]:
        layer, _, part = name.rpartition(".")
        if part in _NORMS:
            return turned(weights(name), weights(f"{layer}.{_NORMS[part]}"))
        match part:
            case "embedding":
                return weights(name) @ rotation
            case "head":
                return turned(weights("embedding" if config.tied_embeddings else "head"), weights("final_norm"))
            case "o" | "down":
                return rotation.T @ weights(name)
            case "attention_norm" | "ffn_norm" | "final_norm":
                return np.ones_like(weights(name))
            case _:  # of queries, keys and values, which are not turned
                return weights(name)

    return replace(config, tied_embeddings=False), read


def randomized_hartley(size: int) -> NDArray[np.float32]:
    """An orthogonal matrix of any size whose entries are all small: at most sqrt(2 / size). The discrete Hartley
    transform, with signs drawn once and for all.
    """
    # Products modulo the size: angles stay exact.
    angles = np.outer(np.arange(size), np.arange(size)) % size * (2 * np.pi / size)
    signs = np.random.Generator(np.random.PCG64(0)).choice([-1, 1], (size, 1))
    entries: NDArray[np.float64] = signs * (np.cos(angles) + np.sin(angles)) / np.sqrt(size)
    return entries.astype(np.float32)
