"""What the device computes of whole models, held against the same graph in float32 on the processor."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.backends.api import Row
from tests.gpu.rig import Oracle, random_tokens, run_alone

QUANTIZATIONS = ("fp16", "bf16", "int8", "int4")
TOLERANCES = {"fp16": 0.05, "bf16": 0.25, "int8": 0.05, "int4": 0.05}
"""Of a logit. The logits of these models spread over about ±12; bfloat16 has 8 bits, the others compute in float16."""


def check_logits(found: NDArray[np.float32], wanted: NDArray[np.float32], tolerance: float) -> None:
    """Close, and the largest is the same where that is not a near tie."""
    np.testing.assert_allclose(found, wanted, atol=tolerance)
    best = np.sort(wanted, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * tolerance
    np.testing.assert_array_equal(found.argmax(axis=1)[clear], wanted.argmax(axis=1)[clear])


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def served(request, rig, small):
    """A model, its oracle, and how far its logits may be off."""
    quantization = request.param
    if rig.dry and quantization == "bf16":
        pytest.skip("the processor's operators know no bfloat16")
    bundle = small(quantization)
    model = rig.open(bundle)
    yield model, Oracle(bundle), TOLERANCES[quantization], bundle.manifest
    model.close()


def test_a_prompt_and_what_follows_it_get_the_logits_of_the_processor(served) -> None:
    model, oracle, tolerance, manifest = served
    tokens = random_tokens(manifest, 300, seed=1)

    found = run_alone(model, 0, tokens, 290)

    check_logits(found, oracle.logits(tokens)[289:], tolerance)


@pytest.mark.parametrize("count", [1, 15, 255, 256, 257])
def test_prompts_that_end_near_the_end_of_a_block(served, count: int) -> None:
    model, oracle, tolerance, manifest = served
    tokens = random_tokens(manifest, count + 3, seed=count)

    found = run_alone(model, 0, tokens, count)

    check_logits(found, oracle.logits(tokens)[count - 1 :], tolerance)


def test_rows_of_all_lengths_beside_each_other(served) -> None:
    model, oracle, tolerance, manifest = served
    lengths = [1, 7, 64, 200, 256, 300, 511, 33]
    sequences = [random_tokens(manifest, length + 4, seed=10 + length) for length in lengths]
    for slot, sequence in enumerate(sequences):
        model.reserve(slot, len(sequence))

    steps = [model.step([Row(i, 0, sequences[i][:n], num_logits=1) for i, n in enumerate(lengths)])]
    found = [[steps[0].row(i).copy()] for i in range(len(lengths))]
    for place in range(4):
        rows = [Row(i, n + place, sequences[i][n + place : n + place + 1], num_logits=1) for i, n in enumerate(lengths)]
        logits = model.step(rows)
        for i, rows_found in enumerate(found):
            rows_found.append(logits.row(i).copy())

    for slot, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        model.release(slot)
        check_logits(np.array(found[slot]), oracle.logits(sequence)[length - 1 :], tolerance)


def test_a_sequence_that_begins_with_another_s_blocks(served) -> None:
    model, oracle, tolerance, manifest = served
    block = model.chunk_alignment
    shared = random_tokens(manifest, 2 * block, seed=2)
    ends = [random_tokens(manifest, 20, seed=3 + i) for i in range(2)]
    model.reserve(0, len(shared) + 20)
    model.step([Row(0, 0, shared, num_logits=0)])
    model.reserve(1, len(shared) + 20)
    model.copy_prefix(0, 1, len(shared))

    logits = model.step([Row(slot, len(shared), ends[slot], num_logits=1) for slot in range(2)])
    found = [logits.row(slot).copy() for slot in range(2)]
    model.release(0)
    after = model.step([Row(1, len(shared) + 20 - 1, ends[1][-1:], num_logits=1)]).row(0).copy()
    model.release(1)

    for slot in range(2):
        check_logits(found[slot][None], oracle.logits(shared + ends[slot])[-1:], tolerance)
    check_logits(after[None], found[1][None], tolerance)


def test_what_is_chosen_on_the_device_is_the_largest_logit(served) -> None:
    model, _, _, manifest = served
    tokens = random_tokens(manifest, 8, seed=4)
    for slot in range(8):
        model.reserve(slot, 2)

    logits = model.step([Row(slot, 0, [token], num_logits=1) for slot, token in enumerate(tokens)])
    chosen = logits.greedy(range(8))
    top = logits.top(range(8), 5, np.full(8, 0.7, np.float32))

    rows = np.array([logits.row(slot) for slot in range(8)])
    for slot in range(8):
        model.release(slot)
    np.testing.assert_array_equal(chosen, rows.argmax(axis=1))
    np.testing.assert_array_equal(top.logits, -np.sort(-rows, axis=1)[:, :5])
    sums = np.log(np.exp(rows.astype(np.float64) / 0.7).sum(axis=1))
    np.testing.assert_allclose(top.log_sum_exp, sums, rtol=1e-4)
