"""Bundles built from a tiny model: what the graph computes, and that a row's bits depend on nothing beside it."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import onnx
import pytest
import tiny
from bundle_runner import Runner

from headrace.backends.onnx.build import build_bundle
from headrace.backends.onnx.bundle import ModelFileError, read_manifest, verify

VOCABULARY_SIZE = len(tiny.byte_level_vocabulary()[0])


def build(folder, quantization="fp32", name="tiny", **changes):
    source = tiny.write_gguf(folder / "tiny.gguf", **changes)
    build_bundle(source, name=name, models_dir=folder, quantization=quantization, progress=tiny.quietly)
    return folder / name


@pytest.fixture(scope="module", params=["fp32", "int8", "w8a8"])
def bundle(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp(request.param), request.param)


def random_tokens(*counts, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY_SIZE, count).tolist() for count in counts]


def reference_logits(weights, tokens, hidden=tiny.HIDDEN):
    """Llama as GGUF stores it, in float64: the rotary embedding turns neighbours, and nothing is fused or cached."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    frequencies = tiny.ROPE_BASE ** (-np.arange(0, tiny.HEAD_SIZE, 2) / tiny.HEAD_SIZE)
    turns = np.exp(1j * np.outer(np.arange(len(tokens)), frequencies))[:, None]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + tiny.EPSILON) * scale

    def heads(x, rotate):
        x = x.reshape(len(tokens), -1, tiny.HEAD_SIZE)
        if rotate:
            turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
            x = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
        return np.repeat(x, tiny.HEADS // x.shape[1], axis=1)

    x = w["token_embd.weight"][tokens]
    for i in range(tiny.LAYERS):
        b = f"blk.{i}."
        y = norm(x, w[b + "attn_norm.weight"])
        q, k = (heads(y @ w[b + f"attn_{part}.weight"].T, rotate=True) for part in "qk")
        v = heads(y @ w[b + "attn_v.weight"].T, rotate=False)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(tiny.HEAD_SIZE)
        scores[:, np.triu(np.ones((len(tokens),) * 2, bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", shares, v).reshape(len(tokens), -1) @ w[b + "attn_output.weight"].T
        y = norm(x, w[b + "ffn_norm.weight"])
        gate = y @ w[b + "ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[b + "ffn_up.weight"].T)) @ w[b + "ffn_down.weight"].T
    return norm(x, w["output_norm.weight"]) @ w.get("output.weight", w["token_embd.weight"]).T


@pytest.mark.parametrize(("quantization", "tolerance"), [("fp32", 1e-5), ("int8", 0.05), ("w8a8", 0.12)])
@pytest.mark.parametrize("hidden", [64, 72], ids=["whole blocks", "a part of a block"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_graph_computes_the_llama_in_the_file(tmp_path, quantization, tolerance, hidden, tied):
    head = np.random.default_rng(9).normal(size=(VOCABULARY_SIZE, hidden)).astype(np.float32) / 8
    changes = {} if tied else {"output.weight": head}
    folder = build(tmp_path, quantization, hidden=hidden, change_tensors=changes)
    (tokens,) = random_tokens(40)
    expected = reference_logits(tiny.tensors(VOCABULARY_SIZE, hidden=hidden) | changes, tokens)
    runner = Runner(folder, 1)
    logits = np.concatenate([runner.step([tokens[:16]]), runner.step([tokens[16:39]]), runner.step([tokens[39:]])])
    # Of int8's 3.5 %, and of w8a8's 8 %, about as much comes from the weights as from the activations.
    assert np.sqrt(((logits - expected) ** 2).mean()) < tolerance * expected.std()


@pytest.mark.parametrize("num_slots", [2, 3, 7, 8, 31, 32])
def test_a_decode_has_the_same_bits_alone_and_beside_others(bundle, num_slots):
    prompts = random_tokens(*np.random.default_rng(1).integers(2, 90, num_slots))
    alone = Runner(bundle, 1)
    crowd = alone.with_slots(num_slots)
    position = num_slots // 2
    for slot, prompt in enumerate(prompts):
        single = alone.with_slots(1)
        single.step([prompt])
        crowd.copy_slot(slot, single, 0)
    alone.copy_slot(0, crowd, position)
    for step in range(6):
        tokens = random_tokens(*[1] * num_slots, seed=step)
        assert (crowd.step(tokens)[position] == alone.step([tokens[position]])[0]).all()


@pytest.mark.parametrize("others", [[64], [3, 40], [128, 2, 17, 31]], ids=str)
@pytest.mark.parametrize(("cached", "length"), [(0, 64), (0, 7), (64, 64), (64, 2), (48, 33)])
def test_a_chunk_has_the_same_bits_alone_and_beside_others(bundle, cached, length, others):
    prompt, *crowd_prompts = random_tokens(cached + length, *others)
    alone = Runner(bundle, 1)
    if cached:
        alone.step([prompt[:cached]])
    crowd = alone.with_slots(1 + len(others))
    crowd.copy_slot(len(others), alone, 0)
    expected = alone.step([prompt[cached:]])
    assert (crowd.step([*crowd_prompts, prompt[cached:]])[-length:] == expected).all()


def test_idle_slots_change_nothing_and_are_not_changed(bundle):
    (prompt,) = random_tokens(20)
    alone = Runner(bundle, 1)
    alone.step([prompt])
    crowd = alone.with_slots(4)
    crowd.copy_slot(2, alone, 0)
    crowd.copy_slot(3, alone, 0)
    before = {name: memory.copy() for name, memory in crowd.cache.items()}
    assert (crowd.step([[], [], [5], []]) == alone.step([[5]])).all()
    assert all((memory[[0, 1, 3]] == before[name][[0, 1, 3]]).all() for name, memory in crowd.cache.items())


def test_every_weight_starts_at_a_page_of_the_bundles_own_file(bundle):
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    external = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert len(external) > 10
    size = (bundle / "weights.bin").stat().st_size
    for tensor in external:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "weights.bin"
        assert int(place["offset"]) % 4096 == 0
        assert int(place["offset"]) + int(place["length"]) <= size


def test_int8_keeps_tied_embeddings_once(tmp_path):
    folder = build(tmp_path, "int8")
    parameters = read_manifest(folder).parameter_count
    # A byte a weight, the scales, the rotary tables, and what aligning to pages costs.
    assert (folder / "weights.bin").stat().st_size < parameters * 1.25 + tiny.CONTEXT * tiny.HEAD_SIZE * 4 + 40 * 4096


def test_the_manifest_says_what_was_built_from_what(tmp_path):
    folder = build(tmp_path, "int8")
    manifest = verify(folder)
    assert manifest.name == "tiny"
    assert manifest.quantization == "int8"
    assert manifest.license == "Apache-2.0"
    assert manifest.source.file_name == "tiny.gguf"
    assert manifest.parameter_count == sum(array.size for array in tiny.tensors(VOCABULARY_SIZE).values())
    assert manifest.eos_token_ids == (2, 0)
    assert (folder / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE


def test_building_twice_gives_the_same_digest(tmp_path):
    source = tiny.write_gguf(tmp_path / "tiny.gguf", quantization=gguf.GGMLQuantizationType.Q8_0)
    first, second = (build_bundle(source, name=name, models_dir=tmp_path, progress=tiny.quietly) for name in ("a", "b"))
    assert first.digest == second.digest


def test_progress_rises_to_one(tmp_path):
    seen = []
    source = tiny.write_gguf(tmp_path / "tiny.gguf")
    build_bundle(source, name="tiny", models_dir=tmp_path, progress=lambda *report: seen.append(report[1]))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "mamba"},
        {"change_tensors": {"blk.1.ffn_up.weight": np.full((128, 64), np.nan, np.float32)}},
        {"change_metadata": {"tokenizer.chat_template": "{% if %}"}},
        {"change_metadata": {"llama.vocab_size": 1, "tokenizer.ggml.tokens": None}},
    ],
    ids=["architecture", "values", "template", "tokenizer"],
)
def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path, changes):
    with pytest.raises(ModelFileError) as caught:
        build(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_without_the_extra_a_build_names_it_and_reading_bundles_works(tmp_path, bundle):
    program = f"""
import sys
sys.modules["gguf"] = sys.modules["onnx"] = None
from pathlib import Path
from headrace.backends.onnx.build import build_bundle
from headrace.backends.onnx.bundle import ModelFileError, read_manifest
read_manifest(Path({str(bundle)!r}))
try:
    build_bundle(Path("a.gguf"), name="a", models_dir=Path({str(tmp_path)!r}), progress=print)
except ModelFileError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "headrace[build]" in result.stdout
