"""A server with a ledger and prices, for the tests of UsageService, its clients and its commands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from headrace.backends.errors import Unauthenticated
from headrace.backends.types import Credentials, Principal
from headrace.server.app import App, running_app
from headrace.server.config import Settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.server import RunningServer, start_server
from headrace.v1 import accounting_pb2 as pb
from headrace.v1 import accounting_pb2_grpc, generation_pb2, generation_pb2_grpc, models_pb2_grpc

PRICES = {"id": "p", "currency": "USD", "models": {"letters": {"input": 1, "output": 2, "cache_read_input": "0.25"}}}
PLAN = {"free": {"monthly_money": "0.001", "soft_monthly_money": "0.0005", "monthly_tokens": 500}}
MONDAY = int(datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()) * 10**9
PRINCIPALS = {
    "a": Principal("acme"),
    "b": Principal("basic"),
    "o": Principal("house", operator=True),
    "k": Principal("acme", key="key1"),
    "m": Principal("acme", models=frozenset({"whole"})),
}


class ByName:
    """Whoever says who it is."""

    async def authenticate(self, credentials: Credentials) -> Principal:
        try:
            key = credentials.metadata.get("authorization", "").removeprefix("Bearer ")
            return PRINCIPALS[credentials.metadata.get("who", key)]
        except KeyError:
            raise Unauthenticated("unknown") from None


class Clock:
    """Stands at noon of a Monday until it is moved."""

    now = MONDAY

    def __call__(self) -> int:
        return self.now


@dataclass
class Served:
    """A server, and calls of it by the name of whoever calls."""

    app: App
    server: RunningServer
    channel: grpc.aio.Channel
    clock: Clock

    @property
    def usage(self) -> Any:
        return accounting_pb2_grpc.UsageServiceStub(self.channel)

    @property
    def models(self) -> Any:
        return models_pb2_grpc.ModelServiceStub(self.channel)

    async def generate(self, who: str, text: str = "four", **fields: Any) -> generation_pb2.GenerateResponse:
        fields = {"model": "letters", "stopping": {"max_new_tokens": 3}} | fields
        request = generation_pb2.GenerateRequest(spec=generation_pb2.GenerationSpec(text=text, **fields))
        stub: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        return await stub.Generate(request, metadata=(("who", who),))

    async def get(self, who: str, **fields: Any) -> pb.GetUsageResponse:
        return await self.usage.GetUsage(pb.GetUsageRequest(**fields), metadata=(("who", who),))

    async def estimate(self, who: str, text: str = "four", **fields: Any) -> pb.EstimateCostResponse:
        fields = {"model": "letters", "stopping": {"max_new_tokens": 100}} | fields
        request = pb.EstimateCostRequest(spec=generation_pb2.GenerationSpec(text=text, **fields))
        return await self.usage.EstimateCost(request, metadata=(("who", who),))

    def watch(self, who: str, **fields: Any) -> Any:
        return self.usage.WatchUsage(pb.WatchUsageRequest(**fields), metadata=(("who", who),))


@asynccontextmanager
async def serving(
    state_dir: Path, *, ledger: str | None = "auto", scripts: Mapping[str, Any] | None = None, **options: Any
) -> AsyncIterator[Served]:
    clock = Clock()
    settings = Settings(
        plugins=("scripted", "price_table"),
        models_dir=Path("unused"),
        backends={"scripted": {"models": scripts or {"letters": {}, "whole": {"kind": "call"}}}},
        ledger=ledger,
        state_dir=state_dir,
        **({"price_sources": {"table": PRICES}} | options),
    )
    async with running_app(settings, authenticator=ByName(), time_of_day=clock) as app:
        server = await start_server(
            app, address="127.0.0.1:0", metrics=Metrics(CollectorRegistry()), usage_poll_seconds=0.005
        )
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield Served(app, server, channel, clock)
        finally:
            await server.stop(0)
