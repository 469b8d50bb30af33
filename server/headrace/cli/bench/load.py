"""The load: streams that each send a request when the last is answered, or requests that arrive by chance.

Times are seconds from the begin of a level's load, on the monotonic clock.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from headrace.cli.bench.prompts import Prompt, Prompts
from headrace.client import AsyncClient, HeadraceError, Report, TextDelta

OK: Final = "OK"
REFUSED: Final = "RESOURCE_EXHAUSTED"
_PAUSE: Final = 1.0
"""Seconds that a stream waits after a call that failed, unless the server says how long."""
_STARTED_AT_ONCE: Final = 8
"""Streams that begin before the event loop does something else: a thousand calls take it a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One load. Without ``rate`` it has ``streams`` streams; with it, requests arrive ``rate`` a second on average,
    as a Poisson process, and ``streams`` bounds how many run at once. It ends after ``requests`` requests or
    ``duration`` seconds; what was sent by then is waited for.
    """

    streams: int | None
    rate: float | None = None
    requests: int | None = None
    duration: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g}/s" + (f", at most {self.streams}" if self.streams else "")
        return "1 stream" if self.streams == 1 else f"{self.streams} streams"

    def arrivals(self) -> Iterator[float]:
        """When the requests of a Poisson process are to be sent."""
        assert self.rate is not None
        source = random.Random(f"{self.seed}:arrivals")  # noqa: S311  # a load is to be repeatable
        now = 0.0
        for _ in itertools.count() if self.requests is None else range(self.requests):
            now += source.expovariate(self.rate)
            if self.duration is not None and now > self.duration:
                return
            yield now


@dataclass(slots=True, kw_only=True)
class Request:
    """One request and what became of it."""

    prompt_tokens: int
    max_new_tokens: int
    intended: float
    """When it was to be sent. Latencies count from here, so that a load that falls behind hides nothing."""
    sent: float
    arrivals: list[float] = field(default_factory=list)
    """When each piece of text came: nearly always one token."""
    ended: float | None = None
    code: str | None = None
    """Its status; None while it runs, and for one that Ctrl-C stopped."""
    message: str = ""
    report: Report | None = None


Send = Callable[[float], Awaitable["Outcome"]]
"""Sends the next request, given when it was to be sent, and returns when it is over."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether a request was answered; if it was not, after how many seconds the next makes sense."""

    ok: bool
    pause: float = _PAUSE


class Load:
    """Puts load on a server. The requests of all levels come from one series of prompts."""

    def __init__(
        self,
        clients: Sequence[AsyncClient],
        prompts: Prompts,
        options: Mapping[str, Any],
        *,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``options`` go with every request; ``timeout`` is the deadline of each, in seconds."""
        self._clients = itertools.cycle(clients)
        self._prompts = prompts
        self._options = options
        self._timeout = timeout
        self._clock = clock

    async def run(self, level: Level, requests: list[Request], on_end: Callable[[], None]) -> None:
        """Runs a level and adds its requests as they are sent, so that they outlive a cancel; calls ``on_end`` whenever
        one is over. Raises PromptError.
        """
        began = self._clock()

        def now() -> float:
            return self._clock() - began

        async def send(intended: float) -> Outcome:
            outcome = await self._send(intended, now, requests)
            on_end()
            return outcome

        try:
            await (_closed_loop if level.rate is None else _open_loop)(level, send, now)
        except ExceptionGroup as group:
            # Every stream fails alike, and the first has cancelled the others.
            raise group.exceptions[0] from group

    async def _send(self, intended: float, now: Callable[[], float], requests: list[Request]) -> Outcome:
        prompt = self._prompts.next()
        request = Request(
            prompt_tokens=prompt.num_tokens, max_new_tokens=prompt.num_new_tokens, intended=intended, sent=now()
        )
        requests.append(request)
        try:
            await self._answer(prompt, request, now)
        except HeadraceError as error:
            request.code, request.message = error.code.name, error.message
            request.ended = now()
            return Outcome(ok=False, pause=_PAUSE if error.retry_after is None else error.retry_after)
        request.code = OK
        request.ended = now()
        return Outcome(ok=True)

    async def _answer(self, prompt: Prompt, request: Request, now: Callable[[], float]) -> None:
        stream = next(self._clients).stream(
            prompt.input, timeout=self._timeout, max_new_tokens=prompt.num_new_tokens, **self._options
        )
        async with stream:
            async for event in stream:
                if isinstance(event, TextDelta):
                    request.arrivals.append(now())
        request.report = stream.report


async def _closed_loop(level: Level, send: Send, now: Callable[[], float]) -> None:
    assert level.streams is not None
    left = itertools.count() if level.requests is None else iter(range(level.requests))

    async def stream() -> None:
        while (level.duration is None or now() < level.duration) and next(left, None) is not None:
            outcome = await send(now())
            if not outcome.ok:
                # A stream that is refused waits, as a caller would; else it would only ever be refused.
                await asyncio.sleep(outcome.pause)

    async with asyncio.TaskGroup() as group:
        for number in range(level.streams):
            group.create_task(stream())
            if number % _STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)


async def _open_loop(level: Level, send: Send, now: Callable[[], float]) -> None:
    slots = nullcontext() if level.streams is None else asyncio.Semaphore(level.streams)

    async def one(intended: float) -> None:
        async with slots:
            await send(intended)

    async with asyncio.TaskGroup() as group:
        for intended in level.arrivals():
            await asyncio.sleep(max(0.0, intended - now()))
            group.create_task(one(intended))
