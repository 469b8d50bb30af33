"""Between the domain and the messages of ``headrace.backend.v1``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError, Message

from headrace.backend.v1 import backend_pb2 as pb
from headrace.backends.api import DeterminismClass, ModelCard
from headrace.backends.errors import BackendError
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, TokenLogprob, ToolCallDelta, TopLogprob
from headrace.backends.requests import ChatInput, ExpiryAction, LatencyClass, NamedTool, Role, ToolChoiceMode
from headrace.backends.types import Call
from headrace.backends.usage import Usage
from headrace.v1 import generation_pb2 as public

CARRIED_OPTIONS = frozenset(
    {
        "text",
        "token_ids.ids",
        "chat.messages.role",
        "chat.messages.content.text",
        "chat.messages.name",
        "chat.messages.tool_calls.id",
        "chat.messages.tool_calls.name",
        "chat.messages.tool_calls.arguments_json",
        "chat.messages.tool_call_id",
        "chat.messages.reasoning_text",
        "chat.tools.name",
        "chat.tools.description",
        "chat.tools.parameters_json_schema",
        "chat.tool_choice.mode",
        "chat.tool_choice.name",
        "chat.add_generation_prompt",
        "chat.template_arguments",
        "sampling.logit_bias",
        "sampling.repetition_penalty",
        "sampling.presence_penalty",
        "sampling.frequency_penalty",
        "sampling.temperature",
        "sampling.top_k",
        "sampling.top_p",
        "sampling.min_p",
        "sampling.typical_p",
        "stopping.max_new_tokens",
        "stopping.min_new_tokens",
        "stopping.stop_sequences",
        "stopping.stop_token_ids",
        "stopping.ignore_eos",
        "stopping.include_stop_sequence",
        "stopping.time_limit",
        "n",
        "reasoning.enabled",
        "reasoning.max_reasoning_tokens",
        "reasoning.include_text",
        "response.logprobs",
        "response.top_logprobs",
        "response.token_ids",
        "scheduling.latency_class",
        "scheduling.priority",
        "scheduling.queue_timeout",
        "scheduling.on_expiry",
        "determinism.seed",
    }
)
"""What ``to_request`` hands over. A worker that declares another option is refused: it would never see it."""

_ROLES = {
    Role.SYSTEM: public.ROLE_SYSTEM,
    Role.USER: public.ROLE_USER,
    Role.ASSISTANT: public.ROLE_ASSISTANT,
    Role.TOOL: public.ROLE_TOOL,
}
_LATENCY_CLASSES = {
    LatencyClass.VOICE: public.LATENCY_CLASS_VOICE,
    LatencyClass.CHAT: public.LATENCY_CLASS_CHAT,
    LatencyClass.BATCH: public.LATENCY_CLASS_BATCH,
}
_REASONS = {public.FinishReason.Value(f"FINISH_REASON_{reason.name}"): reason for reason in FinishReason}
_TOOL_CHOICE_MODES = {
    ToolChoiceMode.AUTO: public.TOOL_CHOICE_MODE_AUTO,
    ToolChoiceMode.NONE: public.TOOL_CHOICE_MODE_NONE,
    ToolChoiceMode.REQUIRED: public.TOOL_CHOICE_MODE_REQUIRED,
}
_COUNTS = [field.name for field in dataclasses.fields(Usage) if field.name not in {"sent_output_tokens", "estimated"}]


def to_request(call: Call, *, tokenized: bool, now: float) -> pb.GenerateRequest:
    """What a worker gets of a call; ``tokenized`` says whether its model has a tokenizer."""
    assert call.model is not None
    assert call.prompt is not None
    request = call.request
    spec = public.GenerationSpec(request_id=call.request_id, model=call.model.card.name)
    if tokenized:
        spec.token_ids.ids.extend(call.prompt.token_ids)
    elif isinstance(request.input, ChatInput):
        spec.chat.CopyFrom(to_chat(request.input))
    else:
        spec.text = call.prompt.text
    _fill(spec.sampling, request.sampling)
    _fill(spec.stopping, dataclasses.replace(request.stopping, max_new_tokens=call.max_new_tokens, time_limit=None))
    if request.stopping.time_limit is not None:
        left = call.arrived + request.stopping.time_limit - now
        spec.stopping.time_limit.FromNanoseconds(max(1, round(left * 1e9)))
    _fill(spec.reasoning, request.reasoning)
    _fill(spec.response, dataclasses.replace(request.response, echo=False, usage_interval=None))
    scheduling = request.scheduling
    spec.scheduling.latency_class = _LATENCY_CLASSES[scheduling.latency_class]
    if scheduling.on_expiry is ExpiryAction.ERROR:
        spec.scheduling.on_expiry = public.EXPIRY_ACTION_ERROR
    if scheduling.priority:
        spec.scheduling.priority = scheduling.priority
    if scheduling.queue_timeout is not None:
        spec.scheduling.queue_timeout.FromNanoseconds(round(scheduling.queue_timeout * 1e9))
    if request.n != 1:
        spec.n = request.n
    if request.seed is not None:
        spec.determinism.seed = request.seed
    for name, values in request.extensions.items():
        spec.extensions[name].update(values)
    prompt_text = call.prompt.text if tokenized else None
    return pb.GenerateRequest(spec=spec, prompt_text=prompt_text, tenant=call.principal.tenant)


def to_chat(chat: ChatInput) -> public.ChatInput:
    message = public.ChatInput(
        messages=[
            public.ChatMessage(
                role=_ROLES[turn.role],
                content=[public.ContentPart(text=turn.text)],
                name=turn.name,
                tool_calls=[
                    public.ToolCall(id=made.id, name=made.name, arguments_json=made.arguments_json)
                    for made in turn.tool_calls
                ],
                tool_call_id=turn.tool_call_id,
                reasoning_text=turn.reasoning_text,
            )
            for turn in chat.messages
        ],
        tools=[
            public.ToolDefinition(
                name=tool.name, description=tool.description, parameters_json_schema=tool.parameters_json_schema
            )
            for tool in chat.tools
        ],
        add_generation_prompt=chat.add_generation_prompt,
    )
    message.template_arguments.update(chat.template_arguments)
    if isinstance(chat.tool_choice, NamedTool):
        message.tool_choice.name = chat.tool_choice.name
    elif chat.tool_choice is not ToolChoiceMode.AUTO:
        message.tool_choice.mode = _TOOL_CHOICE_MODES[chat.tool_choice]
    return message


def _fill(message: Message, options: Any) -> None:
    """Sets what differs from the defaults. The domain's dataclasses and the messages have the same names."""
    defaults = type(options)()
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == getattr(defaults, field.name):
            continue
        if isinstance(value, tuple):
            getattr(message, field.name).extend(value)
        elif isinstance(value, Mapping):
            getattr(message, field.name).update(value)
        else:
            setattr(message, field.name, value)


def to_card(model: pb.Model) -> ModelCard:
    """What Describe says of a model. Raises BackendError where it cannot be."""
    if not model.name:
        raise BackendError("a model has no name")
    if model.context_length < 2:  # one token of prompt, one of output
        raise BackendError(f"model {model.name!r}: context_length must be at least 2, got {model.context_length}")
    if model.HasField("tokenizer") and not model.tokenizer.vocabulary_size:
        raise BackendError(f"model {model.name!r}: tokenizer.vocabulary_size must be set")
    if foreign := set(model.options) - CARRIED_OPTIONS:
        raise BackendError(
            f"model {model.name!r}: options: {', '.join(map(repr, sorted(foreign)))} cannot be handed to a worker; "
            f"there is {', '.join(sorted(CARRIED_OPTIONS))}"
        )
    known = ("digest", "architecture", "quantization", "parameter_count", "license")
    return ModelCard(
        name=model.name,
        context_length=model.context_length,
        **{name: getattr(model, name) for name in known if model.HasField(name)},
    )


def to_determinism(model: pb.Model) -> DeterminismClass:
    exact = model.determinism_class == public.DETERMINISM_CLASS_BIT_EXACT
    return DeterminismClass.BIT_EXACT if exact else DeterminismClass.BEST_EFFORT


class StreamReader:
    """Reads a worker's stream, and insists that it keeps the contract: what breaks it raises BackendError."""

    def __init__(self, call: Call, usage: Usage) -> None:
        """``usage`` is written as counts come."""
        self._usage = usage
        self._unreported = {"input_tokens", "output_tokens"}
        self._unfinished = set(range(call.request.n))
        self._num_calls = dict.fromkeys(self._unfinished, 0)
        """Of tools, by choice."""
        self._max_output_tokens = call.request.n * call.max_new_tokens

    def read(self, raw: bytes) -> Delta | ChoiceFinish | None:
        """The event of one message, if it has one."""
        try:
            message = pb.GenerateResponse.FromString(raw)
        except DecodeError:
            raise _broken("a message that cannot be read (strings must be UTF-8)") from None
        if message.HasField("usage"):
            self._count(message)
        kind = message.WhichOneof("event")
        if kind is None:
            return None
        event = message.delta if kind == "delta" else message.finish
        if event.choice_index not in self._unfinished:
            raise _broken(f"a {kind} of choice {event.choice_index}, which is finished or was never asked for")
        return self._delta(message.delta) if kind == "delta" else self._finish(message.finish)

    def end(self) -> None:
        """The worker says that it is done."""
        if self._unfinished:
            raise _broken(f"its end before choice {min(self._unfinished)} was finished")
        if self._unreported:
            raise _broken(f"its end and no {min(self._unreported)}")

    def _count(self, message: pb.GenerateResponse) -> None:
        counts = message.usage
        for name in _COUNTS:
            if counts.HasField(name):
                new, old = getattr(counts, name), getattr(self._usage, name)
                if old is not None and new < old:
                    raise _broken(f"{name} {new} after {old}")
                setattr(self._usage, name, new)
                self._unreported.discard(name)
        self._usage.estimated = counts.estimated
        if (self._usage.output_tokens or 0) > self._max_output_tokens:
            raise _broken(f"{self._usage.output_tokens} output tokens, where {self._max_output_tokens} were allowed")

    def _delta(self, delta: public.Delta) -> Delta:
        logprobs = tuple(
            TokenLogprob(
                _optional(entry, "token_id"),
                entry.token,
                entry.logprob,
                tuple(TopLogprob(_optional(top, "token_id"), top.token, top.logprob) for top in entry.top),
            )
            for entry in delta.logprobs
        )
        calls = tuple(self._call(delta.choice_index, call) for call in delta.tool_calls)
        return Delta(delta.choice_index, delta.text, tuple(delta.token_ids), logprobs, delta.reasoning_text, calls)

    def _call(self, choice: int, call: public.ToolCallDelta) -> ToolCallDelta:
        num_calls = self._num_calls[choice]
        if call.index > num_calls or (call.index == num_calls) != (bool(call.id) and bool(call.name)):
            raise _broken(f"tool call {call.index} after {num_calls}; the first part of each has its id and its name")
        if call.index < num_calls:
            return ToolCallDelta(call.index, arguments_json=call.arguments_json)
        self._num_calls[choice] += 1
        return ToolCallDelta(call.index, call.id, call.name, call.arguments_json)

    def _finish(self, finish: public.ChoiceFinish) -> ChoiceFinish:
        if finish.reason not in _REASONS:
            raise _broken(f"a finish with reason {finish.reason}")
        self._unfinished.remove(finish.choice_index)
        given = ("stop_sequence", "stop_token_id", "seed")
        return ChoiceFinish(
            finish.choice_index,
            _REASONS[finish.reason],
            **{name: getattr(finish, name) for name in given if finish.HasField(name)},
        )


def _optional(message: public.TokenLogprob | public.TopLogprob, name: str) -> int | None:
    return getattr(message, name) if message.HasField(name) else None


def _broken(what: str) -> BackendError:
    return BackendError(f"the backend's worker broke the contract: it sent {what}")
