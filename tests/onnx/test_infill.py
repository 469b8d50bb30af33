"""Texts with a hole: which vocabularies can lay them out, and how they do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.api import ContinuingTokenizer, InfillTokenizer
from headrace.backends.onnx.build import build_bundle
from headrace.backends.onnx.bundle import ModelFileError, read_manifest
from headrace.backends.onnx.gguf_tokenizer import read_tokenizer
from headrace.backends.onnx.safetensors_tokenizer import read_tokenizer as read_folder
from headrace.backends.onnx.source import SourceTokenizer
from headrace.backends.tokenizer import HuggingFaceTokenizer

GOLDEN = Path(__file__).parent / "golden"
QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
DEEPSEEK = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
CODE_LLAMA = ("▁<PRE>", "▁<SUF>", "▁<MID>")
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1


def sentence_piece() -> dict[str, Any]:
    changed = tiny.metadata() | tiny.sentence_piece_metadata() | {"tokenizer.ggml.add_bos_token": None}
    return {key: value for key, value in changed.items() if value is not None}


def read(metadata: dict[str, Any]) -> SourceTokenizer:
    return read_tokenizer(Path("tiny.gguf"), metadata)


def tokenizer_of(source: SourceTokenizer) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(
        source.tokenizer_json,
        model="tiny",
        backend="onnx",
        eos_token_ids=source.eos_token_ids,
        bos_token_id=source.bos_token_id,
        add_bos_token=source.add_bos_token,
        infill_token_ids=source.infill_token_ids,
    )


BYTES = tokenizer_of(read(tiny.with_tokens(tiny.metadata(), (*QWEN, "<|file_sep|>"), USER_DEFINED)))
PIECES = tokenizer_of(read(tiny.with_tokens(sentence_piece(), CODE_LLAMA, NORMAL, prefix=0, suffix=1, middle=2)))


def shown(tokenizer: HuggingFaceTokenizer, ids: tuple[int, ...]) -> list[str]:
    return [tokenizer._tokenizer.id_to_token(token_id) for token_id in ids]


def test_the_prefix_comes_first_then_the_suffix_then_what_fills_the_hole() -> None:
    encoding = BYTES.encode_infill("hello the", " world")
    before, behind = BYTES.encode("hello the").ids, BYTES.encode(" world").ids
    prefix, suffix, middle = BYTES._infill_token_ids
    assert encoding.ids == (prefix, *before, suffix, *behind, middle)
    assert encoding.text == "<|fim_prefix|>hello the<|fim_suffix|> world<|fim_middle|>"
    assert [encoding.text[start:end] for start, end in encoding.spans] == [
        "<|fim_prefix|>", "hello", " the", "<|fim_suffix|>", " world", "<|fim_middle|>"
    ]  # fmt: skip


def test_code_llamas_suffix_has_no_space_put_in_front() -> None:
    encoding = PIECES.encode_infill("hello", "world")
    prefix, suffix, middle = PIECES._infill_token_ids
    assert encoding.ids[:3] == (PIECES._bos_token_id, prefix, PIECES.encode("hello").ids[1])
    assert encoding.ids[3] == suffix
    assert shown(PIECES, encoding.ids[4:-1]) == ["w", "or", "ld"]
    assert encoding.ids[-1] == middle
    assert [encoding.text[start:end] for start, end in encoding.spans[4:-1]] == ["w", "or", "ld"]


@pytest.mark.parametrize(
    ("tokens", "kind", "keys"),
    [
        (QWEN, CONTROL, {}),
        (QWEN, USER_DEFINED, {}),
        (DEEPSEEK, CONTROL, {}),
        (("[A]", "[B]", "[C]"), NORMAL, {"fim_pre": 0, "fim_suf": 1, "fim_mid": 2}),
        (("[C]", "[A]", "[B]"), NORMAL, {"prefix": 1, "suffix": 2, "middle": 0}),
    ],
    ids=["control tokens", "tokens of the user's", "DeepSeek", "by its keys", "by its keys of 2023"],
)
def test_a_gguf_file_says_which_tokens_they_are(tokens: tuple[str, ...], kind: int, keys: dict[str, int]) -> None:
    found = read(tiny.with_tokens(tiny.metadata(), tokens, kind, **keys))
    size = len(tiny.metadata()["tokenizer.ggml.tokens"])
    places = tuple(keys.values()) or (0, 1, 2)
    assert found.infill_token_ids == tuple(size + place for place in places)
    assert set(found.infill_token_ids) <= set(found.eos_token_ids)
    assert tokenizer_of(found).can_infill


@pytest.mark.parametrize("tokens", [(), QWEN[:2], ("<|fim_prefix|>", "<fim_suffix>", "<|fim_middle|>")])
def test_without_all_three_there_is_no_infill(tokens: tuple[str, ...]) -> None:
    found = read(tiny.with_tokens(tiny.metadata(), tokens, CONTROL))
    assert found.infill_token_ids is None
    assert not tokenizer_of(found).can_infill


def test_words_of_the_vocabulary_are_no_marks() -> None:
    assert read(tiny.with_tokens(tiny.metadata(), QWEN, NORMAL)).infill_token_ids is None


def test_a_key_that_is_no_token_is_damage() -> None:
    with pytest.raises(ModelFileError, match="fim_pre_token_id' is 9999"):
        read(tiny.metadata() | {f"tokenizer.ggml.fim_{key}_token_id": 9999 for key in ("pre", "suf", "mid")})


def test_what_begins_another_file_ends_an_answer() -> None:
    found = read(tiny.with_tokens(tiny.metadata(), (*QWEN, "<|fim_pad|>", "<|file_sep|>", "[END]"), CONTROL, fim_rep=5))
    size = len(tiny.metadata()["tokenizer.ggml.tokens"])
    assert found.eos_token_ids == (2, 0, *range(size, size + 3), size + 5, size + 3, size + 4)


fragments = st.sampled_from([*QWEN, "<|file_sep|>", "▁<PRE>", "<PRE>", " <MID>", "▁<SUF>", "hello", "<|", "fim_"])
texts = st.lists(fragments | st.text(max_size=3), max_size=5).map("".join)


@given(prefix=texts, suffix=texts)
@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
def test_the_callers_text_never_becomes_a_mark(tokenizer: HuggingFaceTokenizer, prefix: str, suffix: str) -> None:
    encoding = tokenizer.encode_infill(prefix, suffix)
    assert [i for i in encoding.ids if i in tokenizer._infill_token_ids] == list(tokenizer._infill_token_ids)
    assert len(encoding.ids) == len(encoding.spans)


@given(text=texts)
def test_what_goes_on_has_nothing_put_in_front(text: str) -> None:
    encoding = PIECES.encode_continuation(text)
    assert b"".join(map(PIECES.token_bytes, encoding.ids)).decode(errors="replace") == text.replace("▁", " ")
    assert all(0 <= start <= end <= len(text) for start, end in encoding.spans)
    assert BYTES.encode_continuation(text).ids == BYTES.encode(text).ids


def test_a_candidate_begins_as_a_word_does_or_not() -> None:
    assert shown(PIECES, PIECES.encode_continuation(" hello world").ids) == ["▁hello", "▁world"]
    assert shown(PIECES, PIECES.encode_continuation("hello").ids)[0] != "▁hello"
    assert PIECES.encode_continuation("").ids == ()
    assert isinstance(PIECES, ContinuingTokenizer)
    assert isinstance(PIECES, InfillTokenizer)


def test_a_model_folder_says_it_by_the_names_of_its_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(GOLDEN / "qwen3", folder)
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    config = json.loads((folder / "config.json").read_text())
    assert read_folder(folder, config, 10_000).infill_token_ids is None
    size = len(description["model"]["vocab"])
    template = description["added_tokens"][0] | {"special": False}
    marks = [template | {"id": size + i, "content": content} for i, content in enumerate((*QWEN, "<|fim_pad|>"))]
    path.write_text(json.dumps(description | {"added_tokens": [*description["added_tokens"], *marks]}))
    found = read_folder(folder, config, 10_000)
    assert found.infill_token_ids == (size, size + 1, size + 2)
    assert found.eos_token_ids[-4:] == tuple(range(size, size + 4))
    tokenizer = tokenizer_of(found)
    assert tokenizer.can_infill
    assert set(tokenizer.encode("".join(QWEN)).ids).isdisjoint(found.infill_token_ids)


def test_a_bundle_keeps_it(tmp_path: Path) -> None:
    changes = tiny.with_tokens(tiny.metadata(), QWEN, CONTROL)
    source = tiny.write_gguf(tmp_path / "fim.gguf", change_metadata=changes)
    built = build_bundle(source, name="fim", models_dir=tmp_path, quantization="int8", progress=tiny.quietly)
    manifest = read_manifest(tmp_path / "fim")
    assert manifest.infill_token_ids == built.infill_token_ids is not None
    loaded = HuggingFaceTokenizer.from_bundle(tmp_path / "fim", manifest)
    assert loaded.encode_infill("a", "b").ids[0] == built.infill_token_ids[0]
