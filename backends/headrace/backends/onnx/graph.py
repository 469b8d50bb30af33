"""Writes a decoder as one packed ONNX graph.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from headrace.backends.onnx.formulations import Formulation, Matrix, converted
from headrace.backends.onnx.writer import MICROSOFT, GraphBuilder, WeightFile

Weights = Callable[[str], NDArray[np.float32]]
"""Reads a weight by its name in ``weight_shapes``, as the graph uses it: what an architecture folds into weights (an
offset of its norms, a scale of its embeddings or of its attention) is in them."""

Activation = Literal["silu", "gelu_tanh"]
"""``silu``: x × sigmoid(x). ``gelu_tanh``: GELU in its approximation by tanh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What may differ between the layers of a decoder."""

    window: int | None
    """How many tokens a token attends to, itself among them: the last ones. None: all of them."""
    rope_frequencies: tuple[float, ...] | None
    """Of the rotary embedding: radians per position, by which each of the ``head_size / 2`` pairs is turned; pair j is
    elements j and ``j + head_size / 2`` of a head. None: queries and keys are not turned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder. With x the residual stream [tokens, hidden_size], layer i is

        y = norm(x) × attention_norm
        q, k, v = y qᵀ + q_bias, y kᵀ + k_bias, y vᵀ + v_bias                   biases: if qkv_bias
        q, k = norm(q) × q_norm, norm(k) × k_norm, each head on its own         if qk_norm
        q, k = rotary(q), rotary(k)                                             if the layer has rope_frequencies
        a = attention(q, k, v) oᵀ, causal, scores over sqrt(head_size), within the layer's window
        x = x + a                           with post_norms: x + norm(a) × attention_post_norm
        y = norm(x) × ffn_norm
        f = (activation(y gateᵀ) × (y upᵀ)) downᵀ
        x = x + f                           with post_norms: x + norm(f) × ffn_post_norm

    where norm(x) = x / sqrt(mean(x²) + norm_epsilon); the first x is a row of ``embedding`` for each token, the logits
    are (norm(x) × final_norm) headᵀ. Names are those of ``weight_shapes``.
    """

    layers: tuple[LayerConfig, ...]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    """Divides ``num_heads``: heads h × num_heads / num_kv_heads and following share head h of keys and values."""
    head_size: int
    """Not always ``hidden_size / num_heads``."""
    ffn_size: int
    vocabulary_size: int
    context_length: int
    norm_epsilon: float
    activation: Activation
    qkv_bias: bool
    qk_norm: bool
    post_norms: bool
    tied_embeddings: bool
    """Whether the head's weights are the embedding's; there is no weight ``head`` then."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by name. Matrices are [outputs, inputs]."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "ffn_norm": (hidden,),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    if config.qkv_bias:
        layer |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    if config.qk_norm:
        layer |= {"q_norm": (config.head_size,), "k_norm": (config.head_size,)}
    if config.post_norms:
        layer |= {"attention_post_norm": (hidden,), "ffn_post_norm": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocabulary_size, hidden), "final_norm": (hidden,)}
    if not config.tied_embeddings:
        shapes["head"] = (config.vocabulary_size, hidden)
    for i in range(config.num_layers):
        shapes |= {f"{i}.{part}": shape for part, shape in layer.items()}
    return shapes


def rope_tables(frequencies: Sequence[float], context_length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The cosines and sines of a rotary embedding, each [context_length, len(frequencies)]."""
    angles = np.outer(np.arange(context_length), np.array(frequencies))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def stored_rope(graph: GraphBuilder, config: DecoderConfig, frequencies: Sequence[float]) -> Sequence[str]:
    """The tables of a rotary embedding, stored once for all layers that share it."""
    first = next(i for i, layer in enumerate(config.layers) if layer.rope_frequencies == frequencies)
    names = [f"{first}.rope_cos", f"{first}.rope_sin"]
    return graph.stored(names, lambda: rope_tables(frequencies, config.context_length))


def matrix(config: DecoderConfig, weights: Weights, name: str, parts: Sequence[str]) -> Matrix:
    """The weights ``parts``, one below the other, to be called ``name``."""
    shapes = weight_shapes(config)
    return Matrix(
        name,
        (sum(shapes[part][0] for part in parts), shapes[parts[0]][1]),
        lambda: np.concatenate([weights(part) for part in parts]),
        normalized=not name.endswith((".o", ".down")),
    )


def packed_decoder(
    config: DecoderConfig, weights: Weights, formulation: Formulation, file: WeightFile
) -> onnx.ModelProto:
    """The graph that this module describes; its weights go to ``file``. What the formulation relies on, ``config`` and
    ``weights`` must already have.
    """
    return _Decoder(config, weights, formulation, GraphBuilder(file)).model()


class Layers:
    """What graphs of packed tokens have in common: everything but attention itself.

    The residual stream and its norms are float32, whatever the type of activations: it grows beyond what float16 holds
    (Gemma 3 270M's to 71,000 in an ordinary sentence), and what its rounding in every layer loses is most of what
    float16 loses (of SmolLM2's logits 0.3 % of their standard deviation instead of 0.1 %).
    """

    def __init__(self, config: DecoderConfig, weights: Weights, formulation: Formulation, graph: GraphBuilder) -> None:
        self._config = config
        self._weights = weights
        self._formulation = formulation
        self._graph = graph

    def logits(self, attention: Callable[[int, str], str], output: str) -> str:
        """From ``input_ids`` [T] and ``logits_index`` [R] to logits [R, V], in the type of activations.

        ``attention`` gives a layer's heads [T, num_heads × head_size], from what its norm made of the stream [T,
        hidden_size]. Returns ``output``.
        """
        config, graph = self._config, self._graph
        embedding = self._matrix("embedding", ["embedding"])
        residual = self._wide(self._formulation.embedding(graph, "input_ids", embedding, "embedded"))
        branch = None
        for i in range(config.num_layers):
            x, residual = self._add_norm(f"{i}.attention_norm", residual, branch)
            out = self._wide(self._linear(attention(i, x), f"{i}.o", [f"{i}.o"]))
            branch = self.norm(f"{i}.attention_post_norm", out) if config.post_norms else out
            x, residual = self._add_norm(f"{i}.ffn_norm", residual, branch)
            branch = self._ffn(i, x)
        x, _ = self._add_norm("final_norm", residual, branch)
        x = graph.node("Gather", [x, "logits_index"], "selected", axis=0)
        head = embedding if config.tied_embeddings else self._matrix("head", ["head"])
        return self._formulation.linear(graph, x, head, output)

    def qkv(self, layer: int, x: str) -> str:
        """Queries, keys and values side by side, not normalised: [T, (num_heads + 2 × num_kv_heads) × head_size]."""
        qkv = self._linear(x, f"{layer}.qkv", [f"{layer}.{part}" for part in "qkv"])
        if not self._config.qkv_bias:
            return qkv
        bias = self._stored(
            f"{layer}.qkv_bias", lambda: np.concatenate([self._weights(f"{layer}.{part}_bias") for part in "qkv"])
        )
        bias = converted(self._graph, bias, self._formulation.activations)
        return self._graph.node("Add", [qkv, bias], f"{layer}.qkv.biased")

    def norm(self, name: str, x: str) -> str:
        """Rows of x, float32, normalised and scaled by the weight ``name``."""
        scale = self._stored(name, partial(self._weights, name))
        return self._graph.node(
            "SimplifiedLayerNormalization", [x, scale], f"{name}.y", epsilon=self._config.norm_epsilon, axis=-1
        )

    def scale(self, name: str) -> str:
        """The weight of a norm, in the type of activations."""
        stored = self._stored(name, partial(self._weights, name))
        return converted(self._graph, stored, self._formulation.activations)

    def rope(self, layer: int) -> Sequence[str]:
        """The tables of a layer's rotary embedding in the type of activations; none if it has no such."""
        frequencies = self._config.layers[layer].rope_frequencies
        if frequencies is None:
            return []
        return [
            converted(self._graph, table, self._formulation.activations)
            for table in stored_rope(self._graph, self._config, frequencies)
        ]

    def _ffn(self, layer: int, x: str) -> str:
        config, graph = self._config, self._graph
        gate = self._linear(x, f"{layer}.gate", [f"{layer}.gate"])
        up = self._linear(x, f"{layer}.up", [f"{layer}.up"])
        if config.activation == "silu":
            activated = graph.node("QuickGelu", [gate], f"{layer}.silu", domain=MICROSOFT, alpha=1.0)
        else:
            activated = graph.node("FastGelu", [gate], f"{layer}.gelu", domain=MICROSOFT)
        gated = graph.node("Mul", [activated, up], f"{layer}.act")
        out = self._wide(self._linear(gated, f"{layer}.down", [f"{layer}.down"]))
        return self.norm(f"{layer}.ffn_post_norm", out) if config.post_norms else out

    def _add_norm(self, name: str, residual: str, branch: str | None) -> tuple[str, str]:
        """Adds a branch to the residual; returns that normalised, in the type of activations, and the sum."""
        config, graph = self._config, self._graph
        if branch is None:
            return self._narrow(self.norm(name, residual)), residual
        scale = self._stored(name, partial(self._weights, name))
        normalized, total = f"{name}.y", f"{name}.sum"
        graph.node(
            "SkipSimplifiedLayerNormalization",
            [residual, branch, scale],
            *(normalized, "", "", total),
            domain=MICROSOFT,
            epsilon=config.norm_epsilon,
        )
        return self._narrow(normalized), total

    def _linear(self, x: str, name: str, parts: list[str]) -> str:
        return self._formulation.linear(self._graph, x, self._matrix(name, parts), f"{name}.y")

    def _matrix(self, name: str, parts: Sequence[str]) -> Matrix:
        return matrix(self._config, self._weights, name, parts)

    def _stored(self, name: str, make: Callable[[], NDArray[np.float32]]) -> str:
        (stored,) = self._graph.stored([name], lambda: [make()])
        return stored

    def _wide(self, x: str) -> str:
        if self._formulation.activations == TensorProto.FLOAT:
            return x
        return self._graph.node("Cast", [x], f"{x}.wide", to=TensorProto.FLOAT)

    def _narrow(self, x: str) -> str:
        if self._formulation.activations == TensorProto.FLOAT:
            return x
        return self._graph.node("Cast", [x], f"{x}.narrow", to=self._formulation.activations)


class _Decoder:
    def __init__(self, config: DecoderConfig, weights: Weights, formulation: Formulation, graph: GraphBuilder) -> None:
        self._config = config
        self._graph = graph
        self._layers = Layers(config, weights, formulation, graph)

    def model(self) -> onnx.ModelProto:
        self._layers.logits(self._attention, "logits")
        return self._graph.model(*self._signature())

    def _attention(self, layer: int, x: str) -> str:
        config, graph = self._config, self._graph
        attributes: dict[str, int] = {"num_heads": config.num_heads, "kv_num_heads": config.num_kv_heads}
        window = config.layers[layer].window
        if window is not None:
            attributes["local_window_size"] = window
        rope = self._layers.rope(layer)
        if rope:
            attributes["do_rotary"] = 1
        qkv = self._qkv(layer, x)
        padded = graph.node("Gather", [qkv, "pad_index"], f"{layer}.padded", axis=0)
        unused = [""] * 7
        attended = graph.node(
            "GroupQueryAttention",
            [
                *(padded, "", ""),  # queries, keys and values in one
                *(f"past_k.{layer}", f"past_v.{layer}", "seqlens_k", "total_len", *(rope or ["", ""])),
                *unused,
                "query_seqlens",
            ],
            f"{layer}.attended",
            f"present_k.{layer}",
            f"present_v.{layer}",
            domain=MICROSOFT,
            **attributes,
        )
        row_shape = graph.integers("row_shape", [-1, config.num_heads * config.head_size])
        rows = graph.node("Reshape", [attended, row_shape], f"{layer}.rows")
        return graph.node("Gather", [rows, "unpad_index"], f"{layer}.packed", axis=0)

    def _qkv(self, layer: int, x: str) -> str:
        """``Layers.qkv``, with queries and keys normalised if the decoder wants it."""
        config, graph = self._config, self._graph
        qkv = self._layers.qkv(layer, x)
        if not config.qk_norm:
            return qkv
        widths = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        sizes = graph.integers("qkv_sizes", [heads * config.head_size for heads in widths.values()])
        graph.node("Split", [qkv, sizes], *(f"{layer}.{part}.y" for part in "qkv"), axis=1)
        parts = [self._head_norm(layer, part, widths[part]) for part in "qk"]
        return graph.node("Concat", [*parts, f"{layer}.v.y"], f"{layer}.qkv.normed", axis=1)

    def _head_norm(self, layer: int, part: str, num_heads: int) -> str:
        """Normalises each head of ``{layer}.{part}.y`` [T, num_heads × head_size] on its own."""
        config, graph = self._config, self._graph
        head_shape = graph.integers("head_shape", [-1, config.head_size])
        row_shape = graph.integers(f"{part}_shape", [-1, num_heads * config.head_size])
        heads = graph.node("Reshape", [f"{layer}.{part}.y", head_shape], f"{layer}.{part}.heads")
        return graph.node(
            "Reshape", [self._layers.norm(f"{layer}.{part}_norm", heads), row_shape], f"{layer}.{part}.normed"
        )

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
