"""Log-probabilities of given tokens, batched with everything else."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
from engine_kit import Clock, letters, make_call, read, running_engine, scripted, until

from headrace.backends.api import Row
from headrace.backends.errors import BackendError, DeadlineExceeded, Draining, InvalidArgument, QueueTimeout
from headrace.backends.events import Scored, ScoredToken, StreamEnd
from headrace.backends.logits import HostLogits
from headrace.backends.requests import LatencyClass, Scheduling, Scoring
from headrace.backends.scripted import EOS, VOCABULARY_SIZE, ScriptedStepModel
from headrace.backends.types import Call
from headrace.server.engine.engine import Engine

BATCH = Scheduling(latency_class=LatencyClass.BATCH)
VOICE = Scheduling(latency_class=LatencyClass.VOICE)
TEXT = b"the channel that brings water to a mill wheel, and another that takes it away again"
KINDS = {
    "one by one": {},
    "in chunks": {"max_scores": 24},
    "in chunks of the fewest": {"max_scores": 8},
    "in chunks beside decodes": {"max_scores": 200, "mixes": True},
}


def score_call(
    prompt: bytes,
    *candidates: Sequence[int],
    tokens: bool = False,
    top_logprobs: int = 0,
    **options: object,
) -> Call:
    """A scoring as ``tokenize`` leaves it."""
    call = make_call(prompt, max_new_tokens=0, **options)
    call.request = replace(call.request, scoring=Scoring(tokens=tokens, top_logprobs=top_logprobs))
    call.candidates = tuple(map(tuple, candidates))
    return call


async def score(engine: Engine, call: Call) -> list[Scored]:
    """By candidate."""
    async with aclosing(engine.generate(call)) as events:
        found = [event async for event in events]
    assert isinstance(found.pop(), StreamEnd)
    assert all(isinstance(event, Scored) for event in found)
    return sorted(found, key=lambda scored: scored.choice)


def logprobs_after(tokens: Sequence[int]) -> np.ndarray:
    """What a scripted model gives after each token, computed without an engine, one token a step: [T, V]."""
    model = scripted(num_slots=1)
    model.reserve(0, len(tokens))
    rows = [model.step([Row(0, i, [token], num_logits=1)]).row(0) for i, token in enumerate(tokens)]
    logits = np.array(rows, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def expected(prompt: Sequence[int], candidate: Sequence[int]) -> list[float]:
    logprobs = logprobs_after([*prompt, *candidate])
    return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(candidate)]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
async def test_candidates_get_the_log_probabilities_that_the_model_gives_their_tokens(options: dict) -> None:
    candidates = [b"a", b"another", TEXT, bytes(range(65, 91))]
    async with running_engine(scripted(**options)) as engine:
        call = score_call(TEXT, *candidates, tokens=True)
        scores = await score(engine, call)
    for scored, candidate in zip(scores, candidates, strict=True):
        right = expected(TEXT, candidate)
        assert [token.token_id for token in scored.tokens] == list(candidate)
        assert [token.token for token in scored.tokens] == [bytes([byte]) for byte in candidate]
        assert [token.logprob for token in scored.tokens] == pytest.approx(right, abs=1e-5)
        assert scored.logprob == math.fsum(token.logprob for token in scored.tokens)
        assert scored.num_tokens == len(candidate)
    usage = call.meter.usage()
    assert usage.input_tokens == len(TEXT) + sum(map(len, candidates))
    assert usage.output_tokens == 0


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
async def test_a_text_is_scored_from_its_second_token_on(options: dict) -> None:
    async with running_engine(scripted(**options)) as engine:
        [scored] = await score(engine, score_call(TEXT, tokens=True))
        [pair] = await score(engine, score_call(b"ab"))
    assert scored.tokens[0] == ScoredToken(TEXT[0], TEXT[:1], None)
    assert [token.logprob for token in scored.tokens[1:]] == pytest.approx(expected(TEXT[:1], TEXT[1:]), abs=1e-5)
    assert scored.num_tokens == len(TEXT) - 1
    assert (pair.num_tokens, pair.tokens) == (1, ())
    assert pair.logprob == pytest.approx(expected(b"a", b"b")[0], abs=1e-5)


async def test_the_likeliest_tokens_are_reported_in_each_place() -> None:
    async with running_engine(scripted(max_scores=32)) as engine:
        [scored] = await score(engine, score_call(TEXT, b"again", tokens=True, top_logprobs=3))
    rows = logprobs_after([*TEXT, *b"agai"])[len(TEXT) - 1 :]
    for token, row in zip(scored.tokens, rows, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        assert [top.token_id for top in token.top] == best.tolist()
        assert [top.logprob for top in token.top] == pytest.approx(row[best].tolist(), abs=1e-5)


@pytest.mark.parametrize("max_scores", [0, 32])
async def test_the_probabilities_of_all_next_tokens_are_1_together(max_scores: int) -> None:
    async with running_engine(scripted(max_scores=max_scores)) as engine:
        scores = await score(engine, score_call(TEXT, *([token] for token in range(VOCABULARY_SIZE))))
    assert math.fsum(math.exp(scored.logprob) for scored in scores) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
async def test_scores_are_the_same_bits_alone_in_a_crowd_and_after_what_others_computed(options: dict) -> None:
    dice = random.Random(7)
    prompts = [TEXT[: dice.randrange(1, len(TEXT))] for _ in range(6)]
    candidates = [[dice.randbytes(dice.randrange(1, 60)).replace(b"\0", b"x") for _ in range(4)] for _ in prompts]
    async with running_engine(scripted(**options), prefix_cache=False) as engine:
        alone = [await score(engine, score_call(*one)) for one in zip_all(prompts, candidates)]
    async with running_engine(scripted(num_slots=5, num_spare_slots=3, **options)) as engine:
        readers = [asyncio.ensure_future(read(engine, make_call(f"{i}" * 20, max_new_tokens=40))) for i in range(3)]
        crowd = await asyncio.gather(*(score(engine, score_call(*one)) for one in zip_all(prompts, candidates)))
        again = [await score(engine, score_call(*one)) for one in zip_all(prompts, candidates)]
        for i, reader in enumerate(readers):
            assert (await reader).text() == letters(f"{i}" * 20, 40)
        assert engine.runner.num_reused_tokens > 0
    assert crowd == alone
    assert again == alone


def zip_all(prompts: list[bytes], candidates: list[list[bytes]]) -> list[tuple[bytes, ...]]:
    return [(prompt, *texts) for prompt, texts in zip(prompts, candidates, strict=True)]


async def test_a_prefix_is_computed_once_for_all_its_candidates() -> None:
    prompt = TEXT * 4
    async with running_engine(scripted(num_slots=4, max_scores=64)) as engine:
        call = score_call(prompt, *(b"candidate %d" % i for i in range(12)))
        await score(engine, call)
        assert engine.runner.num_reused_tokens == 11 * ((len(prompt) - 1) // 16 * 16)
        # One slot keeps it, and none the candidates: what was there before is not pushed out by them.
        assert engine.runner.num_retained_tokens == len(prompt) // 16 * 16
        # A later one of the same tenant finds it, too.
        later = score_call(prompt, b"other")
        await score(engine, later)
        assert later.meter.usage().cache_read_input_tokens == (len(prompt) - 1) // 16 * 16
        stranger = score_call(prompt, b"other", tenant="stranger")
        await score(engine, stranger)
        assert stranger.meter.usage().cache_read_input_tokens == 0


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
async def test_a_scoring_that_made_room_goes_on_and_gives_the_same(options: dict) -> None:
    prompt, candidate = TEXT, bytes(random.Random(3).choices(range(65, 91), k=400))
    async with running_engine(scripted(**options)) as engine:
        alone = await score(engine, score_call(prompt, candidate, tokens=True))
    async with running_engine(scripted(num_slots=1, seconds_per_step=0.002, **options)) as engine:
        batch = score_call(prompt, candidate, tokens=True, scheduling=BATCH)
        task = asyncio.ensure_future(score(engine, batch))
        await until(lambda: batch.meter.started is not None)
        for i in range(2):
            voice = make_call(f"question {i}", max_new_tokens=2, scheduling=VOICE)
            assert (await read(engine, voice)).text() == letters(f"question {i}", 2)
        assert await task == alone
        assert engine.runner.num_preemptions > 0
    assert batch.meter.usage().input_tokens == len(prompt) + len(candidate)


async def test_a_reader_who_goes_away_frees_every_slot() -> None:
    model = scripted(num_slots=3, max_scores=16, seconds_per_step=0.001)
    async with running_engine(model, prefix_cache=False) as engine:
        call = score_call(TEXT, *(TEXT * 20 for _ in range(10)))
        task = asyncio.ensure_future(score(engine, call))
        await until(lambda: model.num_reserved_tokens > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (model.num_reserved_tokens, engine.num_queued) == (0, 0)


async def test_a_deadline_ends_it() -> None:
    clock = Clock()
    async with running_engine(scripted(seconds_per_step=0.001), clock=clock) as engine:
        call = score_call(TEXT, TEXT * 20, deadline=clock.now + 5)
        task = asyncio.ensure_future(score(engine, call))
        await until(lambda: call.meter.started is not None)
        clock.now += 6
        with pytest.raises(DeadlineExceeded):
            await task


async def test_it_waits_no_longer_than_it_may() -> None:
    clock = Clock()
    async with running_engine(scripted(num_slots=1, seconds_per_step=0.001), clock=clock) as engine:
        first = asyncio.ensure_future(read(engine, make_call(max_new_tokens=2000)))
        await until(lambda: engine.runner.num_running == 1 and engine.num_queued == 0)
        call = score_call(TEXT, b"x", scheduling=Scheduling(queue_timeout=5))
        task = asyncio.ensure_future(score(engine, call))
        await until(lambda: engine.num_queued == 1)
        clock.now += 6
        engine.runner.wake()
        with pytest.raises(QueueTimeout):
            await task
        first.cancel()


async def test_a_server_that_stops_gives_no_part_of_a_score() -> None:
    async with running_engine(scripted(seconds_per_step=0.001)) as engine:
        call = score_call(TEXT, TEXT * 20, b"short")
        task = asyncio.ensure_future(score(engine, call))
        await until(lambda: call.meter.started is not None)
        await engine.finish_all()
        with pytest.raises(Draining):
            await task


class GivesNan(ScriptedStepModel):
    def step(self, rows: Sequence[Row]) -> HostLogits:
        logits = super().step(rows)
        if rows[0].num_logits:
            logits.row(0)[ord("x")] = np.nan
        return logits


@pytest.mark.parametrize("max_scores", [0, 32])
async def test_what_is_no_probability_fails_its_own_call(max_scores: int) -> None:
    good = scripted(max_scores=max_scores)
    async with running_engine(GivesNan("nan", good._options)) as engine:
        with pytest.raises(BackendError, match="no probabilities"):
            await score(engine, score_call(TEXT, b"xyz"))
        [scored] = await score(engine, score_call(TEXT, b"abc"))
        assert math.isfinite(scored.logprob)


async def test_more_candidates_than_can_wait_are_refused_by_name() -> None:
    async with running_engine(scripted(), max_queued=3) as engine:
        with pytest.raises(InvalidArgument, match="candidates: must be at most 3"):
            await score(engine, score_call(TEXT, *[b"a"] * 4))


async def test_the_end_of_sequence_can_be_scored() -> None:
    async with running_engine(scripted(max_scores=32)) as engine:
        [scored] = await score(engine, score_call(TEXT, [*b"end", EOS], tokens=True))
    assert scored.tokens[-1].token == b""
    assert scored.logprob == pytest.approx(sum(expected(TEXT, [*b"end", EOS])), abs=1e-4)
