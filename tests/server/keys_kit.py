"""A server that wants keys, over real gRPC, and the operator's hand on its ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from prometheus_client import CollectorRegistry
from server_kit import settings
from sqlalchemy import Connection

from headrace.server.accounting.database import Database
from headrace.server.app import App, running_app
from headrace.server.config import Settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.server import start_server
from headrace.server.tls import server_credentials
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc

T = TypeVar("T")
NOW = 1_800_000_000 * 10**9


def keys_settings(state_dir: Path, **options: Any) -> Settings:
    options.setdefault("scripts", {"letters": {}})
    return settings(options.pop("scripts"), authentication="keys", ledger="auto", state_dir=state_dir, **options)


def operate(chosen: Settings, work: Callable[[Connection], T]) -> T:
    """What the command line does: writes to the ledger's database beside running servers."""
    assert chosen.ledger is not None
    with (
        Database.open(chosen.ledger, state_dir=chosen.state_dir, currency=chosen.currency) as database,
        database.writing() as connection,
    ):
        return work(connection)


@dataclass(frozen=True)
class Caller:
    """A channel to a server, and what is sent with each call."""

    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...] = ()

    def with_key(self, key: str | None) -> Caller:
        return Caller(self.channel, () if key is None else (("authorization", f"Bearer {key}"),))

    async def list_models(self) -> list[models_pb2.Model]:
        stub = models_pb2_grpc.ModelServiceStub(self.channel)
        return list((await stub.ListModels(models_pb2.ListModelsRequest(), metadata=self.metadata)).models)

    async def generate(self, **spec: Any) -> pb.GenerateResponse:
        stub = generation_pb2_grpc.GenerationServiceStub(self.channel)
        request = pb.GenerateRequest(spec=pb.GenerationSpec(text="hello", **spec))
        return await stub.Generate(request, metadata=self.metadata)

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        client_streams: bool = False,
        server_streams: bool = False,
        to_the_end: bool = True,
    ) -> list[bytes]:
        """Any RPC, such as ``"/headrace.v1.ModelService/ListModels"``; the messages of its answer, or the first."""
        make: Mapping[tuple[bool, bool], Any] = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, False): self.channel.stream_unary,
            (True, True): self.channel.stream_stream,
        }
        argument = iter([request]) if client_streams else request
        call = make[client_streams, server_streams](method)(argument, metadata=self.metadata, timeout=30)
        if not server_streams:
            return [await call]
        messages = []
        try:
            async for message in call:
                messages.append(message)
                if not to_the_end:
                    break
        finally:
            call.cancel()
        return messages

    async def error(self, **spec: Any) -> grpc.aio.AioRpcError:
        """What a generation ends with."""
        try:
            await self.generate(**spec)
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the call was let in")


@asynccontextmanager
async def key_server(
    chosen: Settings, credentials: grpc.ChannelCredentials | None = None, **options: Any
) -> AsyncIterator[tuple[App, Caller]]:
    """Serves, and gives a caller without a key. ``options`` are those of App."""
    async with running_app(chosen, **options) as app:
        server = await start_server(
            app,
            address="127.0.0.1:0",
            metrics=Metrics(CollectorRegistry()),
            credentials=server_credentials(chosen),
        )
        address = f"localhost:{server.port}"
        # Retries would hide what a test looks for; connections of its own.
        channel_options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        channel = (
            grpc.aio.insecure_channel(address, channel_options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, channel_options)
        )
        try:
            async with channel:
                yield app, Caller(channel)
        finally:
            await server.stop(0)
