"""Requests: from protobuf messages to the domain.

Checks what the domain types cannot see: what is required, what is too large, what is no value at all. Errors name the
field by its path from GenerationSpec.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from google.protobuf import duration_pb2, struct_pb2
from google.protobuf.message import Message

from headrace.backends import formats
from headrace.backends.errors import InvalidArgument
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    ExpiryAction,
    GenerateRequest,
    InfillInput,
    Input,
    LatencyClass,
    NamedTool,
    Reasoning,
    ResponseCaching,
    ResponseOptions,
    Role,
    Sampling,
    Scheduling,
    Stopping,
    TextInput,
    TokenIdsInput,
    ToolCall,
    ToolChoice,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.server.rpc.options import set_fields
from headrace.v1 import accounting_pb2, scoring_pb2
from headrace.v1 import generation_pb2 as pb

MAX_REQUEST_ID = 128
MAX_TOOLS = 128
MAX_TOOL_NAME = 64
MAX_STRUCT_BYTES = 16 * 1024
"""Of ``chat.template_arguments``, and of one backend's ``extensions``."""

_NOT_OPTIONS = ("request_id", "model", "extensions")
"""What every model accepts; ``extensions`` are checked by name."""

_ROLES = {
    pb.ROLE_SYSTEM: Role.SYSTEM,
    pb.ROLE_USER: Role.USER,
    pb.ROLE_ASSISTANT: Role.ASSISTANT,
    pb.ROLE_TOOL: Role.TOOL,
}
# Numbers that the proto does not have are refused by `set_fields`; UNSPECIFIED is the default.
_LATENCY_CLASSES = {
    pb.LATENCY_CLASS_VOICE: LatencyClass.VOICE,
    pb.LATENCY_CLASS_CHAT: LatencyClass.CHAT,
    pb.LATENCY_CLASS_BATCH: LatencyClass.BATCH,
}
_TOOL_CHOICE_MODES = {
    pb.TOOL_CHOICE_MODE_AUTO: ToolChoiceMode.AUTO,
    pb.TOOL_CHOICE_MODE_NONE: ToolChoiceMode.NONE,
    pb.TOOL_CHOICE_MODE_REQUIRED: ToolChoiceMode.REQUIRED,
}
_CACHE_MODES = {pb.CACHE_MODE_USE: True, pb.CACHE_MODE_BYPASS: False}
_EXPIRY_ACTIONS = {
    pb.EXPIRY_ACTION_PARTIAL: ExpiryAction.PARTIAL,
    pb.EXPIRY_ACTION_ERROR: ExpiryAction.ERROR,
}


_UNSET = GenerateRequest(input=TextInput("?"))
"""What holds where a message says nothing, made once."""


def request_id_of(message: pb.GenerationSpec | scoring_pb2.ScoreRequest) -> str | None:
    """The caller's label, or ``None``."""
    if not message.HasField("request_id"):
        return None
    label = message.request_id
    if not 1 <= len(label) <= MAX_REQUEST_ID or not label.isascii() or not label.isprintable():
        raise InvalidArgument("request_id", f"must be 1 to {MAX_REQUEST_ID} printable ASCII characters")
    return label


def to_request(
    wrapper: pb.GenerateRequest
    | pb.GenerateStreamRequest
    | pb.GenerateBatchRequest
    | accounting_pb2.EstimateCostRequest,
    *,
    default_latency_class: LatencyClass = LatencyClass.CHAT,
) -> GenerateRequest:
    """What the message of a generation RPC asks for. Fields beside its ``spec`` and ``index`` are options too."""
    spec = wrapper.spec
    options = set_fields(spec, exclude=_NOT_OPTIONS) | set_fields(wrapper, exclude=("spec", "index"))
    return GenerateRequest(
        input=to_input(spec),
        model=spec.model if spec.HasField("model") else None,
        idempotency_key=spec.idempotency_key if spec.HasField("idempotency_key") else None,
        sampling=_sampling(spec.sampling) if spec.HasField("sampling") else _UNSET.sampling,
        stopping=_stopping(spec.stopping) if spec.HasField("stopping") else _UNSET.stopping,
        output_format=_output_format(spec.structured_output) if spec.HasField("structured_output") else None,
        response=_response(spec.response) if spec.HasField("response") else _UNSET.response,
        scheduling=to_scheduling(spec.scheduling, default_latency_class),
        reasoning=_reasoning(spec.reasoning) if spec.HasField("reasoning") else _UNSET.reasoning,
        seed=spec.determinism.seed if spec.determinism.HasField("seed") else None,
        strict=spec.determinism.strict,
        clamp_to_budget=spec.budget_policy == pb.BUDGET_POLICY_CLAMP,
        use_prefix_cache=spec.cache.prefix != pb.CACHE_MODE_BYPASS,
        response_caching=to_response_caching(spec.cache) if spec.HasField("cache") else _UNSET.response_caching,
        extensions={name: _struct(f"extensions[{name!r}]", value) for name, value in spec.extensions.items()},
        options=options,
        **_given(spec, "n"),
    )


def _output_format(output: pb.StructuredOutput) -> formats.OutputFormat:
    match output.WhichOneof("format"):
        case "json_schema":
            return formats.JsonSchemaFormat(output.json_schema)
        case "json_object":
            return formats.JsonObjectFormat()
        case "regex":
            return formats.RegexFormat(output.regex)
        case "choice":
            return formats.ChoiceFormat(tuple(output.choice.texts))
        case "lark_grammar":
            return formats.LarkFormat(output.lark_grammar)
        case None:
            members = ", ".join(field.name for field in output.DESCRIPTOR.oneofs_by_name["format"].fields)
            raise InvalidArgument("structured_output", f"must be set to one of {members}")
        case other:
            raise AssertionError(f"format {other!r} has no conversion. This is a bug")


def to_input(message: Any) -> Input:
    """The ``input`` oneof of a GenerationSpec, or of another message with some of its members."""
    match message.WhichOneof("input"):
        case "text":
            if not message.text:
                raise InvalidArgument("text", "must not be empty")
            return TextInput(message.text)
        case "token_ids":
            if not message.token_ids.ids:
                raise InvalidArgument("token_ids.ids", "must have at least one token id")
            return TokenIdsInput(tuple(message.token_ids.ids))
        case "chat":
            return _chat(message.chat)
        case "infill":
            if not (message.infill.prefix or message.infill.suffix):
                raise InvalidArgument("infill", "must have a prefix or a suffix")
            return InfillInput(message.infill.prefix, message.infill.suffix)
        case None:
            members = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name["input"].fields)
            raise InvalidArgument("input", f"must be set to one of {members}")
        case other:
            raise AssertionError(f"input {other!r} has no conversion. This is a bug")


def _sampling(options: pb.SamplingOptions) -> Sampling:
    return Sampling(
        logit_bias=dict(options.logit_bias),
        **_given(
            options,
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ),
    )


def _stopping(options: pb.StoppingOptions) -> Stopping:
    return Stopping(
        stop_sequences=tuple(options.stop_sequences),
        stop_token_ids=tuple(options.stop_token_ids),
        time_limit=_seconds("stopping.time_limit", options, "time_limit"),
        **_given(options, "max_new_tokens", "min_new_tokens", "ignore_eos", "include_stop_sequence"),
    )


def _response(options: pb.ResponseOptions) -> ResponseOptions:
    return ResponseOptions(**_given(options, "logprobs", "top_logprobs", "token_ids", "echo", "usage_interval"))


def _reasoning(options: pb.ReasoningOptions) -> Reasoning:
    return Reasoning(**_given(options, "enabled", "max_reasoning_tokens", "include_text"))


def to_scheduling(options: pb.SchedulingOptions, default_latency_class: LatencyClass) -> Scheduling:
    """The SchedulingOptions of a request."""
    return Scheduling(
        latency_class=_LATENCY_CLASSES.get(options.latency_class, default_latency_class),
        queue_timeout=_seconds("scheduling.queue_timeout", options, "queue_timeout"),
        on_expiry=_EXPIRY_ACTIONS.get(options.on_expiry, ExpiryAction.PARTIAL),
        **_given(options, "priority"),
    )


def to_response_caching(policy: pb.CachePolicy) -> ResponseCaching:
    return ResponseCaching(
        enabled=_CACHE_MODES.get(policy.response),
        max_age=_seconds("cache.response_max_age", policy, "response_max_age"),
        ttl=_seconds("cache.response_ttl", policy, "response_ttl"),
        no_store=policy.response_no_store,
        namespace=policy.response_namespace,
    )


def _chat(chat: pb.ChatInput) -> ChatInput:
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidArgument("chat.tools", f"must have at most {MAX_TOOLS} entries, got {len(chat.tools)}")
    return ChatInput(
        messages=tuple(_chat_message(f"chat.messages[{i}]", message) for i, message in enumerate(chat.messages)),
        tools=tuple(_tool(f"chat.tools[{i}]", tool) for i, tool in enumerate(chat.tools)),
        tool_choice=_tool_choice(chat),
        template_arguments=_struct("chat.template_arguments", chat.template_arguments),
        **_given(chat, "add_generation_prompt"),
    )


def _chat_message(path: str, message: pb.ChatMessage) -> ChatMessage:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidArgument(f"{path}.role", "must be set")
    if not message.content and not message.tool_calls:
        raise InvalidArgument(f"{path}.content", "must have at least one part")
    for i, part in enumerate(message.content):
        if part.WhichOneof("part") is None:
            raise InvalidArgument(f"{path}.content[{i}]", "must be set to one of text")
    return ChatMessage(
        role=role,
        text="".join(part.text for part in message.content),
        tool_calls=tuple(ToolCall(call.id, call.name, call.arguments_json) for call in message.tool_calls),
        **_given(message, "name", "tool_call_id", "reasoning_text"),
    )


def _tool(path: str, tool: pb.ToolDefinition) -> ToolDefinition:
    if not re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_TOOL_NAME}}}", tool.name):
        raise InvalidArgument(f"{path}.name", f"must be 1 to {MAX_TOOL_NAME} letters, digits, '_' or '-'")
    return ToolDefinition(name=tool.name, **_given(tool, "description", "parameters_json_schema"))


def _tool_choice(chat: pb.ChatInput) -> ToolChoice:
    if not chat.HasField("tool_choice"):
        return ToolChoiceMode.AUTO
    choice = chat.tool_choice
    if choice.WhichOneof("choice") == "name":
        return NamedTool(choice.name)
    mode = _TOOL_CHOICE_MODES.get(choice.mode)
    if mode is None:
        raise InvalidArgument("chat.tool_choice", "must be set to a mode or the name of a tool")
    return mode


def _given(message: Message, *names: str) -> dict[str, Any]:
    """The optional fields that are set; the domain's defaults hold for the others. Both use the same names."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _seconds(path: str, message: Message, name: str) -> float | None:
    if not message.HasField(name):
        return None
    duration: duration_pb2.Duration = getattr(message, name)
    if duration.seconds < 0 or duration.nanos < 0:
        raise InvalidArgument(path, f"must not be negative, got {duration.seconds + duration.nanos / 1e9:g} s")
    if duration.nanos > 999_999_999:
        raise InvalidArgument(path, f"nanos must be at most 999999999, got {duration.nanos}")
    return duration.seconds + duration.nanos / 1e9


def _struct(path: str, struct: struct_pb2.Struct) -> dict[str, Any]:
    """Protobuf bounds the nesting when it parses."""
    if (size := struct.ByteSize()) > MAX_STRUCT_BYTES:
        raise InvalidArgument(path, f"must have at most {MAX_STRUCT_BYTES} bytes, got {size}")
    return {name: _plain(value) for name, value in struct.fields.items()}


def _plain(value: struct_pb2.Value) -> Any:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            # JSON has one kind of number; a template that prints 3 should not print 3.0.
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        case "struct_value":
            return {name: _plain(member) for name, member in value.struct_value.fields.items()}
        case "list_value":
            entries: Iterable[struct_pb2.Value] = value.list_value.values
            return [_plain(entry) for entry in entries]
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case _:
            return None
