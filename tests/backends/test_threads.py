"""Blocking generators of events behind an async one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import aclosing

import pytest

from headrace.backends.errors import BackendError
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, StreamEnd
from headrace.backends.requests import GenerateRequest, TextInput
from headrace.backends.threads import CallThreads
from headrace.backends.types import Call


def call(name: str = "a") -> Call:
    return Call(request=GenerateRequest(input=TextInput(name)), request_id=name, arrived=0.0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], CallThreads]]:
    """Makes CallThreads, closed at the end."""
    made: list[CallThreads] = []

    def make(max_calls: int) -> CallThreads:
        made.append(CallThreads(max_calls))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("backend")]


class Library:
    """A blocking library, and what it saw of being used."""

    def __init__(self, seconds: float = 0.0, num_events: int = 5) -> None:
        self.seconds = seconds
        self.num_events = num_events
        self.num_running = self.most_running = 0
        self.used_by: set[str] = set()
        self.made: list[str] = []
        self.closed_at: list[int] = []
        self.working = threading.Event()
        self._lock = threading.Lock()

    def generate(self, call: Call) -> Generator[Event, None, None]:
        with self._lock:
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
        count = 0
        try:
            for count in range(self.num_events):
                self.used_by.add(threading.current_thread().name)
                self.working.set()
                time.sleep(self.seconds)
                self.made.append(f"{call.request_id}{count}")
                yield Delta(0, str(count))
            yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
            yield StreamEnd()
        except GeneratorExit:
            self.closed_at.append(count)
            raise
        finally:
            self.used_by.add(threading.current_thread().name)
            with self._lock:
                self.num_running -= 1


async def read(threads: CallThreads, library: Library, name: str = "a") -> list[Event]:
    async with aclosing(threads.run(library.generate, call(name))) as events:
        return [event async for event in events]


async def test_events_come_in_order_and_are_made_in_a_thread_of_the_pool(threads) -> None:
    library = Library()
    events = await read(threads(1), library)
    assert events[:-2] == [Delta(0, str(i)) for i in range(5)]
    assert isinstance(events[-2], ChoiceFinish)
    assert isinstance(events[-1], StreamEnd)
    assert library.used_by == {"backend_0"}
    assert library.closed_at == []


@pytest.mark.parametrize("max_calls", [1, 3])
async def test_no_more_calls_run_at_a_time_than_may(threads, max_calls: int) -> None:
    library, pool = Library(seconds=0.002), threads(max_calls)
    answers = await asyncio.gather(*(read(pool, library, name) for name in "abcdefg"))
    assert all(len(answer) == 7 for answer in answers)
    assert library.most_running == max_calls


async def test_the_event_loop_goes_on_while_a_call_works(threads) -> None:
    library = Library(seconds=0.2, num_events=1)
    reading = asyncio.create_task(read(threads(1), library))
    ticks = 0
    while not reading.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 5
    await reading


async def test_a_cancelled_call_ends_after_the_event_it_works_on(threads) -> None:
    library, pool = Library(seconds=0.05), threads(1)
    reading = asyncio.create_task(read(pool, library))
    await asyncio.to_thread(library.working.wait)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert library.made == ["a0"]
    assert library.closed_at == [0]
    assert library.num_running == 0
    assert len(await read(pool, library, "b")) == 7


async def test_a_call_that_is_cancelled_again_and_again_still_cleans_up(threads) -> None:
    library, pool = Library(seconds=0.05), threads(1)
    reading = asyncio.create_task(read(pool, library))
    await asyncio.to_thread(library.working.wait)
    while not reading.done():
        reading.cancel()
        await asyncio.sleep(0.002)
    assert reading.cancelled()
    assert len(await read(pool, library, "b")) == 7  # in the one thread, so after the clean-up
    assert library.closed_at == [0]
    assert library.num_running == 0


async def test_a_stream_that_is_closed_between_events_closes_the_generator_in_a_thread(threads) -> None:
    library = Library()
    async with aclosing(threads(1).run(library.generate, call())) as events:
        assert await anext(events) == Delta(0, "0")
    assert library.closed_at == [0]
    assert library.used_by == {"backend_0"}


async def test_what_the_generator_raises_ends_the_call(threads) -> None:
    def fail(call: Call) -> Generator[Event, None, None]:
        yield Delta(0, "a")
        raise BackendError("out of order")

    pool = threads(1)
    events = pool.run(fail, call())
    assert await anext(events) == Delta(0, "a")
    with pytest.raises(BackendError, match="out of order"):
        await anext(events)
    assert len(await read(pool, Library())) == 7


async def test_an_error_in_a_call_that_was_cancelled_is_not_reported_as_unseen(threads, caplog) -> None:
    working = threading.Event()

    def fail(call: Call) -> Generator[Event, None, None]:
        working.set()
        time.sleep(0.05)
        raise BackendError("out of order")
        yield

    async def run() -> None:
        async with aclosing(threads(1).run(fail, call())) as events:
            async for _ in events:
                pass

    task = asyncio.create_task(run())
    await asyncio.to_thread(working.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    import gc

    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_call_that_is_cancelled_while_it_waits_never_starts(threads) -> None:
    library, pool = Library(seconds=0.02), threads(1)
    first = asyncio.create_task(read(pool, library, "a"))
    await asyncio.to_thread(library.working.wait)
    second = asyncio.create_task(read(pool, library, "b"))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert len(await first) == 7
    assert [made for made in library.made if made.startswith("b")] == []
