"""What is too long for CI."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from headrace.backends.scripted import ScriptedModelOptions, ScriptedStepModel
from headrace.backends.types import Call, GenerateRequest, Prompt, TextInput
from headrace.server.engine.engine import Engine

NUM_CALLS = 10_000


@pytest.mark.soak
async def test_ten_thousand_cancels_at_random_phases_leave_nothing_behind() -> None:
    source = random.Random(3)
    model = ScriptedStepModel("soak", ScriptedModelOptions(num_slots=8, num_kv_tokens=4096))
    engine = Engine(model, clock=time.monotonic, max_queued=NUM_CALLS)
    places = asyncio.Semaphore(64)

    async def cancelled_call(number: int) -> None:
        text = f"prompt {number} " * source.randint(1, 10)
        call = Call(request=GenerateRequest(input=TextInput(text)), request_id=str(number), arrived=time.monotonic())
        call.prompt, call.max_new_tokens = Prompt(text, model.tokenizer.encode(text).ids), 200

        async def read() -> None:
            async for _ in engine.generate(call):
                pass

        async with places:
            task = asyncio.create_task(read())
            await asyncio.sleep(source.random() * 0.02)
            task.cancel()
            await asyncio.wait([task])

    await asyncio.gather(*(cancelled_call(number) for number in range(NUM_CALLS)))
    for _ in range(200):
        if not engine.runner.num_running and not engine.num_queued:
            break
        await asyncio.sleep(0.05)
    assert (engine.runner.num_running, engine.num_queued) == (0, 0)
    assert model.num_reserved_tokens == engine.runner.num_retained_tokens
    await engine.close()
    assert model.num_reserved_tokens == 0
