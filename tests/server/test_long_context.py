"""A long prompt of the real model beside short ones."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from server_kit import call, events_of, until

from headrace.backends.events import Delta, Event
from headrace.backends.onnx.model import OnnxModel
from headrace.backends.requests import ResponseOptions, Stopping, TextInput, TokenIdsInput
from headrace.backends.types import Call
from headrace.server.app import running_app
from headrace.server.config import Settings
from tests.backends.test_onnx_kv import physical_bytes

NUM_SHORT = 6
CONTEXT = 8192
MAX_RUNNING = 32


def long_call(num_tokens: int, *, use_prefix_cache: bool = True) -> Call:
    dice = random.Random(5)
    return call(
        TokenIdsInput(tuple(dice.randrange(3, 49_152) for _ in range(num_tokens))),
        stopping=Stopping(max_new_tokens=6, ignore_eos=True),
        response=ResponseOptions(token_ids=True, logprobs=True, top_logprobs=2),
        use_prefix_cache=use_prefix_cache,
    )


def short_call(number: int) -> Call:
    return call(TextInput(f"Count on from {number}:"), stopping=Stopping(max_new_tokens=8, ignore_eos=True))


def deltas(events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, Delta)]


@pytest.mark.parametrize("num_tokens", [3000, pytest.param(8000, marks=pytest.mark.soak)])
async def test_a_long_prompt_holds_up_no_short_one_and_no_memory_but_its_own(smollm2: Path, num_tokens: int) -> None:
    settings = Settings(
        models_dir=smollm2.parent,
        models=(smollm2.name,),
        plugins=("onnx",),
        # Room for the long one and some short ones; for a context each, 32 would need 20 times as much.
        backends={"onnx": {"max_running": MAX_RUNNING, "kv_cache": "512MiB"}},
    )
    async with running_app(settings) as app:
        served = app.registry.find(None)
        model, engine = served.model, served.engine
        assert isinstance(model, OnnxModel)
        assert engine is not None
        assert model.num_kv_tokens < MAX_RUNNING * CONTEXT / 10
        memory = model._kv
        token_bytes = memory._cells.nbytes // (memory._cells.shape[2] * memory.capacity)

        long = asyncio.create_task(events_of(app.generate, long_call(num_tokens)))
        await until(lambda: engine.runner.num_running == 1)
        short = await asyncio.gather(*(events_of(app.generate, short_call(i)) for i in range(NUM_SHORT)))
        assert all(deltas(events) for events in short)
        (running,) = engine.runner._scheduler.running()
        assert running.num_cached_tokens < num_tokens / 2, "the short ones waited for the long one"
        beside = await long

        # A sequence's last steps and what the model ran when it was loaded take some more.
        most = num_tokens + (NUM_SHORT + 6) * 128
        assert num_tokens * token_bytes <= physical_bytes(memory) <= most * token_bytes

        again = await events_of(app.generate, long_call(num_tokens))
        alone = await events_of(app.generate, long_call(num_tokens, use_prefix_cache=False))
        assert deltas(beside) == deltas(again) == deltas(alone)
