"""What a GGUF file can be, and what must be refused in one line."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from gguf_from_folder import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.gguf_file import GgufFile
from headrace.backends.onnx.gguf_source import GgufSource

_WITHOUT_PATTERN = {"gemma3.attention.sliding_window_pattern": None, "gemma3.rope.freq_base_swa": None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.write_gguf(tmp_path_factory.mktemp("whole") / "tiny.gguf").read_bytes()


def open_everything(path):
    """Reads all that a build reads."""
    with GgufFile(path) as file:
        decoder = GgufSource(file)
        tokenizer = decoder.tokenizer()
        for name in ("embedding", "0.q", "1.k", "1.down", "final_norm"):
            decoder.weight(name)
    return decoder.config, tokenizer


def test_the_shape_of_the_model_is_read(tmp_path):
    config, _ = open_everything(tiny.write_gguf(tmp_path / "tiny.gguf"))
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_size) == (2, 2, 1, 32)
    assert config.tied_embeddings
    assert config.context_length == tiny.CONTEXT


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_quantized_tensors_are_read_as_float32(tmp_path, kind):
    exact = tiny.tensors(len(tiny.byte_level_vocabulary()[0]))["blk.0.ffn_up.weight"]
    with GgufFile(tiny.write_gguf(tmp_path / "tiny.gguf", quantization=kind)) as file:
        weight = GgufSource(file).weight("0.up")
    assert weight.dtype == np.float32
    assert (weight == gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind)).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_file_cut_short_anywhere_is_refused_in_one_line(tmp_path, whole, data):
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ModelFileError) as caught:
        open_everything(path)
    assert "\n" not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_damage_anywhere_in_the_header_ends_in_a_clear_error_or_in_nothing(tmp_path, whole, data):
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 9000))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    # Damage can hit what is not read, such as the model's name: then there is no error.
    with contextlib.suppress(ModelFileError):
        open_everything(path)


def test_more_layers_than_there_are_tensors_are_refused_at_once(tmp_path, whole):
    key = b"llama.block_count"
    at = whole.index(key) + len(key) + 4  # behind the type
    path = tmp_path / "layers.gguf"
    path.write_bytes(whole[:at] + (4_000_000_000).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ModelFileError, match="4000000000 layers cannot be in"):
        open_everything(path)


def test_a_huge_length_in_the_header_is_an_error_and_no_allocation(tmp_path, whole):
    key = b"llama.block_count"
    at = whole.index(key) + len(key)
    path = tmp_path / "huge.gguf"
    huge_array = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
    path.write_bytes(whole[:at] + huge_array + whole[at:])
    with pytest.raises(ModelFileError, match="it ends too early"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(64), "not a GGUF file"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(64), "big-endian"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(64), "version 9"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        GgufFile(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"cannot read .*gone\.gguf: No such file"):
        GgufFile(tmp_path / "gone.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
        ({"llama.block_count": 3}, r"'blk\.2\.attn_norm\.weight' is missing"),
        ({"llama.attention.head_count": 0}, "'llama.attention.head_count' is 0"),
        ({"llama.attention.head_count_kv": 3}, "cannot share"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon' is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "instead of a positive number"),
        ({"llama.feed_forward_length": 96}, r"ffn_gate\.weight' has shape \[128, 64\] instead of \[96, 64\]"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is 'yarn'"),
        ({"llama.rope.dimension_count": 16}, "is not the head size"),
        ({"llama.expert_count": 8}, r"llama\.expert_count is 8"),
        ({"llama.attention.sliding_window": 128}, "sliding_window is 128"),
        ({"llama.attention.key_length": 24}, "head size 24: it must be a multiple of 16"),
        ({"llama.rope.scaling.factor": 4.0}, r"llama\.rope\.scaling\.factor is 4\.0 without a type"),
        ({"llama.final_logit_softcapping": 30.0}, r"llama\.final_logit_softcapping is 30\.0"),
        ({"llama.attention.key_of_the_future": 1}, r"llama\.attention\.key_of_the_future is 1"),
        ({"split.count": 2}, "several parts"),
        ({"tokenizer.ggml.model": "bert"}, "unsupported tokenizer 'bert'"),
        ({"tokenizer.ggml.pre": "poro-chat"}, "unsupported pre-tokenizer 'poro-chat'"),
        ({"tokenizer.ggml.merges": None}, "'tokenizer.ggml.merges' is missing"),
        ({"tokenizer.ggml.merges": ["q z"]}, "merge 'q z'"),
        ({"tokenizer.ggml.eos_token_id": 99999}, "99999, which is no token"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "2 token types"),
    ],
)
def test_what_the_metadata_gets_wrong_is_named(tmp_path, metadata, message):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", change_metadata=metadata)
    with pytest.raises(ModelFileError, match=message):
        open_everything(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"'blk\.1\.ffn_up\.weight' is missing"),
        ({"token_embd.weight": None}, r"'token_embd\.weight' is missing"),
        ({"blk.0.attn_q.weight": np.zeros((64, 32), np.float32)}, r"shape \[64, 32\] instead of \[64, 64\]"),
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, r"unsupported: tensor 'blk\.0\.attn_q\.bias'"),
        ({"rope_freqs.weight": np.ones(8, np.float32)}, r"'rope_freqs\.weight' does not hold 16 positive numbers"),
        ({"rope_freqs.weight": np.zeros(16, np.float32)}, r"'rope_freqs\.weight' does not hold 16 positive numbers"),
        ({"output_norm.weight": np.full(64, np.inf, np.float32)}, "not finite"),
    ],
)
def test_what_the_tensors_get_wrong_is_named(tmp_path, tensors, message):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", change_tensors=tensors)
    with pytest.raises(ModelFileError, match=message):
        open_everything(path)


def test_another_architecture_is_refused_by_name(tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", architecture="mamba")
    with pytest.raises(ModelFileError, match="unsupported architecture 'mamba'; supported are 'llama', 'qwen2', "):
        open_everything(path)


def test_gemma_without_a_pattern_of_windows_has_that_of_its_makers(tmp_path):
    folder = Path(__file__).parent / "golden" / "gemma3"
    with GgufFile(write_gguf(folder, tmp_path / "gemma.gguf", change_metadata=_WITHOUT_PATTERN)) as file:
        config = GgufSource(file).config
    assert [layer.window for layer in config.layers] == [20, 20, 20]
    assert [layer.rope_frequencies[1] for layer in config.layers] == [pytest.approx(10_000 ** (-1 / 8))] * 3


def test_end_of_turn_tokens_end_answers_beside_the_files_own(tmp_path):
    _, tokenizer = open_everything(
        tiny.write_gguf(tmp_path / "a.gguf", change_metadata={"tokenizer.ggml.eos_token_id": 1})
    )
    assert tokenizer.eos_token_ids[0] == 1
    assert set(tokenizer.eos_token_ids) == {0, 1, 2}


def test_a_missing_chat_template_is_no_error(tmp_path):
    _, tokenizer = open_everything(
        tiny.write_gguf(tmp_path / "a.gguf", change_metadata={"tokenizer.chat_template": None})
    )
    assert tokenizer.chat_template is None
