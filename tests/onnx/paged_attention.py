"""PagedAttention in numpy, written from the operator's documentation, one token after another; and cases to hold an
implementation of the operator to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

Array = NDArray[Any]
Feeds = dict[str, Array]

NUM_BLOCKS = 9
LENGTHS = np.array([20, 1, 0, 3, 1])
"""Of a prompt, a decode, a row that does nothing, a draft, and a decode that begins a block."""
TABLE = np.array(
    [[4, 1, -1, -1, -1], [7, 2, -1, -1, -1], [0, -1, -1, -1, -1], [7, 8, 3, -1, -1], [5, 6, 2, -1, -1]], np.int32
)
"""The second row and the fourth share their first block."""
_NUM_PADDING = 2

INPUTS = (
    *("query", "key", "value", "key_cache", "value_cache", "cumulative", "past", "table", "cos", "sin", "slots"),
    *("sink", "q_norm", "k_norm", "k_scale", "v_scale", "bounds"),
)
"""In the operator's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A node, and the sizes of what it is given."""

    attributes: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    norm: bool = False
    sink: bool = False
    int8: str = ""
    """The granularity of a quantized cache's scales."""
    rotary_share: float = 0.0
    """How much of each head is turned."""
    heads: int = 6
    kv_heads: int = 2
    size: int = 16
    block: int = 16

    @property
    def past(self) -> Array:
        return np.array([0, self.block + 1, 5, 2 * self.block + 8, 2 * self.block - 1], np.int32)


CASES = {
    "plain": Case(),
    "queries, keys and values in one": Case(packed=True),
    "rotary": Case(attributes={"do_rotary": 1}, rotary_share=1.0),
    "rotary of a part of each head": Case(attributes={"do_rotary": 1}, rotary_share=0.5),
    "rotary of neighbours": Case(attributes={"do_rotary": 1, "rotary_interleaved": 1}, rotary_share=1.0, packed=True),
    "a window": Case(attributes={"local_window_size": 7, "do_rotary": 1}, rotary_share=1.0),
    "a scale and a cap": Case(attributes={"scale": 0.5, "softcap": 2.0}),
    "a sink": Case(sink=True),
    "norms of queries and keys": Case(attributes={"do_rotary": 1, "qk_norm_epsilon": 1e-5}, norm=True, rotary_share=1),
    "an int8 cache": Case(int8="PER_TENSOR"),
    "an int8 cache with a scale per channel": Case(int8="PER_CHANNEL"),
}


def inputs(case: Case) -> Feeds:
    """What a case's node is given, by the names in ``INPUTS``; optional ones only where the case has them."""
    random = np.random.default_rng(7)

    def normal(*shape: int) -> Array:
        return random.normal(size=shape).astype(np.float16)

    slots = [
        TABLE[row, place // case.block] * case.block + place % case.block
        for row, (past, length) in enumerate(zip(case.past, LENGTHS, strict=True))
        for place in range(past, past + length)
    ]
    slots[2] = -1  # as one whose keys are there already
    total, width = len(slots) + _NUM_PADDING, case.kv_heads * case.size
    cache = (NUM_BLOCKS, case.block, case.kv_heads, case.size)
    feeds: Feeds = {
        "query": normal(total, case.heads * case.size),
        "key": normal(total, width),
        "value": normal(total, width),
        "key_cache": normal(*cache),
        "value_cache": normal(*cache),
        "cumulative": np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32),
        "past": case.past,
        "table": TABLE,
        "slots": np.array(slots + [-1] * _NUM_PADDING, np.int32),
    }
    if case.packed:
        feeds["query"] = np.concatenate([feeds["query"], feeds.pop("key"), feeds.pop("value")], axis=1)
    if half := int(case.size * case.rotary_share) // 2:
        angles = np.outer(np.arange(3 * case.block), 100.0 ** (-np.arange(half) / half))
        feeds |= {"cos": np.cos(angles).astype(np.float16), "sin": np.sin(angles).astype(np.float16)}
    if case.sink:
        feeds["sink"] = normal(case.heads)
    if case.norm:
        feeds |= {"q_norm": normal(case.size), "k_norm": normal(case.size)}
    if case.int8:
        shape = (case.kv_heads, 1, case.size) if case.int8 == "PER_CHANNEL" else (1,)
        for part in ("key", "value"):
            feeds[f"{part[0]}_scale"] = random.uniform(0.01, 0.03, shape).astype(np.float32)
            feeds[f"{part}_cache"] = random.integers(-127, 128, cache).astype(np.int8)
    return feeds


def graph(case: Case, feeds: Feeds) -> onnx.ModelProto:
    """A graph of nothing but the node: outputs ``output``, ``key_cache_out``, ``value_cache_out``."""
    quantized = {"k_quant_type": case.int8, "v_quant_type": case.int8} if case.int8 else {}
    node = helper.make_node(
        "PagedAttention",
        [name if name in feeds else "" for name in INPUTS],
        ["output", "key_cache_out", "value_cache_out"],
        domain="com.microsoft",
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        **case.attributes,
        **quantized,
    )

    def value(name: str, source: str) -> onnx.ValueInfoProto:
        array = feeds[source]
        dimensions = [f"{source}.{i}" for i in range(array.ndim)]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), dimensions)

    output = helper.make_tensor_value_info("output", TensorProto.FLOAT16, ["T", case.heads * case.size])
    caches = [value(f"{part}_cache_out", f"{part}_cache") for part in ("key", "value")]
    body = helper.make_graph([node], "attention", [value(name, name) for name in feeds], [output, *caches])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, ir_version=10, opset_imports=opsets)


def expected(case: Case, feeds: Feeds) -> tuple[Array, Array, Array]:
    """The output, zeros for padding, and both caches."""
    attention = _Attention(case, feeds)
    queries = attention.write()
    output = np.zeros((len(feeds["query"]), case.heads * case.size), np.float32)
    for token, row, position in tokens(feeds):
        output[token] = attention.attended(queries[token], row, position).reshape(-1)
    return output, attention.caches["key"], attention.caches["value"]


def tokens(feeds: Feeds) -> Iterator[tuple[int, int, int]]:
    """Each token that is no padding, its row, and its position."""
    for row, start in enumerate(feeds["cumulative"][:-1].tolist()):
        for token in range(start, feeds["cumulative"][row + 1]):
            yield token, row, int(feeds["past"][row]) + token - start


class _Attention:
    def __init__(self, case: Case, feeds: Feeds) -> None:
        self._case = case
        self._feeds = feeds
        self.caches = {part: feeds[f"{part}_cache"].copy() for part in ("key", "value")}

    def write(self) -> dict[int, Array]:
        """Writes keys and values of every token that has a slot; the queries of each, [heads, size]."""
        case, feeds = self._case, self._feeds
        parts = [feeds["query"]] if case.packed else [feeds[name] for name in ("query", "key", "value")]
        heads = np.concatenate(parts, axis=1).astype(np.float32).reshape(len(feeds["query"]), -1, case.size)
        queries = {}
        for token, _, position in tokens(feeds):
            query, key, value = np.split(heads[token], [case.heads, case.heads + case.kv_heads])
            query = self._turned(self._normalized("q_norm", query), position)
            queries[token] = query.astype(feeds["query"].dtype).astype(np.float32)
            slot = int(feeds["slots"][token])
            if slot != -1:
                self._store("key", slot, self._turned(self._normalized("k_norm", key), position))
                self._store("value", slot, value)
        return queries

    def attended(self, query: Array, row: int, position: int) -> Array:
        """[heads, size]"""
        case = self._case
        window = case.attributes.get("local_window_size", position + 1)
        seen = range(max(0, position + 1 - window), position + 1)
        keys, values = (np.array([self._load(part, row, place) for place in seen]) for part in ("key", "value"))
        result = np.empty_like(query)
        for head in range(case.heads):
            shared = head * case.kv_heads // case.heads
            scores = keys[:, shared] @ query[head] * case.attributes.get("scale", case.size**-0.5)
            if cap := case.attributes.get("softcap"):
                scores = cap * np.tanh(scores / cap)
            weights = np.exp(scores)
            total = weights.sum() + (np.exp(np.float32(self._feeds["sink"][head])) if case.sink else 0)
            result[head] = weights @ values[:, shared] / total
        return result

    def _normalized(self, name: str, heads: Array) -> Array:
        if not self._case.norm:
            return heads
        roots = np.sqrt((heads**2).mean(axis=1, keepdims=True) + self._case.attributes["qk_norm_epsilon"])
        return heads / roots * self._feeds[name].astype(np.float32)

    def _turned(self, heads: Array, position: int) -> Array:
        """Each pair of elements as a complex number, turned by the position's angle."""
        if "cos" not in self._feeds:
            return heads
        cos, sin = (self._feeds[name][position].astype(np.float32) for name in ("cos", "sin"))
        first, second = slice(0, len(cos)), slice(len(cos), 2 * len(cos))
        if self._case.attributes.get("rotary_interleaved"):
            first, second = slice(0, 2 * len(cos), 2), slice(1, 2 * len(cos), 2)
        turned = (heads[:, first] + 1j * heads[:, second]) * (cos + 1j * sin)
        result = heads.copy()
        result[:, first], result[:, second] = turned.real, turned.imag
        return result

    def _store(self, part: str, slot: int, new: Array) -> None:
        if self._case.int8:
            new = np.clip(np.rint(new / self._scale(part)), -128, 127)
        cache = self.caches[part]
        cache[slot // self._case.block, slot % self._case.block] = new.astype(cache.dtype)

    def _load(self, part: str, row: int, place: int) -> Array:
        """[kv_heads, size]"""
        block = self._feeds["table"][row, place // self._case.block]
        found = self.caches[part][block, place % self._case.block].astype(np.float32)
        return found * self._scale(part) if self._case.int8 else found

    def _scale(self, part: str) -> Array:
        scale = self._feeds[f"{part[0]}_scale"]
        return scale.reshape(-1, self._case.size) if self._case.int8 == "PER_CHANNEL" else scale
