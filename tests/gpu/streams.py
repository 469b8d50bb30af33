"""Calls of an engine, as token ids, and what came back when."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from headrace.backends.events import Delta
from headrace.backends.requests import GenerateRequest, ResponseOptions, Sampling, Stopping, TokenIdsInput
from headrace.backends.types import Call, Principal, Prompt
from headrace.backends.usage import Usage
from headrace.server.engine.engine import Engine

_numbers = itertools.count()


@dataclass(slots=True)
class Stream:
    """What a reader saw of a call."""

    began: float
    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    """When each of the tokens came; tokens that came together have the same time."""
    usage: Usage | None = None

    @property
    def first_token_seconds(self) -> float:
        return self.arrivals[0] - self.began


async def generate(
    engine: Engine,
    prompt: Sequence[int],
    count: int,
    *,
    limit: int | None = None,
    on_token: Callable[[], None] | None = None,
) -> Stream:
    """Asks for ``count`` tokens, greedily, and goes away after ``limit`` of them."""
    request = GenerateRequest(
        input=TokenIdsInput(tuple(prompt)),
        sampling=Sampling(temperature=0.0),
        stopping=Stopping(max_new_tokens=count, ignore_eos=True),
        response=ResponseOptions(token_ids=True),
    )
    stream = Stream(time.monotonic())
    call = Call(
        request=request,
        request_id=f"gpu-{next(_numbers)}",
        arrived=stream.began,
        principal=Principal("tenant"),
        prompt=Prompt("", tuple(prompt)),
        max_new_tokens=count,
        is_streamed=True,
    )
    async with aclosing(engine.generate(call)) as events:
        async for event in events:
            if isinstance(event, Delta) and event.token_ids:
                stream.tokens += event.token_ids
                stream.arrivals += [time.monotonic()] * len(event.token_ids)
                if on_token is not None:
                    on_token()
                if limit is not None and len(stream.tokens) >= limit:
                    break
    stream.usage = call.meter.usage()
    return stream
