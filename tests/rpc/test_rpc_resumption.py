"""Streams that are resumed over another connection."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from rpc_kit import Served, begin, details_of, gives, says, serving, spec, status_of
from structlog.testing import capture_logs

from headrace.backends.components import CallRecord
from headrace.backends.errors import BackendError, QueueFull
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.types import Call, Events, Handler
from headrace.backends.usage import AttemptOutcome
from headrace.server.middleware.reporting import UsageReporter
from headrace.server.rpc.resumption import MESSAGE_OVERHEAD_BYTES, STREAM_OVERHEAD_BYTES, ResumableStreams
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc
from tests.tcp_proxy import CuttingProxy

LETTERS = "abcdef"
WINDOW = 30.0
"""Longer than any test."""


class Paced:
    """A handler that says a letter for each release of ``go``."""

    def __init__(self, letters: str = LETTERS) -> None:
        self.letters = letters
        self.go = asyncio.Semaphore(0)
        self.made = 0

    def release(self, count: int = 100) -> None:
        for _ in range(count):
            self.go.release()

    async def __call__(self, call: Call) -> Events:
        attempt = begin(call)
        call.meter.sent_output_tokens = 0
        try:
            for i, letter in enumerate(self.letters):
                await self.go.acquire()
                self.made += 1
                attempt.usage.output_tokens = self.made
                yield Delta(0, letter, (i,))
            yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
            attempt.outcome = AttemptOutcome.COMPLETED
            yield StreamEnd()
        finally:
            attempt.outcome = attempt.outcome or AttemptOutcome.CANCELLED


class Sink:
    """Keeps what it is told."""

    name = "sink"

    def __init__(self) -> None:
        self.records: list[CallRecord] = []

    async def record(self, record: CallRecord) -> None:
        self.records.append(record)

    async def close(self) -> None: ...


def request(after: int | None = 0, text: str = "hello", request_id: str = "stream", **fields: Any) -> Any:
    return pb.GenerateStreamRequest(spec=spec(text, request_id=request_id, **fields), resume_after_sequence=after)


@asynccontextmanager
async def serving_with_sink(handler: Handler, **options: Any) -> AsyncIterator[tuple[Served, Sink]]:
    sink = Sink()
    options.setdefault("resume_window", WINDOW)
    async with serving(UsageReporter([sink], clock=time.monotonic).report(handler), **options) as served:
        yield served, sink


def streams_of(served: Served) -> ResumableStreams:
    return served.server._streams


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # nothing sets an event for tests
            await asyncio.sleep(0.001)


async def until_left(served: Served) -> None:
    """Until the server has noticed that no connection reads its only stream."""
    [stream] = streams_of(served)._streams.values()
    await until(lambda: stream.reader is None)


async def read(call: Any, count: int) -> list[pb.GenerateStreamResponse]:
    return [await call.read() for _ in range(count)]


async def rest_of(call: Any) -> list[pb.GenerateStreamResponse]:
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rest_of(call)
    return caught.value


def reason_of(error: grpc.aio.AioRpcError) -> str:
    reason: str = details_of(status_of(error))["ErrorInfo"].reason
    return reason


def field_of(error: grpc.aio.AioRpcError) -> str:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = details_of(status_of(error))["BadRequest"].field_violations
    return str(violation.field)


def text_of(events: list[pb.GenerateStreamResponse]) -> str:
    return "".join(event.delta.text for event in events)


async def broken_after(served: Served, count: int, **fields: Any) -> list[pb.GenerateStreamResponse]:
    """The first events of a stream whose client then goes away."""
    call = served.generation.GenerateStream(request(**fields))
    events = await read(call, count)
    call.cancel()
    await until_left(served)
    return events


# --- what is resumed -----------------------------------------------------------------------------------------------


async def test_a_stream_goes_on_where_its_connection_broke_and_is_counted_once():
    paced = Paced()
    async with serving_with_sink(paced) as (served, sink):
        paced.release(3)
        first = await broken_after(served, 3)
        paced.release()
        # What was made meanwhile, without anybody reading.
        await until(lambda: paced.made == len(LETTERS))
        assert sink.records == []
        rest = await rest_of(served.generation.GenerateStream(request(after=2)))
        await until(lambda: bool(sink.records))
        text = served.metrics_text()
        assert len(served.application.calls) == 1
    assert text_of(first) == "abc"
    assert text_of(rest) == "cdef"
    assert [event.sequence for event in rest] == [3, 4, 5, 6, 7, 8]
    assert [event.WhichOneof("event") for event in rest[-2:]] == ["finish", "end"]
    usage = rest[-1].end.usage
    assert (usage.output_tokens, usage.sent_output_tokens) == (6, 6)
    assert len(rest[-1].end.attempts) == 1
    [record] = sink.records
    assert record.error is None
    assert (record.usage.output_tokens, record.usage.sent_output_tokens) == (6, 6)
    assert [attempt.outcome for attempt in record.attempts] == [AttemptOutcome.COMPLETED]
    assert "headrace_resumed_streams_total 1.0" in text
    assert 'gen_ai_usage_tokens_total{model="tiny",type="output"} 6.0' in text
    assert 'gen_ai_server_request_duration_seconds_count{error_type="",model="tiny"} 1.0' in text


async def test_usage_on_the_way_is_what_an_unbroken_stream_would_have_said():
    options = {"response": pb.ResponseOptions(usage_interval=2, echo=True)}
    async with serving_with_sink(says(*LETTERS)) as (served, _):
        unbroken = await rest_of(served.generation.GenerateStream(request(**options)))
    paced = Paced()
    async with serving_with_sink(paced) as (served, _):
        paced.release()
        first = await broken_after(served, 2, **options)
        rest = await rest_of(served.generation.GenerateStream(request(after=2, **options)))
    sent = [event.usage.sent_output_tokens for event in unbroken if event.HasField("usage")]
    assert [event.usage.sent_output_tokens for event in first + rest if event.HasField("usage")] == sent == [2, 4, 6]
    assert first[0].prompt.text == "hello"


async def test_a_stream_that_has_ended_is_repeated_but_not_counted_again():
    async with serving_with_sink(says(*LETTERS)) as (served, sink):
        whole = await rest_of(served.generation.GenerateStream(request()))
        again = await rest_of(served.generation.GenerateStream(request(after=0)))
        tail = await rest_of(served.generation.GenerateStream(request(after=5)))
        nothing = await rest_of(served.generation.GenerateStream(request(after=8)))
        assert len(served.application.calls) == 1
        await until(lambda: bool(sink.records))
    assert again == whole
    assert tail == whole[5:]
    assert nothing == []
    assert len(sink.records) == 1
    assert whole[-1].end.usage.sent_output_tokens == 6


async def test_the_same_request_sent_again_before_the_first_event_attaches():
    paced = Paced()
    async with serving_with_sink(paced) as (served, _):
        lost = served.generation.GenerateStream(request())
        await served.until_running()
        lost.cancel()
        await until_left(served)
        paced.release()
        events = await rest_of(served.generation.GenerateStream(request()))
        assert len(served.application.calls) == 1
    assert text_of(events) == LETTERS


async def test_of_two_connections_the_later_goes_on_and_the_earlier_is_aborted():
    paced = Paced()
    async with serving_with_sink(paced) as (served, sink):
        paced.release(2)
        earlier = served.generation.GenerateStream(request())
        first = await read(earlier, 2)
        later = served.generation.GenerateStream(request(after=2))
        error = await error_of(earlier)
        assert error.code() is grpc.StatusCode.ABORTED
        assert reason_of(error) == "STREAM_ABORTED"
        paced.release()
        rest = await rest_of(later)
        await until(lambda: bool(sink.records))
    assert [event.sequence for event in first + rest] == list(range(1, 9))
    assert sink.records[0].usage.sent_output_tokens == 6


async def test_many_connections_at_once_leave_one_reader_with_everything():
    paced = Paced("x" * 200)
    async with serving_with_sink(paced) as (served, sink):
        paced.release(5)
        await broken_after(served, 5)
        calls = [served.generation.GenerateStream(request(after=5)) for _ in range(20)]
        outcomes = [asyncio.ensure_future(rest_of(call)) for call in calls]
        await until(lambda: sum(outcome.done() for outcome in outcomes) == 19)
        paced.release(200)
        done = await asyncio.gather(*outcomes, return_exceptions=True)
        await until(lambda: bool(sink.records))
    whole = [events for events in done if isinstance(events, list)]
    assert len(whole) == 1
    assert [event.sequence for event in whole[0]] == list(range(6, 203))
    assert all(error.code() is grpc.StatusCode.ABORTED for error in done if not isinstance(error, list))
    assert sink.records[0].usage.sent_output_tokens == 200


async def test_an_error_after_events_is_given_to_whoever_resumes():
    async with serving_with_sink(gives(Delta(0, "a", (1,)), BackendError("it broke"))) as (served, sink):
        assert (await error_of(served.generation.GenerateStream(request()))).code() is grpc.StatusCode.INTERNAL
        again = served.generation.GenerateStream(request(after=1))
        error = await error_of(again)
        assert len(served.application.calls) == 1
        await until(lambda: bool(sink.records))
    assert error.details() == "it broke"
    assert len(sink.records) == 1


async def test_what_fails_before_the_first_event_is_tried_anew():
    async with serving_with_sink(gives(QueueFull("full", retry_after=0.01))) as (served, _):
        for _ in range(2):
            error = await error_of(served.generation.GenerateStream(request()))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(served.application.calls) == 2
        assert len(streams_of(served)) == 0


async def test_a_reader_that_does_not_read_holds_its_handler_back():
    made = 0

    async def handler(call: Call) -> Events:
        nonlocal made
        begin(call)
        while made < 100:
            made += 1
            yield Delta(0, "x" * 100_000, (1,))
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

    async with serving_with_sink(handler) as (served, _):
        call = served.generation.GenerateStream(request())
        await call.read()
        await asyncio.sleep(0.3)
        held_at = made
        await asyncio.sleep(0.1)
        assert made == held_at < 100
        assert (await rest_of(call))[-1].HasField("end")
    assert made == 100


# --- what is not ---------------------------------------------------------------------------------------------------


async def test_a_stream_that_nobody_resumes_is_cancelled_and_settled():
    paced = Paced()
    async with serving_with_sink(paced, resume_window=0.05) as (served, sink):
        paced.release(3)
        with capture_logs() as logs:
            await broken_after(served, 2)
            await until(lambda: bool(sink.records))
        assert len(streams_of(served)) == streams_of(served).kept_bytes == 0
        assert await served.server._calls.wait_idle(5)
        error = await error_of(served.generation.GenerateStream(request(after=2)))
        assert 'error_type="CANCELLED",model="tiny"} 1.0' in served.metrics_text()
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert reason_of(error) == "STREAM_NOT_FOUND"
    [record] = sink.records
    assert record.error == "Cancelled"
    assert (record.usage.output_tokens, record.attempts[0].outcome) == (3, AttemptOutcome.CANCELLED)
    assert [log["event"] for log in logs if log["event"] == "stream_not_resumed"] == ["stream_not_resumed"]


@pytest.mark.parametrize("sent", [2, 3])
async def test_what_was_sent_is_what_a_transport_got(sent):
    paced = Paced()
    async with serving_with_sink(paced, resume_window=0.2) as (served, sink):
        paced.release(sent)
        await broken_after(served, sent)
        paced.release()
        await until(lambda: bool(sink.records))
    assert (sink.records[0].usage.output_tokens, sink.records[0].usage.sent_output_tokens) == (6, sent)


async def test_a_stream_that_did_not_ask_for_it_ends_with_its_connection():
    paced = Paced()
    async with serving_with_sink(paced) as (served, sink):
        paced.release(1)
        call = served.generation.GenerateStream(request(after=None))
        await call.read()
        call.cancel()
        await until(lambda: bool(sink.records))
        assert len(streams_of(served)) == 0
    assert sink.records[0].error == "Cancelled"


async def test_another_tenants_stream_is_unknown():
    paced = Paced()
    async with serving_with_sink(paced) as (served, _):
        paced.release(2)
        await broken_after(served, 2)
        other = (("tenant", "other"),)
        error = await error_of(served.generation.GenerateStream(request(after=2), metadata=other))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "STREAM_NOT_FOUND")
        await served.generation.CancelStream(pb.CancelStreamRequest(request_id="stream"), metadata=other)
        assert len(streams_of(served)) == 1
        paced.release()
        mine = served.generation.GenerateStream(request(), metadata=other)
        assert text_of(await rest_of(mine)) == LETTERS


@pytest.mark.parametrize(
    "other",
    [{"text": "something else"}, {"n": 2}, {"sampling": pb.SamplingOptions(top_k=3)}, {"idempotency_key": "k"}],
    ids=lambda fields: next(iter(fields)),
)
async def test_another_request_under_the_same_id_is_refused_by_the_field(other):
    paced = Paced()
    async with serving_with_sink(paced) as (served, _):
        paced.release(2)
        await broken_after(served, 2)
        for after in (0, 2):
            error = await error_of(served.generation.GenerateStream(request(after=after, **other)))
            assert field_of(error) == "spec.request_id"
        assert len(served.application.calls) == 1


async def test_an_event_that_is_not_there_is_refused_by_the_field():
    paced = Paced()
    async with serving_with_sink(paced) as (served, _):
        paced.release(2)
        await broken_after(served, 2)
        error = await error_of(served.generation.GenerateStream(request(after=3)))
        assert field_of(error) == "resume_after_sequence"
        assert "at most 2" in error.details()
        paced.release()
        assert len(await rest_of(served.generation.GenerateStream(request(after=2)))) == 6
        error = await error_of(served.generation.GenerateStream(request(after=9)))
        assert field_of(error) == "resume_after_sequence"


async def test_a_stream_without_a_request_id_cannot_be_resumable():
    async with serving_with_sink(says("a")) as (served, _):
        unnamed = pb.GenerateStreamRequest(spec=spec(), resume_after_sequence=0)
        assert field_of(await error_of(served.generation.GenerateStream(unnamed))) == "spec.request_id"
        assert served.application.calls == []


async def test_a_server_without_a_window_serves_streams_and_resumes_none():
    async with serving_with_sink(says(*LETTERS), resume_window=0) as (served, _):
        assert text_of(await rest_of(served.generation.GenerateStream(request()))) == LETTERS
        error = await error_of(served.generation.GenerateStream(request(after=2)))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert len(streams_of(served)) == 0


# --- cancels, deadlines, stops -------------------------------------------------------------------------------------


async def test_cancel_stream_ends_a_stream_at_once_and_answers_when_it_is_settled():
    paced = Paced()
    async with serving_with_sink(paced) as (served, sink):
        paced.release(2)
        await broken_after(served, 2)
        await served.generation.CancelStream(pb.CancelStreamRequest(request_id="stream"))
        assert served.application.num_running == 0
        assert len(streams_of(served)) == streams_of(served).kept_bytes == 0
        await until(lambda: bool(sink.records))
        await served.generation.CancelStream(pb.CancelStreamRequest(request_id="stream"))  # OK: nothing to do
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.CancelStream(pb.CancelStreamRequest())
        assert field_of(caught.value) == "request_id"
    assert sink.records[0].error == "Cancelled"


async def test_whoever_reads_a_stream_that_another_cancels_hears_of_it():
    paced = Paced()
    async with serving_with_sink(paced) as (served, _):
        paced.release(1)
        call = served.generation.GenerateStream(request())
        await call.read()
        await served.generation.CancelStream(pb.CancelStreamRequest(request_id="stream"))
        error = await error_of(call)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.ABORTED, "STREAM_ABORTED")


async def test_a_deadline_that_passes_ends_the_stream():
    paced = Paced()
    async with serving_with_sink(paced) as (served, sink):
        paced.release(1)
        error = await error_of(served.generation.GenerateStream(request(), timeout=0.3))
        await until(lambda: bool(sink.records))
        assert len(streams_of(served)) == 0
        assert 'error_type="DEADLINE_EXCEEDED"' in served.metrics_text()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_deadline_is_that_of_the_connection_that_reads():
    paced = Paced()
    async with serving_with_sink(paced) as (served, _):
        paced.release(1)
        first = served.generation.GenerateStream(request(), timeout=60)
        await first.read()
        [call] = served.application.calls
        assert call.deadline is not None
        first.cancel()
        await until_left(served)
        call.run = dataclasses.replace(call)  # as the response cache has it
        second = served.generation.GenerateStream(request(after=0))
        await second.read()
        assert call.deadline is None
        assert call.run.deadline is None
        second.cancel()


async def test_a_stop_cancels_what_nobody_reads_and_lets_the_others_end():
    paced, other = Paced(), Paced()

    async def handler(call: Call) -> Events:
        chosen = paced if call.request_id == "stream" else other
        async for event in chosen(call):
            yield event

    async with serving_with_sink(handler) as (served, sink):
        paced.release(1)
        await broken_after(served, 1)
        other.release(1)
        reading = served.generation.GenerateStream(request(request_id="other"))
        await reading.read()
        stopping = asyncio.create_task(served.server.stop(10))
        await until(lambda: bool(sink.records))
        assert sink.records[0].request_id == "stream"
        assert not stopping.done()
        other.release()
        assert (await rest_of(reading))[-1].HasField("end")
        async with asyncio.timeout(5):
            await stopping
        assert len(streams_of(served)) == streams_of(served).kept_bytes == 0


# --- bounds --------------------------------------------------------------------------------------------------------


async def test_kept_messages_are_bounded_and_the_oldest_go_first():
    size = 1000 + MESSAGE_OVERHEAD_BYTES
    most = STREAM_OVERHEAD_BYTES * 3 + 10 * size
    async with serving_with_sink(says(*["x" * 1000] * 20), resume_max_bytes=most) as (served, _):
        streams = streams_of(served)
        for number in range(5):
            async for _ in served.generation.GenerateStream(request(request_id=f"s{number}")):
                assert streams.kept_bytes <= most
        assert 0 < streams.kept_bytes <= most
        assert len(streams) < 5
        oldest = await error_of(served.generation.GenerateStream(request(after=1, request_id="s0")))
        assert oldest.code() is grpc.StatusCode.NOT_FOUND
        dropped = await error_of(served.generation.GenerateStream(request(after=1, request_id="s4")))
        assert reason_of(dropped) == "STREAM_NOT_FOUND"
        assert len(await rest_of(served.generation.GenerateStream(request(after=18, request_id="s4")))) == 4


async def test_a_stream_that_has_lost_what_nobody_was_sent_is_cancelled():
    paced = Paced("x" * 100)
    most = STREAM_OVERHEAD_BYTES + 20 * (MESSAGE_OVERHEAD_BYTES + 20)
    async with serving_with_sink(paced, resume_max_bytes=most) as (served, sink):
        paced.release(2)
        await broken_after(served, 2)
        paced.release(98)
        await until(lambda: bool(sink.records))
        assert len(streams_of(served)) == streams_of(served).kept_bytes == 0
    assert sink.records[0].error == "Cancelled"
    assert paced.made < 50


@pytest.mark.parametrize("most", [0, 1])
async def test_a_stream_that_is_read_needs_nothing_kept(most):
    async with serving_with_sink(says(*["x" * 5000] * 50), resume_max_bytes=most) as (served, _):
        calls = [served.generation.GenerateStream(request(request_id=str(number))) for number in range(8)]
        for events in await asyncio.gather(*map(rest_of, calls)):
            assert [event.sequence for event in events] == list(range(1, 53))


async def test_the_prompt_is_not_kept_with_a_stream_that_has_ended():
    async with serving_with_sink(says("a")) as (served, _):
        await rest_of(served.generation.GenerateStream(request(text="p" * 1_000_000)))
        [stream] = streams_of(served)._streams.values()
        await until(lambda: stream.done)
    assert stream.call.prompt is None
    assert not stream.call.request.options


# --- real connections ----------------------------------------------------------------------------------------------


async def test_a_connection_that_is_cut_is_resumed_over_another():
    paced = Paced()
    async with (
        serving_with_sink(paced) as (served, sink),
        CuttingProxy(served.server.port) as proxy,
        grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        paced.release(3)
        call = stub.GenerateStream(request())
        first = await read(call, 3)
        proxy.cut_all()
        error = await error_of(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await until_left(served)
        paced.release()
        rest = await rest_of(stub.GenerateStream(request(after=3)))
        await until(lambda: bool(sink.records))
        assert proxy.num_cuts == 1
    assert text_of(first + rest) == LETTERS
    assert sink.records[0].usage.sent_output_tokens == 6
