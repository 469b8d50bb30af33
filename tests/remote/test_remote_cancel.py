"""Calls that do not run to their end: what becomes of them upstream, and what they used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from headrace.backends.api import WholeCallModel
from headrace.backends.errors import DeadlineExceeded
from headrace.backends.events import Delta, FinishReason, StreamEnd
from headrace.backends.remote.model import RemoteModel
from headrace.backends.requests import ExpiryAction, Scheduling, Stopping
from headrace.backends.types import Call
from headrace.backends.usage import AttemptOutcome
from tests.remote.asking import ask, ask_in_vain, call_of, remote_model, request_of, text_of
from tests.remote.remote_kit import answer, chunk, finish_of, no_task_is_left, says, serving, stream
from tests.remote.upstream import Answer, Upstream

FIRST = "twelve bytes"
"""Three tokens, as they are estimated."""


class Held:
    """An answer that begins, and goes on when it is let."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    def __call__(self, _request: object) -> Answer:
        return Answer(self._pieces())

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield says(FIRST)
        await self.go_on.wait()
        for piece in answer(" and more"):
            yield piece


async def _leave_at_first_text(model: WholeCallModel, call: Call) -> None:
    """As a reader that has had enough."""
    async with aclosing(model.generate(call)) as events:
        async for event in events:
            assert isinstance(event, Delta)
            break


async def _cancel_at_first_text(model: WholeCallModel, call: Call) -> None:
    """As the server does when a caller goes away."""

    async def run() -> None:
        async with aclosing(model.generate(call)) as events:
            async for _ in events:
                first.set()

    first = asyncio.Event()
    task = asyncio.create_task(run())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def _aborted_all(upstream: Upstream) -> bool:
    """Whatever arrived before time was over."""
    return upstream.num_open == 0 and len(upstream.aborted) == len(upstream.requests)


LEAVING = [_leave_at_first_text, _cancel_at_first_text]


@pytest.mark.parametrize("leave", LEAVING)
async def test_a_call_that_is_left_is_aborted_upstream_and_what_it_used_is_estimated(
    leave: Callable[[WholeCallModel, Call], Awaitable[None]],
):
    before = asyncio.all_tasks()
    async with Upstream(Held()) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        call = call_of()
        await leave(model, call)
        await upstream.until(lambda it: bool(it.aborted) and it.num_open == 0)
        await no_task_is_left(before)
    [attempt] = call.meter.attempts
    assert attempt.outcome is AttemptOutcome.CANCELLED
    assert (attempt.usage.input_tokens, attempt.usage.output_tokens, attempt.usage.estimated) == (1, 3, True)


async def test_a_call_that_is_cancelled_before_its_answer_begins_is_aborted():
    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def silent(_request: object) -> Answer:
        await asyncio.Event().wait()
        return Answer(nothing())

    async with Upstream(silent) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        call = call_of()
        task = asyncio.create_task(ask(model, call))
        await upstream.until(lambda it: bool(it.requests))
        task.cancel()
        await upstream.until(lambda it: bool(it.aborted) and it.num_open == 0)
        assert await asyncio.gather(task, return_exceptions=True) != []
    assert task.cancelled()
    assert call.meter.attempts[0].outcome is AttemptOutcome.CANCELLED


@pytest.mark.parametrize("leave", LEAVING)
async def test_a_call_that_is_left_can_be_drained_for_its_usage(
    leave: Callable[[WholeCallModel, Call], Awaitable[None]],
):
    held = Held()
    async with (
        Upstream(held) as upstream,
        remote_model(upstream.url, "openai-compatible", provider={"on_cancel": "drain"}) as model,
    ):
        call = call_of()
        leaving = asyncio.create_task(leave(model, call))
        while call.meter.first_token is None:  # noqa: ASYNC110 -- it is no event
            await asyncio.sleep(0)
        held.go_on.set()
        await leaving
    assert upstream.aborted == []
    [attempt] = call.meter.attempts
    assert attempt.outcome is AttemptOutcome.CANCELLED
    assert (attempt.usage.input_tokens, attempt.usage.output_tokens, attempt.usage.estimated) == (7, 2, False)


@pytest.mark.parametrize("policy", ["abort", "drain"])
async def test_what_has_come_when_a_call_is_left_is_counted_whatever_the_policy(policy: str):
    """Its first text and its end in one piece."""

    async def pieces() -> AsyncIterator[bytes]:
        yield tools + b"".join(answer("Hi"))
        await asyncio.Event().wait()

    part = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": "{}"}}
    tools = chunk(choices=[{"index": 0, "delta": {"tool_calls": [part]}, "finish_reason": None}])
    async with (
        Upstream(lambda _: Answer(pieces())) as upstream,
        remote_model(upstream.url, "openai-compatible", provider={"on_cancel": policy}) as model,
    ):
        call = call_of()
        await _leave_at_first_text(model, call)
    usage = call.meter.attempts[0].usage
    assert (usage.input_tokens, usage.output_tokens, usage.estimated) == (7, 2, False)


async def test_a_drain_that_takes_too_long_is_aborted_and_estimated():
    options = {"on_cancel": "drain", "drain_seconds": 0.05}
    async with Upstream(Held()) as upstream, remote_model(upstream.url, "openai-compatible", provider=options) as model:
        call = call_of()
        await _leave_at_first_text(model, call)
        await upstream.until(lambda it: bool(it.aborted))
    usage = call.meter.attempts[0].usage
    assert (usage.output_tokens, usage.estimated) == (3, True)


async def test_a_drain_ends_when_its_task_is_cancelled_once_more():
    async with (
        Upstream(Held()) as upstream,
        remote_model(upstream.url, "openai-compatible", provider={"on_cancel": "drain"}) as model,
    ):
        call = call_of()
        leaving = asyncio.create_task(_leave_at_first_text(model, call))
        while call.meter.first_token is None:  # noqa: ASYNC110 -- it is no event
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        leaving.cancel()
        await upstream.until(lambda it: bool(it.aborted))
        await asyncio.gather(leaving, return_exceptions=True)
    assert call.meter.attempts[0].outcome is AttemptOutcome.CANCELLED


async def test_a_client_that_cancels_has_its_call_aborted_upstream_and_settled(tmp_path: Path):
    async with Upstream(Held()) as upstream, serving(tmp_path, upstream.url) as served:
        running = stream(served)
        async for event in running:
            if event.WhichOneof("event") == "delta":
                break
        cancelled_at = time.monotonic()
        running.cancel()
        await upstream.until(lambda it: bool(it.aborted))
        await served.all_settled()
        [posting] = await served.postings()
    assert upstream.aborted[0].at >= cancelled_at
    assert (posting.state, posting.outcome, posting.output_tokens, posting.estimated) == (
        "posted",
        "cancelled",
        3,
        True,
    )


async def test_a_client_that_cancels_pays_what_the_drain_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held, drain = Held(), RemoteModel._drain

    async def go_on_and_drain(*arguments: Any) -> bool:
        held.go_on.set()  # not before the server knows of the cancel
        return await drain(*arguments)

    monkeypatch.setattr(RemoteModel, "_drain", go_on_and_drain)
    async with Upstream(held) as upstream, serving(tmp_path, upstream.url, on_cancel="drain") as served:
        running = stream(served)
        async for event in running:
            if event.WhichOneof("event") == "delta":
                break
        running.cancel()
        await served.all_settled()
        [posting] = await served.postings()
    assert (posting.outcome, posting.input_tokens, posting.output_tokens, posting.estimated) == (
        "cancelled",
        7,
        2,
        False,
    )


async def test_a_deadline_ends_the_call_upstream_too(tmp_path: Path):
    async with Upstream(Held()) as upstream, serving(tmp_path, upstream.url) as served:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in stream(served, timeout=1.0):
                pass
        await upstream.until(lambda it: bool(it.aborted))
        await served.all_settled()
        [posting] = await served.postings()
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert posting.outcome in ("expired", "cancelled")


async def test_a_deadline_that_passes_while_an_answer_is_awaited_is_an_error():
    async with Upstream(Held()) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        call = call_of()
        call.deadline = time.monotonic() + 0.2
        events, error = await ask_in_vain(model, call)
        await upstream.until(_aborted_all)
    assert isinstance(error, DeadlineExceeded)
    assert text_of(events) in ("", FIRST)
    assert call.meter.attempts[0].outcome is AttemptOutcome.EXPIRED


async def test_a_deadline_that_moves_away_while_an_answer_is_awaited_is_not_kept():
    """As when somebody with more time comes to read the same call."""
    held = Held()
    async with Upstream(held) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        call = call_of()
        call.deadline = first = time.monotonic() + 1.0
        asking = asyncio.create_task(ask(model, call))
        await upstream.until(lambda it: bool(it.requests))
        call.extend(None)
        await asyncio.sleep(max(0.0, first + 0.05 - time.monotonic()))
        held.go_on.set()
        found = await asking
    assert text_of(found.events) == f"{FIRST} and more"
    assert call.meter.attempts[0].outcome is AttemptOutcome.COMPLETED


async def test_a_deadline_that_has_passed_already_sends_nothing():
    async with Upstream(Held()) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        call = call_of()
        call.deadline = time.monotonic() - 1
        _, error = await ask_in_vain(model, call)
    assert isinstance(error, DeadlineExceeded)
    assert upstream.requests == []
    assert call.meter.usage().input_tokens == 0


async def test_a_time_limit_ends_the_answer_with_what_there_is():
    async with Upstream(Held()) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        call = call_of(request_of(stopping=Stopping(time_limit=0.3)))
        found = await ask(model, call)
        await upstream.until(_aborted_all)
    assert isinstance(found.events[-1], StreamEnd)
    assert finish_of(found.events).reason is FinishReason.TIME_LIMIT
    [attempt] = call.meter.attempts
    assert (attempt.outcome, attempt.usage.estimated) == (AttemptOutcome.COMPLETED, True)


async def test_a_time_limit_can_be_an_error():
    async with Upstream(Held()) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        request = request_of(stopping=Stopping(time_limit=0.05), scheduling=Scheduling(on_expiry=ExpiryAction.ERROR))
        call = call_of(request)
        _, error = await ask_in_vain(model, call)
    assert isinstance(error, DeadlineExceeded)
    assert call.meter.attempts[0].outcome is AttemptOutcome.EXPIRED
