"""Writes a llama-like decoder as one packed ONNX graph.

All dense work runs on packed tokens [T, hidden]: the new tokens of every sequence, one after another. Attention alone
sees a padded view [B, S, …], one row a cache slot, and appends each row's keys and values to the cache in place.

Inputs (T new tokens; B slots; S tokens of the longest row; R rows of logits; C capacity of a slot):

    input_ids       int64 [T]
    pad_index       int64 [B, S]   the packed token at each place of the padded view; anything where there is none
    unpad_index     int64 [T]      the place of each packed token in the flattened padded view
    logits_index    int64 [R]      the packed tokens whose logits are wanted
    seqlens_k       int32 [B]      tokens in the cache after this run, minus 1; at least 0
    total_len       int32 []       the largest of seqlens_k, plus 1
    query_seqlens   int32 [B]      new tokens of each row; 0 marks an idle one
    past_k.{i}, past_v.{i}   float32 [B, kv_heads, C, head_size], for each layer i

Outputs: ``logits`` float32 [R, V], and ``present_k.{i}``, ``present_v.{i}``, to be bound to the memory of the inputs
``past_k.{i}``, ``past_v.{i}``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from headrace.backends.onnx.formulations import Formulation, Matrix
from headrace.backends.onnx.writer import MICROSOFT, GraphBuilder, WeightFile

Weights = Callable[[str], NDArray[np.float32]]
"""Reads a weight by its name in ``weight_shapes``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a llama-like decoder: pre-norm RMSNorm, rotary embedding of halves, grouped queries, SwiGLU."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    vocabulary_size: int
    context_length: int
    rope_base: float
    norm_epsilon: float
    tied_embeddings: bool
    """Whether the head's weights are the embedding's."""


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by name. Matrices are [outputs, inputs]."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (config.vocabulary_size, hidden),
        "final_norm": (hidden,),
    }
    if not config.tied_embeddings:
        shapes["head"] = (config.vocabulary_size, hidden)
    for i in range(config.num_layers):
        shapes |= {
            f"{i}.attention_norm": (hidden,),
            f"{i}.q": (queries, hidden),
            f"{i}.k": (keys, hidden),
            f"{i}.v": (keys, hidden),
            f"{i}.o": (hidden, queries),
            f"{i}.ffn_norm": (hidden,),
            f"{i}.gate": (ffn, hidden),
            f"{i}.up": (ffn, hidden),
            f"{i}.down": (hidden, ffn),
        }
    return shapes


def packed_decoder(
    config: DecoderConfig, weights: Weights, formulation: Formulation, file: WeightFile
) -> onnx.ModelProto:
    """The graph that this module describes; its weights go to ``file``. What the formulation relies on, ``config`` and
    ``weights`` must already have.
    """
    return _Decoder(config, weights, formulation, GraphBuilder(file)).model()


class _Decoder:
    def __init__(self, config: DecoderConfig, weights: Weights, formulation: Formulation, graph: GraphBuilder) -> None:
        self._config = config
        self._weights = weights
        self._formulation = formulation
        self._graph = graph

    def model(self) -> onnx.ModelProto:
        config, graph = self._config, self._graph
        embedding = self._matrix("embedding", ["embedding"])
        residual, branch = self._formulation.embedding(graph, "input_ids", embedding, "embedded"), None
        for i in range(config.num_layers):
            x, residual = self._add_norm(f"{i}.attention_norm", residual, branch)
            branch = self._attention(i, x)
            x, residual = self._add_norm(f"{i}.ffn_norm", residual, branch)
            branch = self._ffn(i, x)
        x, _ = self._add_norm("final_norm", residual, branch)
        x = graph.node("Gather", [x, "logits_index"], "selected", axis=0)
        head = embedding if config.tied_embeddings else self._matrix("head", ["head"])
        self._formulation.linear(graph, x, head, "logits")
        return graph.model(*self._signature())

    def _attention(self, layer: int, x: str) -> str:
        config, graph = self._config, self._graph
        qkv = self._linear(x, f"{layer}.qkv", [f"{layer}.q", f"{layer}.k", f"{layer}.v"])
        padded = graph.node("Gather", [qkv, "pad_index"], f"{layer}.padded", axis=0)
        cos = self._weight("rope_cos", lambda: self._rope(np.cos))
        sin = self._weight("rope_sin", lambda: self._rope(np.sin))
        unused = [""] * 7
        attended = graph.node(
            "GroupQueryAttention",
            [
                *(padded, "", ""),  # queries, keys and values in one
                *(f"past_k.{layer}", f"past_v.{layer}", "seqlens_k", "total_len", cos, sin),
                *unused,
                "query_seqlens",
            ],
            f"{layer}.attended",
            f"present_k.{layer}",
            f"present_v.{layer}",
            domain=MICROSOFT,
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            do_rotary=1,
        )
        row_shape = graph.integers("row_shape", [-1, config.num_heads * config.head_size])
        rows = graph.node("Reshape", [attended, row_shape], f"{layer}.rows")
        packed = graph.node("Gather", [rows, "unpad_index"], f"{layer}.packed", axis=0)
        return self._linear(packed, f"{layer}.o", [f"{layer}.o"])

    def _ffn(self, layer: int, x: str) -> str:
        graph = self._graph
        gate = self._linear(x, f"{layer}.gate", [f"{layer}.gate"])
        up = self._linear(x, f"{layer}.up", [f"{layer}.up"])
        activated = graph.node("QuickGelu", [gate], f"{layer}.silu", domain=MICROSOFT, alpha=1.0)
        gated = graph.node("Mul", [activated, up], f"{layer}.act")
        return self._linear(gated, f"{layer}.down", [f"{layer}.down"])

    def _add_norm(self, name: str, residual: str, branch: str | None) -> tuple[str, str]:
        """Adds a branch to the residual; returns that normalised, and the sum."""
        config, graph = self._config, self._graph
        scale = self._weight(name, partial(self._weights, name))
        normalized, total = f"{name}.y", f"{name}.sum"
        if branch is None:
            graph.node(
                "SimplifiedLayerNormalization", [residual, scale], normalized, epsilon=config.norm_epsilon, axis=-1
            )
            return normalized, residual
        graph.node(
            "SkipSimplifiedLayerNormalization",
            [residual, branch, scale],
            *(normalized, "", "", total),
            domain=MICROSOFT,
            epsilon=config.norm_epsilon,
        )
        return normalized, total

    def _linear(self, x: str, name: str, parts: list[str]) -> str:
        return self._formulation.linear(self._graph, x, self._matrix(name, parts), f"{name}.y")

    def _matrix(self, name: str, parts: list[str]) -> Matrix:
        """The weights ``parts``, one below the other."""
        shapes = weight_shapes(self._config)
        return Matrix(
            name,
            (sum(shapes[part][0] for part in parts), shapes[parts[0]][1]),
            lambda: np.concatenate([self._weights(part) for part in parts]),
            normalized=not name.endswith((".o", ".down")),
        )

    def _weight(self, name: str, make: Callable[[], NDArray[np.float32]]) -> str:
        (stored,) = self._graph.stored([name], lambda: [make()])
        return stored

    def _rope(self, function: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float32]:
        """[context, head_size / 2]"""
        config = self._config
        frequencies = config.rope_base ** (-np.arange(0, config.head_size, 2) / config.head_size)
        return function(np.outer(np.arange(config.context_length), frequencies)).astype(np.float32)

    def _signature(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        config = self._config
        value = helper.make_tensor_value_info
        inputs = [
            value("input_ids", TensorProto.INT64, ["T"]),
            value("pad_index", TensorProto.INT64, ["B", "S"]),
            value("unpad_index", TensorProto.INT64, ["T"]),
            value("logits_index", TensorProto.INT64, ["R"]),
            value("seqlens_k", TensorProto.INT32, ["B"]),
            value("total_len", TensorProto.INT32, []),
            value("query_seqlens", TensorProto.INT32, ["B"]),
        ]
        outputs = [value("logits", TensorProto.FLOAT, ["R", config.vocabulary_size])]
        cache = ["B", config.num_kv_heads, "C", config.head_size]
        for i in range(config.num_layers):
            inputs += [value(f"past_{part}.{i}", TensorProto.FLOAT, cache) for part in "kv"]
            outputs += [value(f"present_{part}.{i}", TensorProto.FLOAT, cache) for part in "kv"]
        return inputs, outputs
