"""The text of an evaluation, its windows, prompts, and the quick figures of speed."""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.api import BackendContext, Encoding
from headrace.backends.evaluation.errors import EvaluationError
from headrace.backends.evaluation.prompt import cuts
from headrace.backends.evaluation.quality import measure_quality
from headrace.backends.evaluation.speed import BATCHES, measure_speed, resident_bytes
from headrace.backends.evaluation.text import cut_windows, read_text, shipped_text
from headrace.backends.onnx.bundle import read_manifest
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions
from headrace.backends.scripted import ByteTokenizer, ScriptedModelOptions, ScriptedStepModel
from headrace.backends.tokenizer import HuggingFaceTokenizer


class BeginningTokenizer(ByteTokenizer):
    """Every prompt begins with token 256."""

    def encode(self, text: str) -> Encoding:
        plain = super().encode(text)
        return Encoding(text, (256, *plain.ids), ((0, 0), *plain.spans))


TEXT = bytes(np.random.default_rng(0).integers(32, 127, 5000).astype(np.uint8)).decode()


def test_the_shipped_text_has_ten_thousand_tokens_to_score(smollm2: Path):
    tokenizer = HuggingFaceTokenizer.from_bundle(smollm2, read_manifest(smollm2))
    windows = cut_windows(shipped_text(), tokenizer, num_positions=10_000, context_length=8192)
    assert windows.token_ids.shape == (27, 512)
    assert 27 * (512 - 128 - 1) >= 10_000
    # Tokens of more than six characters on average, as no vocabulary has them, would still be enough.
    assert len(shipped_text()) / 6 > 10_000 + 512


def test_two_copies_of_the_real_model_predict_the_shipped_text_alike(smollm2: Path):
    backend = OnnxBackend(OnnxOptions(max_running=4, spinning=False), BackendContext(smollm2.parent))
    with closing(backend.load(smollm2.name)) as one, closing(backend.load(smollm2.name)) as other:
        windows = cut_windows(shipped_text(), one.tokenizer, num_positions=250, context_length=96)
        assert windows.token_ids.shape == (4, 96)
        _, quality = measure_quality([one, other], windows, progress=lambda _done: None)
    assert (quality.kl_divergence, quality.top1_agreement) == (0, 1)
    assert 5 < quality.perplexity < 100


def test_windows_are_spread_over_the_whole_text():
    windows = cut_windows(TEXT, ByteTokenizer(), num_positions=1000, context_length=4096)
    assert windows.num_context == 128
    assert windows.token_ids.shape == (3, 512)
    assert [bytes(window.astype(np.uint8)).decode() for window in windows.token_ids] == [
        TEXT[start : start + 512] for start in (0, 2244, 4488)
    ]


def test_no_token_is_scored_twice_where_the_text_is_short():
    windows = cut_windows(TEXT, ByteTokenizer(), num_positions=1_000_000, context_length=4096)
    starts = [TEXT.encode().index(bytes(window.astype(np.uint8))) for window in windows.token_ids]
    num_scored = 512 - 128 - 1
    assert len(starts) == 1 + (5000 - 512) // num_scored
    assert all(later - earlier >= num_scored for earlier, later in pairwise(starts))


def test_each_window_begins_as_a_prompt_does():
    windows = cut_windows(TEXT, BeginningTokenizer(), num_positions=1000, context_length=4096)
    assert windows.token_ids.shape == (3, 512)
    assert (windows.token_ids[:, 0] == 256).all()
    assert (windows.token_ids[:, 1:] != 256).all()


def test_windows_fit_a_short_context():
    windows = cut_windows(TEXT, ByteTokenizer(), num_positions=100, context_length=64)
    assert (windows.token_ids.shape, windows.num_context) == ((3, 64), 16)


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(EvaluationError, match="the text is too short: it has 511 tokens, and must have at least 512"):
        cut_windows(TEXT[:511], ByteTokenizer(), num_positions=1, context_length=4096)
    assert len(cut_windows(TEXT[:512], ByteTokenizer(), num_positions=1, context_length=4096).token_ids) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; it must hold at least 512 tokens of text"),
        (b" \n\t\n", "empty; it must hold at least 512 tokens of text"),
        (b"caf\xe9", "not UTF-8: byte 3 cannot be read"),
    ],
)
def test_a_file_that_is_no_text_is_an_error(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_text(file)


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"cannot read .*none\.txt: No such file"):
        read_text(tmp_path / "none.txt")


@given(num_tokens=st.integers(1, 1000), alignment=st.integers(2, 64), chunks=st.integers(1, 8), more=st.integers(0, 63))
def test_prompts_are_cut_as_the_contract_says(num_tokens: int, alignment: int, chunks: int, more: int):
    max_chunk = max(alignment * chunks + more % alignment, alignment + 1)
    places = cuts(num_tokens, max_chunk=max_chunk, alignment=alignment)
    assert (places[0], places[-1]) == (0, num_tokens)
    assert all(place % alignment == 0 for place in places[:-1])
    assert all(0 < end - start <= max_chunk for start, end in pairwise(places))
    assert num_tokens == 1 or places[-1] - places[-2] > 1


def test_speed_is_measured_at_every_batch_and_leaves_slots_free():
    models = [ScriptedStepModel(name, ScriptedModelOptions(num_slots=32)) for name in ("one", "other")]
    told: list[float] = []
    speeds = measure_speed(models, list(range(1, 513)), repeats=2, progress=told.append)
    assert len(speeds) == 2
    for speed in speeds:
        assert tuple(speed.decode_tokens_per_second) == BATCHES
        assert all(rate > 0 for rate in speed.decode_tokens_per_second.values())
        assert speed.prefill_tokens_per_second > 0
    assert told == sorted(told)
    assert told[-1] == 1
    for model in models:
        model.close()


def test_what_is_resident_grows_with_what_is_used():
    before = resident_bytes()
    memory = bytearray(64 << 20)
    memory[:: 1 << 12] = b"x" * (64 << 8)
    assert resident_bytes() - before > 60 << 20
