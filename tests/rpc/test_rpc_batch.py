import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rpc_kit import GENERATE_BATCH, Served, begin, details_of, says, serving, spec, status_of
from structlog.testing import capture_logs

from headrace.backends.errors import BackendError, DeadlineExceeded, QueueFull, QueueTimeout, Unauthenticated
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.requests import LatencyClass, TextInput
from headrace.backends.types import Call, Events
from headrace.server.rpc.batch import SeenIndices
from headrace.v1 import generation_pb2 as pb


def item(index: int, text: str = "hello", **fields) -> pb.GenerateBatchRequest:
    return pb.GenerateBatchRequest(index=index, spec=spec(text, **fields))


async def answers(served: Served, items: Iterable[pb.GenerateBatchRequest]) -> dict[int, pb.GenerateBatchResponse]:
    async def requests() -> AsyncIterator[pb.GenerateBatchRequest]:
        for request in items:
            yield request

    return {response.index: response async for response in served.generation.GenerateBatch(requests())}


async def says_the_prompt(call: Call) -> Events:
    attempt = begin(call)
    attempt.usage.output_tokens = 1
    assert isinstance(call.request.input, TextInput)
    yield Delta(0, call.request.input.text, (1,))
    yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
    yield StreamEnd()


@pytest.mark.parametrize("max_batch_in_flight", [1, 7, 64])
async def test_a_long_batch_gets_every_answer_and_runs_no_more_at_once_than_it_may(max_batch_in_flight):
    num_items = 1000 if max_batch_in_flight == 64 else 50
    async with serving(says_the_prompt, max_batch_in_flight=max_batch_in_flight) as served:
        responses = await answers(served, (item(i, f"text {i}") for i in range(num_items)))
        assert served.application.most_running <= max_batch_in_flight
    assert responses.keys() == set(range(num_items))
    for i, response in responses.items():
        assert response.result.choices[0].text == f"text {i}"
        assert response.usage == response.result.report.usage
        assert response.usage.sent_output_tokens == 1


async def test_an_empty_batch_ends_well():
    async with serving(says("a")) as served:
        assert await answers(served, []) == {}


async def test_answers_come_in_the_order_of_completion():
    first_may_end = asyncio.Event()

    async def handler(call: Call) -> Events:
        if call.request.input == TextInput("first"):
            await first_may_end.wait()
        async for event in says_the_prompt(call):
            yield event

    async with serving(handler) as served:
        call = served.generation.GenerateBatch()
        await call.write(item(1, "first"))
        await call.write(item(2, "second"))
        assert (await call.read()).index == 2
        first_may_end.set()
        assert (await call.read()).index == 1
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_no_item_is_read_before_there_is_room_for_it():
    release = asyncio.Event()

    async def handler(call: Call) -> Events:
        begin(call)
        await release.wait()
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

    async with serving(handler, max_batch_in_flight=3) as served:
        task = asyncio.create_task(answers(served, (item(i) for i in range(20))))
        await asyncio.sleep(0.2)
        assert len(served.application.calls) == 3
        release.set()
        assert len(await task) == 20


async def test_a_failed_item_is_answered_with_details_and_usage_and_the_others_go_on():
    async def handler(call: Call) -> Events:
        begin(call).usage.output_tokens = 2
        if call.request.input == TextInput("bad"):
            raise BackendError("it broke")
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

    async with serving(handler) as served:
        responses = await answers(
            served, [item(0), item(1, "bad", request_id="mine"), item(2, sampling=pb.SamplingOptions(top_p=3)), item(4)]
        )
    assert [responses[i].WhichOneof("outcome") for i in (0, 1, 2, 4)] == ["result", "error", "error", "result"]
    broke = responses[1]
    assert (broke.error.code, broke.error.message) == (grpc.StatusCode.INTERNAL.value[0], "it broke")
    assert details_of(broke.error)["RequestInfo"].request_id == "mine"
    assert (broke.usage.input_tokens, broke.usage.output_tokens) == (3, 2)
    [violation] = details_of(responses[2].error)["BadRequest"].field_violations
    assert violation.field == "spec.sampling.top_p"


async def test_an_index_used_twice_fails_the_second_item():
    async with serving(says("a")) as served:
        call = served.generation.GenerateBatch()
        outcomes = []
        for _ in range(2):
            await call.write(item(7))
            outcomes.append(await call.read())
        await call.done_writing()
    assert [outcome.index for outcome in outcomes] == [7, 7]
    assert outcomes[0].HasField("result")
    [violation] = details_of(outcomes[1].error)["BadRequest"].field_violations
    assert violation.field == "index"


@pytest.mark.parametrize(
    ("raw", "index"),
    [
        (item(9, "XXXX").SerializeToString().replace(b"XXXX", b"\xff\xfe\xff\xfe"), 9),
        (item(0, "XXXX").SerializeToString().replace(b"XXXX", b"\xff\xfe\xff\xfe"), 0),
        (b"\xff\xff\xff garbage", 0),
    ],
    ids=["not UTF-8", "not UTF-8, index 0", "garbage"],
)
async def test_bytes_that_are_no_item_are_answered_and_do_not_end_the_stream(raw, index):
    async with serving(says("a")) as served:
        call = served.channel.stream_stream(GENERATE_BATCH)()
        await call.write(raw)
        broken = pb.GenerateBatchResponse.FromString(await call.read())
        await call.write(item(9).SerializeToString())
        whole = pb.GenerateBatchResponse.FromString(await call.read())
        await call.done_writing()
    assert broken.index == index
    assert broken.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert whole.HasField("result")


@pytest.mark.parametrize("error", [QueueFull("full", retry_after=0.01), QueueTimeout("waited", retry_after=0)])
async def test_an_item_that_finds_no_room_is_tried_again(error):
    async def handler(call: Call) -> Events:
        begin(call)
        if len(call.meter.attempts) < 4:
            raise error
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

    async with serving(handler) as served:
        [response] = (await answers(served, [item(1)])).values()
        assert 'gen_ai_server_request_duration_seconds_count{error_type="",model="tiny"} 1.0' in served.metrics_text()
    assert response.HasField("result")
    assert len(response.result.report.attempts) == 4


async def test_a_queue_timeout_that_the_item_asked_for_is_its_answer():
    async def handler(call: Call) -> Events:
        begin(call)
        raise QueueTimeout("waited", retry_after=0)
        yield

    request = item(1)
    request.spec.scheduling.queue_timeout.seconds = 1
    async with serving(handler) as served:
        [response] = (await answers(served, [request])).values()
    assert response.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert "RetryInfo" in details_of(response.error)


async def test_nothing_is_tried_again_after_the_first_token():
    async def handler(call: Call) -> Events:
        begin(call)
        call.meter.first_token = call.arrived
        yield Delta(0, "x", (1,))
        raise QueueFull("evicted", retry_after=0)

    async with serving(handler) as served:
        [response] = (await answers(served, [item(1)])).values()
        assert len(served.application.calls) == 1
    assert response.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


async def test_a_deadline_of_one_item_is_its_answer():
    async def handler(call: Call) -> Events:
        begin(call)
        raise DeadlineExceeded("time limit")
        yield

    async with serving(handler) as served:
        [response] = (await answers(served, [item(1)])).values()
    assert response.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_items_are_of_class_batch_unless_they_say_otherwise():
    async with serving(says("a"), max_batch_in_flight=1) as served:
        voice = pb.SchedulingOptions(latency_class=pb.LATENCY_CLASS_VOICE)
        await answers(served, [item(1), item(2, scheduling=voice)])
        classes = [call.request.scheduling.latency_class for call in served.application.calls]
    assert classes == [LatencyClass.BATCH, LatencyClass.VOICE]


async def test_a_cancel_of_the_stream_cancels_every_item():
    closed = 0

    async def handler(call: Call) -> Events:
        nonlocal closed
        begin(call)
        try:
            await asyncio.Event().wait()
            yield StreamEnd()
        finally:
            await asyncio.sleep(0.01)
            closed += 1

    async with serving(handler) as served:
        call = served.generation.GenerateBatch()
        for i in range(5):
            await call.write(item(i))
        await served.until_running(5)
        call.cancel()
        assert await served.server._calls.wait_idle(5)
        assert closed == 5


async def test_without_credentials_the_stream_fails_as_a_whole():
    async with serving(says("a")) as served:
        served.application.front_error = Unauthenticated("no credentials")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answers(served, [item(1)])
        assert served.application.calls == []
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "RequestInfo" in details_of(status_of(caught.value))


async def test_each_item_is_a_log_line_under_its_own_request_id():
    async with serving(says("a")) as served:
        with capture_logs() as logs:
            await answers(served, [item(1, "secret", request_id="one"), item(2, "secret", n=0)])
            assert await served.server._calls.wait_idle(5)
    items = {log["index"]: log for log in logs if log["event"] == "batch_item_finished"}
    assert {index: log["code"] for index, log in items.items()} == {1: "OK", 2: "INVALID_ARGUMENT"}
    [stream] = [log for log in logs if log["event"] == "call_finished"]
    assert stream["items"] == {"OK": 1, "INVALID_ARGUMENT": 1}
    assert "secret" not in repr(logs)


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3000)))
def test_seen_indices_are_a_set(indices):
    ours, reference = SeenIndices(), set()
    for index in indices:
        assert ours.add(index) == (index not in reference)
        reference.add(index)


def test_seen_indices_of_a_long_run_take_little_room():
    indices = SeenIndices()
    assert all(map(indices.add, range(100_000)))
    assert len(indices._pages) == 98
