"""What a Hugging Face folder can be, and what must be refused in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from headrace.backends.onnx.build import build_bundle
from headrace.backends.onnx.bundle import ModelFileError, read_manifest
from headrace.backends.onnx.safetensors_source import open_safetensors

GOLDEN = Path(__file__).parent / "golden"


def copy(name, folder):
    return Path(shutil.copytree(GOLDEN / name, folder / name))


def change_json(path, **changes):
    """Sets keys; ``...`` leaves one out."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_tensors(folder, **changes):
    """Sets tensors, whose names have _ for a dot; ``...`` leaves one out."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not ...}, path)


def open_everything(folder):
    """Reads all that a build reads."""
    with open_safetensors(folder) as model:
        tokenizer = model.tokenizer()
        for name in ("embedding", "0.q", "1.k", "1.down", "final_norm"):
            model.weight(name)
        return model.config, tokenizer


def refused(folder):
    """The message, which is one line."""
    with pytest.raises(ModelFileError) as caught:
        open_everything(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# --- what is read --------------------------------------------------------------------------------------------------


def test_layers_say_what_they_see_and_how_they_turn():
    gemma, _ = open_everything(GOLDEN / "gemma3")
    assert [layer.window for layer in gemma.layers] == [20, None, 20]
    assert gemma.layers[0].rope_frequencies[1] == pytest.approx(1000 ** (-1 / 8))
    assert gemma.layers[1].rope_frequencies[1] == pytest.approx(100_000 ** (-1 / 8) / 8)
    smollm, _ = open_everything(GOLDEN / "smollm3")
    assert [layer.rope_frequencies is None for layer in smollm.layers] == [False, False, False, True]
    qwen, _ = open_everything(GOLDEN / "qwen2")
    assert [layer.window for layer in qwen.layers] == [None, 24, 24]


def test_a_window_as_long_as_the_context_is_none(tmp_path):
    folder = copy("mistral", tmp_path)
    change_json(folder / "config.json", sliding_window=256)
    config, _ = open_everything(folder)
    assert {layer.window for layer in config.layers} == {None}


def test_transformers_5_has_other_names_for_the_same(tmp_path):
    folder = copy("gemma3", tmp_path)
    before, _ = open_everything(folder)
    change_json(
        folder / "config.json",
        **dict.fromkeys(["rope_theta", "rope_scaling", "rope_local_base_freq"], ...),
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
        },
    )
    assert open_everything(folder)[0] == before
    folder = copy("llama", tmp_path)
    before, _ = open_everything(folder)
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    change_json(
        folder / "config.json", rope_theta=..., rope_scaling=..., rope_parameters=scaling | {"rope_theta": 500.0}
    )
    assert open_everything(folder)[0] == before


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_tensors_are_read_as_float32_whatever_they_are_stored_as(tmp_path, dtype):
    folder = copy("qwen3", tmp_path)
    values = (np.arange(48 * 32).reshape(48, 32) / 64).astype(dtype)
    change_tensors(folder, model__layers__0__mlp__gate_proj__weight=values)
    with open_safetensors(folder) as model:
        weight = model.weight("0.gate")
    assert weight.dtype == np.float32
    assert (weight == values.astype(np.float32)).all()


def test_rows_that_only_pad_the_embedding_are_left_out(tmp_path):
    build_bundle(GOLDEN / "qwen3", name="tiny", models_dir=tmp_path, progress=tiny.quietly)
    rows = load_file(GOLDEN / "qwen3" / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert read_manifest(tmp_path / "tiny").vocabulary_size == rows - 5


def test_tokens_without_an_embedding_are_left_out(tmp_path):
    folder = copy("qwen3", tmp_path)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    image = added[0] | {"id": 325, "content": "<image>"}
    change_json(folder / "tokenizer.json", added_tokens=[*added, image])
    _, tokenizer = open_everything(folder)
    assert json.loads(tokenizer.tokenizer_json)["added_tokens"] == added


def test_the_tokenizers_text_is_kept_as_it_is():
    _, tokenizer = open_everything(GOLDEN / "llama")
    assert tokenizer.tokenizer_json == (GOLDEN / "llama" / "tokenizer.json").read_text()
    assert tokenizer.chat_template == (GOLDEN / "llama" / "chat_template.jinja").read_text()


def test_answers_end_as_the_files_say(tmp_path):
    folder = copy("llama", tmp_path)
    change_json(folder / "generation_config.json", eos_token_id=[0, 2, 1])
    assert open_everything(folder)[1].eos_token_ids == (2, 0, 1)  # the tokenizer's own first
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", eos_token_id=1)
    assert open_everything(folder)[1].eos_token_ids == (2, 1)


@pytest.mark.parametrize(
    ("changes", "adds"),
    [
        ({}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, False),
        ({"bos_token": None}, None),
    ],
)
def test_whether_a_text_begins_with_a_token_is_as_in_transformers(tmp_path, changes, adds):
    folder = copy("llama", tmp_path)
    change_json(folder / "tokenizer_config.json", **changes)
    if adds is None:
        assert "puts ['<|endoftext|>'] around a text" in refused(folder)
    else:
        assert open_everything(folder)[1].add_bos_token is adds


def test_the_chat_template_may_be_in_the_tokenizers_settings(tmp_path):
    folder = copy("llama", tmp_path)
    (folder / "chat_template.jinja").unlink()
    assert open_everything(folder)[1].chat_template is None
    change_json(folder / "tokenizer_config.json", chat_template="a")
    assert open_everything(folder)[1].chat_template == "a"
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    change_json(folder / "tokenizer_config.json", chat_template=named)
    assert open_everything(folder)[1].chat_template == "c"


def test_a_tied_head_that_is_stored_all_the_same_is_not_read(tmp_path):
    folder = copy("qwen3", tmp_path)
    change_tensors(folder, lm_head__weight=np.zeros((325, 32), np.float32))
    open_everything(folder)


def test_building_twice_gives_the_same_digest(tmp_path):
    first, second = (
        build_bundle(GOLDEN / "qwen2", name=name, models_dir=tmp_path, progress=tiny.quietly) for name in ("a", "b")
    )
    assert first.digest == second.digest
    assert first.source == second.source


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type is 'mamba'; supported are 'llama', 'mistral', "),
        ("llama", {"model_type": ...}, "model_type is None"),
        ("gemma3", {"model_type": "gemma3"}, "sees images; its text model alone is 'gemma3_text'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequence"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised ('gptq')"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"sliding_window": 64}, "sliding_window is 64"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
        ("llama", {"head_dim": 24}, "head_dim is 24: it must be a multiple of 16"),
        ("llama", {"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, "mrope_section is [1]"),
        ("llama", {"rope_scaling": [1]}, "'rope_scaling' is [1] instead of an object"),
        ("llama", {"rope_theta": -1}, "'rope_theta' is -1 instead of a positive number"),
        ("llama", {"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan instead of a positive number"),
        ("llama", {"rms_norm_eps": ...}, "'rms_norm_eps' is missing"),
        ("llama", {"num_hidden_layers": 4_000_000_000}, "4000000000 layers cannot be in"),
        ("llama", {"num_hidden_layers": 3}, "tensor 'model.layers.2.input_layernorm.weight' is missing"),
        ("llama", {"num_hidden_layers": 1}, "unsupported: tensor 'model.layers.1."),
        ("llama", {"vocab_size": 320}, "'model.embed_tokens.weight' has shape [325, 32] instead of [320, 32]"),
        ("llama", {"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is 'yes' instead of true or false"),
        ("qwen2", {"use_sliding_window": False}, "'layer_types' has windows, but 'use_sliding_window' is not true"),
        ("qwen2", {"layer_types": ["full_attention"]}, "'layer_types' is not one for each of 3 layers"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "layer_types has 'chunked_attention'"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"query_pre_attn_scalar": ...}, "'query_pre_attn_scalar' is missing"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "'no_rope_layers' is for 2 layers instead of 4"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 2]}, "'no_rope_layers' is no list of 0 and 1"),
    ],
)
def test_what_the_settings_say_and_cannot_be_honoured_is_named(tmp_path, model, changes, message):
    folder = copy(model, tmp_path)
    change_json(folder / "config.json", **changes)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head__weight": ...}, "tensor 'lm_head.weight' is missing"),
        ({"model__norm__weight": np.zeros(31, np.float32)}, "has shape [31] instead of [32]"),
        (
            {"model__norm__weight": np.full(32, np.nan, np.float32)},
            "'model.norm.weight' has values that are not finite",
        ),
        ({"model__norm__weight": np.zeros(32, np.int8)}, "tensor 'model.norm.weight' has type I8"),
        ({"model__layers__0__mlp__up_proj__bias": np.zeros(48, np.float32)}, "'model.layers.0.mlp.up_proj.bias'"),
    ],
)
def test_what_the_tensors_get_wrong_is_named(tmp_path, changes, message):
    folder = copy("llama", tmp_path)
    change_tensors(folder, **changes)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "not a Hugging Face model folder: it has no config.json"),
        ("model.safetensors", "it has neither model.safetensors nor model.safetensors.index.json"),
        ("tokenizer.json", "it has no tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name, message):
    folder = copy("llama", tmp_path)
    (folder / name).unlink()
    assert message in refused(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "..", "a/b.safetensors", "", "x.bin", 7])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    folder = copy("qwen2", tmp_path)
    (tmp_path / "x.safetensors").write_bytes((folder / "model-00001-of-00004.safetensors").read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "damaged" in refused(folder)


def test_what_an_index_promises_must_be_there(tmp_path):
    folder = copy("qwen2", tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00004.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00004.safetensors has no tensor 'model.norm.weight'" in refused(folder)
    (folder / "model-00002-of-00004.safetensors").unlink()
    assert "model-00002-of-00004.safetensors" in refused(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "<nothing>"}, "'eos_token' is '<nothing>', which is no token"),
        ("tokenizer_config.json", {"chat_template": 7}, "'chat_template' is no text"),
        ("generation_config.json", {"eos_token_id": 9999}, "'eos_token_id' is 9999, which is no token"),
        ("generation_config.json", {"eos_token_id": [2, 322]}, "'eos_token_id' is 322, which is no token"),
        ("generation_config.json", {"eos_token_id": "2"}, "'eos_token_id' is '2'"),
        ("tokenizer.json", {"model": {"type": "Unknown"}}, "it is no tokenizer"),
        ("tokenizer.json", {"model": 7}, "it has no 'model' with a 'type'"),
        ("tokenizer.json", {"added_tokens": [{}]}, "'added_tokens' is no list of tokens with an 'id'"),
    ],
)
def test_what_the_tokenizers_files_get_wrong_is_named(tmp_path, file, changes, message):
    folder = copy("llama", tmp_path)
    (folder / "chat_template.jinja").unlink()
    change_json(folder / file, **changes)
    assert message in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff{}", b"[" * 100_000])
def test_files_that_are_no_json_object_are_named(tmp_path, name, content):
    folder = copy("llama", tmp_path)
    (folder / name).write_bytes(content)
    assert f"{name}: damaged: it is no JSON" in refused(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(data=st.data())
def test_weights_cut_short_anywhere_are_refused_in_one_line(tmp_path, data):
    folder = tmp_path / "qwen3"
    if not folder.exists():
        copy("qwen3", tmp_path)
    whole = (GOLDEN / "qwen3" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refused(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(data=st.data())
def test_damage_anywhere_ends_in_a_clear_error_or_in_nothing(tmp_path, data):
    folder = tmp_path / "qwen3"
    if not folder.exists():
        copy("qwen3", tmp_path)
    name = data.draw(st.sampled_from(["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]))
    whole = (GOLDEN / "qwen3" / name).read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(whole), 3000) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(damaged)
    # Damage can hit what is not read, or make another model of it: then there is no error.
    with contextlib.suppress(ModelFileError):
        open_everything(folder)
    (folder / name).write_bytes(whole)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_of_any_setting_ends_in_a_clear_error_or_in_nothing(tmp_path, data):
    name = data.draw(st.sampled_from(["gemma3", "qwen2", "smollm3", "mistral", "llama"]))
    folder = tmp_path / name
    if not folder.exists():
        copy(name, tmp_path)
    file = data.draw(st.sampled_from(["config.json", "config.json", "generation_config.json", "tokenizer_config.json"]))
    whole = (GOLDEN / name / file).read_text()
    key = data.draw(st.sampled_from(sorted(json.loads(whole))))
    change_json(folder / file, **{key: data.draw(json_values)})
    with contextlib.suppress(ModelFileError):
        open_everything(folder)
    (folder / file).write_text(whole)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    folder = copy("llama", tmp_path)
    change_tensors(folder, model__layers__1__mlp__down_proj__weight=np.full((32, 48), np.inf, np.float32))
    with pytest.raises(ModelFileError, match="not finite"):
        build_bundle(folder, name="tiny", models_dir=tmp_path / "models", progress=tiny.quietly)
    assert not list((tmp_path / "models").iterdir())
