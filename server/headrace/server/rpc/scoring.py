"""ScoringService."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

from headrace.backends import requests
from headrace.backends.errors import InvalidArgument
from headrace.backends.events import Scored, StreamEnd
from headrace.backends.types import Call
from headrace.server.rpc.answer import report_message
from headrace.server.rpc.calls import Rpc, convert, parse
from headrace.server.rpc.convert import request_id_of, to_input, to_response_caching, to_scheduling
from headrace.server.rpc.generation import Generation
from headrace.server.rpc.options import set_fields
from headrace.v1 import generation_pb2
from headrace.v1 import scoring_pb2 as pb

OPTION = "scoring"
"""What a model declares that can score: no field of the request says it, being sent here does."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """Runs scorings through the application's chain."""

    generation: Generation

    async def score(self, rpc: Rpc, raw: bytes) -> pb.ScoreResponse:
        """Score."""
        message = parse(pb.ScoreRequest, raw)
        rpc.label(request_id_of(message))
        call = rpc.begin(await convert(self.generation.application, raw, lambda: to_request(message)))
        async with self.generation.measured(call):
            scores = await self._run(call)
            report = report_message(call, now=self.generation.clock())
            return pb.ScoreResponse(request_id=call.request_id, scores=scores, report=report)

    async def _run(self, call: Call) -> list[pb.Score]:
        """Runs a call to its very end, so that what the middleware does there is done."""
        scores: dict[int, pb.Score] = {}
        async with aclosing(self.generation.application.generate(call)) as events:
            async for event in events:
                match event:
                    case Scored():
                        scores[event.choice] = _score_message(event)
                    case StreamEnd():
                        pass
                    case _:
                        raise RuntimeError(f"{type(event).__name__} in the answer of a scoring. This is a bug")
        assert call.request.scoring is not None
        if scores.keys() != set(range(max(1, len(call.request.scoring.candidates)))):
            raise RuntimeError(f"a scoring ended with {len(scores)} of its scores. This is a bug")
        return [score for _, score in sorted(scores.items())]


def to_request(message: pb.ScoreRequest) -> requests.GenerateRequest:
    """What a message asks for. Raises InvalidArgument."""
    if message.scheduling.HasField("on_expiry"):
        raise InvalidArgument("scheduling.on_expiry", "is for generations only: nothing is scored in part")
    if message.determinism.HasField("seed"):
        raise InvalidArgument("determinism.seed", "is for generations only: scoring draws nothing")
    options = set_fields(message, exclude=("request_id", "model"))
    return requests.GenerateRequest(
        input=to_input(message),
        model=message.model if message.HasField("model") else None,
        idempotency_key=message.idempotency_key if message.HasField("idempotency_key") else None,
        scoring=requests.Scoring(
            candidates=tuple(_candidate(f"candidates[{i}]", one) for i, one in enumerate(message.candidates)),
            tokens=message.response.tokens,
            top_logprobs=message.response.top_logprobs,
        ),
        scheduling=to_scheduling(message.scheduling, requests.LatencyClass.CHAT),
        strict=message.determinism.strict,
        response_caching=to_response_caching(message.cache),
        use_prefix_cache=message.cache.prefix != generation_pb2.CACHE_MODE_BYPASS,
        options=options | {OPTION},
    )


def _candidate(path: str, message: pb.ScoreCandidate) -> requests.TextInput | requests.TokenIdsInput:
    match message.WhichOneof("candidate"):
        case "text":
            if not message.text:
                raise InvalidArgument(f"{path}.text", "must not be empty")
            return requests.TextInput(message.text)
        case "token_ids":
            if not message.token_ids.ids:
                raise InvalidArgument(f"{path}.token_ids.ids", "must have at least one token id")
            return requests.TokenIdsInput(tuple(message.token_ids.ids))
        case _:
            raise InvalidArgument(path, "must be set to one of text, token_ids")


def _score_message(scored: Scored) -> pb.Score:
    return pb.Score(
        index=scored.choice,
        logprob=scored.logprob,
        num_tokens=scored.num_tokens,
        tokens=[
            pb.ScoredToken(
                token_id=token.token_id,
                token=token.token,
                logprob=token.logprob,
                top=[
                    generation_pb2.TopLogprob(token_id=top.token_id, token=top.token, logprob=top.logprob)
                    for top in token.top
                ],
            )
            for token in scored.tokens
        ],
    )
