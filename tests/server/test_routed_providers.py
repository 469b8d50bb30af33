"""Routes to providers: real HTTP servers that limit, refuse, break off and hang up, behind a whole server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from headrace.server.app import running_app
from headrace.server.config import Settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.server import start_server
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc, usage_pb2
from tests.remote.remote_kit import answer, error_body, says, spec
from tests.remote.upstream import Answer, Ending, Upstream, json_answer
from tests.rpc.rpc_kit import trailers_of
from tests.server.routing_kit import route

FAILED, COMPLETED = usage_pb2.ATTEMPT_OUTCOME_FAILED, usage_pb2.ATTEMPT_OUTCOME_COMPLETED
LIMITED = json_answer(error_body("slow down", "rate_limit_exceeded"), 429, {"retry-after": "30"})
REFUSED = json_answer(error_body("wrong key"), 401)
GOOD_DAY = Answer(answer("Good ", "day"))


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """Captured: tracebacks of what fails on purpose take seconds to be written."""
    with capture_logs():
        yield


@dataclass
class Serving:
    """A server, and the providers behind the route ``distant``, in order."""

    generation: generation_pb2_grpc.GenerationServiceStub
    near: Upstream
    far: Upstream

    @property
    def num_requests(self) -> tuple[int, int]:
        return len(self.near.requests), len(self.far.requests)

    async def generate(self) -> pb.GenerateResponse:
        return await self.generation.Generate(pb.GenerateRequest(spec=spec()))


@asynccontextmanager
async def serving(state_dir: Path, near: Answer, far: Answer, **breaker: Any) -> AsyncIterator[Serving]:
    """Each provider has one model, and one answer for all."""
    async with Upstream(lambda _: near) as first, Upstream(lambda _: far) as second:
        providers = {
            name: {
                "dialect": "openai-compatible",
                "base_url": upstream.url,
                "models": {f"{name}-model": {"model": "there", "context_length": 4096}},
            }
            for name, upstream in (("near", first), ("far", second))
        }
        chosen = Settings(
            plugins=("remote",),
            backends={"remote": {"providers": providers}},
            routes={"distant": route("near-model", "far-model")},
            retries={"first_wait_seconds": 0.001},
            breaker={"cool_down_seconds": 3600} | breaker,
            state_dir=state_dir,
        )
        async with running_app(chosen) as app:
            server = await start_server(app, address="127.0.0.1:0", metrics=Metrics(CollectorRegistry()))
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                    yield Serving(generation_pb2_grpc.GenerationServiceStub(channel), first, second)
            finally:
                await server.stop(0)


@pytest.mark.parametrize(
    ("given", "num_tries"),
    [
        (LIMITED, 1),
        (json_answer(error_body("overloaded"), 503), 2),
        (json_answer(error_body("overloaded"), 503, {"retry-after": "30"}), 1),
        (REFUSED, 1),
        (json_answer(error_body("no such model"), 404), 1),
        (Answer([], ending=Ending.CUT), 2),
        (Answer(raw=b"what is HTTP?\r\n\r\n"), 1),
    ],
    ids=["429", "503", "503 with Retry-After", "401", "404", "broken off", "no HTTP"],
)
async def test_before_the_first_token_the_next_provider_answers(tmp_path: Path, given: Answer, num_tries: int) -> None:
    async with serving(tmp_path, given, GOOD_DAY) as served:
        got = await served.generate()
        assert (got.choices[0].text, got.report.model) == ("Good day", "far-model")
        assert [(one.model, one.outcome) for one in got.report.attempts] == [
            *[("near-model", FAILED)] * num_tries,
            ("far-model", COMPLETED),
        ]
        assert served.num_requests == (num_tries, 1)


async def test_after_the_first_token_nobody_else_is_asked(tmp_path: Path) -> None:
    async with serving(tmp_path, Answer([says("Good ")], ending=Ending.CUT), GOOD_DAY) as served:
        stream = served.generation.GenerateStream(pb.GenerateStreamRequest(spec=spec()))
        assert (await stream.read()).delta.text == "Good "
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream.read()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert usage_pb2.Usage.FromString(trailers_of(error.value)["headrace-usage-bin"]).output_tokens
        assert served.num_requests == (1, 0)


async def test_a_provider_that_asks_for_a_pause_gets_it(tmp_path: Path) -> None:
    async with serving(tmp_path, LIMITED, GOOD_DAY) as served:
        for _ in range(3):
            await served.generate()
        assert served.num_requests == (1, 3)


async def test_a_provider_that_keeps_failing_is_left_alone(tmp_path: Path) -> None:
    async with serving(tmp_path, REFUSED, GOOD_DAY, failures_in_a_row=2) as served:
        for _ in range(4):
            await served.generate()
        assert served.num_requests == (2, 4)
