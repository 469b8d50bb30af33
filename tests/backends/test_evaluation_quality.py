"""Perplexity, divergence and agreement, against plain formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.backends.api import DeterminismClass, Logits, ModelCard, Row
from headrace.backends.evaluation.errors import EvaluationError
from headrace.backends.evaluation.quality import Quality, _interval_of_mean, measure_quality
from headrace.backends.evaluation.text import Windows
from headrace.backends.logits import HostLogits
from headrace.backends.scripted import ByteTokenizer, ScriptedModelOptions, ScriptedStepModel

VOCABULARY_SIZE = 257


class Bigrams:
    """A step-wise model whose logits are a row of a table: that of the last token, turned by the one before it."""

    backend = "fake"
    determinism = DeterminismClass.BIT_EXACT
    max_chunk, chunk_alignment = 32, 8

    def __init__(self, table: NDArray[np.float32], *, num_slots: int = 32, num_kv_tokens: int = 100_000) -> None:
        self.card = ModelCard(name="bigrams", context_length=4096)
        self.tokenizer = ByteTokenizer()
        self.table = table
        self.num_slots, self.num_kv_tokens = num_slots, num_kv_tokens
        self.slots: dict[int, list[int]] = {}

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.roll(self.table[tokens[-1]], tokens[-2])

    def reserve(self, slot: int, num_tokens: int) -> None:
        assert slot not in self.slots
        self.slots[slot] = []
        assert len(self.slots) <= self.num_slots

    def release(self, slot: int) -> None:
        del self.slots[slot]

    def step(self, rows: Sequence[Row]) -> Logits:
        for row in rows:
            assert row.num_cached_tokens == len(self.slots[row.slot])
            self.slots[row.slot] += row.token_ids
        return HostLogits(np.array([self.logits(self.slots[row.slot]) for row in rows if row.num_logits]))

    def problem(self) -> str | None:
        return None

    def close(self) -> None:
        assert not self.slots


def table(seed: int, *, spread: float = 3.0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return random.normal(scale=spread, size=(VOCABULARY_SIZE, VOCABULARY_SIZE)).astype(np.float32)


def windows(num_windows: int = 5, length: int = 40) -> Windows:
    ids = np.random.default_rng(7).integers(VOCABULARY_SIZE, size=(num_windows, length))
    return Windows(ids, num_context=10)


def measure(*models: Bigrams, of: Windows | None = None) -> tuple[Quality, ...]:
    result = measure_quality(models, of or windows(), progress=lambda _done: None)
    for model in models:
        model.close()
    return result


def probabilities(model: Bigrams, tokens: Sequence[int]) -> NDArray[np.float64]:
    weights = np.exp(model.logits(tokens).astype(np.float64))
    return weights / weights.sum()


def test_figures_are_those_of_the_plain_formulas():
    reference = Bigrams(table(0))
    model = Bigrams(reference.table + table(1, spread=0.2))
    surprisals, divergences, agreements = [], [], []
    for window in windows().token_ids:
        for i in range(11, len(window)):
            p, q = probabilities(reference, window[:i]), probabilities(model, window[:i])
            surprisals.append(-math.log(q[window[i]]))
            divergences.append((p * np.log(p / q)).sum())
            agreements.append(p.argmax() == q.argmax())
    assert 0 < np.mean(agreements) < 1

    _, quality = measure(reference, model)
    assert quality.num_positions == len(surprisals)
    assert quality.perplexity == pytest.approx(math.exp(np.mean(surprisals)), rel=1e-5)
    assert quality.kl_divergence == pytest.approx(np.mean(divergences), rel=1e-5)
    assert quality.top1_agreement == np.mean(agreements)


def test_a_divergence_is_exact_where_it_is_tiny():
    reference = Bigrams(table(0))
    model = Bigrams(reference.table + table(1, spread=1e-3))
    expected = []
    for window in windows().token_ids:
        for i in range(11, len(window)):
            p, q = probabilities(reference, window[:i]), probabilities(model, window[:i])
            expected.append((p * np.log(p / q)).sum())
    assert 1e-7 < np.mean(expected) < 1e-6
    assert measure(reference, model)[1].kl_divergence == pytest.approx(np.mean(expected), rel=0.02)


def test_a_model_is_at_no_distance_from_itself():
    reference, model = measure(Bigrams(table(0)), Bigrams(table(0)))
    assert reference == model
    assert (model.kl_divergence, model.kl_interval_95, model.top1_agreement) == (0.0, (0.0, 0.0), 1.0)


def test_logits_that_differ_by_a_constant_are_the_same_prediction():
    _, model = measure(Bigrams(table(0)), Bigrams(table(0) + np.float32(100)))
    assert model.kl_divergence == pytest.approx(0, abs=1e-5)
    assert model.top1_agreement == 1.0


def test_figures_do_not_depend_on_how_many_windows_run_at_once():
    together = measure(Bigrams(table(0)), Bigrams(table(1)))
    assert measure(Bigrams(table(0)), Bigrams(table(1), num_slots=2)) == together
    assert measure(Bigrams(table(0), num_kv_tokens=45), Bigrams(table(1))) == together


def test_the_interval_is_that_of_a_mean_over_windows():
    values = np.random.default_rng(3).normal(loc=5, scale=2, size=400)
    error = values.std() / math.sqrt(400)
    assert _interval_of_mean(values) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )
    _, quality = measure(Bigrams(table(0)), Bigrams(table(1)))
    low, high = quality.kl_interval_95
    assert low < quality.kl_divergence < high


def test_one_window_has_no_interval():
    _, quality = measure(Bigrams(table(0)), Bigrams(table(1)), of=windows(1))
    assert quality.kl_interval_95 is None


def test_progress_rises_to_one():
    told = []
    measure_quality([Bigrams(table(0), num_slots=2)], windows(), progress=told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)


def test_models_are_driven_as_the_contract_says():
    # This model insists on it.
    model = ScriptedStepModel("parrot", ScriptedModelOptions(num_slots=4))
    ids = np.random.default_rng(7).integers(1, 256, size=(5, 100))
    (quality,) = measure_quality([model], Windows(ids, num_context=41), progress=lambda _done: None)
    assert quality.kl_divergence == 0
    model.close()


def test_slots_are_free_again_after_an_error():
    model = Bigrams(np.full((VOCABULARY_SIZE, VOCABULARY_SIZE), np.nan, np.float32))
    with pytest.raises(EvaluationError, match="'bigrams' gives logits that are not finite"):
        measure_quality([model], windows(), progress=lambda _done: None)
    model.close()


def test_vocabularies_of_different_sizes_are_an_error():
    other = Bigrams(table(0)[:, :200])
    with pytest.raises(EvaluationError, match="has 200 logits, and 'bigrams' has 257: they cannot be compared"):
        measure(Bigrams(table(0)), other)


def test_a_model_without_room_for_a_window_is_an_error():
    with pytest.raises(EvaluationError, match="no room for a window of 40 tokens"):
        measure(Bigrams(table(0), num_kv_tokens=39))
