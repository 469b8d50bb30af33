"""Answers: from the domain to protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from google.protobuf import duration_pb2

from headrace.backends.events import ChoiceFinish, Delta, TokenLogprob, ToolCallDelta
from headrace.backends.types import Call
from headrace.backends.usage import Attempt, CacheStatus, Usage
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import usage_pb2

_COUNTS = (
    "input_tokens",
    "cache_read_input_tokens",
    "cache_write_input_tokens",
    "output_tokens",
    "reasoning_output_tokens",
    "sent_output_tokens",
    "accepted_draft_tokens",
    "rejected_draft_tokens",
)


def prompt_message(call: Call) -> pb.Prompt:
    """The prompt as the model saw it. Only after the first event: ``call.prompt`` is known then."""
    if call.prompt is None:
        raise RuntimeError("events came without a prompt having been set. This is a bug")
    return pb.Prompt(text=call.prompt.text, token_ids=call.prompt.token_ids if call.request.response.token_ids else ())


def delta_message(delta: Delta, *, token_ids: bool) -> pb.Delta:
    """``token_ids`` says whether the caller asked for them."""
    return pb.Delta(
        choice_index=delta.choice,
        text=delta.text,
        token_ids=delta.token_ids if token_ids else (),
        logprobs=_logprob_messages(delta.logprobs),
        reasoning_text=delta.reasoning_text or None,
        tool_calls=[
            pb.ToolCallDelta(index=call.index, id=call.id, name=call.name, arguments_json=call.arguments_json)
            for call in delta.tool_calls
        ],
    )


def finish_message(finish: ChoiceFinish) -> pb.ChoiceFinish:
    return pb.ChoiceFinish(
        choice_index=finish.choice,
        reason=f"FINISH_REASON_{finish.reason.name}",
        stop_sequence=finish.stop_sequence,
        stop_token_id=finish.stop_token_id,
        seed=finish.seed,
    )


@dataclass(slots=True)
class ChoiceBuilder:
    """Puts one choice together from its deltas."""

    token_ids: bool
    """Whether the caller asked for them."""
    _texts: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: dict[int, list[ToolCallDelta]] = field(default_factory=dict)
    _message: pb.Choice = field(default_factory=pb.Choice)

    def add(self, event: Delta | ChoiceFinish) -> None:
        if isinstance(event, ChoiceFinish):
            self._message.finish.CopyFrom(finish_message(event))
            return
        self._texts.append(event.text)
        self._reasoning.append(event.reasoning_text)
        for call in event.tool_calls:
            self._calls.setdefault(call.index, []).append(call)
        if self.token_ids:
            self._message.token_ids.extend(event.token_ids)
        self._message.logprobs.extend(_logprob_messages(event.logprobs))

    def build(self, index: int) -> pb.Choice:
        self._message.index = index
        self._message.text = "".join(self._texts)
        if reasoning := "".join(self._reasoning):
            self._message.reasoning_text = reasoning
        for _, deltas in sorted(self._calls.items()):
            arguments = "".join(delta.arguments_json for delta in deltas)
            self._message.tool_calls.add(id=deltas[0].id, name=deltas[0].name, arguments_json=arguments)
        return self._message


def usage_message(usage: Usage) -> usage_pb2.Usage:
    """``None`` ("not reported") stays unset."""
    message = usage_pb2.Usage(**{name: getattr(usage, name) for name in _COUNTS})
    if usage.estimated:
        message.estimated = True
    return message


def report_message(call: Call, *, now: float) -> pb.GenerationReport:
    """What ``call`` used and where it ran. ``now`` is its end, on the call's clock."""
    usage = call.meter.usage()
    model = call.model
    return pb.GenerationReport(
        request_id=call.request_id,
        usage=usage_message(usage),
        timings=_timings_message(call, usage.output_tokens, now),
        backend=_backend(call),
        model=model.card.name if model is not None else None,
        model_digest=model.card.digest if model is not None else None,
        determinism_class=f"DETERMINISM_CLASS_{model.determinism.name}" if model is not None else None,
        cache_status=None if call.meter.cache is None else f"CACHE_STATUS_{call.meter.cache.name}",
        attempts=[_attempt_message(attempt) for attempt in call.meter.attempts],
        cost=cost_message(call),
    )


def _backend(call: Call) -> str | None:
    """Of what answered: now, or when the answer was stored."""
    if call.meter.attempts:
        return call.meter.attempts[-1].backend
    return call.model.backend if call.meter.cache is CacheStatus.HIT and call.model is not None else None


def cost_message(call: Call) -> usage_pb2.Cost | None:
    """What ``call`` costs so far. What a provider bills is the operator's business alone."""
    cost = call.meter.cost
    if cost is None:
        return None
    message = usage_pb2.Cost(currency=cost.currency, charge_nanos=cost.charge_nanos, price_id=cost.price_id)
    if cost.cost_nanos is not None and call.principal.operator:
        message.cost_nanos = cost.cost_nanos
    if cost.estimated:
        message.estimated = True
    return message


def _timings_message(call: Call, output_tokens: int | None, now: float) -> usage_pb2.Timings:
    meter = call.meter
    timings = usage_pb2.Timings(
        queue=_duration(call.arrived, meter.started),
        prefill=_duration(meter.started, meter.first_token),
        time_to_first_token=_duration(call.arrived, meter.first_token),
        time_to_first_answer_token=_duration(call.arrived, meter.first_answer_token),
        decode=_duration(meter.first_token, meter.last_token),
        total=_duration(call.arrived, now),
    )
    if meter.first_token is not None and meter.last_token is not None and output_tokens is not None:
        decode = meter.last_token - meter.first_token
        if output_tokens >= 2 and decode > 0:
            timings.output_tokens_per_second = (output_tokens - 1) / decode
    return timings


def duration_message(seconds: float | None) -> duration_pb2.Duration | None:
    if seconds is None:
        return None
    whole, nanos = divmod(round(seconds * 1e9), 1_000_000_000)
    return duration_pb2.Duration(seconds=whole, nanos=nanos)


def _duration(start: float | None, end: float | None) -> duration_pb2.Duration | None:
    return None if start is None or end is None else duration_message(end - start)


def _attempt_message(attempt: Attempt) -> usage_pb2.Attempt:
    return usage_pb2.Attempt(
        backend=attempt.backend,
        model=attempt.model,
        price_id=attempt.price_id,
        usage=usage_message(attempt.usage),
        outcome=None if attempt.outcome is None else f"ATTEMPT_OUTCOME_{attempt.outcome.name}",
    )


def _logprob_messages(logprobs: Sequence[TokenLogprob]) -> Iterable[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=entry.token_id,
            token=entry.token,
            logprob=entry.logprob,
            top=[pb.TopLogprob(token_id=top.token_id, token=top.token, logprob=top.logprob) for top in entry.top],
        )
        for entry in logprobs
    ]
