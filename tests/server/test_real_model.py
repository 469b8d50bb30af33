"""The whole chain with the real model: what a call gets does not depend on who else is served."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from server_kit import call, events_of, reason_of, text_of

from headrace.backends.events import Delta, Event, FinishReason
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    Input,
    ResponseOptions,
    Role,
    Sampling,
    Stopping,
    TextInput,
)
from headrace.backends.types import Call
from headrace.server.app import running_app
from headrace.server.config import Settings

TEXT = "the river turns a wheel and the wheel turns a stone that grinds our corn until it is fine"


def chat(text: str) -> ChatInput:
    return ChatInput((ChatMessage(Role.USER, text),))


def calls() -> list[Call]:
    dice = random.Random(1)
    sources: list[Input] = [TextInput(" ".join(dice.choices(TEXT.split(), k=k))) for k in (1, 15, 40, 90)]
    sources.append(chat("Name a river."))
    return [
        call(
            source,
            stopping=Stopping(max_new_tokens=6),
            sampling=Sampling(temperature=0.8, top_p=0.9) if i % 2 else Sampling(),
            seed=i,
            response=ResponseOptions(token_ids=True, logprobs=True, top_logprobs=2),
        )
        for i, source in enumerate(sources)
    ]


def deltas(events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, Delta)]


async def test_tokens_text_and_log_probabilities_are_the_same_alone_and_in_a_crowd(smollm2: Path) -> None:
    settings = Settings(
        models_dir=smollm2.parent,
        models=(smollm2.name,),
        plugins=("onnx",),
        backends={"onnx": {"max_running": 4, "kv_cache": "128MiB"}},
    )
    async with running_app(settings) as app:
        alone = [await events_of(app.generate, made) for made in calls()]

        async def arrive(made: Call, delay: float) -> list[Event]:
            await asyncio.sleep(delay)
            return await events_of(app.generate, made)

        crowd = await asyncio.gather(*(arrive(made, 0.03 * i) for i, made in enumerate(reversed(calls()))))
        assert [deltas(events) for events in reversed(crowd)] == [deltas(events) for events in alone]

        # It is the model that we think it is, laid out by its template.
        made = call(chat("What is the capital of France? Answer in one word."), stopping=Stopping(max_new_tokens=24))
        events = await events_of(app.generate, made)
        assert "Paris" in text_of(events)
        assert reason_of(events) is FinishReason.EOS_TOKEN
