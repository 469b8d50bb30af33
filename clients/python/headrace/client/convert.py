"""From the proto's messages to the types of this package."""

from __future__ import annotations

import enum
from datetime import UTC
from typing import Any, TypeVar

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.wrappers_pb2 import Int32Value

from headrace.client import types
from headrace.client.trailers import Trailers
from headrace.v1 import accounting_pb2, generation_pb2, models_pb2, scoring_pb2, tokenization_pb2, usage_pb2

_Name = TypeVar("_Name", bound=enum.StrEnum)


def completion(message: generation_pb2.GenerateResponse, trailers: Trailers | None = None) -> types.Completion:
    return types.Completion(
        request_id=message.request_id,
        prompt=prompt(message.prompt) if message.HasField("prompt") else None,
        choices=tuple(map(choice, message.choices)),
        report=report(message.report),
        budget_warnings=trailers.budget_warnings if trailers else (),
        replayed=trailers.replayed if trailers else False,
    )


def event(message: generation_pb2.GenerateStreamResponse) -> types.Event | None:
    """``None`` for an event that only a newer client knows."""
    match message.WhichOneof("event"):
        case "prompt":
            return prompt(message.prompt)
        case "delta":
            return delta(message.delta)
        case "finish":
            return finish(message.finish)
        case "usage":
            return usage(message.usage)
        case "end":
            return types.End(report(message.end))
        case _:
            return None


def prompt(message: generation_pb2.Prompt) -> types.PromptEcho:
    return types.PromptEcho(text=message.text, token_ids=tuple(message.token_ids))


def delta(message: generation_pb2.Delta) -> types.TextDelta:
    return types.TextDelta(
        choice_index=message.choice_index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_token_logprob, message.logprobs)),
        reasoning_text=optional(message, "reasoning_text"),
        tool_calls=tuple(
            types.ToolCallDelta(
                index=call.index,
                id=optional(call, "id"),
                name=optional(call, "name"),
                arguments_json=call.arguments_json,
            )
            for call in message.tool_calls
        ),
    )


def finish(message: generation_pb2.ChoiceFinish) -> types.Finish:
    return types.Finish(
        choice_index=message.choice_index,
        reason=named(types.FinishReason, message, "reason"),
        stop_sequence=optional(message, "stop_sequence"),
        stop_token_id=optional(message, "stop_token_id"),
        seed=optional(message, "seed"),
    )


def choice(message: generation_pb2.Choice) -> types.Choice:
    return types.Choice(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_token_logprob, message.logprobs)),
        reasoning_text=optional(message, "reasoning_text"),
        tool_calls=tuple(types.ToolCall(c.id, c.name, c.arguments_json) for c in message.tool_calls),
        finish=finish(message.finish),
    )


def report(message: generation_pb2.GenerationReport) -> types.Report:
    return types.Report(
        request_id=message.request_id,
        usage=usage(message.usage),
        cost=cost(message.cost) if message.HasField("cost") else None,
        timings=timings(message.timings),
        backend=message.backend,
        model=message.model,
        model_digest=optional(message, "model_digest"),
        determinism_class=named(types.DeterminismClass, message, "determinism_class"),
        cache_status=named(types.CacheStatus, message, "cache_status"),
        attempts=tuple(
            types.Attempt(
                backend=attempt.backend,
                model=attempt.model,
                price_id=optional(attempt, "price_id"),
                usage=usage(attempt.usage),
                outcome=named(types.AttemptOutcome, attempt, "outcome"),
            )
            for attempt in message.attempts
        ),
    )


def usage(message: usage_pb2.Usage) -> types.Usage:
    return types.Usage(
        input_tokens=optional(message, "input_tokens"),
        cache_read_input_tokens=optional(message, "cache_read_input_tokens"),
        cache_write_input_tokens=optional(message, "cache_write_input_tokens"),
        output_tokens=optional(message, "output_tokens"),
        reasoning_output_tokens=optional(message, "reasoning_output_tokens"),
        sent_output_tokens=optional(message, "sent_output_tokens"),
        accepted_draft_tokens=optional(message, "accepted_draft_tokens"),
        rejected_draft_tokens=optional(message, "rejected_draft_tokens"),
        estimated=optional(message, "estimated"),
    )


def timings(message: usage_pb2.Timings) -> types.Timings:
    return types.Timings(
        queue=_seconds(message, "queue"),
        prefill=_seconds(message, "prefill"),
        time_to_first_token=_seconds(message, "time_to_first_token"),
        time_to_first_answer_token=_seconds(message, "time_to_first_answer_token"),
        decode=_seconds(message, "decode"),
        total=_seconds(message, "total"),
        output_tokens_per_second=optional(message, "output_tokens_per_second"),
    )


def scores(message: scoring_pb2.ScoreResponse, trailers: Trailers) -> types.Scores:
    return types.Scores(
        request_id=message.request_id,
        scores=tuple(
            types.Score(
                index=score.index,
                logprob=score.logprob,
                num_tokens=score.num_tokens,
                tokens=tuple(
                    types.ScoredToken(
                        token_id=token.token_id,
                        token=token.token,
                        logprob=optional(token, "logprob"),
                        top=tuple(map(_top_logprob, token.top)),
                    )
                    for token in score.tokens
                ),
            )
            for score in message.scores
        ),
        report=report(message.report),
        budget_warnings=trailers.budget_warnings,
        replayed=trailers.replayed,
    )


def tokenization(message: tokenization_pb2.TokenizeResponse) -> types.Tokenization:
    return types.Tokenization(
        tokens=tuple(types.Token(id=t.id, bytes=t.bytes, start=t.start, end=t.end) for t in message.tokens),
        text=message.text,
    )


def token_count(message: tokenization_pb2.CountTokensResponse) -> types.TokenCount:
    return types.TokenCount(input_tokens=message.input_tokens, context_length=message.context_length)


def model(message: models_pb2.Model) -> types.Model:
    return types.Model(
        name=message.name,
        is_default=message.is_default,
        backend=message.backend,
        state=named(types.ModelState, message, "state"),
        digest=optional(message, "digest"),
        architecture=optional(message, "architecture"),
        quantization=optional(message, "quantization"),
        parameter_count=optional(message, "parameter_count"),
        license=optional(message, "license"),
        capabilities=types.ModelCapabilities(
            options=tuple(message.capabilities.options),
            determinism_class=named(types.DeterminismClass, message.capabilities, "determinism_class"),
            continuous_batching=message.capabilities.continuous_batching,
        ),
        limits=types.ModelLimits(
            context_length=message.limits.context_length,
            vocabulary_size=optional(message.limits, "vocabulary_size"),
            max_n=message.limits.max_n,
            max_top_logprobs=message.limits.max_top_logprobs,
            max_running=optional(message.limits, "max_running"),
        ),
        default_sampling=_sampling(message.default_sampling),
        measured_speed=_speed(message.measured_speed) if message.HasField("measured_speed") else None,
        price=price(message.price) if message.HasField("price") else None,
        targets=tuple(map(_route_target, message.targets)),
        provider=optional(message, "provider"),
    )


def _route_target(message: models_pb2.RouteTarget) -> types.RouteTarget:
    return types.RouteTarget(
        model=message.model,
        state=named(types.RouteTargetState, message, "state"),
        weight=optional(message, "weight"),
        measured_speed=_speed(message.measured_speed) if message.HasField("measured_speed") else None,
        failures_in_a_row=message.failures_in_a_row,
    )


def price(message: accounting_pb2.ModelPrice) -> types.ModelPrice:
    return types.ModelPrice(
        price_id=message.price_id,
        provider=message.provider,
        model=message.model,
        currency=message.currency,
        input_nanos=message.input_nanos,
        output_nanos=message.output_nanos,
        cache_read_input_nanos=optional(message, "cache_read_input_nanos"),
        cache_write_input_nanos=optional(message, "cache_write_input_nanos"),
        effective_from=message.effective_from.ToDatetime(tzinfo=UTC) if message.HasField("effective_from") else None,
        source=message.source,
        served=message.served,
    )


def health(message: Int32Value) -> types.Health:
    """From grpc.health.v1's status, in the order of its numbers."""
    statuses = tuple(types.Health)
    return statuses[message.value] if 0 <= message.value < len(statuses) else types.Health.UNKNOWN


def _sampling(message: generation_pb2.SamplingOptions) -> types.SamplingDefaults:
    return types.SamplingDefaults(
        logit_bias=dict(message.logit_bias),
        repetition_penalty=optional(message, "repetition_penalty"),
        presence_penalty=optional(message, "presence_penalty"),
        frequency_penalty=optional(message, "frequency_penalty"),
        temperature=optional(message, "temperature"),
        top_k=optional(message, "top_k"),
        top_p=optional(message, "top_p"),
        min_p=optional(message, "min_p"),
        typical_p=optional(message, "typical_p"),
    )


def _speed(message: models_pb2.MeasuredSpeed) -> types.MeasuredSpeed:
    return types.MeasuredSpeed(
        prefill_tokens_per_second=optional(message, "prefill_tokens_per_second"),
        decode_tokens_per_second=optional(message, "decode_tokens_per_second"),
        time_to_first_token_p50=_seconds(message, "time_to_first_token_p50"),
        time_to_first_token_p99=_seconds(message, "time_to_first_token_p99"),
    )


def cost(message: usage_pb2.Cost) -> types.Cost:
    return types.Cost(
        currency=message.currency,
        charge_nanos=message.charge_nanos,
        cost_nanos=optional(message, "cost_nanos"),
        price_id=message.price_id,
        estimated=optional(message, "estimated"),
    )


def _token_logprob(message: generation_pb2.TokenLogprob) -> types.TokenLogprob:
    return types.TokenLogprob(
        token_id=optional(message, "token_id"),
        token=message.token,
        logprob=message.logprob,
        top=tuple(map(_top_logprob, message.top)),
    )


def _top_logprob(message: generation_pb2.TopLogprob) -> types.TopLogprob:
    return types.TopLogprob(token_id=optional(message, "token_id"), token=message.token, logprob=message.logprob)


def optional(message: ProtoMessage, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _seconds(message: ProtoMessage, field: str) -> float | None:
    return getattr(message, field).ToNanoseconds() / 1e9 if message.HasField(field) else None


def named(names: type[_Name], message: ProtoMessage, field: str) -> _Name | None:
    """An enum's value by name. ``None`` if it is unspecified, or newer than this client."""
    enum_type = message.DESCRIPTOR.fields_by_name[field].enum_type
    assert enum_type is not None
    values = enum_type.values_by_number
    value = values.get(getattr(message, field))
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    return names.__members__.get(value.name.removeprefix(prefix)) if value else None
