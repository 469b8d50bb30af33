"""The graph of compiled operators computes what the stock one does, closer to float32, for every architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from headrace.backends.api import DeterminismClass, Row
from headrace.backends.errors import BackendError
from headrace.backends.onnx import bundle
from headrace.backends.onnx.build import build_bundle
from headrace.backends.onnx.bundle import read_manifest
from headrace.backends.onnx.model import OnnxModel
from tests.onnx import bundles, tiny

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm3"]

pytestmark = bundles.needs_operators


class Case:
    def __init__(self, architecture: str, quantization: str, models_dir: Path) -> None:
        source = GOLDEN / architecture
        expected = json.loads((source / "expected.json").read_text())
        self.ids: list[int] = expected["prompt_ids"] + expected["greedy_ids"]
        golden = load_file(source / "expected.safetensors")
        self.positions, self.golden = golden["positions"], golden["logits"]
        self.folder = models_dir / "tiny"
        build_bundle(source, name="tiny", models_dir=models_dir, quantization=quantization, progress=tiny.quietly)

    def error(self, logits: NDArray[np.float32]) -> float:
        """Root mean square, against transformers in float32."""
        return float(np.sqrt(((logits[self.positions] - self.golden) ** 2).mean()))


@pytest.fixture(scope="module", params=[(name, kind) for name in ARCHITECTURES for kind in ("int8", "int4")], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(*request.param, tmp_path_factory.mktemp("fused"))


@pytest.fixture(scope="module")
def model(case: Case) -> Iterator[OnnxModel]:
    loaded = bundles.load(case.folder, compiled=True)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def int8_model(case: Case) -> Iterator[OnnxModel]:
    """The same bundle, with a cache of int8."""
    loaded = bundles.load(case.folder, compiled=True, int8_cache=True)
    yield loaded
    loaded.close()


def every_logit(model: OnnxModel, ids: list[int], slot: int = 0) -> NDArray[np.float32]:
    """One token after another."""
    model.reserve(slot, len(ids))
    found = [model.step([Row(slot, i, [token], num_logits=1)]).row(0).copy() for i, token in enumerate(ids)]
    model.release(slot)
    return np.array(found)


def test_it_is_no_further_from_float32_than_the_stock_graph(case: Case, model: OnnxModel) -> None:
    stock = bundles.load(case.folder, compiled=False)
    try:
        limit = case.error(every_logit(stock, case.ids))
    finally:
        stock.close()
    # Stock operators quantise activations to 8 bits, the compiled ones to 16; weights are the same.
    assert case.error(every_logit(model, case.ids)) < 1.05 * limit


def test_a_cache_of_int8_loses_little(case: Case, model: OnnxModel, int8_model: OnnxModel) -> None:
    # Of models with random weights, which carry every error on.
    assert case.error(every_logit(int8_model, case.ids)) < 1.3 * case.error(every_logit(model, case.ids))


@pytest.mark.parametrize("cache", ["model", "int8_model"])
def test_a_token_has_the_same_bits_however_the_sequence_is_cut_and_whatever_shares_the_step(
    case: Case, cache: str, request: pytest.FixtureRequest
) -> None:
    model: OnnxModel = request.getfixturevalue(cache)
    assert model.determinism is DeterminismClass.STRICT
    assert model.mixes
    alone = every_logit(model, case.ids)
    dice = np.random.default_rng(1)
    for slot in range(4):
        others = [other for other in range(4) if other != slot]
        for taken in (slot, *others):
            model.reserve(taken, len(case.ids))
        position, beside = 0, dict.fromkeys(others, 0)
        while position < len(case.ids):
            rows = []
            for taken, start in [(slot, position), *beside.items()]:
                count = min(int(dice.choice([1, 1, 2, 7, 16, 40])), len(case.ids) - start)
                if count:
                    rows.append(Row(taken, start, case.ids[start : start + count], num_logits=1))
                if taken == slot:
                    position += count
                else:
                    beside[taken] += count
            dice.shuffle(rows)  # type: ignore[arg-type]
            logits = model.step(rows)
            mine = [row.slot for row in rows].index(slot)
            assert logits.row(mine).tobytes() == alone[position - 1].tobytes()
        for taken in range(4):
            model.release(taken)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "stock"])
def test_a_damaged_graph_is_a_typed_error(compiled: bool, tmp_path: Path) -> None:
    folder = Case("llama", "int8", tmp_path).folder
    graph = folder / (bundle.FUSED if compiled else bundle.GRAPH)
    graph.write_bytes(bytes(graph.stat().st_size))
    with pytest.raises(BackendError, match="the graph of model 'tiny' cannot be loaded"):
        bundles.load(folder, compiled=compiled)


def test_float32_and_per_channel_bundles_have_no_such_graph_and_so_no_cache_of_int8(tmp_path: Path) -> None:
    for quantization in ("fp32", "w8a8"):
        folder = Case("llama", quantization, tmp_path).folder
        assert bundle.FUSED not in read_manifest(folder).files
        with pytest.raises(BackendError, match=f"'tiny'.*a bundle of {quantization} has no graph: build it"):
            bundles.load(folder, compiled=True, int8_cache=True)
