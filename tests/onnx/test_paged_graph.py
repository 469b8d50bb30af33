"""The graph for CUDA: what a bundle has of it, and that it computes what the graph for the CPU does. What executes it
here is ``paged_reference``, on the CPU: of CUDA's kernels these tests say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented  # noqa: A004  # onnxruntime's name for it

from headrace.backends.onnx import bundle as files
from headrace.backends.onnx.build import build_bundle
from headrace.backends.onnx.bundle import FileEntry, Manifest, ModelFileError, bundle_digest, read_manifest
from tests.onnx import bundles, tiny
from tests.onnx.bundle_runner import Runner
from tests.onnx.paged_reference import reference

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm3"]
QUANTIZATIONS = ["int8", "int4", "fp16", "bf16"]
DEVICE_FILES = {"paged.onnx", "rows.onnx", "largest.onnx", "draw.onnx"}
BLOCK_SIZE, NUM_BLOCKS = 16, 40


class PagedRunner:
    """A pool of blocks, and rows whose blocks are taken from it in an order that is no order."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        path = folder / "reference.onnx"
        onnx.save(model, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.cache = {}
        for value in self.session.get_inputs():
            if "_cache." in value.name:
                dtype = np.float16 if value.type == "tensor(float16)" else np.float32
                self.cache[value.name] = np.full((NUM_BLOCKS, BLOCK_SIZE, *value.shape[2:]), 0.25, dtype)
        self.free = np.random.default_rng(0).permutation(NUM_BLOCKS).tolist()
        self.tables: list[list[int]] = []
        self.lengths: list[int] = []

    def begin(self, shared: Sequence[int] = (), length: int = 0) -> int:
        """A row that begins with blocks of another one."""
        self.tables.append(list(shared))
        self.lengths.append(length)
        return len(self.tables) - 1

    def step(self, tokens: Mapping[int, Sequence[int]], *, padding: int = 0) -> NDArray[np.float32]:
        """Appends tokens to rows; the logits after every token, packed."""
        slots = []
        for row, ids in tokens.items():
            end = self.lengths[row] + len(ids)
            while len(self.tables[row]) * BLOCK_SIZE < end:
                self.tables[row].append(self.free.pop())
            places = range(self.lengths[row], end)
            slots += [self.tables[row][place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE for place in places]
        counts = [len(ids) for ids in tokens.values()]
        past = [self.lengths[row] for row in tokens]
        ends = np.add(past, counts)
        table = np.full((len(tokens), max(len(self.tables[row]) for row in tokens)), -1, np.int32)
        for place, row in enumerate(tokens):
            table[place, : len(self.tables[row])] = self.tables[row]
        feeds = {
            "input_ids": np.array([token for ids in tokens.values() for token in ids] + [0] * padding, np.int64),
            "logits_index": np.arange(sum(counts), dtype=np.int64),
            "cumulative_lengths": np.cumsum([0, *counts]).astype(np.int32),
            "past_lengths": np.array(past, np.int32),
            "block_table": table,
            "slot_mapping": np.array(slots + [-1] * padding, np.int32),
            "attention_bounds": np.array([max(counts), ends.max(), ends.max()], np.int32),
        }
        names = [value.name for value in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, feeds | self.cache), strict=True))
        for name in self.cache:
            self.cache[name] = outputs[f"present_{name}"]
        for row, end in zip(tokens, ends.tolist(), strict=True):
            self.lengths[row] = end
        return outputs["logits"]


Golden = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Bundles of the models that transformers has made predictions of; not to be changed."""
    folder = tmp_path_factory.mktemp("golden")

    @cache
    def build(architecture: str, quantization: str) -> Path:
        name = f"{architecture}-{quantization}"
        source = GOLDEN / architecture
        build_bundle(source, name=name, models_dir=folder, quantization=quantization, progress=tiny.quietly)
        return folder / name

    return build


def prompt(architecture: str) -> list[int]:
    ids: list[int] = json.loads((GOLDEN / architecture / "expected.json").read_text())["prompt_ids"]
    return ids[:40]


def paged_graph(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "paged.onnx", load_external_data=False)


def difference(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sqrt(((logits - expected) ** 2).mean()) / expected.std())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_graphs_of_a_bundle_compute_the_same(golden: Golden, architecture: str, quantization: str) -> None:
    bundle = golden(architecture, quantization)
    tokens = prompt(architecture)
    stock = onnx.load(bundle / "model.onnx", load_external_data=False)
    for node in stock.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # activations are not quantised on a device
    onnx.save(stock, bundle / "exact.onnx")
    cpu = Runner(bundle, 1, ort.InferenceSession(bundle / "exact.onnx", providers=["CPUExecutionProvider"]))
    paged = PagedRunner(reference(paged_graph(bundle), float32=True), bundle)
    row = paged.begin()
    for start, end in ((0, 19), (19, 38), (38, 39), (39, 40)):
        expected = cpu.step([tokens[start:end]])
        assert difference(paged.step({row: tokens[start:end]}), expected) < 1e-4


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_activations_of_float16_lose_little(golden: Golden, architecture: str, quantization: str) -> None:
    bundle = golden(architecture, quantization)
    tokens = prompt(architecture)
    runners = [PagedRunner(reference(paged_graph(bundle), float32=float32), bundle) for float32 in (False, True)]
    narrow, wide = (runner.step({runner.begin(): tokens}) for runner in runners)
    assert 0 < difference(narrow, wide) < 0.01


def test_rows_may_be_side_by_side_in_pieces_padded_and_share_blocks(golden: Golden) -> None:
    llama = golden("llama", "fp16")
    model = reference(paged_graph(llama), float32=True)
    random = np.random.default_rng(2)
    first, second, third = (random.integers(5, 60, count).tolist() for count in (50, 7, 45))
    third[:32] = first[:32]
    alone = {}
    for name, tokens in (("first", first), ("second", second), ("third", third)):
        runner = PagedRunner(model, llama)
        alone[name] = runner.step({runner.begin(): tokens})
    paged = PagedRunner(model, llama)
    one, two = paged.begin(), paged.begin()
    early = paged.step({one: first[:33], two: second[:6]}, padding=5)
    np.testing.assert_allclose(early, np.concatenate([alone["first"][:33], alone["second"][:6]]), atol=1e-4)
    three = paged.begin(paged.tables[one][:2], 32)
    late = paged.step({two: second[6:], three: third[32:], one: first[33:]}, padding=2)
    expected = [alone["second"][6:], alone["third"][32:], alone["first"][33:]]
    np.testing.assert_allclose(late, np.concatenate(expected), atol=1e-4)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_onnx_runtime_misses_nothing_but_the_kernel(golden: Golden, architecture: str, quantization: str) -> None:
    bundle = golden(architecture, quantization)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with pytest.raises(NotImplemented) as raised:
        ort.InferenceSession(bundle / "paged.onnx", options, providers=["CPUExecutionProvider"])
    if _cache_type(paged_graph(bundle)) == "FLOAT16":  # the CPU has hardly a kernel for the other
        assert "implementation for PagedAttention" in str(raised.value)


def _cache_type(model: onnx.ModelProto) -> str:
    (kind,) = {
        TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*model.graph.input, *model.graph.output)
        if "_cache." in value.name
    }
    return kind


@pytest.mark.parametrize(
    ("architecture", "quantization", "kind"),
    [
        ("llama", "int8", "FLOAT16"),
        ("llama", "fp16", "FLOAT16"),
        ("llama", "bf16", "BFLOAT16"),
        ("gemma3", "int4", "FLOAT16"),
    ],
)
def test_caches_are_float16_unless_the_weights_are_bfloat16(
    golden: Golden, architecture: str, quantization: str, kind: str
) -> None:
    assert _cache_type(paged_graph(golden(architecture, quantization))) == kind


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_it_stores_no_tensor_of_its_own(golden: Golden, quantization: str) -> None:
    bundle = golden("qwen3", quantization)
    stock = onnx.load(bundle / "model.onnx", load_external_data=False)

    def places(model: onnx.ModelProto) -> set[tuple[str, ...]]:
        external = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        return {tuple(entry.value for entry in tensor.external_data) for tensor in external}

    paged = paged_graph(bundle)
    assert places(paged) <= places(stock)
    assert all(len(t.raw_data) < 1024 for t in paged.graph.initializer)


@pytest.mark.parametrize("quantization", ["fp32", "w8a8"])
def test_what_no_kernel_of_a_device_computes_has_no_graph_for_it(tmp_path: Path, quantization: str) -> None:
    bundle = bundles.build(tmp_path, quantization=quantization)
    assert DEVICE_FILES.isdisjoint(read_manifest(bundle).files)


def _without(manifest: Manifest, names: set[str]) -> Manifest:
    kept: dict[str, FileEntry] = {name: entry for name, entry in manifest.files.items() if name not in names}
    fields = json.loads(manifest.model_dump_json())
    fields |= {"files": {name: entry.model_dump() for name, entry in kept.items()}, "digest": bundle_digest(kept)}
    return Manifest.model_validate(fields)


def test_a_bundle_without_it_is_served_on_the_cpu(tmp_path: Path) -> None:
    bundle = bundles.build(tmp_path)
    manifest = _without(read_manifest(bundle), DEVICE_FILES)
    for name in DEVICE_FILES:
        (bundle / name).unlink()
    (bundle / files.MANIFEST).write_text(manifest.model_dump_json())
    model = bundles.load(bundle, compiled=False)
    model.close()
    assert read_manifest(bundle) == manifest


def test_a_manifest_with_a_part_of_its_files_is_refused(tmp_path: Path) -> None:
    manifest = read_manifest(bundles.build(tmp_path))
    with pytest.raises(ValueError, match=r"all of \['draw.onnx', 'largest.onnx', 'paged.onnx', 'rows.onnx'\], or none"):
        _without(manifest, {"draw.onnx"})


@pytest.mark.parametrize(("quantization", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_on_the_cpu_weights_of_16_bits_are_widened_once_and_not_in_every_step(
    tmp_path: Path, quantization: str, tolerance: float
) -> None:
    exact = Runner(bundles.build(tmp_path, quantization="fp32", name="exact"), 1)
    bundle = bundles.build(tmp_path, quantization=quantization)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    assert "Cast" not in {node.op_type for node in nodes}
    tokens = list(range(40))
    assert difference(Runner(bundle, 1, session).step([tokens]), exact.step([tokens])) < tolerance
    sizes = [(tmp_path / name / "weights.bin").stat().st_size for name in ("tiny", "exact")]
    assert sizes[0] < 0.75 * sizes[1]


def test_weights_that_float16_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    size = len(tiny.byte_level_vocabulary()[0])
    up = np.full((tiny.FFN, tiny.HIDDEN), 7e4, np.float32)
    source = tiny.write_gguf(tmp_path / "wide.gguf", change_tensors={"blk.1.ffn_up.weight": up})
    assert tiny.tensors(size)["blk.1.ffn_up.weight"].shape == up.shape
    with pytest.raises(ModelFileError, match=r"^1\.up has weights of up to 7e\+04, which float16 cannot hold"):
        build_bundle(source, name="wide", models_dir=tmp_path, quantization="fp16", progress=tiny.quietly)
    build_bundle(source, name="wide", models_dir=tmp_path, quantization="bf16", progress=tiny.quietly)
