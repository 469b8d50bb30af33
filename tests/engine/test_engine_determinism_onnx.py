"""Strict determinism on real graphs: whatever happens around a call, it gets the bits that it gets alone, on an engine
that neither guesses nor keeps anything.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_kit import Answer, make_call, read, running_engine

from headrace.backends.api import DeterminismClass
from headrace.backends.onnx.model import OnnxModel
from headrace.backends.requests import LatencyClass, ResponseOptions, Sampling, Scheduling, Stopping
from headrace.backends.types import Call, Prompt
from headrace.server.engine.pace import Pacer
from tests.onnx import bundles, tiny

NUM_CALLS = 24
MOST_TOKENS = 260
"""Of prompt and output of any call."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.build(tmp_path_factory.mktemp("determinism"))


def load(folder: Path, *, int8_cache: bool) -> OnnxModel:
    """Its cache holds three or four of the longest calls: others wait, and what is kept is given up."""
    token_bytes = tiny.LAYERS * 2 * tiny.KV_HEADS * (tiny.HEAD_SIZE + 2 if int8_cache else 2 * tiny.HEAD_SIZE)
    return bundles.load(
        folder,
        int8_cache=int8_cache,
        num_slots=6,
        num_spare_slots=3,
        num_kv_bytes=7 * MOST_TOKENS // 2 * token_bytes,
    )


@dataclass
class Visit:
    """When a call comes, and after how many events its reader goes away."""

    call: Call
    delay: float
    limit: int | None


def prompts(dice: random.Random) -> list[tuple[int, ...]]:
    """They begin alike, some with the answers' kind of repetition."""
    beginnings = [[dice.randrange(3, 270) for _ in range(dice.randrange(20, 150))] for _ in range(3)]
    beginnings.append([*range(40, 60)] * 5)
    found = []
    for _ in range(NUM_CALLS):
        beginning = dice.choice([*beginnings, beginnings[-1]])
        shared = beginning[: dice.choice([len(beginning), dice.randrange(1, len(beginning))])]
        found.append((*shared, *(dice.randrange(3, 270) for _ in range(dice.choice([0, 1, 2, 17, 40])))))
    return found


def make_visits(seed: int) -> list[Visit]:
    """The same ones for the same seed."""
    dice = random.Random(seed)
    visits = []
    for i, ids in enumerate(prompts(dice)):
        call = make_call(
            max_new_tokens=dice.randrange(1, 60),
            n=dice.choice([1, 1, 1, 3]),
            seed=i,
            sampling=Sampling(
                temperature=dice.choice([0.0, 0.0, 0.6, 1.7]),
                top_k=dice.choice([None, 5]),
                top_p=dice.choice([1.0, 0.9]),
                min_p=dice.choice([0.0, 0.05]),
                repetition_penalty=dice.choice([1.0, 1.3]),
                frequency_penalty=dice.choice([0.0, 0.4]),
            ),
            stopping=Stopping(ignore_eos=dice.random() < 0.7),
            response=ResponseOptions(token_ids=True, logprobs=True, top_logprobs=2),
            scheduling=Scheduling(latency_class=dice.choice(list(LatencyClass)), priority=dice.randrange(3)),
            tenant=dice.choice(["a", "a", "b"]),
            use_prefix_cache=dice.random() < 0.8,
        )
        call.prompt = Prompt("", ids)
        limit = dice.randrange(1, 20) if dice.random() < 0.25 else None
        is_urgent = call.request.scheduling.latency_class is LatencyClass.VOICE
        # Whoever is urgent comes when others hold what it needs.
        delay = dice.uniform(0, 0.3) if is_urgent else dice.choice([0.0, 0.0, dice.uniform(0, 0.05)])
        visits.append(Visit(call, delay, limit))
    return visits


async def alone(folder: Path, seed: int, *, int8_cache: bool) -> list[Answer]:
    """What each call gets with nobody beside it, to its end."""
    async with running_engine(load(folder, int8_cache=int8_cache), prefix_cache=False, speculation=False) as engine:
        return [await read(engine, visit.call) for visit in make_visits(seed)]


def check(visit: Visit, got: Answer, expected: Answer) -> None:
    """Log-probabilities show every bit of the logits."""
    for choice in range(visit.call.request.n):
        ids, logprobs = got.ids(choice), got.logprobs(choice)
        assert ids == expected.ids(choice)[: len(ids)]
        assert logprobs == expected.logprobs(choice)[: len(logprobs)]
        if visit.limit is None:
            assert len(ids) == len(expected.ids(choice))
            assert got.text(choice) == expected.text(choice)
            assert got.finish(choice) == expected.finish(choice)


async def mix(bundle: Path, seed: int, monkeypatch: pytest.MonkeyPatch, *, int8_cache: bool) -> tuple[int, int, int]:
    """Runs the visits of a seed at once and checks each. Returns how many tokens were reused and how many guessed, and
    how many sequences had to make room.
    """
    expected = await alone(bundle, seed, int8_cache=int8_cache)
    dice = random.Random(1000 + seed)
    monkeypatch.setattr(Pacer, "chunk_budget", lambda *_: dice.choice([16, 16, 48, 112, 256]))
    monkeypatch.setattr(Pacer, "draft_price", lambda *_: dice.choice([0.01, 0.2, 0.5, 2.0]))
    monkeypatch.setattr(Pacer, "can_mix", lambda *_: dice.random() < 0.8)
    model = load(bundle, int8_cache=int8_cache)
    assert model.determinism is DeterminismClass.STRICT
    model.mixes = seed % 3 != 2
    model.chunk_alignment = dice.choice([16, 32])
    visits = make_visits(seed)

    async def visit_engine(visit: Visit) -> Answer:
        await asyncio.sleep(visit.delay)
        return await read(engine, visit.call, limit=visit.limit)

    async with running_engine(model, prefix_cache=seed % 4 != 1, speculation=seed % 4 != 2) as engine:
        answers = await asyncio.gather(*map(visit_engine, visits))
        num_reused, num_preemptions = engine.runner.num_reused_tokens, engine.runner.num_preemptions
    for visit, got, right in zip(visits, answers, expected, strict=True):
        check(visit, got, right)
    usages = [visit.call.meter.usage() for visit in visits]
    num_guessed = sum((usage.accepted_draft_tokens or 0) + (usage.rejected_draft_tokens or 0) for usage in usages)
    return num_reused, num_guessed, num_preemptions


@pytest.mark.parametrize("int8_cache", [False, True], ids=["float16 cache", "int8 cache"])
async def test_a_call_has_the_bits_that_it_has_alone_whatever_happens_around_it(
    bundle: Path, int8_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [await mix(bundle, seed, monkeypatch, int8_cache=int8_cache) for seed in range(6)]
    print("reused tokens, guessed tokens, preemptions:", *shown)
    assert all(map(sum, zip(*shown, strict=True))), "these mixes show less than they should"
