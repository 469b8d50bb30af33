"""Prompts that begin alike, on real graphs: the same bits, whether their beginning was computed or copied."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engine_kit import Answer, make_call, read, running_engine, until

from headrace.backends.api import DeterminismClass
from headrace.backends.onnx.model import CHUNK_ALIGNMENT, OnnxModel
from headrace.backends.requests import LatencyClass, ResponseOptions, Sampling, Scheduling, Stopping
from headrace.backends.types import Call, Prompt
from tests.onnx import bundles

NUM_NEW = 40


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.build(tmp_path_factory.mktemp("prefix"))


@pytest.fixture(params=["compiled", "stock", "stock, where bits depend on cuts"])
def model(bundle: Path, request: pytest.FixtureRequest) -> OnnxModel:
    """Closed by the engine that runs it."""
    compiled = request.param == "compiled"
    loaded = bundles.load(bundle, compiled=compiled)
    if "cuts" in request.param:
        loaded.determinism = DeterminismClass.BEST_EFFORT
        loaded.chunk_alignment, loaded.max_chunk = 4 * CHUNK_ALIGNMENT, 4 * CHUNK_ALIGNMENT + 1
    else:
        assert loaded.determinism is (DeterminismClass.STRICT if compiled else DeterminismClass.BIT_EXACT)
    return loaded


def seen(answer: Answer) -> list[object]:
    """Log-probabilities show every bit of the logits."""
    return [answer.ids(), answer.logprobs(), answer.finish()]


async def converse(model: OnnxModel, *, prefix_cache: bool) -> tuple[list[object], list[int | None]]:
    """A turn, the turn after it, another after the same beginning, and the second once more."""
    answers: list[object] = []
    hits: list[int | None] = []
    prompts = [tuple(range(40, 150))]
    async with running_engine(model, prefix_cache=prefix_cache) as engine:
        for turn in range(4):
            call = make_call(
                max_new_tokens=NUM_NEW,
                seed=1,
                stopping=Stopping(ignore_eos=True),
                response=ResponseOptions(token_ids=True, logprobs=True, top_logprobs=3),
            )
            call.prompt = Prompt("", prompts[turn])
            answer = await read(engine, call)
            answers.append(seen(answer))
            hits.append(call.meter.usage().cache_read_input_tokens)
            if turn == 0:
                second = (*prompts[0], *answer.ids(), *range(30))
                prompts += [second, (*prompts[0][:90], *range(60)), second]
    return answers, hits


async def test_every_turn_has_the_bits_that_it_has_without_a_cache(bundle: Path, model: OnnxModel) -> None:
    align, decoded = model.chunk_alignment, model.decodes_like_chunks
    cold = bundles.load(bundle, compiled=model.mixes)
    cold.determinism, cold.chunk_alignment, cold.max_chunk = model.determinism, align, model.max_chunk
    expected, none = await converse(cold, prefix_cache=False)
    answers, hits = await converse(model, prefix_cache=True)
    assert answers == expected
    assert none == [None] * 4
    whole = 110 + NUM_NEW + 30
    there = 110 + NUM_NEW - 1 if decoded else 110
    assert hits == [0, there // align * align, 90 // align * align, (whole - 2) // align * align]


@pytest.mark.parametrize("prefix_cache", [True, False])
async def test_what_made_room_for_a_voice_goes_on_with_the_bits_that_it_has_alone(
    bundle: Path, prefix_cache: bool
) -> None:

    def told() -> Call:
        call = make_call(
            max_new_tokens=200,
            seed=1,
            sampling=Sampling(temperature=1.0, repetition_penalty=1.1),
            stopping=Stopping(ignore_eos=True),
            response=ResponseOptions(token_ids=True, logprobs=True, top_logprobs=3),
            scheduling=Scheduling(latency_class=LatencyClass.BATCH),
        )
        call.prompt = Prompt("", tuple(range(40, 150)))
        return call

    model = bundles.load(bundle, compiled=True)
    model.num_slots = 1
    async with running_engine(model, prefix_cache=prefix_cache) as engine:
        alone = await read(engine, told())
        task = asyncio.ensure_future(read(engine, batch := told()))
        for i in range(4):
            await until(lambda i=i: (batch.meter.usage().output_tokens or 0) > 40 * i)
            voice = make_call(max_new_tokens=2, scheduling=Scheduling(latency_class=LatencyClass.VOICE))
            voice.prompt = Prompt("", tuple(range(50 + i, 80 + i)))
            await read(engine, voice)
        assert seen(await task) == seen(alone)
        assert engine.runner.num_preemptions == 4
