"""Writes a decoder for the compiled operators of the package ``headrace-kernels``: the same as ``graph``'s, in a
quarter of the nodes.

A layer is four products and an attention (backends/kernels/src/*_op.c). There is no padded view: a token says itself
which slot it belongs to and where, so tokens of any number of sequences, decodes and chunks alike, make one run.

Inputs (T new tokens; R rows of logits; C capacity of a slot, a multiple of 16):

    input_ids       int64 [T]
    slots           int32 [T]     tokens of a slot follow one another …
    positions       int32 [T]     … and their positions ascend by 1
    logits_index    int64 [R]     the tokens whose logits are wanted
    cache           float16 [layers, 2, slots, kv_heads, C, head_size]: keys, then values; written in place

Outputs: ``logits`` float32 [R, V]; ``maxima`` float32 [R, M], the largest of each span of neighbouring logits.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from headrace.backends.onnx.formulations import Blocks, Blockwise
from headrace.backends.onnx.graph import DecoderConfig, Weights, matrix, stored_rope
from headrace.backends.onnx.writer import HEADRACE, GraphBuilder, WeightFile

_GATES = {"silu": 1, "gelu_tanh": 2}
_TILE = 16
_MAX_HEAD_SIZE = 256


def can_fuse(config: DecoderConfig) -> bool:
    """Whether the operators compute decoders of this shape."""
    return config.head_size % _TILE == 0 and config.head_size <= _MAX_HEAD_SIZE and config.ffn_size % _TILE == 0


def fused_decoder(config: DecoderConfig, weights: Weights, formulation: Blockwise, file: WeightFile) -> onnx.ModelProto:
    """The graph that this module describes. It uses the tensors that ``graph.packed_decoder`` stored in ``file``."""
    return _FusedDecoder(config, weights, formulation, GraphBuilder(file)).model()


class _FusedDecoder:
    def __init__(self, config: DecoderConfig, weights: Weights, formulation: Blockwise, graph: GraphBuilder) -> None:
        self._config = config
        self._weights = weights
        self._formulation = formulation
        self._graph = graph

    def model(self) -> onnx.ModelProto:
        config, graph = self._config, self._graph
        embedding = matrix(config, self._weights, "embedding", ["embedding"])
        x = self._formulation.embedding(graph, "input_ids", embedding, "embedded")
        for i in range(config.num_layers):
            qkv = self._linear(x, f"{i}.qkv", [f"{i}.{part}" for part in "qkv"], norm=f"{i}.attention_norm")
            attended = self._attention(i, qkv)
            x = self._add(x, attended, f"{i}.o", f"{i}.attention_post_norm")
            gated = self._ffn(i, x)
            x = self._add(x, gated, f"{i}.down", f"{i}.ffn_post_norm")
        x = graph.node("Gather", [x, "logits_index"], "selected", axis=0)
        head = "embedding" if config.tied_embeddings else "head"
        self._linear(x, head, [head], "logits", "maxima", norm="final_norm")
        return graph.model(*self._signature())

    def _attention(self, layer: int, qkv: str) -> str:
        config, graph = self._config, self._graph
        frequencies = config.layers[layer].rope_frequencies
        rope = ["", ""]
        if frequencies is not None:
            rope = [*stored_rope(graph, config, frequencies)]
        norms = [self._weight(f"{layer}.{part}_norm") for part in "qk"] if config.qk_norm else []
        return graph.node(
            "Attention",
            [qkv, "cache", "slots", "positions", *rope, *norms],
            f"{layer}.attended",
            domain=HEADRACE,
            layer=layer,
            num_heads=config.num_heads,
            scale=config.head_size**-0.5,
            window=config.layers[layer].window or 0,
            epsilon=config.norm_epsilon,
        )

    def _ffn(self, layer: int, x: str) -> str:
        gated = self._blocks(f"{layer}.up", [f"{layer}.up"])
        return self._linear(
            x,
            f"{layer}.gate",
            [f"{layer}.gate"],
            norm=f"{layer}.ffn_norm",
            gate=_GATES[self._config.activation],
            gated=gated,
        )

    def _add(self, residual: str, x: str, name: str, post_norm: str) -> str:
        """The residual plus a product, normalised first if the decoder has post-norms."""
        if not self._config.post_norms:
            return self._linear(x, name, [name], residual=residual)
        graph = self._graph
        scale = self._weight(post_norm)
        normed = graph.node(
            "SimplifiedLayerNormalization",
            [self._linear(x, name, [name]), scale],
            f"{post_norm}.y",
            epsilon=self._config.norm_epsilon,
            axis=-1,
        )
        return graph.node("Add", [residual, normed], f"{name}.sum")

    def _linear(
        self,
        x: str,
        name: str,
        parts: list[str],
        *outputs: str,
        norm: str | None = None,
        residual: str = "",
        gate: int = 0,
        gated: Blocks | None = None,
    ) -> str:
        blocks = self._blocks(name, parts)
        bias = ""
        if name.endswith(".qkv") and self._config.qkv_bias:
            biases = [f"{part}_bias" for part in parts]
            (bias,) = self._graph.stored(
                [f"{name}_bias"], lambda: [np.concatenate([self._weights(part) for part in biases])]
            )
        more = [] if gated is None else [gated.values, gated.scales, gated.minima]
        return self._graph.node(
            "Linear",
            [x, blocks.values, blocks.scales, blocks.minima, self._weight(norm) if norm else "", bias, residual, *more],
            *(outputs or [f"{name}.y"]),
            domain=HEADRACE,
            bits=blocks.bits,
            gate=gate,
            epsilon=self._config.norm_epsilon,
        )

    def _blocks(self, name: str, parts: list[str]) -> Blocks:
        return self._formulation.blocks(self._graph, matrix(self._config, self._weights, name, parts))

    def _weight(self, name: str) -> str:
        (stored,) = self._graph.stored([name], lambda: [self._weights(name)])
        return stored

    def _signature(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        config = self._config
        value = helper.make_tensor_value_info
        cache = [config.num_layers, 2, "S", config.num_kv_heads, "C", config.head_size]
        inputs = [
            value("input_ids", TensorProto.INT64, ["T"]),
            value("slots", TensorProto.INT32, ["T"]),
            value("positions", TensorProto.INT32, ["T"]),
            value("logits_index", TensorProto.INT64, ["R"]),
            value("cache", TensorProto.FLOAT16, cache),
        ]
        outputs = [
            value("logits", TensorProto.FLOAT, ["R", config.vocabulary_size]),
            value("maxima", TensorProto.FLOAT, ["R", "M"]),
        ]
        return inputs, outputs
