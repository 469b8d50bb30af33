"""A whole server with a ledger, on scripted models whose tokens are bytes, and readers of what it wrote down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry
from sqlalchemy import select

from headrace.backends.errors import Unauthenticated
from headrace.backends.types import Credentials, Principal
from headrace.server.accounting.clock import SteadyClock
from headrace.server.accounting.schema import balances, holds, postings
from headrace.server.app import App, running_app
from headrace.server.config import Settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.server import start_server
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc, scoring_pb2_grpc

INPUT_NANOS, OUTPUT_NANOS, READ_NANOS = 3_000, 5_000, 1_000
"""For one token: amounts that no rounding touches."""

MODELS: dict[str, dict[str, Any]] = {
    "letters": {},
    "slow": {"seconds_per_step": 0.005, "num_slots": 64},
    "whole": {"kind": "call", "answer": "Hello there."},
    "unpriced": {},
}


def price_table(**models: Any) -> dict[str, Any]:
    price = {"input": 3, "output": 5, "cache_read_input": 1}
    return {
        "table": {
            "id": "test",
            "currency": "USD",
            "models": dict.fromkeys(("letters", "slow", "whole"), price) | models,
        }
    }


class ByName:
    """Takes the metadata's word for who calls."""

    async def authenticate(self, credentials: Credentials) -> Principal:
        if "tenant" not in credentials.metadata:
            raise Unauthenticated("metadata `tenant` is needed")
        return Principal(credentials.metadata["tenant"])


@dataclass
class TimeOfDay:
    """Stands still until it is set."""

    now: datetime = field(default_factory=lambda: datetime(2026, 11, 23, 12, tzinfo=UTC))

    def __call__(self) -> int:
        return int(self.now.timestamp()) * 1_000_000_000


@dataclass(frozen=True)
class Served:
    app: App
    channel: grpc.aio.Channel
    generation: generation_pb2_grpc.GenerationServiceStub
    scoring: scoring_pb2_grpc.ScoringServiceStub
    metrics: Metrics

    async def generate(self, text: str = "prompt", *, tenant: str = "acme", **spec: Any) -> pb.GenerateResponse:
        return await self.generation.Generate(request(text, **spec), metadata=(("tenant", tenant),))

    async def postings(self) -> list[Any]:
        """All of them, in order; whatever is over is settled."""
        assert self.app.accounting.ledger is not None
        return await self.app.accounting.ledger.read(
            lambda connection: list(connection.execute(select(postings).order_by(postings.c.sequence)))
        )

    async def num_holds(self) -> int:
        assert self.app.accounting.ledger is not None
        return await self.app.accounting.ledger.read(lambda connection: len(list(connection.execute(select(holds)))))

    async def all_settled(self) -> None:
        async with asyncio.timeout(30):
            # A cancelled call's client is told of nothing.
            while self.app.num_open_holds() or await self.num_holds():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def balance(self, tenant: str = "acme", month: str = "2026-11") -> Any:
        assert self.app.accounting.ledger is not None
        where = (balances.c.tenant == tenant) & (balances.c.month == month) & (balances.c.key == "")
        return await self.app.accounting.ledger.read(
            lambda connection: connection.execute(select(balances).where(where)).one_or_none()
        )


def request(
    text: str = "prompt", *, max_new_tokens: int = 8, least: int | None = None, **spec: Any
) -> pb.GenerateRequest:
    """``least``: no fewer tokens either, so that all answers are equally long."""
    stopping = pb.StoppingOptions(max_new_tokens=max_new_tokens)
    if least is not None:
        stopping.min_new_tokens = least
    return pb.GenerateRequest(spec=pb.GenerationSpec(text=text, stopping=stopping, **spec))


@asynccontextmanager
async def serving(
    state_dir: Path, *, time_of_day: TimeOfDay | None = None, plan: Mapping[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """``plan`` is everybody's."""
    settings = {"price_sources": price_table(), "ledger": "auto", "state_dir": state_dir} | settings
    if plan is not None:
        settings |= {"plans": {"everybody": plan}, "default_plan": "everybody"}
    chosen = Settings(plugins=("scripted", "price_table"), backends={"scripted": {"models": MODELS}}, **settings)
    metrics = Metrics(CollectorRegistry())
    clock = None if time_of_day is None else SteadyClock(time_of_day)
    async with running_app(chosen, authenticator=ByName(), time_of_day=clock) as app:
        server = await start_server(app, address="127.0.0.1:0", metrics=metrics)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield Served(
                    app,
                    channel,
                    generation_pb2_grpc.GenerationServiceStub(channel),
                    scoring_pb2_grpc.ScoringServiceStub(channel),
                    metrics,
                )
        finally:
            await server.stop(0)
