"""``com.microsoft.PagedAttention`` rewritten into stock operators, so that ONNX Runtime's CPU provider executes a graph
that is otherwise for CUDA alone: the very same graph, but for this operator.

What it computes is what the operator's documentation says: scores and sums in float32, whatever types come in and go
out. It is made to find mistakes, not for speed: a row that is longer than ``attention_metadata`` says, which the kernel
trusts, gives NaN; a slot beyond the cache, which the kernel does not check, is an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from headrace.backends.onnx.bundle import MANIFEST, PAGED, bundle_digest, hash_file, read_manifest

_FLOAT16 = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
_LOWEST = float(np.finfo(np.float32).min)
_INPUTS = (
    *("query", "key", "value", "key_cache", "value_cache", "cumulative_lengths", "past_lengths", "block_table"),
    *("cos", "sin", "slot_mapping", "head_sink", "q_norm", "k_norm", "k_scale", "v_scale", "metadata"),
)
"""In the operator's order."""


def stand_in(bundle: Path, folder: Path, *, float32: bool = False) -> Path:
    """A copy of a bundle, ``folder / bundle.name``, whose paged graph runs on the CPU: for everything above a session.

    Its other files are links to those of ``bundle`` where the file system has them, and copies where not.
    """
    copy = folder / bundle.name
    shutil.copytree(bundle, copy, copy_function=_link)
    model = onnx.load(copy / PAGED, load_external_data=False)
    for name in (PAGED, MANIFEST):
        (copy / name).unlink()  # not to write through the links
    onnx.save(reference(model, float32=float32), copy / PAGED)
    manifest = read_manifest(bundle)
    files = manifest.files | {PAGED: hash_file(copy / PAGED)}
    changed = manifest.model_copy(update={"files": files, "digest": bundle_digest(files)})
    (copy / MANIFEST).write_text(changed.model_dump_json())
    return copy


def reference(model: onnx.ModelProto, *, float32: bool = False) -> onnx.ModelProto:
    """``model`` with every PagedAttention in stock operators.

    With ``float32`` all that was float16 or bfloat16 is float32, its inputs and outputs too: what is left of a
    difference from another graph over the same weights is then no rounding.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if float32:
        _widen(result.graph)
    nodes = [stock for node in result.graph.node for stock in _rewritten(node)]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _link(source: str, destination: str) -> None:
    try:
        Path(destination).hardlink_to(source)
    except OSError:  # another file system
        shutil.copyfile(source, destination)


def _widen(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # MatMulNBits with float32 activations; 4 would make them int8
            elif attribute.name in {"to", "dtype"} and attribute.i in _FLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.t.data_type in _FLOAT16:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type in _FLOAT16:
            stored = f"{tensor.name}.stored"
            casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
            tensor.name = stored
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _rewritten(node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
    return _Rewriting(node).nodes() if node.op_type == "PagedAttention" else [node]


class _Rewriting:
    """Of one node. ``self(operator, …)`` adds a stock one and returns the name of its output."""

    def __init__(self, node: onnx.NodeProto) -> None:
        names = dict(zip(_INPUTS, (*node.input, *[""] * len(_INPUTS)), strict=False))
        self._in = {key: name for key, name in names.items() if name}
        self._attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        self._outputs = node.output
        self._prefix = f"{node.output[0]}.reference"
        self._nodes: list[onnx.NodeProto] = []
        self._heads: int = self._attributes["num_heads"]
        self._kv_heads: int = self._attributes["kv_num_heads"]
        if self._attributes.get("kv_cache_layout", b"SEPARATE") != b"SEPARATE" or "slot_mapping" not in self._in:
            raise ValueError(f"{node.name or node.output[0]}: only caches apart, and a slot_mapping, can be rewritten")
        if not self._attributes.get("is_causal", 1) or self._attributes.get("rotary_offset", 0):
            raise ValueError(f"{node.name or node.output[0]}: is_causal = 0 and rotary_offset cannot be rewritten")

    def nodes(self) -> list[onnx.NodeProto]:
        self._find_tokens()
        query, key, value = self._parts()
        key, value = self._cached("key", key, 1), self._cached("value", value, 2)
        self._attend(query, key, value)
        return self._nodes

    def __call__(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{self._prefix}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _constant(self, value: float | Sequence[int], kind: type[np.generic] = np.int64) -> str:
        return self("Constant", value=numpy_helper.from_array(np.array(value, kind)))

    def _cast(self, name: str, kind: int) -> str:
        return self("Cast", name, to=kind)

    def _integers(self, name: str) -> str:
        return self._cast(self._in[name], TensorProto.INT64)

    def _floats(self, name: str) -> str:
        return self._cast(self._in[name], TensorProto.FLOAT)

    def _reshape(self, x: str, *shape: int) -> str:
        return self("Reshape", x, self._constant(shape))

    def _size(self, x: str, axis: int) -> str:
        """A dimension, as a scalar."""
        return self("Gather", self("Shape", x), self._constant(axis))

    def _count(self, size: str) -> str:
        """0, 1, … up to a scalar."""
        return self("Range", self._constant(0), size, self._constant(1))

    def _unsqueeze(self, x: str, *axes: int) -> str:
        return self("Unsqueeze", x, self._constant(axes))

    def _slice(self, x: str, start: str, end: str, axis: int, step: int = 1) -> str:
        return self("Slice", x, start, end, self._constant([axis]), self._constant([step]))

    def _find_tokens(self) -> None:
        """The row of every token, and its position there; tokens behind the last row are padding."""
        one = self._constant(1)
        cumulative, self._past = self._integers("cumulative_lengths"), self._integers("past_lengths")
        self._starts = self._slice(cumulative, self._constant([0]), self._constant([-1]), 0)
        ends = self._slice(cumulative, self._constant([1]), self._constant([2**31]), 0)
        self._lengths = self("Sub", ends, self._starts)
        self._num_tokens = self._size(self._in["query"], 0)
        token = self._count(self._num_tokens)
        behind = self("GreaterOrEqual", self._unsqueeze(token, 1), self._unsqueeze(ends, 0))
        row = self("ReduceSum", self._cast(behind, TensorProto.INT64), self._constant([1]), keepdims=0)
        num_rows = self._size(self._starts, 0)
        self._real = self("Less", row, num_rows)
        self._row = self("Min", row, self("Sub", num_rows, one))
        offset = self("Sub", token, self("Gather", self._starts, self._row))
        zero = self._constant(0)
        self._offset = self("Where", self._real, offset, zero)
        position = self("Add", self("Gather", self._past, self._row), self._offset)
        self._position = self("Where", self._real, position, zero)

    def _parts(self) -> tuple[str, str, str]:
        """Queries, keys and values, each float32 [T, heads, head_size], normalised and turned."""
        if "key" in self._in:
            query, key, value = (
                self._reshape(self._floats(name), 0, heads, -1)
                for name, heads in (("query", self._heads), ("key", self._kv_heads), ("value", self._kv_heads))
            )
        else:
            packed = self._reshape(self._floats("query"), 0, self._heads + 2 * self._kv_heads, -1)
            ends = np.cumsum([0, self._heads, self._kv_heads, self._kv_heads]).tolist()
            query, key, value = (
                self._slice(packed, self._constant([start]), self._constant([end]), 1) for start, end in pairwise(ends)
            )
        if "q_norm" in self._in:
            query, key = self._normalized(query, "q_norm"), self._normalized(key, "k_norm")
        if self._attributes.get("do_rotary", 0):
            query, key = self._turned(query), self._turned(key)
        # What attention reads are queries of the graph's type.
        query = self._cast(self("CastLike", query, self._in["query"]), TensorProto.FLOAT)
        return query, key, value

    def _normalized(self, x: str, scale: str) -> str:
        epsilon = self._constant(self._attributes.get("qk_norm_epsilon", 1e-6), np.float32)
        mean = self("ReduceMean", self("Mul", x, x), self._constant([-1]), keepdims=1)
        normalized = self("Div", x, self("Sqrt", self("Add", mean, epsilon)))
        return self("Mul", normalized, self._floats(scale))

    def _turned(self, x: str) -> str:
        cos, sin = (
            self._unsqueeze(self("Gather", self._floats(name), self._position, axis=0), 1) for name in ("cos", "sin")
        )
        half = self._unsqueeze(self._size(self._in["cos"], 1), 0)
        both = self("Mul", half, self._constant([2]))
        interleaved = self._attributes.get("rotary_interleaved", 0)
        if interleaved:
            first, second = (self._slice(x, self._constant([start]), both, 2, step=2) for start in (0, 1))
        else:
            first, second = self._slice(x, self._constant([0]), half, 2), self._slice(x, half, both, 2)
        rest = self._slice(x, both, self._constant([2**31]), 2)
        turned = [
            self("Sub", self("Mul", first, cos), self("Mul", second, sin)),
            self("Add", self("Mul", second, cos), self("Mul", first, sin)),
        ]
        if not interleaved:
            return self("Concat", *turned, rest, axis=2)
        pairs = self("Concat", *(self._unsqueeze(part, 3) for part in turned), axis=3)
        shape = self("Concat", self._constant([0, 0]), both, axis=0)
        return self("Concat", self("Reshape", pairs, shape), rest, axis=2)

    def _cached(self, part: str, new: str, output: int) -> str:
        """Writes ``new`` [T, kv_heads, head_size] to the cache of ``part``; the cache after that, in its type."""
        cache = self._in[f"{part}_cache"]
        if self._quantized(part):
            step = self("Div", new, self._scale(part))
            lowest, highest = self._constant(-128, np.float32), self._constant(127, np.float32)
            new = self("Clip", self("Round", step), lowest, highest)
        slots = self._integers("slot_mapping")
        written = self("GreaterOrEqual", slots, self._constant(0))
        kept = self._reshape(self("NonZero", written), -1)
        slots = self("Gather", slots, kept)
        block_size = self._size(cache, 1)
        # Two indices rather than a flat view: so an output that is bound to the cache's memory is written in place.
        places = self(
            "Concat",
            self._unsqueeze(self("Div", slots, block_size), 1),
            self._unsqueeze(self("Mod", slots, block_size), 1),
            axis=1,
        )
        named = self._outputs[output] if len(self._outputs) > output else ""
        return self("ScatterND", cache, places, self("CastLike", self("Gather", new, kept), cache), output=named)

    def _quantized(self, part: str) -> bool:
        return self._attributes.get(f"{part[0]}_quant_type", b"NONE") != b"NONE"

    def _scale(self, part: str) -> str:
        """float32 [1, 1] or [kv_heads, head_size]"""
        heads = self._kv_heads if self._attributes[f"{part[0]}_quant_type"] == b"PER_CHANNEL" else 1
        return self._reshape(self._floats(f"{part[0]}_scale"), heads, -1)

    def _attend(self, query: str, key_cache: str, value_cache: str) -> None:
        """Over a padded view: N rows of Q tokens, which see S places of the cache, G queries for each head of keys."""
        group = self._heads // self._kv_heads
        one = self._constant(1)
        longest = self("Max", self("ReduceMax", self._lengths, keepdims=0), one)
        step = self._count(longest)
        view = self("Add", self._unsqueeze(self._starts, 1), self._unsqueeze(step, 0))
        view = self("Min", view, self("Sub", self._num_tokens, one))
        position = self("Add", self._unsqueeze(self._past, 1), self._unsqueeze(step, 0))  # [N, Q]
        mapped, blocks, total = self._blocks(key_cache)
        place = self._count(self._size(mapped, 1))

        distance = self("Sub", self._unsqueeze(position, 2), self._unsqueeze(place, 0, 1))  # [N, Q, S]
        seen = self("And", self("GreaterOrEqual", distance, self._constant(0)), self._unsqueeze(mapped, 1))
        window = self._attributes.get("local_window_size", -1)
        if window > 0:
            seen = self("And", seen, self("Less", distance, self._constant(window)))
        seen = self._unsqueeze(seen, 1, 2)

        rows = self._reshape(self("Gather", query, view, axis=0), 0, 0, self._kv_heads, group, -1)
        rows = self("Transpose", rows, perm=[0, 2, 3, 1, 4])  # [N, kv_heads, G, Q, head_size]
        keys = self._unsqueeze(self._read(key_cache, "key", blocks, [0, 2, 3, 1]), 2)
        values = self._unsqueeze(self._read(value_cache, "value", blocks, [0, 2, 1, 3]), 2)
        scores = self("Mul", self("MatMul", rows, keys), self._score_scale(query))
        if cap := self._attributes.get("softcap", 0.0):
            cap_name = self._constant(cap, np.float32)
            scores = self("Mul", self("Tanh", self("Div", scores, cap_name)), cap_name)
        weights, sums = self._softmax(scores, seen, group)
        attended = self("Div", self("MatMul", weights, values), sums)
        attended = self("Transpose", attended, perm=[0, 3, 1, 2, 4])
        self._give(self._flat(attended), longest, total)

    def _flat(self, attended: str) -> str:
        """[N, Q, kv_heads, G, head_size] as [N × Q, heads × head_size]"""
        size = self._unsqueeze(self._size(attended, 4), 0)
        width = self("Mul", size, self._constant([self._heads]))
        return self("Reshape", attended, self("Concat", self._constant([-1]), width, axis=0))

    def _blocks(self, key_cache: str) -> tuple[str, str, str]:
        """Which places of each row are in a block [N, S]; its blocks, unmapped ones as the first; its length [N]."""
        one, zero = self._constant(1), self._constant(0)
        block_size = self._size(key_cache, 1)
        total = self("Add", self._past, self._lengths)
        needed = self(
            "Div", self("Sub", self("Add", self("ReduceMax", total, keepdims=0), block_size), one), block_size
        )
        needed = self._unsqueeze(self("Max", needed, one), 0)
        table = self._slice(self._integers("block_table"), self._constant([0]), needed, 1)
        inside = self(
            "And",
            self("GreaterOrEqual", table, zero),
            self("Less", table, self._size(key_cache, 0)),
        )
        blocks = self("Where", inside, table, zero)
        shape = self("Concat", self("Shape", table), self._unsqueeze(block_size, 0), axis=0)
        mapped = self._reshape(self("Expand", self._unsqueeze(inside, 2), shape), 0, -1)
        return mapped, blocks, total

    def _read(self, cache: str, part: str, blocks: str, order: Sequence[int]) -> str:
        """What the rows see of a cache: float32 [N, S, kv_heads, head_size] in another order of dimensions."""
        found = self._cast(self("Gather", cache, blocks, axis=0), TensorProto.FLOAT)
        if self._quantized(part):
            found = self("Mul", found, self._scale(part))
        shape = self("Shape", found)
        size = self(
            "Concat", self._constant([0, -1]), self._slice(shape, self._constant([3]), self._constant([5]), 0), axis=0
        )
        return self("Transpose", self("Reshape", found, size), perm=order)

    def _score_scale(self, query: str) -> str:
        if scale := self._attributes.get("scale", 0.0):
            return self._constant(scale, np.float32)
        return self("Reciprocal", self("Sqrt", self._cast(self._size(query, 2), TensorProto.FLOAT)))

    def _softmax(self, scores: str, seen: str, group: int) -> tuple[str, str]:
        """Weights of sum ``sums``, both to be divided by it; zeros for a query that sees nothing."""
        zero, tiny = self._constant(0, np.float32), self._constant(1e-30, np.float32)
        last = self._constant([-1])
        highest = self("ReduceMax", self("Where", seen, scores, self._constant(_LOWEST, np.float32)), last, keepdims=1)
        sink = ""
        if "head_sink" in self._in:
            sink = self._reshape(self._floats("head_sink"), 1, self._kv_heads, group, 1, 1)
            highest = self("Max", highest, sink)
        weights = self("Where", seen, self("Exp", self("Sub", scores, highest)), zero)
        sums = self("ReduceSum", weights, last, keepdims=1)
        if sink:
            sums = self("Add", sums, self("Exp", self("Sub", sink, highest)))
        return weights, self("Max", sums, tiny)

    def _give(self, flat: str, longest: str, total: str) -> None:
        """The packed output: zeros for padding, NaN for what the bounds do not cover."""
        index = self("Add", self("Mul", self._row, longest), self._offset)
        packed = self("Gather", flat, index, axis=0)
        packed = self("Where", self._unsqueeze(self._real, 1), packed, self._constant(0, np.float32))
        if "metadata" in self._in:
            bounds = self._integers("metadata")
            for place, lengths in enumerate((self._lengths, total)):
                bound = self("Gather", bounds, self._constant(place))
                known = self("Greater", bound, self._constant(0))
                beyond = self("And", known, self("Greater", lengths, bound))  # [N]
                wrong = self._unsqueeze(self("Gather", beyond, self._row), 1)
                packed = self("Where", wrong, self._constant(np.nan, np.float32), packed)
        self("CastLike", packed, self._in["query"], output=self._outputs[0])
