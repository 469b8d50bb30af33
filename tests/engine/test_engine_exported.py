"""Graphs that Optimum exported, behind the engine: batched, sampled, constrained, scored and counted like any other."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from engine_kit import make_call, read, running_engine
from test_engine_scoring import score, score_call

from headrace.backends.events import FinishReason
from headrace.backends.formats import JsonSchemaFormat
from headrace.backends.requests import Sampling
from headrace.backends.types import Call, Prompt
from tests.onnx import exports

SCHEMA = {"type": "object", "properties": {"wheels": {"type": "integer", "minimum": 1}}, "required": ["wheels"]}


@pytest.fixture(scope="module", params=["gpt2", "mpt"])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.unpack(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def bundle(export: Path) -> Path:
    return exports.add(export, export.parent, quantization="fp32")


def call_of(prompt_ids: list[int], **options) -> Call:
    call = make_call(b"", **options)
    call.prompt = Prompt("", tuple(prompt_ids))
    return call


async def test_streams_that_come_and_go_get_the_answers_of_transformers(export: Path, bundle: Path) -> None:
    expected = exports.expected_of(export)
    async with running_engine(exports.load(bundle, max_running=4)) as engine:
        calls = [call_of(expected[i % 4]["prompt_ids"], max_new_tokens=16 - i) for i in range(12)]
        answers = await asyncio.gather(*(read(engine, call) for call in calls))
    for i, (call, answer) in enumerate(zip(calls, answers, strict=True)):
        ids, usage = answer.ids(), call.meter.usage()
        assert ids == expected[i % 4]["greedy_ids"][: len(ids)]
        assert len(ids) == 16 - i or answer.finish().reason is FinishReason.EOS_TOKEN
        assert usage.input_tokens == len(expected[i % 4]["prompt_ids"])
        assert usage.output_tokens is not None
        assert len(ids) <= usage.output_tokens <= len(ids) + 1


async def test_a_schema_holds(bundle: Path) -> None:
    async with running_engine(exports.load(bundle)) as engine:
        call = call_of([5, 6, 7], max_new_tokens=60, output_format=JsonSchemaFormat(json.dumps(SCHEMA)), seed=3)
        answer = await read(engine, call)
    if answer.finish().reason is not FinishReason.MAX_TOKENS:
        assert json.loads(answer.text())["wheels"] >= 1
    assert answer.text().startswith("{")


async def test_a_seed_repeats_what_is_drawn(bundle: Path) -> None:
    async with running_engine(exports.load(bundle)) as engine:
        sampling = Sampling(temperature=1.0, top_p=0.9)
        one, same, other = [
            (await read(engine, call_of([5, 6, 7], max_new_tokens=20, seed=seed, sampling=sampling))).ids()
            for seed in (1, 1, 2)
        ]
    assert one == same != other


async def test_a_text_is_scored_a_token_at_a_time(export: Path, bundle: Path) -> None:
    expected = exports.expected_of(export)[0]
    async with running_engine(exports.load(bundle)) as engine:
        call = score_call(b"", expected["greedy_ids"], expected["greedy_ids"][::-1], tokens=True)
        call.prompt = Prompt("", tuple(expected["prompt_ids"]))
        greedy, other = await score(engine, call)
    assert greedy.num_tokens == other.num_tokens == 16
    assert greedy.logprob > other.logprob
    assert greedy.logprob == pytest.approx(math.fsum(token.logprob for token in greedy.tokens), abs=1e-3)
