"""A key's limits over real gRPC: what is counted, and what its caller is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from keys_kit import NOW, Caller, key_server, keys_settings, operate

from headrace.server.accounting.plans import Limits
from headrace.server.accounting.tenants import create_key, create_tenant, key_id_of
from headrace.server.app import App
from headrace.server.config import Settings
from headrace.v1 import accounting_pb2, scoring_pb2, tokenization_pb2
from headrace.v1 import generation_pb2 as pb

PACKAGE = "/headrace.v1."
SPEC = pb.GenerationSpec(text="hello", stopping=pb.StoppingOptions(max_new_tokens=4))


def limited(state_dir: Path, own: Limits | None = None, **plan: Any) -> tuple[Settings, str]:
    """Settings of a server, and a key of a tenant with such a plan."""
    scripts = {"letters": {}, "slow": {"seconds_per_step": 0.01}}
    chosen = keys_settings(state_dir, scripts=scripts, plans={"plan": Limits(**plan)}, default_plan="plan")

    def work(connection: Any) -> str | None:
        create_tenant(connection, "acme", plan=None, now=NOW)
        return create_key(connection, "acme", now=NOW, limits=own or Limits())[1]

    key = operate(chosen, work)
    assert key is not None
    return chosen, key


def stop_the_clock(app: App) -> None:
    """That of the limits alone: the engine needs its own."""
    for buckets in (app._limits._requests, app._limits._tokens):
        buckets._clock = lambda: 1000.0


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    packed = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    details = {}
    for one in status_pb2.Status.FromString(packed).details:
        name = one.TypeName().removeprefix("google.rpc.")
        details[name] = getattr(error_details_pb2, name).FromString(one.value)
    return details


COUNTED = [
    ("GenerationService/Generate", pb.GenerateRequest(spec=SPEC), {}),
    ("GenerationService/GenerateStream", pb.GenerateStreamRequest(spec=SPEC), {"server_streams": True}),
    ("ScoringService/Score", scoring_pb2.ScoreRequest(text="hello"), {}),
    ("TokenizationService/Tokenize", tokenization_pb2.TokenizeRequest(text="hello"), {}),
    ("TokenizationService/Detokenize", tokenization_pb2.DetokenizeRequest(token_ids=[97]), {}),
    ("TokenizationService/CountTokens", tokenization_pb2.CountTokensRequest(text="hello"), {}),
    ("UsageService/EstimateCost", accounting_pb2.EstimateCostRequest(spec=SPEC), {}),
]


@pytest.mark.parametrize(("method", "request_", "kinds"), COUNTED, ids=[method for method, _, _ in COUNTED])
async def test_every_call_about_a_model_counts_in_the_minute(
    method: str, request_: Any, kinds: dict[str, bool], tmp_path: Path
) -> None:
    chosen, key = limited(tmp_path, requests_per_minute=2)
    async with key_server(chosen) as (app, caller):
        stop_the_clock(app)
        caller = caller.with_key(key)
        for _ in range(2):
            await caller.call(PACKAGE + method, request_.SerializeToString(), **kinds)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await caller.call(PACKAGE + method, request_.SerializeToString(), **kinds)
        await caller.list_models()  # costs nothing
    error = refused.value
    assert (error.code(), error.details()) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "tenant 'acme' may have 2 calls a minute; try again in 30 s",
    )
    details = details_of(error)
    assert details["ErrorInfo"].reason == "RATE_LIMITED"
    assert details["RetryInfo"].retry_delay.seconds == 30
    assert details["QuotaFailure"].violations[0].subject == "tenant:acme"


async def test_a_key_has_no_more_streams_at_once_than_its_own(tmp_path: Path) -> None:
    chosen, key = limited(tmp_path, own=Limits(max_streams=1), max_streams=3)
    async with key_server(chosen) as (app, caller):
        caller = caller.with_key(key)
        running = asyncio.create_task(caller.generate(model="slow", stopping={"max_new_tokens": 200}))
        async with asyncio.timeout(20):
            while not app._limits._streams:  # noqa: ASYNC110  # no event tells of it
                await asyncio.sleep(0.001)
        error = await caller.error()
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details_of(error)["QuotaFailure"].violations[0].subject == f"key:{key_id_of(key)}"
        running.cancel()
        await asyncio.wait([running])
        async with asyncio.timeout(20):
            while app._limits._streams:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await caller.generate()


async def test_tokens_are_taken_for_the_worst_case_and_come_back_when_they_were_not_used(tmp_path: Path) -> None:
    chosen, key = limited(tmp_path, tokens_per_minute=100)
    async with key_server(chosen) as (app, caller):
        stop_the_clock(app)
        caller = caller.with_key(key)
        for _ in range(4):  # each might need 65
            answered = await caller.generate(
                stopping={"max_new_tokens": 60, "stop_sequences": ["a", "e", "i", "o", "u"]}
            )
            used = answered.report.usage.input_tokens + answered.report.usage.output_tokens
            assert used < 25
        error = await caller.error(stopping={"max_new_tokens": 96})
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "the call may need 101 tokens, and tenant 'acme' has 100 a minute" in (error.details() or "")
        error = await caller.error(stopping={"max_new_tokens": 90})
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (error.details() or "").startswith("tenant 'acme' may have 100 tokens a minute; try again in")


async def test_anonymous_has_the_plan_that_its_operator_gave_it(tmp_path: Path) -> None:
    plans = {"plan": Limits(requests_per_minute=1)}
    chosen = keys_settings(tmp_path, plans=plans).model_copy(update={"authentication": "anonymous"})
    operate(chosen, lambda connection: create_tenant(connection, "anonymous", plan="plan", now=NOW))
    async with key_server(chosen) as (app, caller):
        stop_the_clock(app)
        await Caller(caller.channel).generate()
        assert (await caller.error()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
