import asyncio

import grpc
import pytest
from prometheus_client import CollectorRegistry
from rpc_kit import (
    TinyApplication,
    begin,
    details_of,
    says,
    serving,
    spec,
    status_of,
    trailers_of,
    waits,
)

from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.types import Call, Events
from headrace.server.metrics import Metrics
from headrace.server.rpc import server as server_module
from headrace.server.rpc.server import start_server
from headrace.v1 import generation_pb2 as pb


async def test_a_port_in_use_is_an_error_that_names_it():
    async with serving(says()) as served:
        address = f"127.0.0.1:{served.server.port}"
        with pytest.raises(OSError, match=f"cannot listen on {address}"):
            await start_server(TinyApplication(says()), address=address, metrics=Metrics(CollectorRegistry()))


async def test_servers_share_a_port_if_asked_to():
    async with serving(says("a"), reuse_port=True) as served:
        address = f"127.0.0.1:{served.server.port}"
        metrics = Metrics(CollectorRegistry())
        second = await start_server(TinyApplication(says("a")), address=address, metrics=metrics, reuse_port=True)
        assert second.port == served.server.port
        await second.stop(0)


async def test_a_message_over_the_limit_is_resource_exhausted():
    async with serving(says("a"), max_message_bytes=10_000) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=spec("x" * 10_000)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert served.application.calls == []
        await served.generation.Generate(pb.GenerateRequest(spec=spec("x" * 9_000)))


async def test_a_message_over_the_limit_ends_a_batch():
    async with serving(waits(asyncio.Event()), max_message_bytes=10_000) as served:
        call = served.generation.GenerateBatch()
        await call.write(pb.GenerateBatchRequest(index=1, spec=spec()))
        await served.until_running()
        await call.write(pb.GenerateBatchRequest(index=2, spec=spec("x" * 10_000)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await served.server._calls.wait_idle(5)


async def test_a_draining_application_refuses_calls_with_a_delay_to_retry():
    async with serving(says("a")) as served:
        served.application.draining = True
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=spec()))
        assert served.application.calls == []
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    details = details_of(status_of(caught.value))
    assert details["ErrorInfo"].reason == "DRAINING"
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1000
    assert trailers_of(caught.value)["grpc-retry-pushback-ms"] == "1000"


async def test_a_stop_lets_running_calls_end_and_refuses_new_ones():
    release = asyncio.Event()
    async with serving(waits(release)) as served:
        running = served.generation.Generate(pb.GenerateRequest(spec=spec()))
        answered = asyncio.ensure_future(running.code())
        await served.until_running()
        stopping = asyncio.create_task(served.server.stop(grace=10))
        await asyncio.sleep(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=spec()))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not stopping.done()
        release.set()
        assert await answered is grpc.StatusCode.OK
        assert (await running).choices[0].text == "late"
        async with asyncio.timeout(5):
            await stopping
        assert len(served.application.calls) == 1


async def test_what_runs_when_the_grace_is_over_is_the_applications_to_end():
    shutdown = asyncio.Event()

    async def handler(call: Call) -> Events:
        begin(call)
        yield Delta(0, "partial", (1,))
        await shutdown.wait()
        yield ChoiceFinish(0, FinishReason.SHUTDOWN)
        yield StreamEnd()

    async def on_grace_over() -> None:
        shutdown.set()

    async with serving(handler) as served:
        call = aiter(served.generation.GenerateStream(pb.GenerateStreamRequest(spec=spec())))
        assert (await anext(call)).delta.text == "partial"
        async with asyncio.timeout(4):
            await served.server.stop(0.05, on_grace_over)
        rest = [event async for event in call]
    assert [event.WhichOneof("event") for event in rest] == ["finish", "end"]
    assert rest[0].finish.reason == pb.FINISH_REASON_SHUTDOWN


async def test_what_does_not_end_is_cancelled_and_has_cleaned_up_when_stop_returns(monkeypatch):
    monkeypatch.setattr(server_module, "END_SECONDS", 0.05)
    cleaned_up = False

    async def handler(call: Call) -> Events:
        nonlocal cleaned_up
        begin(call)
        try:
            await asyncio.Event().wait()
            yield StreamEnd()
        finally:
            await asyncio.sleep(0.1)
            cleaned_up = True

    async with serving(handler) as served:
        call = served.generation.Generate(pb.GenerateRequest(spec=spec()))
        code = asyncio.ensure_future(call.code())
        await served.until_running()
        await served.server.stop(0.05)
        assert cleaned_up
        assert await code is not grpc.StatusCode.OK


async def test_a_health_watcher_does_not_hold_a_stop_up():
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with serving(says()) as served:
        watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(2):
            await served.server.stop(grace=60)


async def test_a_stop_answers_the_batch_items_it_has_and_leaves_the_rest_to_the_caller():
    release = asyncio.Event()
    async with serving(waits(release)) as served:
        call = served.generation.GenerateBatch()
        await call.write(pb.GenerateBatchRequest(index=1, spec=spec()))
        await served.until_running()
        stopping = asyncio.create_task(served.server.stop(grace=10))
        await asyncio.sleep(0.05)
        await call.write(pb.GenerateBatchRequest(index=2, spec=spec()))
        release.set()
        answer = await call.read()
        assert (answer.index, answer.WhichOneof("outcome")) == (1, "result")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(status_of(caught.value))["ErrorInfo"].reason == "DRAINING"
        async with asyncio.timeout(5):
            await stopping
        assert len(served.application.calls) == 1


async def test_a_stop_may_be_repeated():
    async with serving(says("a")) as served:
        await served.server.stop(0)
        await served.server.stop(0)
