"""What a folder of Optimum's can be, and what must be refused in one line."""

from __future__ import annotations

import json
import os

import onnx
import pytest
from onnx import TensorProto, helper

from headrace.backends.api import Row
from headrace.backends.onnx.bundle import ModelFileError, read_manifest
from tests.onnx import exports


@pytest.fixture
def export(tmp_path):
    return exports.unpack("gpt2", tmp_path / "exports")


def change_config(export, **changes):
    """Sets keys; ``...`` leaves one out."""
    path = export / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_graph(export, change):
    model = onnx.load_model(export / "model.onnx")
    change(model.graph)
    onnx.save_model(model, export / "model.onnx")


def values(graph):
    return {value.name: value for value in (*graph.input, *graph.output)}


def with_weights_beside(export, location="model.onnx_data"):
    """The export as Optimum leaves large ones."""
    model = onnx.load_model(export / "model.onnx")
    onnx.save_model(
        model, export / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=256
    )
    if location != "model.onnx_data":
        model = onnx.load_model(export / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (export / "model.onnx").write_bytes(model.SerializeToString())


def refused(export, tmp_path, **options):
    """The message, which is one line; nothing is left behind."""
    with pytest.raises(ModelFileError) as caught:
        exports.add(export, tmp_path / "models", **options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "models").glob("*")) if (tmp_path / "models").exists() else True
    return str(caught.value)


# --- what is read --------------------------------------------------------------------------------------------------


def test_weights_beside_the_graph_are_the_same_weights(export, tmp_path):
    before = read_manifest(exports.add(export, tmp_path / "one"))
    with_weights_beside(export)
    after = read_manifest(exports.add(export, tmp_path / "two"))
    assert after.files["weights.bin"] == before.files["weights.bin"]
    assert after.source.sha256 != before.source.sha256


def test_an_embedding_that_is_the_head_is_stored_once(export, tmp_path):
    tied = read_manifest(exports.add(export, tmp_path / "one")).files["weights.bin"]

    def untie(graph):
        head = next(tensor for tensor in graph.initializer if tensor.name.startswith("onnx::MatMul"))
        changed = onnx.numpy_helper.to_array(head).copy()
        changed[0, 0] += 1
        head.CopyFrom(onnx.numpy_helper.from_array(changed, head.name))

    change_graph(export, untie)
    separate = read_manifest(exports.add(export, tmp_path / "two")).files["weights.bin"]
    assert separate.num_bytes > tied.num_bytes + 320 * 32


def test_the_context_can_be_said_where_the_config_does_not(export, tmp_path):
    change_config(export, n_positions=...)
    assert "it says no context length" in refused(export, tmp_path)
    assert read_manifest(exports.add(export, tmp_path / "models", context_length=100)).context_length == 100


def test_a_context_may_be_shorter_and_not_longer_than_the_config_says(export, tmp_path):
    assert "'n_positions' is 256: a context of 257 would be longer" in refused(export, tmp_path, context_length=257)
    assert read_manifest(exports.add(export, tmp_path / "models", context_length=64)).context_length == 64


def test_rows_that_only_pad_the_logits_are_left_out(export, tmp_path):
    tokenizer = json.loads((export / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    del tokenizer["model"]["vocab"][last]
    tokenizer["model"]["merges"].pop()
    (export / "tokenizer.json").write_text(json.dumps(tokenizer))
    bundle = exports.add(export, tmp_path / "models", quantization="fp32")
    assert read_manifest(bundle).vocabulary_size == 319
    model = exports.load(bundle)
    expected = exports.expected_of(export)[3]
    model.reserve(0, 20)
    assert model.step([Row(0, 0, expected["prompt_ids"], num_logits=1)]).row(0).shape == (319,)
    model.close()


# --- ONNX Runtime's own quantiser -----------------------------------------------------------------------------------


def test_the_dynamic_quantiser_is_taken_where_it_loses_little(export, tmp_path):
    bundle = exports.add(export, tmp_path / "models", quantization="int8_dynamic", max_divergence=10.0)
    assert read_manifest(bundle).quantization == "int8_dynamic"
    exports.load(bundle).close()


def test_the_dynamic_quantiser_is_refused_where_it_loses_much(export, tmp_path):
    message = refused(export, tmp_path, quantization="int8_dynamic", max_divergence=1e-6)
    assert "nats of this model's predictions, and 1e-06 is the most that is served: take int8" in message


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_folder_without_a_graph(export, tmp_path):
    (export / "model.onnx").unlink()
    assert "it has no model.onnx; export the model with optimum-onnx" in refused(export, tmp_path)
    (export / "decoder_model_merged.onnx").touch()
    assert "decoder_model_merged.onnx is of an older Optimum" in refused(export, tmp_path)
    (export / "config.json").unlink()
    assert "not an export of Optimum" in refused(export, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no protobuf, or is it?", b"\x08\x08" * 100])
def test_a_graph_that_is_none(export, tmp_path, content):
    (export / "model.onnx").write_bytes(content)
    assert "model.onnx: " in refused(export, tmp_path)


def test_a_graph_without_a_past(export, tmp_path):
    def drop(graph):
        kept = [value for value in graph.input if not value.name.startswith("past")]
        del graph.input[:]
        graph.input.extend(kept)

    change_graph(export, drop)
    assert "export it with --task text-generation-with-past" in refused(export, tmp_path)


@pytest.mark.parametrize("name", ["use_cache_branch", "encoder_hidden_states"])
def test_an_input_that_no_decoder_has_is_named(export, tmp_path, name):
    change_graph(export, lambda graph: graph.input.append(helper.make_tensor_value_info(name, TensorProto.BOOL, [1])))
    assert f"input {name!r}; only decoders of" in refused(export, tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("past_key_values.0.key", TensorProto.FLOAT16, ["b", 4, "p", 8], "FLOAT; export it with --dtype fp32"),
        ("past_key_values.0.key", TensorProto.FLOAT, ["b", 4, 8, "p"], "instead of [B, kv heads, past, head size]"),
        ("past_key_values.1.value", TensorProto.FLOAT, ["b", 2, "p", 8], "instead of [any, 4, any, 8]"),
        ("past_key_values.0.key", TensorProto.FLOAT, ["b", "p", 64], "instead of [B, kv heads, past, head size]"),
        ("present.1.key", TensorProto.FLOAT, ["b", 4, "p"], "instead of [any, 4, any, 8]"),
        ("attention_mask", TensorProto.FLOAT, ["b", "p"], "instead of INT64"),
        ("input_ids", TensorProto.INT64, [1, "s"], "instead of [any, any]"),
        ("logits", TensorProto.FLOAT, ["b", "s", "v"], "instead of [B, S, a number of tokens]"),
    ],
)
def test_a_value_of_another_shape_is_named(export, tmp_path, name, dtype, shape, message):
    change_graph(export, lambda graph: values(graph)[name].CopyFrom(helper.make_tensor_value_info(name, dtype, shape)))
    assert repr(name) in (found := refused(export, tmp_path))
    assert message in found


@pytest.mark.parametrize("name", ["logits", "present.0.value"])
def test_an_output_that_is_missing_is_named(export, tmp_path, name):
    def drop(graph):
        kept = [value for value in graph.output if value.name != name]
        del graph.output[:]
        graph.output.extend(kept)

    change_graph(export, drop)
    assert f"it has no output {name!r}" in refused(export, tmp_path)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "", ".hidden", "no/such", "missing.bin"])
def test_weights_that_lie_elsewhere(export, tmp_path, location):
    (export.parent / "secret").write_bytes(bytes(100_000))
    with_weights_beside(export, location)
    assert "which is no file of this folder" in refused(export, tmp_path)


def test_weights_behind_a_link(export, tmp_path):
    with_weights_beside(export)
    secret = tmp_path / "secret"
    (export / "model.onnx_data").rename(secret)
    (export / "model.onnx_data").symlink_to(secret)
    assert "which is no file of this folder" in refused(export, tmp_path)


def test_weights_that_were_cut_short(export, tmp_path):
    with_weights_beside(export)
    os.truncate(export / "model.onnx_data", 1000)
    assert "does not lie within model.onnx_data" in refused(export, tmp_path)


def test_a_tensor_that_is_too_short(export, tmp_path):
    def cut(graph):
        tensor = next(tensor for tensor in graph.initializer if tensor.name == "transformer.wpe.weight")
        tensor.raw_data = tensor.raw_data[:-4]

    change_graph(export, cut)
    assert "tensor 'transformer.wpe.weight' cannot be read" in refused(export, tmp_path)


def test_a_product_of_one_thing(export, tmp_path):
    def drop(graph):
        node = next(node for node in graph.node if node.op_type == "MatMul")
        node.input.pop()

    change_graph(export, drop)
    assert "a MatMul, has 1 inputs instead of 2" in refused(export, tmp_path)


def test_operators_that_the_runtime_lacks(export, tmp_path):
    def rename(graph):
        node = next(node for node in graph.node if node.op_type == "Softmax")
        node.op_type = "Softermax"

    change_graph(export, rename)
    assert "Softermax" in refused(export, tmp_path)


def test_settings_that_cannot_be(export, tmp_path):
    change_config(export, n_positions="long")
    assert "'n_positions' is 'long' instead of a positive integer" in refused(export, tmp_path)
    change_config(export, n_positions=256, model_type=7)
    assert "'model_type' is 7 instead of a name" in refused(export, tmp_path)


def test_a_tokenizer_of_another_model(export, tmp_path):
    other = exports.unpack("gpt2", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"Ġmillstone": 320}
    (export / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "321 tokens, but logits of 320" in refused(export, tmp_path)
    (export / "tokenizer.json").unlink()
    assert "it has no tokenizer.json" in refused(export, tmp_path)
