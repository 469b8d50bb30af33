"""``headrace.Attention`` against numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.backends.onnx.fused_session import OPERATOR_OPTIONS_INT8
from tests.kernels.operators import Operator, needs_operators

pytestmark = needs_operators

INPUTS = ["qkv", "cache", "slots", "positions", "cosines", "sines", "q_norm", "k_norm"]
CAPACITY, SLOTS = 256, 5
EPSILON = 1e-6
both_caches = pytest.mark.parametrize("cells", ["float16", "int8"])


class Layer:
    """An attention of random tables and norms, its cache, and the same in numpy."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        size: int,
        *,
        cells: str,
        window: int = 0,
        rope: bool = True,
        norms: bool = False,
    ) -> None:
        dice = np.random.default_rng(heads * size)
        self.heads, self.kv_heads, self.size, self.window = heads, kv_heads, size, window
        self.scale = 1 / math.sqrt(size)
        self.cells = cells
        # A factor of two bytes for each key and value of int8, and whole rows of halves in all.
        rows = CAPACITY if cells == "float16" else -(-CAPACITY * (size + 2) // (2 * size))
        self.cache = np.full((2, 2, SLOTS, kv_heads, rows, size), 7, np.float16)
        angles = np.outer(np.arange(CAPACITY), 100.0 ** (-np.arange(size // 2) / (size // 2)))
        self.constants: dict[str, NDArray[Any]] = {}
        if rope:
            self.constants |= {"cosines": np.cos(angles).astype(np.float32), "sines": np.sin(angles).astype(np.float32)}
        if norms:
            self.constants |= {name: dice.normal(size=size).astype(np.float32) for name in ("q_norm", "k_norm")}
        fed = {
            "qkv": np.zeros((1, 1), np.float32),
            "cache": self.cache,
            "slots": np.zeros(1, np.int32),
            "positions": np.zeros(1, np.int32),
        }
        self._operator = Operator(
            "Attention",
            INPUTS,
            fed,
            self.constants,
            options=OPERATOR_OPTIONS_INT8 if cells == "int8" else None,
            layer=1,
            num_heads=heads,
            scale=self.scale,
            window=window,
            epsilon=EPSILON,
        )

    def sequence(self, length: int, seed: int) -> NDArray[np.float32]:
        width = (self.heads + 2 * self.kv_heads) * self.size
        return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)

    def run(self, *pieces: tuple[int, int, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Runs pieces of sequences at once: slot, first position, tokens. What each gives."""
        out = self._operator(
            qkv=np.concatenate([tokens for _, _, tokens in pieces]),
            cache=self.cache,
            slots=np.concatenate([np.full(len(tokens), slot, np.int32) for slot, _, tokens in pieces]),
            positions=np.concatenate([start + np.arange(len(tokens), dtype=np.int32) for _, start, tokens in pieces]),
        )
        return np.split(out, np.cumsum([len(tokens) for _, _, tokens in pieces])[:-1])

    def reference(self, tokens: NDArray[np.float32]) -> NDArray[np.float64]:
        """The whole sequence at once, in float64."""
        length, size = len(tokens), self.size
        q, k, v = np.split(tokens.astype(np.float64), [self.heads * size, (self.heads + self.kv_heads) * size], axis=1)
        q, k = (self._turned(x.reshape(length, -1, size), name) for x, name in ((q, "q_norm"), (k, "k_norm")))
        v = v.reshape(length, -1, size)
        if self.cells == "int8":
            rotation, rotated_together = hadamard(size), size & -size
            q, k, v = q @ rotation / rotated_together, rounded(k @ rotation), rounded(v)
        sharing = self.heads // self.kv_heads
        scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, sharing, axis=1)) * self.scale
        ages = np.arange(length)[:, None] - np.arange(length)
        seen = (ages >= 0) & (ages < (self.window or length))
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, np.repeat(v, sharing, axis=1)).reshape(length, -1)

    def planes(self) -> list[NDArray[Any]]:
        """What the cache has of tokens: arrays [layers, 2, slots, kv_heads, CAPACITY, …]."""
        if self.cells == "float16":
            return [self.cache]
        heads = self.cache.view(np.uint8).reshape(*self.cache.shape[:4], -1)
        cells, factors = np.split(heads[..., : CAPACITY * (self.size + 2)], [CAPACITY * self.size], axis=-1)
        return [cells.reshape(*cells.shape[:4], CAPACITY, -1), factors.reshape(*cells.shape[:4], CAPACITY, -1)]

    def _turned(self, x: NDArray[np.float64], norm: str) -> NDArray[np.float64]:
        if norm in self.constants:
            x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON) * self.constants[norm]
        if "cosines" not in self.constants:
            return x
        cosines, sines = (self.constants[name][: len(x), None] for name in ("cosines", "sines"))
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cosines - high * sines, high * cosines + low * sines], axis=-1)


def hadamard(size: int) -> NDArray[np.float64]:
    """What queries and keys of int8 are multiplied by: Sylvester's matrix of the largest power of two that divides a
    head, for each such part of it.
    """
    matrix = np.ones((1, 1))
    while size % (2 * len(matrix)) == 0:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(size // len(matrix)), matrix)


def rounded(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """To int8, with a factor for each last axis."""
    factors = np.abs(x).max(axis=-1, keepdims=True) / 127
    halves = factors.astype(np.float16)
    halves = np.where(halves < factors, np.nextafter(halves, np.float16(np.inf)), halves).astype(np.float64)
    return np.rint(x / halves) * halves


@both_caches
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 9, "kv_heads": 3, "size": 64},
        {"heads": 4, "kv_heads": 4, "size": 32},
        {"heads": 4, "kv_heads": 1, "size": 256, "norms": True},
        {"heads": 4, "kv_heads": 2, "size": 16, "window": 20},
        {"heads": 2, "kv_heads": 1, "size": 128, "window": 64, "rope": False},
        {"heads": 30, "kv_heads": 2, "size": 48},
    ],
    ids=str,
)
def test_attention_is_that_of_the_formula(options: dict[str, Any], cells: str) -> None:
    layer = Layer(**options, cells=cells)
    tokens = layer.sequence(150, seed=1)
    (out,) = layer.run((2, 0, tokens))
    # Halves have 11 bits; the reference rounds to int8 itself.
    assert np.abs(out - layer.reference(tokens)).max() < (4e-3 if cells == "float16" else 4e-4)


@both_caches
@pytest.mark.parametrize("window", [0, 33], ids=["all", "a window"])
def test_bits_do_not_depend_on_how_a_sequence_is_cut_or_what_runs_beside_it(window: int, cells: str) -> None:
    layer = Layer(9, 3, 64, window=window, cells=cells)
    tokens = layer.sequence(200, seed=2)
    (whole,) = layer.run((0, 0, tokens))
    dice = np.random.default_rng(3)
    for slot in range(1, SLOTS):
        position, found = 0, []
        while position < len(tokens):
            count = min(int(dice.choice([1, 1, 2, 15, 16, 17, 63, 64])), len(tokens) - position)
            neighbours = [
                (other, 0, layer.sequence(int(dice.integers(1, 70)), seed=other))
                for other in range(SLOTS)
                if other != slot and dice.random() < 0.5
            ]
            place = int(dice.integers(0, len(neighbours) + 1))
            pieces = [*neighbours[:place], (slot, position, tokens[position : position + count]), *neighbours[place:]]
            found.append(layer.run(*pieces)[place])
            position += count
        assert np.concatenate(found).tobytes() == whole.tobytes()


@both_caches
def test_only_the_layers_own_cells_of_the_slots_that_run_are_written(cells: str) -> None:
    layer = Layer(4, 2, 32, cells=cells)
    before = [plane.copy() for plane in layer.planes()]
    layer.run((3, 0, layer.sequence(40, seed=1)))
    for old, new in zip(before, layer.planes(), strict=True):
        changed = (old != new).any(axis=-1)
        assert not changed[0].any()
        assert not changed[1][:, [0, 1, 2, 4]].any()
        assert changed[1, :, 3, :, :40].all()
        assert not changed[1, :, 3, :, 48:].any()


@both_caches
def test_what_lies_beyond_a_sequence_does_not_show(cells: str) -> None:
    layer = Layer(4, 2, 32, cells=cells)
    tokens = layer.sequence(20, seed=1)
    (before,) = layer.run((1, 0, tokens))
    layer.run((1, 20, layer.sequence(100, seed=2) * 100))
    (after,) = layer.run((1, 0, tokens))
    assert after.tobytes() == before.tobytes()


@both_caches
@pytest.mark.parametrize("factor", [1e6, 1e20])
def test_values_beyond_halves_are_cut_off_and_leave_no_infinity(cells: str, factor: float) -> None:
    layer = Layer(2, 1, 16, rope=False, cells=cells)
    tokens = layer.sequence(5, seed=1)
    tokens[2] *= factor
    (out,) = layer.run((0, 0, tokens))
    assert np.isfinite(out).all()


@both_caches
def test_a_token_that_is_not_a_number_spoils_no_later_sequence(cells: str) -> None:
    layer = Layer(4, 2, 32, cells=cells)
    tokens, broken = layer.sequence(20, seed=1), layer.sequence(40, seed=2)
    (before,) = layer.run((1, 0, tokens))
    broken[5:] = np.nan
    out, _ = layer.run((1, 0, broken), (2, 0, tokens))
    assert np.isfinite(out[:5]).all()
    assert np.isnan(out[5:]).all()
    (after,) = layer.run((1, 0, tokens))
    assert after.tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": -1}, "layer and window must be 0 or more"),
        ({"window": -1}, "layer and window must be 0 or more"),
        ({"num_heads": 0}, "num_heads must be 1 or more"),
        ({"num_heads": -2}, "num_heads must be 1 or more"),
        ({"num_heads": 2**62}, "num_heads must be 1 or more"),
        ({"num_heads": 3}, "qkv must be"),
        ({"layer": 2}, "cache must be"),
        ({"cache": np.zeros((2, 2, 1, 1, 24, 16), np.float16)}, "capacity that is a multiple of 16"),
        ({"options": OPERATOR_OPTIONS_INT8, "cache": np.zeros((2, 2, 1, 1, 8, 16), np.float16)}, "cache must have"),
        ({"options": {"headrace.kv_cache_dtype": "int4"}}, "kv_cache_dtype must be float16 or int8"),
        ({"options": {"headrace.kv_cache_dtype": "float16 or so"}}, "kv_cache_dtype must be float16 or int8"),
        ({"cache": np.zeros((2, 2, 1, 0, 16, 16), np.float16)}, "cache must be"),
        ({"cache": np.zeros((2, 2, 1, 16, 16), np.float16)}, "cache must be"),
        ({"cache": np.zeros((2, 2, 1, 1, 16, 0), np.float16)}, "head_size must be"),
        ({"cache": np.zeros((2, 2, 1, 1, 16, 24), np.float16)}, "head_size must be"),
        ({"cache": np.zeros((2, 2, 1, 3, 16, 16), np.float16)}, "num_heads must be a multiple of kv_heads"),
        ({"slots": np.zeros((1, 1), np.int32)}, "slots and positions must be"),
        ({"positions": np.zeros(0, np.int32)}, "slots and positions must be"),
        ({"q_norm": np.ones(15, np.float32)}, "q_norm and k_norm must be"),
        ({"k_norm": np.ones(0, np.float32)}, "q_norm and k_norm must be"),
        ({"k_norm": np.ones((), np.float32)}, "q_norm and k_norm must be"),
        ({"cosines": np.ones((16, 8), np.float32)}, "cosines and sines must be"),
        ({"sines": np.ones((16, 8), np.float32)}, "cosines and sines must be"),
        ({"cosines": np.ones((16, 7), np.float32), "sines": np.ones((16, 7), np.float32)}, "cosines and sines must be"),
        ({"cosines": np.ones(128, np.float32), "sines": np.ones(128, np.float32)}, "cosines and sines must be"),
        ({"cosines": np.ones((16, 8), np.float32), "sines": np.ones((1, 8), np.float32)}, "cosines and sines must be"),
        ({"cosines": np.ones((0, 8), np.float32), "sines": np.ones((0, 8), np.float32)}, "out of the cosines"),
    ],
)
def test_a_node_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    attributes: dict[str, Any] = {"layer": 1, "num_heads": 2, "scale": 1.0, "window": 0, "epsilon": EPSILON}
    fed: dict[str, NDArray[Any]] = {
        "qkv": np.zeros((1, 64), np.float32),
        "cache": np.zeros((2, 2, 1, 1, 16, 16), np.float16),
        "slots": np.zeros(1, np.int32),
        "positions": np.zeros(1, np.int32),
    }
    changes = dict(changes)
    options = changes.pop("options", None)
    constants = {name: value for name, value in changes.items() if name not in attributes and name not in fed}
    attributes |= {name: value for name, value in changes.items() if name in attributes}
    fed |= {name: value for name, value in changes.items() if name in fed}
    with pytest.raises(Exception, match=message):
        Operator("Attention", INPUTS, fed, constants, options=options, **attributes)(**fed)


@both_caches
@pytest.mark.parametrize(
    ("slot", "position"), [(-1, 0), (SLOTS, 0), (0, -1), (0, CAPACITY)], ids=["slot", "slot", "position", "position"]
)
def test_a_place_outside_the_cache_is_refused(slot: int, position: int, cells: str) -> None:
    layer = Layer(2, 1, 16, cells=cells)
    with pytest.raises(Exception, match="out of the cache"):
        layer.run((slot, position, layer.sequence(1, seed=1)))


def test_positions_with_a_gap_are_refused() -> None:
    layer = Layer(2, 1, 16, cells="float16")
    with pytest.raises(Exception, match="must ascend by 1"):
        layer.run((0, 0, layer.sequence(1, seed=1)), (0, 2, layer.sequence(1, seed=1)))
