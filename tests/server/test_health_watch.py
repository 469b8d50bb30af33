"""A running server notices that a model is unwell, and that it has recovered."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_kit import settings
from test_components import SOURCE

from headrace.server.serve import serve
from tests.plugin_kit import Install

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_what_is_wrong_with_a_model_from_the_start_is_told_to_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    model = {"context_length": 4096}
    provider = {"dialect": "openai", "api_key": "env:NO_SUCH_KEY", "models": {"far": model}}
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    options = settings(
        plugins=("scripted", "remote"),
        backends={"remote": {"providers": {"openai": provider}}},
        listen="127.0.0.1:0",
        metrics_listen=None,
        shutdown_grace=1.0,
    )
    with structlog.testing.capture_logs() as logs:
        server = asyncio.create_task(serve(options, on_ready=ready.set_result))
        async with asyncio.timeout(30):
            await ready
            while not (unhealthy := [line for line in logs if line["event"] == "model_unhealthy"]):  # noqa: ASYNC110  # logs tell nobody
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            await server
    [line] = unhealthy
    assert line["model"] == "far"
    assert line["problem"] == "provider 'openai': the environment variable NO_SUCH_KEY is not set"


async def test_health_follows_the_models(install: Install) -> None:
    plugin = install(SOURCE)
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    options = settings(
        plugins=("scripted", plugin), models=("plain",), listen="127.0.0.1:0", metrics_listen=None, shutdown_grace=1.0
    )
    server = asyncio.create_task(serve(options, on_ready=ready.set_result))
    async with asyncio.timeout(30), grpc.aio.insecure_channel(f"127.0.0.1:{await ready}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        of_model = stub.Watch(health_pb2.HealthCheckRequest(service="headrace.model/plain"))
        of_server = stub.Watch(health_pb2.HealthCheckRequest(service=""))
        model = sys.modules[plugin].Untokenized
        try:
            for trouble, expected in ((None, SERVING), ("the worker is gone", NOT_SERVING), (None, SERVING)):
                model.trouble = trouble
                assert (await of_model.read()).status == expected
                assert (await of_server.read()).status == expected
        finally:
            model.trouble = None
            os.kill(os.getpid(), signal.SIGTERM)
            await server
