from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, reject
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.backends.errors import BackendError
from headrace.backends.logits import HostLogits
from headrace.backends.requests import Sampling
from headrace.server.engine.sampler import Sampled, SamplingState, sample

SMALL, LARGE = 12, 500
"""Vocabularies below and beyond the candidates that sampling looks at first."""


def state(
    sampling: Sampling, *, seed: int = 1, choice: int = 0, prompt: Sequence[int] = (), num_logprobs: int | None = None
) -> SamplingState:
    return SamplingState(
        sampling, default_temperature=0.0, seed=seed, choice=choice, prompt_ids=prompt, num_logprobs=num_logprobs
    )


def draw(row: NDArray[np.float32], states: Sequence[SamplingState], forbidden: Sequence[int] = ()) -> list[int]:
    """One token for each state, all from the same logits."""
    array = np.tile(row, (len(states), 1))
    everywhere = [forbidden] * len(states)
    return [sampled.token_id for sampled in sample(HostLogits(array), range(len(states)), states, everywhere)]


def random_row(size: int, seed: int, scale: float = 2.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


# --- the slow and obvious way


class NearTie(Exception):
    """A token is so close to a border that rounding decides; there is no exact answer to compare with."""


def reference(
    row: NDArray[np.float32],
    sampling: Sampling,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    forbidden: Sequence[int] = (),
) -> NDArray[np.float64]:
    """The probabilities of all tokens. Raises NearTie."""
    logits = [float(x) for x in row]
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    for token in {*prompt, *output}:
        rescaled = logits[token] / sampling.repetition_penalty if logits[token] > 0 else None
        logits[token] = logits[token] * sampling.repetition_penalty if rescaled is None else rescaled
    for token in set(output):
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * list(output).count(token)
    for token in forbidden:
        logits[token] = -np.inf
    scaled = np.array(logits) / (sampling.temperature or 1)
    order = np.argsort(-scaled, kind="stable")
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if sampling.temperature == 0:
        return np.eye(row.size)[order[0]]
    p[order[sampling.top_k :]] = 0 if sampling.top_k else p[order[sampling.top_k :]]
    p /= p.sum()
    if sampling.top_p < 1:
        p = keep_until(p, order, sampling.top_p)
    if sampling.min_p not in {0, 1} and np.any(np.abs(p[p > 0] / p.max() - sampling.min_p) < 1e-5):
        raise NearTie
    p[p < sampling.min_p * p.max()] = 0
    p /= p.sum()
    if sampling.typical_p < 1:
        with np.errstate(divide="ignore"):
            surprise = -np.log(p)
        entropy = sum(x * s for x, s in zip(p, surprise, strict=True) if x > 0)
        p = keep_until(p, np.array(sorted(order, key=lambda i: abs(surprise[i] - entropy))), sampling.typical_p)
    return p


def keep_until(p: NDArray[np.float64], order: NDArray[np.int64], mass: float) -> NDArray[np.float64]:
    """Keeps tokens in order until their sum reaches ``mass``."""
    kept, total = np.zeros_like(p), 0.0
    for token in order:
        if total >= mass:
            break
        kept[token] = p[token]
        total += p[token]
        if abs(total - mass) < 1e-5:
            raise NearTie
    return kept / kept.sum()


def check_exact(row: NDArray[np.float32], sampling: Sampling, *, num_draws: int = 40, **given: Sequence[int]) -> None:
    """Every draw is what its random number gives by the inverse of the reference's cumulated probabilities."""
    p = reference(row, sampling, **given)
    sums = np.cumsum(p)
    states = []
    for seed in range(num_draws):
        states.append(state(sampling, seed=seed, prompt=given.get("prompt", ())))
        for token in given.get("output", ()):
            states[-1].accept(token)
    chosen = draw(row, states, given.get("forbidden", ()))
    for seed, token in enumerate(chosen):
        assert p[token] > 0, f"{token} should not have been kept"
        u = state(sampling, seed=seed).draw()
        if sampling.temperature and np.abs(sums - u).min() > 1e-5:
            assert token == np.searchsorted(sums, u, side="right")


OPTIONS = {
    "temperature": st.floats(0.05, 5),
    "top_k": st.none() | st.integers(1, LARGE + 5),
    "top_p": st.just(1.0) | st.floats(0.01, 1),
    "min_p": st.just(0.0) | st.floats(0, 1),
    "typical_p": st.just(1.0) | st.floats(0.01, 1),
}


@given(st.builds(Sampling, **OPTIONS), st.sampled_from([SMALL, LARGE]), st.integers(0, 99), st.sampled_from([0.01, 2]))
@example(Sampling(temperature=1), LARGE, 0, 0.01)
@example(Sampling(temperature=1, top_k=100), LARGE, 0, 0.01)
@example(Sampling(temperature=1, top_k=64), LARGE, 0, 0.01)
@example(Sampling(temperature=1, top_k=65), LARGE, 0, 0.01)
@example(Sampling(temperature=1, top_p=0.9), LARGE, 0, 0.01)
@example(Sampling(temperature=1, top_k=100, top_p=0.9), LARGE, 0, 0.01)
@example(Sampling(temperature=1, min_p=0.98), LARGE, 0, 0.01)
@example(Sampling(temperature=1, typical_p=0.5), LARGE, 0, 0.01)
@example(Sampling(temperature=1, top_k=100, top_p=0.9, min_p=0.97, typical_p=0.5), LARGE, 0, 0.01)
def test_the_stages_together_give_exactly_the_distribution_they_say(
    sampling: Sampling, size: int, seed: int, scale: float
) -> None:
    try:
        check_exact(random_row(size, seed, scale), sampling)
    except NearTie:
        reject()


@given(
    sampling=st.builds(
        Sampling,
        temperature=st.just(0.0) | st.floats(0.05, 2),
        repetition_penalty=st.floats(0.25, 4),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, SMALL - 1), st.floats(-5, 5), max_size=4),
    ),
    prompt=st.lists(st.integers(0, SMALL - 1), max_size=4),
    output=st.lists(st.integers(0, SMALL - 1), max_size=8),
    forbidden=st.sets(st.integers(0, SMALL - 1), max_size=3),
    seed=st.integers(0, 99),
)
def test_bias_penalties_and_forbidden_tokens_give_exactly_the_distribution_they_say(
    sampling: Sampling, prompt: list[int], output: list[int], forbidden: set[int], seed: int
) -> None:
    check_exact(random_row(SMALL, seed), sampling, prompt=prompt, output=output, forbidden=sorted(forbidden))


def test_penalties_keep_count_of_more_tokens_than_fit_at_first() -> None:
    output = [int(i) for i in np.random.default_rng(3).integers(0, LARGE, 400)]
    sampling = Sampling(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2)
    check_exact(random_row(LARGE, 5), sampling, prompt=output[:100], output=output[100:], num_draws=200)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1, top_p=0.7),
        Sampling(temperature=1, min_p=0.1),
        Sampling(temperature=1, typical_p=0.6),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "typical_p"],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling) -> None:
    size, num_draws = LARGE, 4000
    row = random_row(size, 7, 1.0)
    p = reference(row, sampling)
    seeds = range(num_draws)
    counts = np.bincount(draw(row, [state(sampling, seed=seed) for seed in seeds]), minlength=size)
    expected = p * num_draws
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    observed = [*counts[likely], counts[~likely].sum()]
    wanted = [*expected[likely], expected[~likely].sum()]
    chi_square = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w > 0)
    freedom = len(observed) - 1
    # The mean of chi-square is its degrees of freedom; five standard deviations beyond is one in millions.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_a_draw_beyond_the_candidates_comes_from_the_rest_of_the_vocabulary() -> None:
    row = np.zeros(LARGE, np.float32)
    seen = set(draw(row, [state(Sampling(temperature=1), seed=seed) for seed in range(5000)]))
    assert len(seen) == LARGE


# --- greedy


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_greedy_takes_the_largest_logit_and_of_equal_ones_the_lowest_id(size: int) -> None:
    row = random_row(size, 1)
    row[[3, 7, 9]] = 50.0
    assert draw(row, [state(Sampling())]) == [3]
    # Also beside a row that is drawn.
    assert draw(row, [state(Sampling(temperature=1)), state(Sampling())])[1] == 3


def test_top_k_of_one_is_greedy_with_the_lowest_id_among_equals() -> None:
    row = random_row(LARGE, 1)
    row[[3, 400]] = 50.0
    states = [state(Sampling(temperature=5, top_k=1), seed=seed) for seed in range(50)]
    assert set(draw(row, states)) == {3}


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-44])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature: float) -> None:
    for size in (SMALL, LARGE):
        row = random_row(size, 2, 20.0)
        states = [state(Sampling(temperature=temperature), seed=seed) for seed in range(50)]
        assert set(draw(row, states)) == {int(row.argmax())}


def test_a_tiny_temperature_draws_evenly_among_equals() -> None:
    row = random_row(LARGE, 2, 5.0)
    row[[3, 400]] = 37.7
    chosen = draw(row, [state(Sampling(temperature=1e-6), seed=seed) for seed in range(2000)])
    assert set(chosen) == {3, 400}
    assert 850 < chosen.count(3) < 1150


@given(
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 5e-324, 1e-45, 1e-38, 1e-6, 1.0, 100.0]),
        top_k=st.sampled_from([None, 1, 63, 64, 65, 2**32 - 1]),
        top_p=st.sampled_from([5e-324, 1e-7, 0.5, 1 - 1e-9, 1.0]),
        min_p=st.sampled_from([0.0, 5e-324, 0.5, 1.0]),
        typical_p=st.sampled_from([5e-324, 0.5, 1 - 1e-9, 1.0]),
        repetition_penalty=st.sampled_from([5e-324, 1e-45, 1e-20, 1.0, 10.0]),
        presence_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
        logit_bias=st.sampled_from([{}, {0: -100.0, 5: 100.0}]),
    ),
    st.sampled_from([SMALL, LARGE]),
    st.sampled_from([0.0, 1.0, 1000.0]),
)
def test_the_most_extreme_values_still_give_a_token(sampling: Sampling, size: int, scale: float) -> None:
    states = [state(sampling, seed=seed, prompt=[0, 1, 2], num_logprobs=3) for seed in range(3)]
    for step in range(3):
        array = np.tile(random_row(size, step, scale), (3, 1))
        for sampled in sample(HostLogits(array), range(3), states, [[4]] * 3):
            assert 0 <= sampled.token_id < size
            assert sampled.token_id != 4
            assert sampled.logprob is not None
            assert np.isfinite(sampled.logprob)


# --- rows that have no distribution


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1), Sampling(temperature=1, top_p=0.9)])
@pytest.mark.parametrize(
    ("value", "tokens"), [(np.nan, 77), (np.inf, 77), (np.nan, slice(None)), (-np.inf, slice(None))]
)
def test_a_row_without_a_distribution_fails_alone(sampling: Sampling, value: float, tokens: int | slice) -> None:
    array = np.tile(random_row(LARGE, 1), (3, 1))
    array[1, tokens] = value
    states = [state(sampling, seed=seed, num_logprobs=2) for seed in range(3)]
    before, failed, after = sample(HostLogits(array), range(3), states, [()] * 3)
    assert isinstance(before, Sampled)
    assert isinstance(failed, BackendError)
    assert isinstance(after, Sampled)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1), Sampling(temperature=1, top_k=3)])
def test_a_row_with_every_token_forbidden_fails(sampling: Sampling) -> None:
    (failed,) = sample(HostLogits(random_row(SMALL, 1)[None]), [0], [state(sampling)], [range(SMALL)])
    assert isinstance(failed, BackendError)
    assert "forbidden" in failed.message


# --- seeds


def run(sampling: Sampling, seed: int, rows: NDArray[np.float32], *, neighbours: int, place: int) -> list[int]:
    """The tokens of one sequence in ``place`` among others of all kinds, one step for each of ``rows``."""
    others = [
        state(Sampling(temperature=0.7 * (i % 3), top_p=0.9, presence_penalty=float(i % 2)), seed=100 + i)
        for i in range(neighbours)
    ]
    ours = state(sampling, seed=seed)
    states = [*others[:place], ours, *others[place:]]
    tokens = []
    for step, row in enumerate(rows):
        array = np.stack([random_row(row.size, 1000 * step + i) for i in range(len(states))])
        array[place] = row
        tokens.append(sample(HostLogits(array), range(len(states)), states, [()] * len(states))[place].token_id)
    return tokens


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1),
        Sampling(temperature=0.9, top_p=0.8, frequency_penalty=0.5),
        Sampling(temperature=2, top_k=80),
    ],
    ids=["plain", "penalised", "wide"],
)
def test_a_seed_repeats_whoever_runs_beside(sampling: Sampling, size: int) -> None:
    rows = np.stack([random_row(size, 50 + i) for i in range(20)])
    alone = run(sampling, 42, rows, neighbours=0, place=0)
    assert run(sampling, 42, rows, neighbours=7, place=0) == alone
    assert run(sampling, 42, rows, neighbours=7, place=5) == alone
    assert run(sampling, 43, rows, neighbours=0, place=0) != alone


def test_choices_of_one_seed_differ() -> None:
    row = np.zeros(LARGE, np.float32)
    chosen = draw(row, [state(Sampling(temperature=1), seed=9, choice=choice) for choice in range(16)])
    assert len(set(chosen)) > 10


def test_every_seed_of_64_bits_is_taken() -> None:
    assert 0 <= state(Sampling(temperature=1), seed=2**64 - 1).draw() < 1


# --- log-probabilities


def test_log_probabilities_are_the_models_own_before_any_option() -> None:
    row = random_row(LARGE, 4)
    options = Sampling(
        temperature=0.5, top_k=3, repetition_penalty=2, presence_penalty=1, logit_bias={int(row.argmax()): -100.0}
    )
    # Beside a row without and one with other wishes.
    states = [
        state(Sampling(temperature=1)),
        state(options, num_logprobs=5, prompt=list(range(LARGE))),
        state(Sampling(), num_logprobs=0),
        state(Sampling(), num_logprobs=20),
    ]
    forbidden = [(), [int(np.argsort(-row)[1])], (), ()]
    none, edited, zero, many = sample(HostLogits(np.tile(row, (4, 1))), range(4), states, forbidden)
    expected = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    order = np.argsort(-row, kind="stable")
    assert none == Sampled(none.token_id)
    assert zero.top_logprobs == ()
    for sampled, count in ((edited, 5), (many, 20)):
        assert [token for token, _ in sampled.top_logprobs] == order[:count].tolist()
        assert [p for _, p in sampled.top_logprobs] == pytest.approx(expected[order[:count]], abs=1e-5)
    for sampled in (edited, zero, many):
        assert sampled.logprob == pytest.approx(expected[sampled.token_id], abs=1e-5)
    assert edited.token_id not in order[:2]


def test_a_vocabulary_smaller_than_the_wish_gives_all_its_log_probabilities() -> None:
    (sampled,) = sample(HostLogits(random_row(SMALL, 1)[None]), [0], [state(Sampling(), num_logprobs=20)], [()])
    assert len(sampled.top_logprobs) == SMALL
    assert sum(np.exp(p) for _, p in sampled.top_logprobs) == pytest.approx(1, abs=1e-5)
