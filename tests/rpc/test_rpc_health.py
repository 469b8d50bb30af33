import asyncio

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from rpc_kit import says, serving

from headrace.server.rpc.health import model_service
from headrace.server.rpc.server import SERVICES

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_the_server_and_each_of_its_services_are_serving():
    async with serving(says()) as served:
        stub = health_pb2_grpc.HealthStub(served.channel)
        for service in ("", *SERVICES):
            response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert response.status == SERVING
    assert SERVICES == (
        "headrace.v1.GenerationService",
        "headrace.v1.ScoringService",
        "headrace.v1.TokenizationService",
        "headrace.v1.ModelService",
        "headrace.v1.UsageService",
    )


async def test_a_model_is_known_once_its_state_is_set():
    async with serving(says()) as served:
        stub = health_pb2_grpc.HealthStub(served.channel)
        request = health_pb2.HealthCheckRequest(service="headrace.model/tiny")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        served.server.health.set_model_serving("tiny", serving=True)
        assert (await stub.Check(request)).status == SERVING
        served.server.health.set_model_serving("tiny", serving=False)
        assert (await stub.Check(request)).status == NOT_SERVING


async def test_every_watcher_sees_every_change_after_another_has_left():
    async with serving(says()) as served:
        stub = health_pb2_grpc.HealthStub(served.channel)
        request = health_pb2.HealthCheckRequest(service=model_service("tiny"))
        leaver, stayer = stub.Watch(request), stub.Watch(request)
        assert (await leaver.read()).status == (await stayer.read()).status == SERVICE_UNKNOWN
        leaver.cancel()
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            served.server.health.set_model_serving("tiny", serving=True)
            assert (await stayer.read()).status == SERVING
            await served.server.stop(0)
            assert (await stayer.read()).status == NOT_SERVING
            assert await stayer.read() is grpc.aio.EOF


async def test_nothing_is_serving_again_after_a_stop():
    async with serving(says()) as served:
        await served.server.stop(0)
        served.server.health.set_model_serving("tiny", serving=True)
        assert set(served.server.health._statuses.values()) == {NOT_SERVING}


async def test_reflection_describes_every_service():
    async with serving(says()) as served:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="headrace.v1.GenerationService"),
        ]
        listed, described = [response async for response in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= names
    files = map(descriptor_pb2.FileDescriptorProto.FromString, described.file_descriptor_response.file_descriptor_proto)
    assert "headrace/v1/generation.proto" in {file.name for file in files}
