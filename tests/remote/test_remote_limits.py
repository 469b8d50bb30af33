"""What waits before a provider, in which order, and what is sent away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.errors import ProviderLimited, QueueTimeout
from headrace.backends.remote.limits import Gate
from headrace.backends.requests import LatencyClass, Scheduling
from tests.remote.asking import ask, ask_in_vain, call_of, remote_model, request_of
from tests.remote.remote_kit import answer, generate, serving
from tests.remote.upstream import Answer, ReceivedRequest, Upstream
from tests.rpc.rpc_kit import details_of, status_of


class Time:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def gate(time: Time | None = None, *, most: int = 1, minute: int | None = None) -> Gate:
    return Gate("far", max_concurrent=most, requests_per_minute=minute, clock=time or Time())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Line:
    """Enters a gate in the background, and notes in which order."""

    def __init__(self, way: Gate) -> None:
        self.way = way
        self.entered: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, rank: tuple[int, int] = (0, 0)) -> None:
        async def enter() -> None:
            await self.way.enter(rank, patience=60.0)
            self.entered.append(name)

        self.tasks[name] = asyncio.create_task(enter())
        await settle()


async def test_so_many_run_at_once_and_the_others_follow_in_their_order():
    line = Line(gate(most=2))
    for name in "abcd":
        await line.come(name)
    assert line.entered == ["a", "b"]
    line.way.leave()
    await settle()
    assert line.entered == ["a", "b", "c"]
    line.way.leave()
    await settle()
    assert line.entered == ["a", "b", "c", "d"]
    assert (line.way.num_running, line.way.num_waiting) == (2, 0)


async def test_nobody_overtakes_who_waits_already():
    line = Line(gate())
    await line.come("first")
    await line.come("second")
    line.way.leave()
    await line.come("third")  # there was room, for a moment
    assert line.entered == ["first", "second"]
    line.tasks["third"].cancel()


async def test_the_more_urgent_goes_first():
    line = Line(gate())
    await line.come("running")
    await line.come("batch", (3, 0))
    await line.come("chat", (2, 0))
    await line.come("important chat", (2, -5))
    for _ in range(3):
        line.way.leave()
        await settle()
    assert line.entered == ["running", "important chat", "chat", "batch"]


async def test_who_gives_up_leaves_the_line():
    line = Line(gate())
    for name in ("running", "gives up", "waits"):
        await line.come(name)
    line.tasks["gives up"].cancel()
    await settle()
    assert line.way.num_waiting == 1
    line.way.leave()
    await settle()
    assert line.entered == ["running", "waits"]


async def test_a_turn_that_comes_while_one_gives_up_is_the_next_ones():
    line = Line(gate())
    for name in ("running", "gives up", "waits"):
        await line.come(name)
    line.way.leave()  # it is its turn
    line.tasks["gives up"].cancel()  # and it does not know yet
    await settle()
    assert line.entered == ["running", "waits"]
    assert line.way.num_running == 1


async def test_no_more_begin_in_any_minute_than_may():
    time = Time()
    way = gate(time, most=10, minute=2)
    await way.enter(patience=0)
    time.now += 30
    await way.enter(patience=0)
    with pytest.raises(ProviderLimited) as error:
        await way.enter(patience=5)
    assert error.value.retry_after == 30
    time.now += 30
    await way.enter(patience=0)
    with pytest.raises(ProviderLimited) as error:
        await way.enter(patience=5)
    assert error.value.retry_after == 30


async def test_who_waits_for_the_minute_is_let_in_by_a_timer():
    time = Time()
    way = gate(time, most=10, minute=1)
    await way.enter(patience=0)
    time.now += 59.99
    line = Line(way)
    await line.come("next")
    assert line.entered == []
    time.now += 0.01
    await line.tasks["next"]
    assert line.entered == ["next"]


@given(st.lists(st.sampled_from(["come", "leave", "give up"]), max_size=60), st.integers(1, 3))
def test_whoever_comes_leaves_and_gives_up_there_are_never_too_many_and_no_room_is_lost(steps: list[str], most: int):
    async def run() -> None:
        line = Line(gate(most=most))
        for i, step in enumerate(steps):
            waiting = [name for name, task in line.tasks.items() if not task.done()]
            if step == "come":
                await line.come(str(i))
            elif step == "leave" and line.way.num_running:
                line.way.leave()
                if i % 2 and waiting:
                    line.tasks[waiting[0]].cancel()
            elif step == "give up" and waiting:
                line.tasks[waiting[-1]].cancel()
            await settle()
            num_waiting = sum(not task.done() for task in line.tasks.values())
            assert line.way.num_waiting == num_waiting
            assert line.way.num_running <= most
            assert line.way.num_running == most or num_waiting == 0
        for task in line.tasks.values():
            task.cancel()
        await asyncio.gather(*line.tasks.values(), return_exceptions=True)

    asyncio.run(run())


class Counted:
    """An upstream that answers when it is let, and knows how many it had at once."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.most = 0

    async def __call__(self, _request: ReceivedRequest) -> Answer:
        return Answer(self._pieces())

    async def _pieces(self) -> AsyncIterator[bytes]:
        await self.go_on.wait()
        for piece in answer("Hi"):
            yield piece


async def test_a_provider_never_has_more_calls_than_the_settings_allow():
    counted = Counted()
    async with (
        Upstream(counted) as upstream,
        remote_model(upstream.url, "openai-compatible", provider={"max_concurrent": 3}) as model,
    ):
        calls = [asyncio.create_task(ask(model, call_of())) for _ in range(10)]
        await upstream.until(lambda it: it.num_answering == 3)
        await asyncio.sleep(0.05)  # for the others, if they came
        assert len(upstream.requests) == 3
        counted.go_on.set()
        await asyncio.gather(*calls)
    assert len(upstream.requests) == 10


async def test_a_call_that_waited_too_long_is_sent_away_and_costs_nothing(tmp_path: Path):
    counted = Counted()
    options = {"max_concurrent": 1, "queue_seconds": 0.05}
    async with Upstream(counted) as upstream, serving(tmp_path, upstream.url, **options) as served:
        first = asyncio.ensure_future(generate(served))
        await upstream.until(lambda it: it.num_answering == 1)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await generate(served)
        counted.go_on.set()
        await first
        await served.all_settled()
        postings = await served.postings()
    details = details_of(status_of(error.value))
    assert details["ErrorInfo"].reason == "PROVIDER_LIMITED"
    assert details["ErrorInfo"].metadata["provider"] == "far"
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1000
    assert sorted(one.state for one in postings) == ["posted", "voided"]
    assert len(upstream.requests) == 1


async def test_a_call_waits_no_longer_than_it_wants_to():
    async with (
        Upstream(Counted()) as upstream,
        remote_model(upstream.url, "openai-compatible", provider={"max_concurrent": 1}) as model,
    ):
        first = asyncio.create_task(ask(model, call_of()))
        await upstream.until(lambda it: it.num_answering == 1)
        scheduling = Scheduling(queue_timeout=0.05, latency_class=LatencyClass.VOICE)
        _, error = await ask_in_vain(model, call_of(request_of(scheduling=scheduling)))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert isinstance(error, QueueTimeout)


async def test_a_call_that_fails_or_is_cancelled_leaves_its_place():
    def cut(_request: ReceivedRequest) -> Answer:
        return Answer([], 500) if len(upstream.requests) % 2 else Answer(answer("Hi"))

    async with (
        Upstream(cut) as upstream,
        remote_model(upstream.url, "openai-compatible", provider={"max_concurrent": 1}) as model,
    ):
        for _ in range(3):
            await ask_in_vain(model, call_of())
            async with aclosing(model.generate(call_of())) as events:
                await anext(events)
    assert len(upstream.requests) == 6
