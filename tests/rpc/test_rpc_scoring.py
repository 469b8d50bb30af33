"""ScoringService, through the whole server on scripted models."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rpc_kit import details_of, status_of, trailers_of

from headrace.backends.requests import GenerateRequest, LatencyClass, Scoring, TextInput, TokenIdsInput
from headrace.server.app import App, running_app
from headrace.server.config import Settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.scoring import to_request
from headrace.server.rpc.server import start_server
from headrace.v1 import generation_pb2, scoring_pb2_grpc
from headrace.v1 import scoring_pb2 as pb

SCRIPTS: dict[str, dict[str, Any]] = {
    "chunks": {"max_scores": 64, "context_length": 600},
    "tokens": {},
    "whole": {"kind": "call", "answer": "Hello"},
    "slow": {"seconds_per_step": 0.01, "num_slots": 1},
}


@dataclass(frozen=True)
class Served:
    app: App
    scoring: scoring_pb2_grpc.ScoringServiceStub
    metrics: Metrics


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Served]:
    metrics = Metrics(CollectorRegistry())
    chosen = Settings(plugins=("scripted",), backends={"scripted": {"models": SCRIPTS}}, **settings)
    async with running_app(chosen) as app:
        server = await start_server(app, address="127.0.0.1:0", metrics=metrics)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield Served(app, scoring_pb2_grpc.ScoringServiceStub(channel), metrics)
        finally:
            await server.stop(0)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as running:
        yield running


def candidates(*texts: str) -> list[pb.ScoreCandidate]:
    return [pb.ScoreCandidate(text=text) for text in texts]


async def refused(served: Served, request: pb.ScoreRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.scoring.Score(request)
    return error.value


async def violation(served: Served, request: pb.ScoreRequest) -> tuple[str, str]:
    """The field that a request is refused for, and why."""
    error = await refused(served, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [found] = details_of(status_of(error))["BadRequest"].field_violations
    return found.field, found.description


@pytest.mark.parametrize("model", ["chunks", "tokens"])
async def test_candidates_are_answered_in_their_order_with_what_they_used(served: Served, model: str) -> None:
    ids = generation_pb2.TokenIds(ids=b"ghi")
    given = [*candidates("abc", "d"), pb.ScoreCandidate(token_ids=ids)]
    response = await served.scoring.Score(pb.ScoreRequest(request_id="mine", model=model, text="né", candidates=given))
    assert response.request_id == response.report.request_id == "mine"
    assert [(score.index, score.num_tokens) for score in response.scores] == [(0, 3), (1, 1), (2, 3)]
    assert all(score.logprob < 0 and not score.tokens for score in response.scores)
    usage = response.report.usage
    assert (usage.input_tokens, usage.output_tokens) == (3 + 3 + 1 + 3, 0)
    report = response.report
    assert (report.model, report.backend, report.model_digest) == (model, "scripted", "scripted:None")
    assert report.determinism_class == generation_pb2.DETERMINISM_CLASS_STRICT
    assert report.timings.HasField("total")
    assert not report.timings.HasField("time_to_first_token")
    assert len(report.attempts) == 1


async def test_both_ways_to_score_give_the_same(served: Served) -> None:
    request = pb.ScoreRequest(
        chat=generation_pb2.ChatInput(
            messages=[
                generation_pb2.ChatMessage(
                    role=generation_pb2.ROLE_USER, content=[generation_pb2.ContentPart(text="Which one?")]
                )
            ]
        ),
        candidates=candidates("this one " * 10, "that"),
        response=pb.ScoreResponseOptions(tokens=True, top_logprobs=2),
    )
    found = []
    for request.model in ("chunks", "tokens"):
        found.append((await served.scoring.Score(request)).scores)
    assert found[0] == found[1]


async def test_a_text_is_given_with_its_tokens(served: Served) -> None:
    request = pb.ScoreRequest(text="né!", response=pb.ScoreResponseOptions(tokens=True, top_logprobs=3))
    [score] = (await served.scoring.Score(request)).scores
    assert b"".join(token.token for token in score.tokens) == "né!".encode()
    assert [token.HasField("logprob") for token in score.tokens] == [False, True, True, True]
    assert score.logprob == pytest.approx(math.fsum(token.logprob for token in score.tokens[1:]), rel=1e-6)
    assert [len(token.top) for token in score.tokens] == [0, 3, 3, 3]
    for token in score.tokens[1:]:
        assert [top.logprob for top in token.top] == sorted((top.logprob for top in token.top), reverse=True)
        assert token.top[0].logprob >= token.logprob


def test_a_request_is_converted_field_by_field() -> None:
    message = pb.ScoreRequest(
        model="m",
        text="a",
        candidates=[pb.ScoreCandidate(text="b"), pb.ScoreCandidate(token_ids=generation_pb2.TokenIds(ids=[1, 2]))],
        response=pb.ScoreResponseOptions(tokens=True, top_logprobs=2),
        scheduling=generation_pb2.SchedulingOptions(latency_class=generation_pb2.LATENCY_CLASS_BATCH, priority=3),
        determinism=generation_pb2.DeterminismOptions(strict=True),
        cache=generation_pb2.CachePolicy(prefix=generation_pb2.CACHE_MODE_BYPASS),
    )
    request = to_request(message)
    assert request.scoring == Scoring(candidates=(TextInput("b"), TokenIdsInput((1, 2))), tokens=True, top_logprobs=2)
    assert (request.model, request.input) == ("m", TextInput("a"))
    assert (request.strict, request.use_prefix_cache) == (True, False)
    assert (request.scheduling.latency_class, request.scheduling.priority) == (LatencyClass.BATCH, 3)
    assert request.options == {
        "scoring",
        "text",
        "candidates.text",
        "candidates.token_ids.ids",
        "response.tokens",
        "response.top_logprobs",
        "scheduling.latency_class",
        "scheduling.priority",
        "determinism.strict",
        "cache.prefix",
    }
    assert isinstance(request, GenerateRequest)


@pytest.mark.parametrize(
    ("request_", "field", "problem"),
    [
        (pb.ScoreRequest(), "input", "one of text, token_ids, chat"),
        (pb.ScoreRequest(text=""), "text", "not be empty"),
        (pb.ScoreRequest(text="a"), "input", "at least two tokens"),
        (pb.ScoreRequest(text="a" * 601), "input", "has 601 tokens; the context holds 600"),
        (pb.ScoreRequest(text="a", candidates=[pb.ScoreCandidate()]), "candidates[0]", "one of text, token_ids"),
        (pb.ScoreRequest(text="a", candidates=candidates("b", "")), "candidates[1].text", "not be empty"),
        (
            pb.ScoreRequest(text="a", candidates=[pb.ScoreCandidate(token_ids=generation_pb2.TokenIds())]),
            "candidates[0].token_ids.ids",
            "at least one",
        ),
        (
            pb.ScoreRequest(text="a", candidates=[pb.ScoreCandidate(token_ids=generation_pb2.TokenIds(ids=[1, 257]))]),
            "candidates[0].token_ids.ids[1]",
            "below the vocabulary size 257",
        ),
        (
            pb.ScoreRequest(text="a" * 300, candidates=candidates("b", "b" * 301)),
            "candidates[1]",
            "has 301 tokens after 300 of the input; the context holds 600",
        ),
        (pb.ScoreRequest(text="a", candidates=candidates(*"b" * 129)), "candidates", "at most 128"),
        (
            pb.ScoreRequest(text="a", candidates=candidates(*["b" * 500] * 66)),
            "candidates",
            "at most 32768 tokens in all, got 33000",
        ),
        (
            pb.ScoreRequest(
                text="a",
                candidates=candidates(*["b" * 500] * 20),
                response=pb.ScoreResponseOptions(tokens=True, top_logprobs=20),
            ),
            "response.tokens",
            "gives 210000 tokens",
        ),
        (
            pb.ScoreRequest(text="ab", response=pb.ScoreResponseOptions(tokens=True, top_logprobs=21)),
            "response.top_logprobs",
            "at most 20",
        ),
        (
            pb.ScoreRequest(text="ab", response=pb.ScoreResponseOptions(top_logprobs=2)),
            "response.top_logprobs",
            "needs response.tokens",
        ),
        (
            pb.ScoreRequest(text="ab", scheduling=generation_pb2.SchedulingOptions(on_expiry=1)),
            "scheduling.on_expiry",
            "generations only",
        ),
        (pb.ScoreRequest(text="ab", determinism=generation_pb2.DeterminismOptions(seed=1)), "determinism.seed", "draw"),
        (pb.ScoreRequest(request_id="", text="ab"), "request_id", "1 to 128"),
    ],
)
async def test_what_cannot_be_is_refused_by_its_field(
    served: Served, request_: pb.ScoreRequest, field: str, problem: str
) -> None:
    found, description = await violation(served, request_)
    assert found == field
    assert problem in description


async def test_a_model_that_cannot_score_is_refused_by_name(served: Served) -> None:
    error = await refused(served, pb.ScoreRequest(model="whole", text="ab"))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    info = details_of(status_of(error))["ErrorInfo"]
    assert dict(info.metadata) == {"field": "scoring", "model": "whole", "backend": "scripted"}


async def test_a_field_that_only_a_newer_proto_has_is_refused(served: Served) -> None:
    request = pb.ScoreRequest(text="ab")
    request.MergeFromString(bytes([0xD2, 0x0F, 0x01, 0x78]))  # field 250
    error = await refused(served, request)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "#250" in error.details()


async def test_a_deadline_ends_it_with_its_usage(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.scoring.Score(pb.ScoreRequest(model="slow", text="a" * 3000), timeout=0.3)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_cancels_frees_what_it_had(served: Served) -> None:
    engine = served.app.registry.find("slow").engine
    assert engine is not None
    call = served.scoring.Score(pb.ScoreRequest(model="slow", text="a" * 3000))
    async with asyncio.timeout(10):
        while not engine.runner.num_running:  # noqa: ASYNC110  # the engine's thread sets no event for tests
            await asyncio.sleep(0.001)
        call.cancel()
        while engine.runner.num_running:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_an_error_names_the_request(served: Served) -> None:
    error = await refused(served, pb.ScoreRequest(request_id="mine", model="other", text="ab"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert trailers_of(error)["x-request-id"] == "mine"


async def test_scorings_count_among_the_metrics(served: Served) -> None:
    await served.scoring.Score(pb.ScoreRequest(text="abcd"))
    text = generate_latest(served.metrics.registry).decode()
    assert 'gen_ai_usage_tokens_total{model="chunks",type="input"} 4.0' in text
    assert 'gen_ai_server_request_duration_seconds_count{error_type="",model="chunks"} 1.0' in text
    assert 'grpc_method="headrace.v1.ScoringService/Score",grpc_status="OK"' in text


async def test_a_server_under_a_ceiling_refuses_scorings_too() -> None:
    async with serving(max_calls=1) as served:
        first = served.scoring.Score(pb.ScoreRequest(model="slow", text="a" * 3000))
        engine = served.app.registry.find("slow").engine
        assert engine is not None
        async with asyncio.timeout(10):
            while not engine.runner.num_running:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        error = await refused(served, pb.ScoreRequest(text="ab"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
