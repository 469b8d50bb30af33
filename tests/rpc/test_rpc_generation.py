import asyncio
import json
import logging

import grpc
import pytest
from rpc_kit import (
    GENERATE,
    GENERATE_BATCH,
    GENERATE_STREAM,
    TinyModel,
    begin,
    details_of,
    says,
    serving,
    spec,
    status_of,
    trailers_of,
    waits,
)
from structlog.testing import capture_logs

from headrace.backends.errors import QueueFull
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.types import Call, Events
from headrace.server.rpc.calls import REQUEST_ID_KEY
from headrace.v1 import generation_pb2 as pb


def stream_request(**fields) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(spec=spec(**fields))


async def test_generate_answers_with_every_choice_by_index():
    async with serving(says("a", "b")) as served:
        response = await served.generation.Generate(
            pb.GenerateRequest(spec=spec(n=3, request_id="mine", response=pb.ResponseOptions(token_ids=True)))
        )
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert {choice.text for choice in response.choices} == {"ab"}
    assert list(response.choices[2].token_ids) == [0, 1]
    assert response.choices[1].finish == pb.ChoiceFinish(choice_index=1, reason=pb.FINISH_REASON_EOS_TOKEN, seed=7)
    assert response.request_id == response.report.request_id == "mine"
    assert response.report.usage.output_tokens == response.report.usage.sent_output_tokens == 6
    assert not response.HasField("prompt")


async def test_generate_gives_the_prompt_back_if_asked_to():
    async with serving(says("a")) as served:
        echo = pb.ResponseOptions(echo=True, token_ids=True)
        response = await served.generation.Generate(pb.GenerateRequest(spec=spec("hi", response=echo)))
    assert response.prompt == pb.Prompt(text="hi", token_ids=b"hi")


async def test_a_stream_counts_its_events_from_one_and_ends_with_the_report():
    async with serving(says("a", "b", "c")) as served:
        events = [event async for event in served.generation.GenerateStream(stream_request())]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert [event.WhichOneof("event") for event in events] == ["delta", "delta", "delta", "finish", "end"]
    assert "".join(event.delta.text for event in events) == "abc"
    assert not any(event.delta.token_ids for event in events)
    report = events[-1].end
    assert report.usage.sent_output_tokens == report.usage.output_tokens == 3
    assert report.timings.decode.ToMilliseconds() == 1500


async def test_a_stream_begins_with_the_prompt_if_asked_to():
    async with serving(says("a")) as served:
        request = stream_request(text="hi", response=pb.ResponseOptions(echo=True))
        events = [event async for event in served.generation.GenerateStream(request)]
    assert events[0].prompt == pb.Prompt(text="hi")
    assert [event.sequence for event in events] == [1, 2, 3, 4]


async def test_usage_comes_every_so_many_output_tokens():
    async with serving(says(*"abcde")) as served:
        request = stream_request(response=pb.ResponseOptions(usage_interval=2))
        events = [event async for event in served.generation.GenerateStream(request)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["delta", "delta", "usage", "delta", "delta", "usage", "delta", "finish", "end"]
    assert [event.usage.sent_output_tokens for event in events if event.HasField("usage")] == [2, 4]


async def test_a_usage_interval_is_refused_where_there_is_no_stream():
    async with serving(says("a")) as served:
        request = pb.GenerateRequest(spec=spec(response=pb.ResponseOptions(usage_interval=2)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(request)
    [violation] = details_of(status_of(caught.value))["BadRequest"].field_violations
    assert violation.field == "spec.response.usage_interval"


async def test_what_the_middleware_does_after_the_end_is_done_before_the_report():
    async def handler(call: Call) -> Events:
        attempt = begin(call)
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()
        attempt.usage.cache_read_input_tokens = 4

    async with serving(handler) as served:
        response = await served.generation.Generate(pb.GenerateRequest(spec=spec()))
        events = [event async for event in served.generation.GenerateStream(stream_request())]
    assert response.report.usage.cache_read_input_tokens == 4
    assert events[-1].end.usage.cache_read_input_tokens == 4


async def test_no_headers_come_before_the_first_event():
    release = asyncio.Event()
    async with serving(waits(release)) as served:
        call = served.generation.GenerateStream(stream_request())
        headers = asyncio.ensure_future(call.initial_metadata())
        done, _ = await asyncio.wait({headers}, timeout=0.2)
        assert served.application.num_running == 1
        assert not done
        release.set()
        await headers
        events = [event async for event in call]
    assert events[0].delta.text == "late"


async def test_a_retry_policy_covers_everything_up_to_the_first_event():
    attempts = []

    async def handler(call: Call) -> Events:
        attempts.append(call)
        begin(call)
        if len(attempts) < 3:
            raise QueueFull("full", retry_after=0.01)
        yield Delta(0, "x", (1,))
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }
    config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
    async with serving(handler, channel_options=[("grpc.service_config", json.dumps(config))]) as served:
        events = [event async for event in served.generation.GenerateStream(stream_request())]
    assert events[0].delta.text == "x"
    assert len(attempts) == 3


@pytest.mark.parametrize("text", ["x", "x" * 1_000_000], ids=["while waiting", "during a blocked write"])
async def test_a_cancel_closes_the_handler_and_lets_it_clean_up(text, caplog):
    cleaned_up = asyncio.Event()

    async def handler(call: Call) -> Events:
        begin(call)
        try:
            yield Delta(0, text, (1,))
            if len(text) > 1:
                while True:
                    yield Delta(0, text, (1,))
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            cleaned_up.set()

    options = [("grpc.max_receive_message_length", -1)]
    async with serving(handler, channel_options=options) as served:
        with caplog.at_level(logging.ERROR), capture_logs() as logs:
            call = served.generation.GenerateStream(stream_request())
            await call.read()
            await asyncio.sleep(0.1)
            call.cancel()
            async with asyncio.timeout(5):
                await cleaned_up.wait()
                await served.application.closed.wait()
            assert await served.server._calls.wait_idle(5)
    [log] = [log for log in logs if log["event"] == "call_finished"]
    assert log["code"] == "CANCELLED"
    assert caplog.records == []


async def test_a_deadline_reaches_the_handler_and_ends_it():
    async with serving(waits(asyncio.Event())) as served:
        with capture_logs() as logs:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.generation.Generate(pb.GenerateRequest(spec=spec()), timeout=0.2)
            async with asyncio.timeout(5):
                await served.application.closed.wait()
            assert await served.server._calls.wait_idle(5)
        [call] = served.application.calls
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert call.deadline is not None
    assert 0.05 < call.deadline - call.arrived < 0.4
    assert [log["code"] for log in logs if log["event"] == "call_finished"] == ["DEADLINE_EXCEEDED"]


async def test_a_call_without_a_deadline_has_none():
    async with serving(says("a")) as served:
        await served.generation.Generate(pb.GenerateRequest(spec=spec()))
        assert served.application.calls[0].deadline is None


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

    async with serving(handler) as served:
        call = aiter(served.generation.GenerateStream(stream_request()))
        await anext(call)
        await asyncio.sleep(0.3)
        held_at = made
        await asyncio.sleep(0.1)
        assert made == held_at < 100
        assert served.application.calls[0].meter.sent_output_tokens < held_at + 1
        events = [event async for event in call]
    assert events[-1].WhichOneof("event") == "end"
    assert made == 100


@pytest.mark.parametrize("method", [GENERATE, GENERATE_STREAM])
@pytest.mark.parametrize(
    "raw",
    [
        pb.GenerateRequest(spec=spec("XXXX")).SerializeToString().replace(b"XXXX", b"\xff\xfe\xff\xfe"),
        b"\xff\xff\xff garbage",
    ],
    ids=["not UTF-8", "garbage"],
)
async def test_bytes_that_are_no_request_are_an_invalid_argument(method, raw):
    async with serving(says("a")) as served:
        make = served.channel.unary_unary if method == GENERATE else served.channel.unary_stream
        call = make(method)(raw)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "strings must be UTF-8" in await call.details()
        assert REQUEST_ID_KEY in dict(await call.trailing_metadata())
        assert served.application.calls == []


async def test_a_large_request_is_converted_off_the_event_loop():
    part = pb.ContentPart(text="x")
    messages = [pb.ChatMessage(role=pb.ROLE_USER, content=[part])] * 4000
    async with serving(says("a")) as served:
        await served.generation.Generate(pb.GenerateRequest(spec=spec()))
        assert served.application.num_blocking == 0
        chat = pb.GenerationSpec(chat=pb.ChatInput(messages=messages))
        await served.generation.Generate(pb.GenerateRequest(spec=chat))
        assert served.application.num_blocking == 1
        [_, call] = served.application.calls
    assert len(call.request.input.messages) == 4000


async def test_the_request_id_is_in_the_trailer_of_every_call():
    async with serving(says("a")) as served:
        labelled = served.generation.Generate(pb.GenerateRequest(spec=spec(request_id="mine")))
        response = await labelled
        assert response.request_id == dict(await labelled.trailing_metadata())[REQUEST_ID_KEY] == "mine"
        nameless = served.generation.GenerateStream(stream_request())
        events = [event async for event in nameless]
        made = dict(await nameless.trailing_metadata())[REQUEST_ID_KEY]
        assert events[-1].end.request_id == made
        assert len(made) == 32


async def test_a_bad_request_id_is_refused_under_one_of_ours():
    async with serving(says("a")) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=spec(request_id="naïve")))
    details = details_of(status_of(caught.value))
    assert details["BadRequest"].field_violations[0].field == "spec.request_id"
    assert details["RequestInfo"].request_id == trailers_of(caught.value)[REQUEST_ID_KEY] != "naïve"


async def test_an_error_of_conversion_carries_the_callers_label():
    async with serving(says("a")) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(request_id="mine")))
    assert trailers_of(caught.value)[REQUEST_ID_KEY] == "mine"


async def test_text_metadata_reaches_the_call_and_repeated_keys_are_joined():
    async with serving(says("a")) as served:
        metadata = (("tenant", "a"), ("tenant", "b"), ("thing-bin", b"\x00\xff"))
        await served.generation.Generate(pb.GenerateRequest(spec=spec()), metadata=metadata)
        [call] = served.application.calls
    assert call.credentials.metadata["tenant"] == "a,b"
    assert "thing-bin" not in call.credentials.metadata
    assert all(isinstance(value, str) and key == key.lower() for key, value in call.credentials.metadata.items())


async def test_a_finished_call_is_one_log_line_without_text_or_metadata():
    async with serving(says("pong")) as served:
        with capture_logs() as logs:
            await served.generation.Generate(
                pb.GenerateRequest(spec=spec("ping", request_id="mine")), metadata=(("authorization", "Bearer key"),)
            )
            assert await served.server._calls.wait_idle(5)
    [log] = logs
    assert log["log_level"] == "info"
    assert (log["method"], log["code"]) == (GENERATE[1:], "OK")
    assert (log["model"], log["input_tokens"], log["output_tokens"]) == (TinyModel().card.name, 4, 1)
    for secret in ("ping", "pong", "Bearer"):
        assert secret not in repr(log)


async def test_the_request_id_is_bound_to_every_log_line_of_the_call():
    from structlog import get_logger
    from structlog.contextvars import get_contextvars, merge_contextvars

    bound = []

    async def handler(call: Call) -> Events:
        begin(call)
        bound.append(get_contextvars())
        get_logger().info("within")
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

    async with serving(handler) as served:
        with capture_logs(processors=[merge_contextvars]) as log:
            await served.generation.Generate(pb.GenerateRequest(spec=spec(request_id="first")))
            await served.generation.Generate(pb.GenerateRequest(spec=spec()))
    assert bound[0] == {"request_id": "first"}
    assert bound[1]["request_id"] != "first"
    events = [entry["event"] for entry in log if entry["request_id"] == "first"]
    assert events == ["within", "call_finished"]


async def test_a_method_that_does_not_exist_is_unimplemented():
    async with serving(says("a")) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.channel.unary_unary(GENERATE_BATCH + "es")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
