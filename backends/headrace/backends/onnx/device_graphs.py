"""Graphs that choose tokens where the logits lie, so that a step brings a few numbers to the host and not whole rows.

They are written when a bundle is built, beside its ``paged.onnx``. All of them have two inputs:

    logits        float32 [R, V]
    rows          int64 [N]      the rows that are wanted

``rows.onnx`` gives ``selected`` float32 [N, V].

``largest.onnx`` gives the k largest logits of each row, largest first: ``top_logits`` float32 [N, k] and ``top_ids``
int64 [N, k]; and ``sum_exp`` float32 [N, 1], the sum of exp((logit - largest) / temperature), NaN where a logit is NaN
or the largest is infinite. Its other inputs:

    temperature   float32 [N, 1], above 0
    k             int64 [1]

``draw.onnx`` draws a token from each row, in the order of ids, as ``logits.HostLogits`` does without top-k, top-p and
typical-p: ``ids`` int64 [N, 1], and ``drawn`` float32 [N, 1], their logits, NaN as ``sum_exp``. Its other inputs:

    temperature   float32 [N, 1], above 0
    min_p         float32 [N, 1]
    number        float64 [N, 1], 0 to below 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

ROWS = "rows.onnx"
LARGEST = "largest.onnx"
DRAW = "draw.onnx"

_OPSET = 18
"""The newest whose operators ONNX Runtime's CUDA provider is known to have, all of them."""


def device_graphs() -> dict[str, bytes]:
    """The graphs that this module describes, serialized, by the names of their files. Needs the package onnx."""
    from onnx import TensorProto, helper, numpy_helper

    node, value = helper.make_node, helper.make_tensor_value_info
    logits = value("logits", TensorProto.FLOAT, ["R", "V"])
    rows = value("rows", TensorProto.INT64, ["N"])
    temperature = value("temperature", TensorProto.FLOAT, ["N", 1])
    select = node("Gather", ["logits", "rows"], ["selected"], axis=0)
    last = numpy_helper.from_array(np.array([-1], np.int64), "last")
    first = numpy_helper.from_array(np.array([0], np.int64), "first")
    scale = [
        node("Sub", ["selected", "largest"], ["below"]),
        node("Div", ["below", "temperature"], ["scaled"]),
        node("Exp", ["scaled"], ["all_weights"]),
    ]
    return {
        ROWS: _serialized("rows", [select], [logits, rows], [value("selected", TensorProto.FLOAT, ["N", "V"])], []),
        LARGEST: _serialized(
            "largest",
            [
                select,
                node("TopK", ["selected", "k"], ["top_logits", "top_ids"], axis=1),
                node("Gather", ["top_logits", "first"], ["largest"], axis=1),
                *scale,
                node("ReduceSum", ["all_weights", "last"], ["sum_exp"], keepdims=1),
            ],
            [logits, rows, temperature, value("k", TensorProto.INT64, [1])],
            [
                value("top_logits", TensorProto.FLOAT, ["N", "K"]),
                value("top_ids", TensorProto.INT64, ["N", "K"]),
                value("sum_exp", TensorProto.FLOAT, ["N", 1]),
            ],
            [first, last],
        ),
        DRAW: _serialized(
            "draw",
            [
                select,
                node("ReduceMax", ["selected", "last"], ["largest"], keepdims=1),
                *scale,
                node("Less", ["all_weights", "min_p"], ["too_small"]),
                node("Where", ["too_small", "nothing", "all_weights"], ["weights"]),
                # In doubles: at a vocabulary of 262,144 the steps of a float32 sum are coarser than most weights.
                node("Cast", ["weights"], ["exact_weights"], to=TensorProto.DOUBLE),
                node("CumSum", ["exact_weights", "axis"], ["sums"]),
                node("Gather", ["sums", "last"], ["sum"], axis=1),
                node("Mul", ["sum", "number"], ["share"]),
                # Counted in float32, which is exact below 2**24 and which every provider sums.
                node("LessOrEqual", ["sums", "share"], ["passed"]),
                node("Cast", ["passed"], ["passed_ones"], to=TensorProto.FLOAT),
                node("ReduceSum", ["passed_ones", "last"], ["num_passed"], keepdims=1),
                # Rounding can put the product at the sum of all: the last increase is the latest that counts.
                node("Less", ["sums", "sum"], ["before_end"]),
                node("Cast", ["before_end"], ["before_end_ones"], to=TensorProto.FLOAT),
                node("ReduceSum", ["before_end_ones", "last"], ["num_before_end"], keepdims=1),
                node("Min", ["num_passed", "num_before_end"], ["place"]),
                node("Cast", ["place"], ["ids"], to=TensorProto.INT64),
                node("GatherElements", ["selected", "ids"], ["chosen"], axis=1),
                # A NaN anywhere makes the sum one, and times 0 keeps it.
                node("Cast", ["sum"], ["narrow_sum"], to=TensorProto.FLOAT),
                node("Mul", ["narrow_sum", "nothing"], ["zero_or_nan"]),
                node("Add", ["chosen", "zero_or_nan"], ["drawn"]),
            ],
            [
                *(logits, rows, temperature),
                value("min_p", TensorProto.FLOAT, ["N", 1]),
                value("number", TensorProto.DOUBLE, ["N", 1]),
            ],
            [value("ids", TensorProto.INT64, ["N", 1]), value("drawn", TensorProto.FLOAT, ["N", 1])],
            [
                last,
                numpy_helper.from_array(np.array(1, np.int64), "axis"),
                numpy_helper.from_array(np.array(0, np.float32), "nothing"),
            ],
        ),
    }


def _serialized(
    name: str, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], constants: Sequence[Any]
) -> bytes:
    from onnx import helper

    model = helper.make_model(
        helper.make_graph(nodes, name, inputs, outputs, constants),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        producer_name="headrace",
    )
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized
