"""Log-probabilities by real graphs: those of transformers, and the same bits whatever else runs."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path

import pytest
from engine_kit import make_call, read, running_engine
from test_engine_scoring import score, score_call

from headrace.backends.api import DeterminismClass
from headrace.backends.events import Scored
from headrace.backends.onnx.build import build_bundle
from headrace.backends.onnx.model import OnnxModel
from headrace.backends.requests import Stopping
from headrace.backends.types import Call, Prompt
from tests.onnx import bundles, tiny

GOLDEN = Path(__file__).parents[1] / "onnx" / "golden"
WAYS = {"compiled int8": ("int8", True), "stock int8": ("int8", False), "stock fp32": ("fp32", False)}


def call_of(prompt: list[int], *candidates: list[int]) -> Call:
    call = score_call(b"", *candidates, tokens=True, top_logprobs=2)
    call.prompt = Prompt("", tuple(prompt))
    return call


def logprobs(scored: Scored) -> list[float]:
    return [token.logprob for token in scored.tokens if token.logprob is not None]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm3"])
async def test_an_fp32_model_gives_the_log_probabilities_of_transformers(architecture: str, tmp_path: Path) -> None:
    source = GOLDEN / architecture
    build_bundle(source, name="tiny", models_dir=tmp_path, quantization="fp32", progress=tiny.quietly)
    expected = json.loads((source / "expected.json").read_text())
    prompt, later, golden = expected["prompt_ids"], expected["greedy_ids"], expected["logprobs"]
    async with running_engine(bundles.load(tmp_path / "tiny", compiled=False)) as engine:
        [whole] = await score(engine, call_of(prompt + later))
        candidates = await score(engine, call_of(prompt, later, later[:1], later[:7]))
    assert logprobs(whole) == pytest.approx(golden, abs=1e-3)
    assert whole.logprob == pytest.approx(math.fsum(golden), abs=1e-3)
    for scored, count in zip(candidates, (len(later), 1, 7), strict=True):
        assert logprobs(scored) == pytest.approx(golden[len(prompt) - 1 :][:count], abs=1e-3)
        assert scored.num_tokens == count


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scoring")
    return {name: bundles.build(folder, quantization=name, name=name) for name in ("int8", "fp32")}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def load(request: pytest.FixtureRequest, built: dict[str, Path]):
    quantization, compiled = request.param

    def load() -> OnnxModel:
        return bundles.load(built[quantization], compiled=compiled)

    return load


def texts(dice: random.Random) -> list[list[int]]:
    return [dice.choices(range(3, 260), k=dice.randrange(2, 200)) for _ in range(4)]


async def test_scores_are_the_same_bits_whoever_runs_beside_and_however_texts_are_cut(load) -> None:
    dice = random.Random(5)
    given = [(one,) for one in texts(dice)]
    given += [(one, *texts(dice)) for one in texts(dice)]

    def calls() -> list[Call]:
        return [call_of(*one) for one in given]

    async with running_engine(load(), prefix_cache=False) as engine:
        alone = [await score(engine, call) for call in calls()]
    narrow = load()
    assert narrow.max_scores > narrow.chunk_alignment
    narrow.max_scores = narrow.chunk_alignment
    async with running_engine(narrow, prefix_cache=False) as engine:
        assert [await score(engine, call) for call in calls()] == alone
    async with running_engine(load()) as engine:
        readers = [
            asyncio.ensure_future(
                read(engine, make_call(bytes(range(20 + i)), max_new_tokens=60, stopping=Stopping(ignore_eos=True)))
            )
            for i in range(2)
        ]
        assert await asyncio.gather(*(score(engine, call) for call in calls())) == alone
        await asyncio.gather(*readers)
        assert [await score(engine, call) for call in calls()] == alone
        assert engine.runner.num_reused_tokens > 0


async def test_a_strict_model_gives_the_same_bits_token_by_token(load) -> None:
    model = load()
    if model.determinism is not DeterminismClass.STRICT:
        model.close()
        pytest.skip("not STRICT")
    given = texts(random.Random(6))
    async with running_engine(model) as engine:
        in_chunks = [await score(engine, call_of(one)) for one in given]
    by_token = load()
    by_token.max_scores = 0
    async with running_engine(by_token) as engine:
        assert [await score(engine, call_of(one)) for one in given] == in_chunks


async def test_every_place_sums_to_1(load) -> None:
    model = load()
    size = model.tokenizer.vocabulary_size
    prompt = list(range(40, 75))
    async with running_engine(model) as engine:
        found = [
            await score(engine, call_of(prompt, *([token] for token in range(start, min(start + 100, size)))))
            for start in range(0, size, 100)
        ]
    assert math.fsum(math.exp(one.logprob) for scores in found for one in scores) == pytest.approx(1, abs=1e-5)
