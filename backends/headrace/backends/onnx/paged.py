"""Writes a decoder for ONNX Runtime's CUDA provider: the same as ``graph``'s with activations of 16 bits, and with keys
and values in blocks of a common pool, found by a table.

Products, attention and gates are of 16 bits, the sums between them float32. It stores no tensor of its own: what
``graph.packed_decoder`` stored in float32 (scales, rotary tables) becomes 16 bits when the graph is loaded, and
quantised matrices are read as they are. So every bundle has it that can, asked for or not: of SmolLM2 it is 0.1 MB and
takes 1 % of the time of a build, and a machine with a GPU needs no build of its own.

Inputs (T tokens of all rows, one row behind the other, and then any number that belong to none; N rows; R rows of
logits; M blocks of the longest row):

    input_ids            int64 [T]
    logits_index         int64 [R]      the tokens whose logits are wanted
    cumulative_lengths   int32 [N + 1]  where each row's tokens begin, and where the last one's end; rows may be empty
    past_lengths         int32 [N]      tokens that each row has in the cache before this run
    block_table          int32 [N, M]   the blocks of each row in the order of its tokens, -1 where there is none
    slot_mapping         int32 [T]      block × block_size + place of each token's keys and values; -1: not kept
    attention_bounds     int32 [3]      in the CPU's memory: at least the tokens of any row in this run; at least those
                                        of any row with what it has in the cache; at most that of the longest row. 0:
                                        unknown. A captured run keeps those that it was captured with.
    key_cache.{i}, value_cache.{i}      for each layer i: float16 or bfloat16 [num_blocks, block_size, kv_heads,
                                        head_size]

Outputs: ``logits`` float32 [R, V], and ``present_key_cache.{i}``, ``present_value_cache.{i}``, to be bound to the
memory of the inputs.

How many tokens a block must hold for the fast kernels, ``blocks.block_size`` says. PagedAttention reads neither lengths
nor table back to the host, as long as it is given bounds.

Whether a row has the same bits beside others, and however it is cut, nobody has proven on a device, and kernels are
chosen by how many tokens and rows there are: expect that it has not.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from headrace.backends.onnx.formulations import Formulation, Pageable
from headrace.backends.onnx.graph import DecoderConfig, Layers, Weights
from headrace.backends.onnx.writer import MICROSOFT, GraphBuilder, WeightFile

_HEAD_SIZE_UNIT = 8
_MAX_HEAD_SIZE = 256
"""Of FlashAttention, without which prompts are slow."""
_OPSET = 18
"""Older than the other graphs': the newest whose operators the CUDA provider is known to have, all of them."""


def can_page(config: DecoderConfig) -> bool:
    """Whether the operators compute decoders of this shape."""
    return config.head_size % _HEAD_SIZE_UNIT == 0 and config.head_size <= _MAX_HEAD_SIZE


def paged_decoder(config: DecoderConfig, weights: Weights, formulation: Pageable, file: WeightFile) -> onnx.ModelProto:
    """The graph that this module describes. It uses the tensors that ``graph.packed_decoder`` stored in ``file``."""
    return _PagedDecoder(config, weights, formulation.on_device(), GraphBuilder(file)).model()


class _PagedDecoder:
    def __init__(self, config: DecoderConfig, weights: Weights, formulation: Formulation, graph: GraphBuilder) -> None:
        self._config = config
        self._activations = formulation.activations
        self._graph = graph
        self._layers = Layers(config, weights, formulation, graph)

    def model(self) -> onnx.ModelProto:
        logits = self._layers.logits(self._attention, "logits.narrow")
        self._graph.node("Cast", [logits], "logits", to=TensorProto.FLOAT)
        return self._graph.model(*self._signature(), versions={"": _OPSET})

    def _attention(self, layer: int, x: str) -> str:
        config = self._config
        attributes: dict[str, int | float] = {"num_heads": config.num_heads, "kv_num_heads": config.num_kv_heads}
        window = config.layers[layer].window
        if window is not None:
            attributes["local_window_size"] = window
        rope = self._layers.rope(layer)
        if rope:
            attributes["do_rotary"] = 1
        head_norms: list[str] = []
        if config.qk_norm:
            head_norms = [self._layers.scale(f"{layer}.{part}_norm") for part in "qk"]
            attributes["qk_norm_epsilon"] = config.norm_epsilon
        no_sink, no_scales = "", ["", ""]
        return self._graph.node(
            "PagedAttention",
            [
                *(self._layers.qkv(layer, x), "", ""),  # queries, keys and values in one
                *(f"key_cache.{layer}", f"value_cache.{layer}"),
                *("cumulative_lengths", "past_lengths", "block_table"),
                *(rope or ["", ""]),
                *("slot_mapping", no_sink),
                *(head_norms or ["", ""]),
                *(*no_scales, "attention_bounds"),
            ],
            f"{layer}.attended",
            f"present_key_cache.{layer}",
            f"present_value_cache.{layer}",
            domain=MICROSOFT,
            **attributes,
        )

    def _signature(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        config = self._config
        value = helper.make_tensor_value_info
        inputs = [
            value("input_ids", TensorProto.INT64, ["T"]),
            value("logits_index", TensorProto.INT64, ["R"]),
            value("cumulative_lengths", TensorProto.INT32, ["N + 1"]),
            value("past_lengths", TensorProto.INT32, ["N"]),
            value("block_table", TensorProto.INT32, ["N", "M"]),
            value("slot_mapping", TensorProto.INT32, ["T"]),
            value("attention_bounds", TensorProto.INT32, [3]),
        ]
        outputs = [value("logits", TensorProto.FLOAT, ["R", config.vocabulary_size])]
        blocks = ["num_blocks", "block_size", config.num_kv_heads, config.head_size]
        for i in range(config.num_layers):
            names = [f"{part}_cache.{i}" for part in ("key", "value")]
            inputs += [value(name, self._activations, blocks) for name in names]
            outputs += [value(f"present_{name}", self._activations, blocks) for name in names]
        return inputs, outputs
