"""A model that says letters in turns, and readers that take events one by one."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from headrace.backends.api import DeterminismClass, ModelCard
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, StreamEnd
from headrace.backends.types import Call, Events, Handler
from headrace.backends.usage import AttemptOutcome, Usage
from tests.server.server_kit import text_of, until


@dataclass(eq=False)
class Letters:
    """A model that says the letters of a text, one each time that ``go`` has a turn; or all, if ``free``."""

    letters: str = "abc"
    free: bool = True
    error: Exception | None = None
    """What it ends with instead of a finish."""
    error_first: bool = False
    """Before its first letter."""
    reason: FinishReason = FinishReason.EOS_TOKEN
    name: str = "letters"
    determinism: DeterminismClass = DeterminismClass.BIT_EXACT
    reported_version: str | None = None
    backend: str = "tests"
    tokenizer: None = None
    runs: int = 0
    said: int = 0
    closed: int = 0
    calls: list[Call] = field(default_factory=list)
    go: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    @property
    def card(self) -> ModelCard:
        return ModelCard(name=self.name, context_length=64, digest="sha256:00")

    def problem(self) -> None: ...

    def close(self) -> None: ...

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.go.release()

    async def run(self, made: Call) -> Events:
        self.runs += 1
        self.calls.append(made)
        attempt = made.meter.begin("tests", price_id="book")
        attempt.usage = Usage(input_tokens=6, output_tokens=0)
        made.meter.started = made.meter.first_token = made.meter.last_token = time.monotonic()
        try:
            if self.error_first:
                await self.go.acquire()
            if self.error is not None and self.error_first:
                attempt.outcome = AttemptOutcome.FAILED
                raise self.error
            for i, letter in enumerate(self.letters):
                if not self.free:
                    await self.go.acquire()
                assert attempt.usage.output_tokens is not None
                attempt.usage.output_tokens += 1
                self.said += 1
                yield Delta(0, letter, (i,))
            if self.error is not None:
                attempt.outcome = AttemptOutcome.FAILED
                raise self.error
            attempt.outcome = AttemptOutcome.COMPLETED
            yield ChoiceFinish(0, self.reason, seed=7)
            yield StreamEnd()
        finally:
            self.closed += 1


class Reader:
    """Reads a call one event at a time, in a task of its own."""

    def __init__(self, handler: Handler, made: Call) -> None:
        self.call = made
        self.events: list[Event] = []
        self._wanted = asyncio.Semaphore(0)
        self.task = asyncio.create_task(self._read(handler, made))

    async def _read(self, handler: Handler, made: Call) -> None:
        await self._wanted.acquire()
        async with aclosing(handler(made)) as events:
            async for event in events:
                self.events.append(event)
                await self._wanted.acquire()

    async def read(self, count: int) -> None:
        """Until it has so many events."""
        self.want(count - len(self.events))
        await until(lambda: len(self.events) == count or self.task.done())
        assert len(self.events) == count

    def want(self, count: int = 1) -> None:
        for _ in range(count):
            self._wanted.release()

    async def rest(self) -> str:
        """All there is, as text."""
        self.want(10_000)
        await self.task
        return text_of(self.events)

    async def leave(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task
