"""A model on the device behind the engine: the conformance kit, tokens, cancels, and prompts that begin alike."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from headrace.backends.testing import BackendConformance
from headrace.server.engine.testing import run_in_engine
from tests.gpu.rig import Oracle, random_tokens
from tests.gpu.streams import Stream, generate

NUM_SLOTS = 8
NEAR_TIE = 0.1
"""Two logits that are this near may change places; see ``test_device_numbers``."""


class TestPaged(BackendConformance):
    """The kit, on a backend as the plugin makes it."""

    engine = staticmethod(run_in_engine)

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, rig, small):
        return rig.backend(small("fp16"))


@pytest.fixture(scope="module")
def bundle(small):
    return small("fp16")


@pytest.fixture(params=[False, True], ids=["launched one by one", "CUDA graphs"])
def model(request, rig, bundle):
    """Closed by the engine that runs it. A capture that failed would be no failure but for this."""
    opened = rig.open(bundle, num_slots=NUM_SLOTS, captures=request.param)
    yield opened
    assert opened.captures == request.param


def check_greedy(oracle: Oracle, prompt: list[int], tokens: list[int]) -> None:
    """Every token has the largest logit there is, but for near ties. What follows one counts from there."""
    logits = oracle.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    short = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
    assert short.max() < NEAR_TIE, f"token {int(short.argmax())} is {short.max():.3f} below the largest logit"


async def test_greedy_tokens_are_those_of_the_processor_alone_and_in_a_crowd(model, bundle) -> None:
    oracle, manifest = Oracle(bundle), bundle.manifest
    prompts = [random_tokens(manifest, 5 + 37 * i, seed=20 + i) for i in range(3 * NUM_SLOTS)]
    async with run_in_engine(model) as running:
        alone = await generate(running.engine, prompts[3], 40)
        crowd = await asyncio.gather(*(generate(running.engine, prompt, 24) for prompt in prompts))

    check_greedy(oracle, prompts[3], alone.tokens)
    for prompt, stream in zip(prompts, crowd, strict=True):
        assert len(stream.tokens) == 24
        check_greedy(oracle, prompt, stream.tokens)


async def test_a_prompt_that_begins_as_an_earlier_one_reads_it_from_the_cache(model, bundle) -> None:
    oracle, manifest, block = Oracle(bundle), bundle.manifest, model.chunk_alignment
    shared = random_tokens(manifest, 2 * block + 10, seed=30)
    prompts = [[*shared, *random_tokens(manifest, 30, seed=31 + i)] for i in range(3)]
    async with run_in_engine(model) as running:
        first = await generate(running.engine, prompts[0], 8)
        others = await asyncio.gather(*(generate(running.engine, prompt, 8) for prompt in prompts[1:]))

    assert not first.usage.cache_read_input_tokens
    assert [stream.usage.cache_read_input_tokens for stream in others] == [2 * block] * 2
    for prompt, stream in zip(prompts, [first, *others], strict=True):
        check_greedy(oracle, prompt, stream.tokens)


async def test_cancels_leave_nothing_behind(model, bundle) -> None:
    oracle, manifest = Oracle(bundle), bundle.manifest
    random = np.random.default_rng(40)

    async def broken_off(seed: int) -> Stream:
        prompt = random_tokens(manifest, int(random.integers(2, 400)), seed=seed)
        return await generate(running.engine, prompt, 200, limit=int(random.integers(1, 12)))

    # As many tokens as the cache has room for: a block that were lost would be missed.
    length = min(model.num_kv_tokens // NUM_SLOTS, manifest.context_length) - 8
    whole = [random_tokens(manifest, length, seed=50 + i) for i in range(NUM_SLOTS)]
    async with run_in_engine(model) as running:
        await asyncio.gather(*(broken_off(100 + i) for i in range(5 * NUM_SLOTS)))
        streams = await asyncio.gather(*(generate(running.engine, prompt, 8) for prompt in whole))

    for prompt, stream in zip(whole, streams, strict=True):
        check_greedy(oracle, prompt, stream.tokens)
