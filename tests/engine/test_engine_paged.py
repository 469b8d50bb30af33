"""The engine over blocks of a device's cache: sequences that begin alike share them, and the last one frees them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from engine_kit import make_call, read, running_engine, until

from headrace.backends.api import Logits, Row
from headrace.backends.errors import BackendUnavailable
from headrace.backends.onnx.paged_model import PagedModel
from headrace.backends.requests import LatencyClass, ResponseOptions, Sampling, Scheduling, Stopping
from headrace.backends.types import Call, Prompt
from tests.onnx import paged_kit
from tests.onnx.paged_kit import BLOCK

ALIKE = tuple(range(40, 110))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paged_kit.build(tmp_path_factory.mktemp("paged"))


@pytest.fixture(params=[False, True], ids=["", "decodes in buckets"])
def model(bundle: Path, request: pytest.FixtureRequest) -> PagedModel:
    """Closed by the engine that runs it."""
    return paged_kit.load(bundle, captures=request.param)


def told(prompt: Sequence[int], *, max_new_tokens: int = 12, **options: Any) -> Call:
    options = {"stopping": Stopping(ignore_eos=True), **options}
    call = make_call(max_new_tokens=max_new_tokens, **options)
    call.prompt = Prompt("", tuple(prompt))
    return call


async def answers_on_processor(bundle: Path, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    async with running_engine(paged_kit.on_processor(bundle), prefix_cache=False) as engine:
        return [(await read(engine, told(prompt, **options))).ids() for prompt in prompts]


def assert_empty(model: PagedModel) -> None:
    """Once the engine is closed: no block is anybody's."""
    assert model._pool.num_free_blocks == model._pool.num_blocks


async def test_a_crowd_that_begins_alike_gets_the_tokens_of_the_processor(bundle: Path, model: PagedModel) -> None:
    prompts = [(*ALIKE[: 20 * (i % 4)], *range(i, i + 30 + 7 * i)) for i in range(10)]
    expected = await answers_on_processor(bundle, prompts)
    async with running_engine(model) as engine:
        answers = await asyncio.gather(*(read(engine, told(prompt)) for prompt in prompts))
    assert [answer.ids() for answer in answers] == expected
    assert_empty(model)


async def test_turns_of_a_conversation_begin_with_whole_blocks_of_the_last(bundle: Path, model: PagedModel) -> None:
    first = ALIKE
    (said,) = await answers_on_processor(bundle, [first])
    second = (*first, *said, *range(20))
    expected = await answers_on_processor(bundle, [second, second, (*first[:40], *range(9))])
    hits = []
    async with running_engine(model) as engine:
        assert (await read(engine, told(first))).ids() == said
        answers = []
        for prompt in (second, second, (*first[:40], *range(9))):
            answers.append((await read(engine, call := told(prompt))).ids())
            hits.append(call.meter.usage().cache_read_input_tokens)
    assert answers == expected
    assert hits == [len(first) // BLOCK * BLOCK, (len(second) - 2) // BLOCK * BLOCK, 32]
    assert_empty(model)


async def test_choices_of_a_call_share_their_prompt_and_draw_on_the_device_as_on_the_processor(
    bundle: Path, model: PagedModel
) -> None:
    """Whole rows, top-k, top-p and min-p, and penalties, which look at rows on the host."""
    samplings = [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=20, top_p=0.9),
        Sampling(temperature=1.3, min_p=0.05),
        Sampling(temperature=0.8, repetition_penalty=1.3, typical_p=0.9),
    ]

    def calls() -> list[Call]:
        return [told(ALIKE, n=3, seed=7, sampling=sampling) for sampling in samplings]

    async with running_engine(paged_kit.on_processor(bundle)) as engine:
        expected = [await read(engine, call) for call in calls()]
    async with running_engine(model) as engine:
        answers = await asyncio.gather(*(read(engine, call) for call in calls()))
    for answer, other in zip(answers, expected, strict=True):
        assert [answer.ids(choice) for choice in range(3)] == [other.ids(choice) for choice in range(3)]
    assert_empty(model)


async def test_logprobs_are_those_of_the_processor(bundle: Path, model: PagedModel) -> None:
    response = ResponseOptions(token_ids=True, logprobs=True, top_logprobs=3)
    async with running_engine(paged_kit.on_processor(bundle)) as engine:
        expected = await read(engine, told(ALIKE, response=response))
    async with running_engine(model) as engine:
        answer = await read(engine, told(ALIKE, response=response))
    assert [one.token_id for one in answer.logprobs()] == [one.token_id for one in expected.logprobs()]
    for one, other in zip(answer.logprobs(), expected.logprobs(), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [top.token_id for top in one.top] == [top.token_id for top in other.top]


async def test_readers_that_go_away_leave_no_block_behind(model: PagedModel) -> None:
    async with running_engine(model) as engine:
        for turn in range(3):
            calls = [told((*ALIKE, i, turn), max_new_tokens=200) for i in range(6)]
            await asyncio.gather(*(read(engine, call, limit=1 + i) for i, call in enumerate(calls)))
        assert len((await read(engine, told(ALIKE))).ids()) == 12
    assert_empty(model)


class Gate:
    """Holds a model's steps up until somebody lets them go."""

    def __init__(self, model: PagedModel) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self._step = model.step
        model.step = self

    def __call__(self, rows: Sequence[Row]) -> Logits:
        self.entered.set()
        assert self.open.wait(30)
        return self._step(rows)


async def test_what_makes_room_for_a_voice_starts_again_with_the_blocks_that_it_left(
    bundle: Path, model: PagedModel
) -> None:
    prompt = tuple(i * 7 % 240 for i in range(400))
    (expected,) = await answers_on_processor(bundle, [prompt])
    model.num_slots, model.max_chunk = 1, BLOCK + 1
    gate = Gate(model)
    async with running_engine(model) as engine:
        batch = told(prompt, scheduling=Scheduling(latency_class=LatencyClass.BATCH))
        task = asyncio.ensure_future(read(engine, batch))
        await asyncio.to_thread(gate.entered.wait, 30)
        voice = asyncio.ensure_future(
            read(engine, told(range(20), max_new_tokens=2, scheduling=Scheduling(latency_class=LatencyClass.VOICE)))
        )
        await until(lambda: engine.num_queued == 1)
        gate.open.set()
        await voice
        assert (await task).ids() == expected
        assert engine.runner.num_preemptions == 1
    assert_empty(model)


async def test_a_gpu_that_vanishes_ends_its_streams_and_not_the_engine(
    model: PagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    async with running_engine(model) as engine:
        calls = [told((*ALIKE, i), max_new_tokens=400) for i in range(6)]
        tasks = [asyncio.ensure_future(read(engine, call)) for call in calls]
        await until(lambda: sum(call.meter.usage().output_tokens or 0 for call in calls) > 40)
        monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", fail)
        monkeypatch.setattr(ort.OrtValue, "update_inplace", fail)
        failures = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(failure, BackendUnavailable) for failure in failures)
        assert model.problem() == "the processor has failed: start the server again"
        with pytest.raises(BackendUnavailable):
            await read(engine, told(ALIKE))
        assert engine.runner.is_alive()
    assert_empty(model)


async def test_a_step_that_fails_once_costs_its_own_calls_and_no_others(
    bundle: Path, model: PagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = await answers_on_processor(bundle, [ALIKE])
    async with running_engine(model) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(PagedModel, "step", lambda *_: (_ for _ in ()).throw(BackendUnavailable("out of memory")))
            with pytest.raises(BackendUnavailable):
                await read(engine, told(ALIKE))
        assert (await read(engine, told(ALIKE))).ids() == expected
    assert_empty(model)
