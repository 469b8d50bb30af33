"""Asks models of the backend ``remote``, without a server before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from headrace.backends.api import BackendContext, WholeCallModel
from headrace.backends.errors import HeadraceError
from headrace.backends.events import Delta, Event
from headrace.backends.remote.dialect import Dialect
from headrace.backends.remote.options import RemoteModelOptions, RemoteOptions
from headrace.backends.remote.plugin import RemoteBackend
from headrace.backends.remote.sse import EventParser
from headrace.backends.requests import ChatInput, ChatMessage, GenerateRequest, Input, Role, Sampling
from headrace.backends.testing.calls import Answer, read
from headrace.backends.types import Call
from headrace.backends.usage import Usage

DOCUMENTED = Path(__file__).parent / "documented"
"""Streams as the documentation of a provider prints them."""


def remote_backend(url: str, dialect: str, *, provider: Mapping[str, Any] = {}, **model: Any) -> RemoteBackend:
    """With one provider, ``there``, and one model, ``it``."""
    settings = {"dialect": dialect, "base_url": url, "models": {"it": {"context_length": 100_000, **model}}}
    options = RemoteOptions.model_validate({"providers": {"there": settings | dict(provider)}})
    return RemoteBackend(options, BackendContext(models_dir=Path("models")))


@asynccontextmanager
async def remote_model(
    url: str, dialect: str, *, provider: Mapping[str, Any] = {}, **model: Any
) -> AsyncIterator[WholeCallModel]:
    """The model of such a backend; closed in the end."""
    loaded = await asyncio.to_thread(remote_backend(url, dialect, provider=provider, **model).load, "it")
    try:
        yield loaded
    finally:
        await asyncio.to_thread(loaded.close)


def request_of(source: Input | str = "Hello", *, options: Iterable[str] = (), **request: Any) -> GenerateRequest:
    """``source``: what the user says, unless it is more. ``options``: what is set, where a dialect looks at that."""
    if isinstance(source, str):
        source = ChatInput((ChatMessage(Role.USER, source),))
    return GenerateRequest(input=source, options=frozenset(options), **request)


def call_of(
    request: GenerateRequest | None = None,
    *,
    max_new_tokens: int = 64,
    extensions: Mapping[str, BaseModel] = {},
    request_id: str = "r1",
) -> Call:
    return Call(
        request=request or request_of(),
        request_id=request_id,
        arrived=time.monotonic(),
        max_new_tokens=max_new_tokens,
        extensions=extensions,
    )


def body_of(dialect: Dialect, call: Call, **model: Any) -> dict[str, Any]:
    options = {"model": "the-model", "context_length": 100_000, **model}
    return dialect.body(call, RemoteModelOptions.model_validate(options))


async def ask(model: WholeCallModel, call: Call) -> Answer:
    """Reads an answer to its end. Raises what it ends with."""
    return await read(model.generate, call)


async def ask_with_seeds(model: WholeCallModel, seeds: Iterable[int]) -> list[Answer]:
    """Asks for the same story with one seed after the other, at a temperature that tells them apart."""
    hot = {"sampling.temperature", "determinism.seed"}
    requests = [
        request_of("Tell me a story.", sampling=Sampling(temperature=1.5), seed=seed, options=hot) for seed in seeds
    ]
    return [await ask(model, call_of(request, max_new_tokens=24)) for request in requests]


async def ask_in_vain(model: WholeCallModel, call: Call) -> tuple[list[Event], HeadraceError]:
    """What an answer gives before its error, and that error."""
    events: list[Event] = []
    try:
        async with aclosing(model.generate(call)) as answer:
            async for event in answer:
                events.append(event)  # noqa: PERF401 -- what came before an error counts
    except HeadraceError as error:
        return events, error
    raise AssertionError("the call ended well")


def read_events(dialect: Dialect, stream: bytes, call: Call | None = None) -> tuple[list[Event], Usage]:
    """What a dialect reads of a whole stream, and the provider's counts. Raises EOFError if the stream is cut."""
    usage = Usage()
    reader = dialect.reader(call or call_of(), usage)
    events = [event for message in EventParser().feed(stream) for event in reader.read(message)]
    if not reader.finished:
        events += reader.end()
    return events, usage


def text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def reasoning_of(events: Iterable[Event]) -> str:
    return "".join(event.reasoning_text for event in events if isinstance(event, Delta))


def tool_calls_of(events: Iterable[Event]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each."""
    calls: list[tuple[str, str, str]] = []
    for delta in (delta for event in events if isinstance(event, Delta) for delta in event.tool_calls):
        if delta.index == len(calls):
            calls.append((delta.id or "", delta.name or "", ""))
        call_id, name, arguments = calls[delta.index]
        calls[delta.index] = call_id, name, arguments + delta.arguments_json
    return calls


def splits(stream: bytes) -> Iterator[list[bytes]]:
    """The same stream in pieces: byte by byte, in odd sizes, event by event, in two at the worst places, and whole."""
    yield [stream]
    for size in (1, 3, 7, 1000):
        yield [stream[i : i + size] for i in range(0, len(stream), size)]
    end = b"\r\n\r\n" if b"\r\n\r\n" in stream else b"\n\n"
    events = [event + end for event in stream.split(end)[:-1]]
    yield events
    yield [b"".join(events[i : i + 3]) for i in range(0, len(events), 3)]
    yield [events[0][:-1], *(a[-1:] + b[:-1] for a, b in pairwise(events)), events[-1][-1:]]
