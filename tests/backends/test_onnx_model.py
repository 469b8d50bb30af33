"""The real model's promise: a sequence's logits are the same bits however its prompt is cut, whoever runs beside
it, and wherever it lies.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from headrace.backends.api import BackendContext, DeterminismClass, Row
from headrace.backends.errors import BackendError
from headrace.backends.onnx.bundle import read_manifest
from headrace.backends.onnx.model import OnnxModel
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions, compiled_operators
from headrace.backends.onnx.stock_session import _group_neighbours
from headrace.backends.tokenizer import HuggingFaceTokenizer

NUM_SLOTS = 32
VOCABULARY_SIZE = 49_152


@pytest.fixture(scope="module", params=["ONNX Runtime's operators", "compiled operators", "compiled operators, int8"])
def model(smollm2: Path, request: pytest.FixtureRequest) -> Iterator[OnnxModel]:
    compiled = request.param.startswith("compiled operators")
    if compiled and compiled_operators() is None:
        pytest.skip("headrace-kernels is not installed, or this processor lacks AVX2")
    manifest = read_manifest(smollm2)
    loaded = OnnxModel(
        smollm2,
        manifest,
        HuggingFaceTokenizer.from_bundle(smollm2, manifest),
        threads=2,
        num_slots=NUM_SLOTS,
        num_kv_bytes=2**29,
        spinning=False,
        operators=compiled_operators() if compiled else None,
        int8_cache=request.param.endswith("int8"),
    )
    yield loaded
    loaded.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, VOCABULARY_SIZE) for _ in range(length)]


@contextmanager
def reserved(model: OnnxModel, *slots: int, num_tokens: int = 400) -> Iterator[None]:
    for slot in slots:
        model.reserve(slot, num_tokens)
    try:
        yield
    finally:
        for slot in slots:
            model.release(slot)


def feed(model: OnnxModel, slot: int, tokens: Sequence[int], cuts: Sequence[int] = ()) -> bytes:
    """Runs a prompt alone, cut at ``cuts``; the bits of the logits after its last token."""
    ends = [*cuts, len(tokens)]
    for start, end in zip([0, *cuts], ends, strict=True):
        last = end == len(tokens)
        logits = model.step([Row(slot, start, tokens[start:end], num_logits=int(last))])
    return logits.row(0).tobytes()


def decode(model: OnnxModel, slot: int, position: int, tokens: Sequence[int]) -> list[bytes]:
    """Appends tokens one by one, alone."""
    return [
        model.step([Row(slot, position + i, [token], num_logits=1)]).row(0).tobytes() for i, token in enumerate(tokens)
    ]


def test_this_machine_is_bit_exact(model: OnnxModel) -> None:
    # Stock operators compute decodes by another kernel than chunks.
    assert model.determinism is (DeterminismClass.STRICT if model.mixes else DeterminismClass.BIT_EXACT)
    assert (model.max_chunk, model.chunk_alignment) == (128, 16)


@pytest.mark.parametrize(
    ("length", "ways"),
    [
        (34, [(), (16,), (32,)]),
        (130, [(128,), (64, 112)]),
        (146, [(128,), (16, 144)]),
        (259, [(128, 256), (16, 32, 48, 176)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_logits_do_not_depend_on_how_a_prompt_is_cut(
    model: OnnxModel, length: int, ways: Sequence[tuple[int, ...]]
) -> None:
    tokens, later = prompt(length, length), [11, 12]
    seen = []
    for i, cuts in enumerate(ways):
        slot = 5 * i
        with reserved(model, slot):
            seen.append([feed(model, slot, tokens, cuts), *decode(model, slot, length, later)])
    assert all(bits == seen[0] for bits in seen)


def test_logits_of_a_prompt_do_not_depend_on_the_prompts_in_the_same_run(model: OnnxModel) -> None:
    tokens = prompt(70, 1)
    with reserved(model, 0):
        alone = feed(model, 0, tokens, (48,))
    # Neighbours in the same run, far ones in a run of their own, some longer and some that end.
    for slot, others in ((0, (1, 2, 3)), (9, (0, 20, 31, 8))):
        with reserved(model, slot, *others):
            rows = [Row(other, 0, prompt(8 + other, other), num_logits=int(other % 2 == 0)) for other in others]
            model.step([*rows, Row(slot, 0, tokens[:48], num_logits=0)])
            rows = [Row(other, 8 + other, prompt(40 - other, other), num_logits=1) for other in others]
            logits = model.step([rows[0], Row(slot, 48, tokens[48:], num_logits=1), *rows[1:]])
            assert logits.row(1).tobytes() == alone


def test_guesses_get_the_bits_of_tokens_that_come_one_by_one_whoever_runs_beside_them(model: OnnxModel) -> None:
    if not model.mixes:
        assert model.max_drafts == 0
        return
    tokens, later = prompt(40, 3), [5, 6, 7, 8, 9, 10]
    with reserved(model, 0):
        feed(model, 0, tokens)
        alone = decode(model, 0, 40, later)
    with reserved(model, 0, 1, 30):
        for slot, length in ((0, 40), (1, 40), (30, 33)):
            feed(model, slot, tokens[:length])
        first = model.step(
            [
                Row(30, 33, [1, 2, 3], num_logits=3),
                Row(1, 40, [later[0], 11, 12, 13], num_logits=4),
                Row(0, 40, later, num_logits=6),
            ]
        )
        assert [first.row(i).tobytes() for i in range(7, 13)] == alone
        assert first.row(3).tobytes() == alone[0]
        assert decode(model, 1, 41, later[1:]) == alone[1:], "what was wrong is written over"


@pytest.fixture(scope="module")
def lines(model: OnnxModel) -> list[tuple[list[int], list[int], list[bytes]]]:
    """31 sequences, each of a prompt, the tokens that follow it, and the bits it gives alone in slot 0."""
    found = []
    for i in range(31):
        tokens, later = prompt(2 + i, 100 + i), prompt(2, 200 + i)
        with reserved(model, 0):
            found.append((tokens, later, [feed(model, 0, tokens), *decode(model, 0, len(tokens), later)]))
    return found


@pytest.mark.parametrize(
    ("slots", "shuffled"),
    [
        ([7, 8], False),
        ([0, 15, 31], True),
        ([30, 3, 9, 4, 21, 5, 0, 16], False),
        (list(range(31)), True),
    ],
    ids=["2 neighbours", "3 far apart", "8 in any order", "31"],
)
def test_logits_of_a_decode_do_not_depend_on_the_decodes_beside_it(
    model: OnnxModel, lines: list[tuple[list[int], list[int], list[bytes]]], slots: list[int], shuffled: bool
) -> None:
    """Also: rows come back in the order they were given in, whatever their slots."""
    places = list(zip(slots, lines[-len(slots) :], strict=True))
    with reserved(model, *slots):
        logits = model.step([Row(slot, 0, tokens, num_logits=1) for slot, (tokens, _, _) in places])
        for i, (_, (_, _, bits)) in enumerate(places):
            assert logits.row(i).tobytes() == bits[0]
        for step in range(2):
            if shuffled:
                random.Random(step).shuffle(places)
            rows = [Row(slot, len(t) + step, [later[step]], num_logits=1) for slot, (t, later, _) in places]
            logits = model.step(rows)
            for i, (_, (_, _, bits)) in enumerate(places):
                assert logits.row(i).tobytes() == bits[1 + step], f"row {i}, step {step}"


def test_rows_that_want_no_logits_get_none_and_the_others_keep_their_order(
    model: OnnxModel, lines: list[tuple[list[int], list[int], list[bytes]]]
) -> None:
    slots = [12, 2, 25, 1, 13]
    with reserved(model, *slots):
        rows = [Row(slot, 0, lines[5 + i][0], num_logits=int(i != 1)) for i, slot in enumerate(slots)]
        logits = model.step(rows)
        assert [logits.row(i).tobytes() for i in range(4)] == [lines[5 + i][2][0] for i in (0, 2, 3, 4)]
        assert logits.greedy(range(4)).shape == (4,)


def test_a_sequence_that_stands_still_between_others_is_not_touched(
    model: OnnxModel, lines: list[tuple[list[int], list[int], list[bytes]]]
) -> None:
    tokens, later, bits = lines[10]
    with reserved(model, 4, 5, 6):
        feed(model, 4, prompt(30, 1))
        feed(model, 6, prompt(50, 2))
        feed(model, 5, tokens)
        for i in range(2):
            model.step([Row(4, 30 + i, [9], num_logits=1), Row(6, 50 + i, [9], num_logits=1)])
        model.step([Row(4, 32, prompt(20), num_logits=0), Row(6, 52, prompt(20), num_logits=0)])
        assert decode(model, 5, len(tokens), later) == bits[1:]


def test_a_slot_shows_nothing_of_the_sequence_it_held_before(
    model: OnnxModel, lines: list[tuple[list[int], list[int], list[bytes]]]
) -> None:
    tokens, later, bits = lines[7]
    with reserved(model, 3):
        feed(model, 3, prompt(200, 66), (128,))
    with reserved(model, 3):
        assert feed(model, 3, tokens) == bits[0]
        assert decode(model, 3, len(tokens), later) == bits[1:]


def test_a_prompt_of_one_token_is_a_decode_like_any_other(model: OnnxModel) -> None:
    with reserved(model, 0):
        alone = decode(model, 0, 0, [77, 78])
    with reserved(model, 1, 2, 3):
        feed(model, 1, prompt(40))
        logits = model.step([Row(2, 0, [77], num_logits=1), Row(1, 40, [5], num_logits=1)])
        assert logits.row(0).tobytes() == alone[0]
        assert decode(model, 2, 1, [78]) == alone[1:]


def test_the_model_continues_text_sensibly(model: OnnxModel) -> None:
    tokens = list(model.tokenizer.encode("The capital of France is").ids)
    with reserved(model, 0):
        logits = model.step([Row(0, 0, tokens, num_logits=1)])
        assert model.tokenizer.token_bytes(int(logits.greedy([0])[0])) == b" Paris"


# --- how rows are put into runs


def rows_at(*slots: int, length: int = 1) -> list[Row]:
    return [Row(slot, 0, [1] * length, num_logits=1) for slot in slots]


def test_decodes_are_one_run_wherever_they_lie() -> None:
    assert _group_neighbours(rows_at(9, 0, 31)) == [[1, 0, 2]]


def test_chunks_far_apart_are_runs_of_their_own() -> None:
    assert _group_neighbours(rows_at(0, 1, 20, 21, length=50)) == [[0, 1], [2, 3]]


def test_a_run_is_never_padded_to_more_than_twice_its_tokens() -> None:
    dice = random.Random(1)
    for _ in range(200):
        slots = dice.sample(range(32), dice.randrange(1, 12))
        rows = [Row(slot, 0, [1] * dice.randrange(2, 128), num_logits=1) for slot in slots]
        groups = _group_neighbours(rows)
        assert sorted(i for group in groups for i in group) == list(range(len(rows)))
        assert [rows[i].slot for group in groups for i in group] == sorted(slots)
        for group in groups:
            lengths = [len(rows[i].token_ids) for i in group]
            span = rows[group[-1]].slot - rows[group[0]].slot + 1
            assert span * max(lengths) <= 2 * sum(lengths)


# --- the backend


def test_the_backend_offers_what_is_in_the_folder_and_loads_it(smollm2: Path) -> None:
    options = OnnxOptions(max_running=2, kv_cache="64MiB", threads=1, compiled_operators=False)
    backend = OnnxBackend(options, BackendContext(smollm2.parent))
    cards = {card.name: card for card in backend.list_models()}
    manifest = read_manifest(smollm2)
    assert cards[manifest.name].digest == manifest.digest
    assert cards[manifest.name].context_length == 8192
    loaded = backend.load(manifest.name)
    try:
        assert loaded.card == cards[manifest.name]
        assert loaded.num_slots == 2
        # 30 layers, keys and values, 3 heads of 64 floats.
        assert loaded.num_kv_tokens == 64 * 2**20 // (30 * 2 * 3 * 64 * 4)
    finally:
        loaded.close()


def test_the_compiled_operators_keep_twice_as_many_tokens_in_the_same_memory(smollm2: Path) -> None:
    if compiled_operators() is None:
        pytest.skip("headrace-kernels is not installed, or this processor lacks AVX2")
    options = OnnxOptions(max_running=2, kv_cache="64MiB", threads=1)
    loaded = OnnxBackend(options, BackendContext(smollm2.parent)).load(smollm2.name)
    try:
        assert loaded.num_kv_tokens == 64 * 2**20 // (30 * 2 * 3 * 64 * 2)
    finally:
        loaded.close()


def test_a_cache_of_int8_keeps_nearly_twice_as_many_again_and_says_so(
    smollm2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if compiled_operators() is None:
        pytest.skip("headrace-kernels is not installed, or this processor lacks AVX2")
    from headrace_kernels import instruction_set

    options = OnnxOptions(max_running=2, kv_cache="64MiB", threads=1, kv_cache_dtype="int8")
    with caplog.at_level(logging.INFO, logger="headrace.backends.onnx"):
        loaded = OnnxBackend(options, BackendContext(smollm2.parent)).load(smollm2.name)
    try:
        assert loaded.num_kv_tokens == 64 * 2**20 // (30 * 2 * 3 * (64 + 2))
        wanted = f"compiled operators ({instruction_set()}); its cache holds {loaded.num_kv_tokens} tokens in int8"
        assert wanted in caplog.text
    finally:
        loaded.close()


def test_a_cache_of_int8_is_refused_where_the_compiled_operators_are_off_or_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValidationError, match="int8 needs compiled_operators"):
        OnnxOptions(kv_cache_dtype="int8", compiled_operators=False)
    monkeypatch.setitem(sys.modules, "headrace_kernels", None)
    with pytest.raises(ValidationError, match="install headrace-kernels"):
        OnnxOptions(kv_cache_dtype="int8")


def test_an_empty_or_missing_folder_offers_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        backend = OnnxBackend(OnnxOptions(), BackendContext(folder))
        assert list(backend.list_models()) == []
        with pytest.raises(BackendError, match="no longer there"):
            backend.load("smollm2-135m")
