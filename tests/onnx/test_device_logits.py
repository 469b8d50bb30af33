"""Logits on a device: what is chosen from them is what is chosen from the same rows in host memory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from headrace.backends.api import DrawOptions
from headrace.backends.logits import HostLogits
from headrace.backends.onnx import device_logits
from headrace.backends.onnx.device_graphs import device_graphs
from headrace.backends.onnx.device_logits import DeviceLogits, Search, draw_from_largest
from headrace.backends.onnx.paged_session import on_device
from headrace.backends.onnx.providers import CPU

NUM_ROWS, VOCABULARY = 48, 9000
EVERY_TOKEN = 2**63 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs")
    for name, graph in device_graphs().items():
        (path / name).write_bytes(graph)
    return path


def some_rows(scale: float = 4.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM_ROWS, VOCABULARY)).astype(np.float32) * np.float32(scale)


def both(folder: Path, rows: np.ndarray) -> tuple[DeviceLogits, HostLogits]:
    search = Search(folder, CPU, on_device(np.concatenate([rows, rows]), CPU), nullcontext)
    return DeviceLogits(search, len(rows)), HostLogits(rows.copy())


def options(count: int, seed: int = 1, **fixed: float) -> DrawOptions:
    """Of every kind, by row."""
    random = np.random.default_rng(seed)

    def some(otherwise: float, values: np.ndarray) -> np.ndarray:
        return np.where(random.random(count) < 0.5, otherwise, values)

    chosen = {
        "temperature": random.uniform(0.05, 2, count),
        "top_k": some(EVERY_TOKEN, random.integers(1, 6000, count)).astype(np.int64),
        "top_p": some(1, random.uniform(0.01, 1, count)),
        "min_p": some(0, random.uniform(0, 0.2, count)),
        "typical_p": np.where(random.random(count) < 0.9, 1, random.uniform(0.2, 1, count)),
        "number": random.random(count),
    }
    return DrawOptions(**chosen | {name: np.full(count, value) for name, value in fixed.items()})


@pytest.mark.parametrize("at_once", [2**23, 7 * VOCABULARY])
@pytest.mark.parametrize("rows", [range(NUM_ROWS), [5, 3, 47], [0]])
def test_the_largest_are_the_same(folder: Path, rows: list[int], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_logits, "_MAX_LOGITS", at_once)
    device, host = both(folder, some_rows())
    temperature = np.linspace(0.1, 3, len(rows), dtype=np.float32)
    for k in (1, 7, 100, VOCABULARY + 1):
        found, expected = device.top(rows, k, temperature), host.top(rows, k, temperature)
        assert (found.token_ids == expected.token_ids).all()
        assert (found.logits == expected.logits).all()
        np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=1e-6)
    assert (device.greedy(rows) == host.greedy(rows)).all()


def test_of_equal_logits_the_first_is_taken(folder: Path) -> None:
    rows = some_rows()
    rows[:, [17, 400, 8999]] = 99
    device, _ = both(folder, rows)
    assert device.greedy(range(NUM_ROWS)).tolist() == [17] * NUM_ROWS


@pytest.mark.parametrize("scale", [0.05, 4.0, 30.0])
def test_what_is_drawn_is_the_same(folder: Path, scale: float) -> None:
    """Flat rows, whose top-p is most of the vocabulary, and steep ones. Rounding may decide a row in a thousand."""
    device, host = both(folder, some_rows(scale))
    rows = list(range(NUM_ROWS))
    equal = 0
    for seed in range(6):
        drawn, expected = (logits.draw(rows, options(NUM_ROWS, seed)) for logits in (device, host))
        equal += int((drawn == expected).sum())
    assert equal >= 6 * NUM_ROWS - 2


@pytest.mark.parametrize("number", [0.0, float(np.nextafter(1, 0))])
def test_the_ends_of_the_range_draw_a_token_that_counts(folder: Path, number: float) -> None:
    rows = some_rows()
    rows[:, 0] = rows[:, -1] = -np.inf
    device, _ = both(folder, rows)
    for fixed in ({"top_k": EVERY_TOKEN, "top_p": 1.0}, {"top_k": 5, "top_p": 0.5}):
        drawn = device.draw(range(NUM_ROWS), options(NUM_ROWS, number=number, typical_p=1.0, **fixed))
        assert np.isfinite(rows[np.arange(NUM_ROWS), drawn]).all()


def test_a_row_that_was_changed_counts_as_it_is(folder: Path) -> None:
    device, host = both(folder, some_rows())
    best = device.greedy([4, 9]).tolist()
    for logits in (device, host):
        logits.row(9)[best[1]] = -np.inf
    assert device.greedy([4, 9]).tolist() == [best[0], int(host.row(9).argmax())]
    assert device.logit(9, best[1]) == -np.inf
    assert device.logit(4, best[0]) == host.row(4)[best[0]]
    temperature = np.ones(2, np.float32)
    assert (device.top([9, 4], 3, temperature).token_ids == host.top([9, 4], 3, temperature).token_ids).all()
    chosen = options(2, top_k=3, typical_p=1.0)
    assert (device.draw([9, 4], chosen) == host.draw([9, 4], chosen)).all()


def test_no_whole_row_is_fetched_to_choose_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, host = both(folder, some_rows())
    monkeypatch.setattr(Search, "rows", None)
    rows = list(range(NUM_ROWS))
    for ids in (
        device.greedy(rows),
        device.draw(rows, options(NUM_ROWS, typical_p=1.0, top_k=50)),
        device.draw(rows, options(NUM_ROWS, typical_p=1.0, top_k=EVERY_TOKEN, top_p=1.0)),
    ):
        known = [device.logit(row, token_id) for row, token_id in zip(rows, ids.tolist(), strict=True)]
        assert known == [host.row(row)[token_id] for row, token_id in zip(rows, ids.tolist(), strict=True)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("fixed", [{"top_k": EVERY_TOKEN, "top_p": 1.0}, {"top_k": 8, "top_p": 1.0}])
def test_of_a_row_that_is_not_finite_such_a_token_is_given_and_of_its_neighbours_their_own(
    folder: Path, value: float, fixed: dict[str, float]
) -> None:
    rows = some_rows()
    rows[2, 5000] = value
    device, host = both(folder, rows)
    chosen = options(3, typical_p=1.0, **fixed)
    for ids, expected in (
        (device.greedy([1, 2, 3]), host.greedy([1, 2, 3])),
        (device.draw([1, 2, 3], chosen), host.draw([1, 2, 3], chosen)),
    ):
        assert ids.tolist() == expected.tolist()
        assert not np.isfinite(device.logit(2, int(ids[1])))
        assert np.isfinite(device.logit(1, int(ids[0])))


def test_a_row_of_which_nothing_is_allowed_gives_a_token_that_is_not(folder: Path) -> None:
    rows = some_rows()
    rows[0] = -np.inf
    device, _ = both(folder, rows)
    assert device.logit(0, int(device.greedy([0])[0])) == -np.inf
    drawn = device.draw([0], options(1, typical_p=1.0, top_k=EVERY_TOKEN, top_p=1.0))
    assert device.logit(0, int(drawn[0])) == -np.inf


def test_a_row_that_is_not_there_is_an_error(folder: Path) -> None:
    device, _ = both(folder, some_rows())
    for index in (-1, NUM_ROWS):
        with pytest.raises(IndexError):
            device.row(index)


def test_too_few_candidates_are_known_to_be_too_few() -> None:
    logits = np.zeros((1, 4), np.float32)
    ids, sums = np.arange(4)[None], np.array([np.log(100)])
    chosen = options(1, top_k=EVERY_TOKEN, top_p=0.025, typical_p=1.0)
    assert draw_from_largest(logits, ids, sums, chosen, 100)[1].tolist() == [True]
    chosen = options(1, top_k=EVERY_TOKEN, top_p=0.5, typical_p=1.0)
    assert draw_from_largest(logits, ids, sums, chosen, 100)[1].tolist() == [False]
