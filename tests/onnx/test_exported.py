"""Exports of Optimum compute what transformers does, alone and padded beside others."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from headrace.backends.api import DeterminismClass, PrefixModel, Row, StepModel
from headrace.backends.errors import BackendError
from headrace.backends.onnx.bundle import verify
from headrace.backends.onnx.exported.model import CHUNK_ALIGNMENT
from headrace.backends.onnx.top import CompiledLogits
from tests.onnx import exports

ROOM = 160


@pytest.fixture(scope="module", params=exports.ARCHITECTURES)
def export(request, tmp_path_factory):
    return exports.unpack(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def bundle(export):
    return exports.add(export, export.parent, quantization="fp32")


@pytest.fixture
def model(bundle):
    model = exports.load(bundle)
    yield model
    model.close()


def greedy(model, slots, prompts, count, *, chunk=CHUNK_ALIGNMENT):
    """The answers to prompts that run beside each other; chunks first, then decodes."""
    for slot in slots:
        model.reserve(slot, ROOM)
    lengths = dict.fromkeys(slots, 0)
    answers = {slot: [] for slot in slots}
    tokens = dict(zip(slots, map(list, prompts), strict=True))
    while any(len(answer) < count for answer in answers.values()):
        rows = []
        for slot in slots:
            rest = tokens[slot][lengths[slot] :]
            if len(rest) > 1:
                rows.append(Row(slot, lengths[slot], rest[:chunk], num_logits=int(len(rest) <= chunk)))
        if not rows:
            rows = [Row(slot, lengths[slot], tokens[slot][lengths[slot] :], num_logits=1) for slot in slots]
        wanted = [row.slot for row in rows if row.num_logits]
        logits = model.step(rows)
        for row in rows:
            lengths[row.slot] += len(row.token_ids)
        for at, slot in enumerate(wanted):
            answers[slot].append(int(logits.greedy([at])[0]))
            tokens[slot].append(answers[slot][-1])
    for slot in slots:
        model.release(slot)
    return [answers[slot][:count] for slot in slots]


def test_an_architecture_that_the_issue_asks_for_is_never_left_out():
    assert {"gpt2", "opt", "gpt_neox", "phi", "falcon", "llama", "qwen2"} <= set(exports.ARCHITECTURES)


def test_prompts_have_the_tokens_of_transformers(export, model):
    for expected in exports.expected_of(export):
        assert list(model.tokenizer.encode(expected["prompt"]).ids) == expected["prompt_ids"]


def test_prompts_of_several_lengths_together_get_the_answers_of_transformers(export, model):
    expected = exports.expected_of(export)
    prompts = [one["prompt_ids"] for one in expected]
    assert greedy(model, [3, 0, 5, 1], prompts, 16) == [one["greedy_ids"] for one in expected]


def test_each_alone_gets_the_same(export, model):
    for slot, expected in enumerate(exports.expected_of(export)):
        assert greedy(model, [slot], [expected["prompt_ids"]], 16) == [expected["greedy_ids"]]


def test_logits_do_not_depend_on_padding_but_for_the_last_bits(export, model):
    ids = exports.expected_of(export)[1]["prompt_ids"][:40]
    for slot, length in ((0, 40), (1, 40), (2, 3), (3, 90)):
        model.reserve(slot, length + 1)
    alone = np.array(model.step([Row(0, 0, ids, num_logits=1)]).row(0))
    beside = [Row(2, 0, ids[:2], num_logits=1), Row(1, 0, ids[:20], num_logits=0), Row(3, 0, ids[:30], num_logits=0)]
    model.step(beside)
    got = model.step([Row(3, 30, ids, num_logits=0), Row(1, 20, ids[20:], num_logits=1)]).row(0)
    assert np.abs(got - alone).max() < 1e-4
    for slot in range(4):
        model.release(slot)


def test_what_a_slot_held_before_does_not_show(export, model):
    first, second = (expected["prompt_ids"] for expected in exports.expected_of(export)[1:3])
    greedy(model, [0, 1], [second, first], 4)
    expected = exports.expected_of(export)[0]
    assert greedy(model, [1, 0], [expected["prompt_ids"], first], 16)[0] == expected["greedy_ids"]


def test_int8_computes_nearly_the_same(export, bundle, tmp_path):
    ids = exports.expected_of(export)[1]["prompt_ids"][:60]
    rows = []
    for folder in (bundle, exports.add(export, tmp_path)):
        model = exports.load(folder)
        model.reserve(0, len(ids))
        rows.append(np.array(model.step([Row(0, 0, ids, num_logits=1)]).row(0)))
        model.close()
    exact, quantized = rows
    assert 0 < np.sqrt(((quantized - exact) ** 2).mean()) < 0.15 * exact.std()


# --- what a model says of itself -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    return exports.add(exports.unpack("gpt2", folder), folder)


def test_a_manifest_says_what_the_export_was(gpt2):
    manifest = verify(gpt2)
    assert (manifest.graph, manifest.architecture, manifest.quantization) == ("exported", "gpt2", "int8")
    assert (manifest.num_layers, manifest.num_kv_heads, manifest.head_size) == (2, 4, 8)
    assert (manifest.context_length, manifest.vocabulary_size) == (256, 320)
    # GPT-2's head is its embedding, of which the export has two.
    assert manifest.parameter_count == 320 * 32 + 256 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32


def test_a_model_declares_only_what_a_dense_graph_can_do(gpt2):
    model = exports.load(gpt2)
    assert isinstance(model, StepModel)
    assert not isinstance(model, PrefixModel)
    assert model.determinism is DeterminismClass.BEST_EFFORT
    assert not any(hasattr(model, name) for name in ("mixes", "max_drafts", "max_scores", "rewinds"))
    assert "packed graph" in model.needed_for_strict
    model.close()


def test_logits_are_searched_by_stock_operators_where_there_are_no_others(gpt2):
    model = exports.load(gpt2, compiled_operators=False)
    model.reserve(0, 2)
    logits = model.step([Row(0, 0, [5, 6], num_logits=1)])
    assert not isinstance(logits, CompiledLogits)
    top = logits.top([0], 3, np.ones(1, np.float32))
    assert top.token_ids[0, 0] == logits.row(0).argmax()
    model.close()


def test_a_cache_of_int8_is_refused_by_name(gpt2):
    backend = exports.backend(gpt2.parent)
    backend._options = backend._options.model_copy(update={"kv_cache_dtype": "int8"})
    with pytest.raises(BackendError, match=r'kv_cache_dtype = "int8" needs a packed graph'):
        backend.load("tiny")


def test_exports_are_small_files():
    sizes = [path.stat().st_size for path in exports.FOLDER.iterdir()]
    assert max(sizes) < 300_000
    assert sum(sizes) < 2_000_000


# --- which rows share a run ----------------------------------------------------------------------------------------


def test_rows_that_would_be_mostly_padding_run_apart(gpt2, monkeypatch):
    model = exports.load(gpt2)
    session = model._session
    seen = []
    run = session._run
    monkeypatch.setattr(session, "_run", lambda rows: seen.append([row.slot for row in rows]) or run(rows))
    for slot in range(4):
        model.reserve(slot, 250)
    ids = list(itertools.islice(itertools.cycle(range(5, 300)), 64))
    model.step([Row(slot, 0, ids[:length], num_logits=1) for slot, length in enumerate((64, 2, 60, 3))])
    assert sorted(map(sorted, seen)) == [[0, 2], [1, 3]]
    seen.clear()
    for start in (64, 128):
        model.step([Row(0, start, ids, num_logits=0)])
    session._max_padding_tokens = 120
    seen.clear()
    model.step([Row(slot, start, [7], num_logits=1) for slot, start in enumerate((192, 2, 60, 3))])
    assert seen == [[1, 3, 2], [0]]
    model.close()
