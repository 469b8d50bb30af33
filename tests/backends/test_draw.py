"""``api.Logits.draw``: every implementation against the slow and obvious way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.backends.api import DrawOptions, Logits
from headrace.backends.logits import HostLogits
from headrace.backends.onnx.plugin import compiled_operators
from headrace.backends.onnx.top import CompiledLogits, OnnxLogits, Top, top_graph

Make = Callable[[NDArray[np.float32]], Logits]

EVERY = 2**63 - 1
ALMOST_ONE = 1 - 2**-53
CLOSE = 1e-5
"""So close to a border, rounding may decide; weights are float32 in part."""


@pytest.fixture(params=["numpy", "ONNX Runtime", "compiled"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "numpy":
        return HostLogits
    if request.param == "compiled":
        if compiled_operators() is None:
            pytest.skip("headrace-kernels is not installed, or this processor lacks AVX2")
        return CompiledLogits
    (tmp_path / "top.onnx").write_bytes(top_graph())
    top = Top(tmp_path / "top.onnx")
    return lambda array: OnnxLogits(array, top)


def options(number: NDArray[np.float64] | list[float], **given: float) -> DrawOptions:
    """The same for every number but that."""
    size = len(number)
    return DrawOptions(
        temperature=np.full(size, given.get("temperature", 1.0)),
        top_k=np.full(size, given.get("top_k", EVERY), np.int64),
        top_p=np.full(size, given.get("top_p", 1.0)),
        min_p=np.full(size, given.get("min_p", 0.0)),
        typical_p=np.full(size, given.get("typical_p", 1.0)),
        number=np.array(number, np.float64),
    )


def draw(make: Make, row: NDArray[np.float32], number: NDArray[np.float64] | list[float], **given: float) -> list[int]:
    """A token for each number, all from the same row."""
    return make(row[None].copy()).draw([0] * len(number), options(number, **given)).tolist()


def shares(row: NDArray[np.float32], **given: float) -> tuple[NDArray[np.float64], bool]:
    """The share of each token, and whether one is so close to a border that rounding may keep or drop it."""
    x = row.astype(np.float64)
    weights = np.exp((x - x.max()) / given.get("temperature", 1.0))
    order = np.lexsort((np.arange(x.size), -x))[: int(min(given.get("top_k", EVERY), x.size))]
    close = False
    if (top_p := given.get("top_p", 1.0)) < 1:
        goal = top_p * weights[order].sum()
        reached = np.cumsum(weights[order])
        close = bool((np.abs(reached - goal) < CLOSE * reached[-1]).any())
        order = order[: 1 + int(np.count_nonzero(reached < goal))]
    if (min_p := given.get("min_p", 0.0)) > 0:
        close |= bool((np.abs(weights[order] - min_p) < CLOSE * min_p).any()) and min_p < 1
        order = order[weights[order] >= min_p]
    kept = np.zeros(x.size)
    kept[order] = weights[order]
    return kept / kept.sum(), close


def some_row(random: np.random.Generator) -> NDArray[np.float32]:
    size = int(random.choice([1, 2, 3, 7, 8, 9, 31, 500, 511, 512, 513, 1500, 4099, 20_003]))
    scale, middle = random.choice([0, 0.01, 1, 3, 20, 1000]), random.choice([0, 30, -30])
    row = (random.normal(size=size) * scale + middle).astype(np.float32)
    if random.random() < 0.3:
        row = np.round(row)  # ties
    if random.random() < 0.2:
        row[random.random(size) < 0.7] = -np.inf
        row[random.integers(size)] = 1
    return row


def some_options(random: np.random.Generator, size: int) -> dict[str, float]:
    return {
        "temperature": float(random.choice([1e-9, 1e-6, 0.01, 0.5, 1, 1.3, 5, 100])),
        "top_k": int(random.choice([1, 2, 40, size, size + 1, EVERY, EVERY, EVERY, random.integers(1, size + 1)])),
        "top_p": float(random.choice([1, 1, 1, 0.95, 0.5, 1e-9, 5e-324, 1 - 1e-9, random.uniform(1e-9, 1)])),
        "min_p": float(random.choice([0, 0, 0, 0.05, 0.5, 1, 5e-324, random.random()])),
    }


@pytest.mark.parametrize("seed", range(8))
def test_a_draw_is_what_its_number_gives_by_the_kept_shares_in_the_order_of_ids(make: Make, seed: int) -> None:
    random = np.random.default_rng(seed)
    compared = 0
    for _ in range(150):
        row = some_row(random)
        given = some_options(random, row.size)
        expected, close = shares(row, **given)
        if close:
            continue
        sums = np.cumsum(expected)
        numbers = np.array([0, ALMOST_ONE, *random.random(6)])
        for number, token in zip(numbers, draw(make, row, numbers, **given), strict=True):
            assert expected[token] > 0, (row.size, given, number)
            if np.abs(sums - number).min() > CLOSE:
                assert token == np.searchsorted(sums, number, side="right"), (row.size, given, number)
                compared += 1
    assert compared > 300


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 50},
        {"top_p": 0.7},
        {"top_p": 0.95, "top_k": 3000},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(make: Make, given: dict[str, float]) -> None:
    row = np.random.default_rng(7).normal(size=5000).astype(np.float32)
    row[np.random.default_rng(8).integers(0, 5000, 40)] += 6
    num_draws = 3000
    expected, _ = shares(row, **given)
    expected *= num_draws
    counts = np.bincount(draw(make, row, np.random.default_rng(9).random(num_draws), **given), minlength=row.size)
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    observed = np.array([*counts[likely], counts[~likely].sum()])
    wanted = np.array([*expected[likely], expected[~likely].sum()])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    # The mean of chi-square is its degrees of freedom; five standard deviations beyond is one in millions.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("size", [1, 7, 8, 600, 49_152])
def test_equal_logits_are_drawn_evenly_and_kept_from_the_lowest_id_on(make: Make, size: int) -> None:
    row = np.full(size, -3.25, np.float32)
    ids = np.unique(np.linspace(0, size - 1, 20).astype(int))
    middles = (ids + 0.5) / size
    assert draw(make, row, middles) == ids.tolist()
    half = max(1, size // 2)
    assert draw(make, row, [0.0, ALMOST_ONE], top_k=half) == [0, half - 1]
    # A share of exactly half is reached by half of them; a little less needs as many.
    assert draw(make, row, [0.0, ALMOST_ONE], top_p=(half - 0.25) / size) == [0, half - 1]


def test_what_is_forbidden_never_comes(make: Make) -> None:
    row = np.full(100, -np.inf, np.float32)
    row[[40, 60]] = 2.0
    for given in ({}, {"top_p": 0.999}, {"top_k": 70}, {"temperature": 100.0, "top_k": 99, "top_p": 0.9999}):
        assert draw(make, row, [0.0, 0.49, 0.51, ALMOST_ONE], **given) == [40, 40, 60, 60]
    row[:] = np.finfo(np.float32).min
    row[50] = 3e38
    assert draw(make, row, [0.0, ALMOST_ONE], temperature=0.5) == [50, 50]


@pytest.mark.parametrize("size", [5, 4099])
@pytest.mark.parametrize("given", [{}, {"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.5}], ids=str)
def test_a_row_without_a_distribution_gives_a_token_that_is_not_finite(
    make: Make, size: int, given: dict[str, float]
) -> None:
    for value in (np.nan, np.inf):
        for place in (0, 3, size - 1):
            row = np.zeros(size, np.float32)
            row[place] = value
            assert draw(make, row, [0.3], **given) == [place]
    assert draw(make, np.full(size, -np.inf, np.float32), [0.3], **given) == [0]


def test_a_draw_depends_on_its_own_row_and_options_alone(make: Make) -> None:
    random = np.random.default_rng(11)
    array = random.normal(size=(32, 5003)).astype(np.float32) * 3
    rows = random.permutation(32)
    mixed = DrawOptions(
        temperature=random.uniform(0.1, 2, 32),
        top_k=random.choice([1, 40, 3000, EVERY], 32),
        top_p=random.choice([0.3, 0.95, 1], 32),
        min_p=random.choice([0, 0.01], 32),
        typical_p=random.choice([0.5, 1], 32),
        number=random.random(32),
    )
    together = make(array).draw(rows.tolist(), mixed).tolist()
    for i, row in enumerate(rows):
        alone = mixed.of(np.arange(32) == i)
        assert make(array[row : row + 1].copy()).draw([0], alone).tolist() == [together[i]]
