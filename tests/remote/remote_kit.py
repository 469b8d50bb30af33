"""What the tests of remote models share: chunks of the dialect ``openai-compatible``, models on a real upstream, alone
and behind a whole server with a ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from headrace.backends.api import WholeCallModel
from headrace.backends.errors import HeadraceError
from headrace.backends.events import ChoiceFinish, Event
from headrace.backends.types import Call
from headrace.backends.usage import Attempt
from headrace.server.app import running_app
from headrace.server.config import Settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.server import start_server
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc, scoring_pb2_grpc
from tests.accounting.calls_kit import ByName, Served
from tests.remote.asking import ask

USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
DONE = b"data: [DONE]\n\n"
MODEL = "distant"


def chunk(**fields: Any) -> bytes:
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "there-2026", "choices": []}
    return b"data: " + json.dumps(body | fields, ensure_ascii=False).encode() + b"\n\n"


def says(text: str, *, finish: str | None = None, choice: int = 0) -> bytes:
    return chunk(choices=[{"index": choice, "delta": {"content": text}, "finish_reason": finish}])


def answer(*texts: str, finish: str = "stop", usage: Mapping[str, int] | None = USAGE) -> list[bytes]:
    """The messages of a whole answer."""
    last = [] if usage is None else [chunk(usage=usage)]
    return [*(says(text) for text in texts), says("", finish=finish), *last, DONE]


def error_body(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": None, "param": None, "code": code}}


def provider(url: str, *, model: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """The settings of one, with one model."""
    one = {"model": "there", "context_length": 4096, **(model or {})}
    return {"dialect": "openai-compatible", "base_url": url, "models": {MODEL: one}, **options}


async def outcome_of(model: WholeCallModel, call: Call) -> Attempt:
    """Runs a call, however it ends; its only attempt."""
    with contextlib.suppress(HeadraceError):
        await ask(model, call)
    [attempt] = call.meter.attempts
    return attempt


async def no_task_is_left(before: set[asyncio.Task[Any]]) -> None:
    """Waits until there are no other tasks than ``before``; the test's time-out says if that never comes."""
    while asyncio.all_tasks() - before:  # noqa: ASYNC110  # servers take a moment to end theirs
        await asyncio.sleep(0.001)


def spec(text: str = "Hi there", *, most: int = 16, **fields: Any) -> pb.GenerationSpec:
    made = pb.GenerationSpec(model=MODEL, **fields)
    message = made.chat.messages.add(role=pb.ROLE_USER)
    message.content.add(text=text)
    made.stopping.max_new_tokens = most
    return made


@asynccontextmanager
async def serving(state_dir: Path, url: str, **options: Any) -> AsyncIterator[Served]:
    """A whole server, with a ledger, whose model is that of ``provider(url, **options)``."""
    price = {"input": 3, "output": 5, "cache_read_input": 1}
    chosen = Settings(
        plugins=("remote", "price_table"),
        backends={"remote": {"providers": {"far": provider(url, **options)}}},
        price_sources={"table": {"id": "test", "currency": "USD", "models": {MODEL: price}}},
        retries={"max_retries": 0},
        ledger="auto",
        state_dir=state_dir,
    )
    metrics = Metrics(CollectorRegistry())
    async with running_app(chosen, authenticator=ByName()) as app:
        server = await start_server(app, address="127.0.0.1:0", metrics=metrics)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield Served(
                    app,
                    channel,
                    generation_pb2_grpc.GenerationServiceStub(channel),
                    scoring_pb2_grpc.ScoringServiceStub(channel),
                    metrics,
                )
        finally:
            await server.stop(0)


def generate(served: Served, *, timeout: float | None = None, **fields: Any) -> Any:
    message = pb.GenerateRequest(spec=spec(**fields))
    return served.generation.Generate(message, metadata=(("tenant", "acme"),), timeout=timeout)


def stream(served: Served, *, timeout: float | None = None, **fields: Any) -> Any:
    message = pb.GenerateStreamRequest(spec=spec(**fields))
    return served.generation.GenerateStream(message, metadata=(("tenant", "acme"),), timeout=timeout)


def finish_of(events: Sequence[Event]) -> ChoiceFinish:
    [finish] = [event for event in events if isinstance(event, ChoiceFinish)]
    return finish
