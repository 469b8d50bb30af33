"""The options of a generation: their names, types, and the field of GenerationSpec that each one sets.

``Options`` is the one table: type checkers read it as the keyword arguments of the client's methods, and
``apply`` reads the paths in it. What an option means is written at its field in ``generation.proto``.
``None`` leaves an option unset.
"""

from __future__ import annotations

import datetime as dt
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Protocol, TypedDict, get_type_hints

from google.protobuf.message import Message as ProtoMessage

from headrace.client.types import BudgetPolicy, CacheMode, ExpiryAction, LatencyClass, ToolDefinition
from headrace.v1 import generation_pb2, scoring_pb2

Put = Callable[[Any, str, Any], None]
"""Puts a value into a field (by name) of a message."""


@dataclass(frozen=True, slots=True)
class At:
    """Where an option goes: a path from GenerationSpec."""

    path: str
    put: Put


def _value(message: ProtoMessage, field: str, value: Any) -> None:
    setattr(message, field, value)


def _values(message: ProtoMessage, field: str, values: Any) -> None:
    message.ClearField(field)
    getattr(message, field).extend([values] if isinstance(values, str) else values)


def _entries(message: ProtoMessage, field: str, entries: Mapping[Any, Any]) -> None:
    message.ClearField(field)
    getattr(message, field).update(entries)


def _structs(message: ProtoMessage, field: str, structs: Mapping[str, Mapping[str, Any]]) -> None:
    message.ClearField(field)
    for key, struct in structs.items():
        getattr(message, field)[key].update(struct)


def _struct(message: ProtoMessage, field: str, struct: Mapping[str, Any]) -> None:
    message.ClearField(field)
    getattr(message, field).update(struct)


def _seconds(message: ProtoMessage, field: str, value: float | dt.timedelta) -> None:
    seconds = value.total_seconds() if isinstance(value, dt.timedelta) else value
    getattr(message, field).FromNanoseconds(round(seconds * 1e9))


def _named(message: ProtoMessage, field: str, value: str) -> None:
    enum_type = message.DESCRIPTOR.fields_by_name[field].enum_type
    assert enum_type is not None
    values = enum_type.values_by_name
    prefix = next(iter(values)).removesuffix("UNSPECIFIED")
    chosen = values.get(f"{prefix}{value.upper()}")
    if chosen is None or chosen.number == 0:
        names = [name.removeprefix(prefix).lower() for name, v in values.items() if v.number]
        raise ValueError(f"must be one of {', '.join(names)}; got {value!r}")
    setattr(message, field, chosen.number)


def _present(message: ProtoMessage, field: str, value: bool) -> None:
    if value:
        getattr(message, field).SetInParent()


class HasJsonSchema(Protocol):
    """A class that knows its JSON schema, such as a pydantic model."""

    def model_json_schema(self) -> Mapping[str, Any]: ...


def _json_schema(message: ProtoMessage, field: str, value: str | Mapping[str, Any] | HasJsonSchema) -> None:
    if not isinstance(value, str | Mapping):
        value = value.model_json_schema()
    setattr(message, field, value if isinstance(value, str) else json.dumps(value))


def _tools(message: ProtoMessage, field: str, tools: Iterable[ToolDefinition | Mapping[str, Any]]) -> None:
    message.ClearField(field)
    for tool in tools:
        definition = tool if isinstance(tool, ToolDefinition) else ToolDefinition(**tool)
        added = getattr(message, field).add(name=definition.name, description=definition.description)
        if definition.parameters_json_schema is not None:
            _json_schema(added, "parameters_json_schema", definition.parameters_json_schema)


def _tool_choice(message: ProtoMessage, field: str, value: str | Mapping[str, str]) -> None:
    choice = getattr(message, field)
    if isinstance(value, str):
        _named(choice, "mode", value)
    else:
        choice.name = value["name"]


class ChatOptions(TypedDict, total=False):
    """Options that a conversation takes, wherever it is used."""

    tools: Annotated[Sequence[ToolDefinition | Mapping[str, Any]] | None, At("chat.tools", _tools)]
    tool_choice: Annotated[str | Mapping[str, str] | None, At("chat.tool_choice", _tool_choice)]
    add_generation_prompt: Annotated[bool | None, At("chat.add_generation_prompt", _value)]
    template_arguments: Annotated[Mapping[str, Any] | None, At("chat.template_arguments", _struct)]


class Options(ChatOptions, total=False):
    """Options of a generation."""

    request_id: Annotated[str | None, At("request_id", _value)]
    idempotency_key: Annotated[str | None, At("idempotency_key", _value)]
    model: Annotated[str | None, At("model", _value)]
    n: Annotated[int | None, At("n", _value)]
    budget_policy: Annotated[BudgetPolicy | str | None, At("budget_policy", _named)]
    extensions: Annotated[Mapping[str, Mapping[str, Any]] | None, At("extensions", _structs)]

    logit_bias: Annotated[Mapping[int, float] | None, At("sampling.logit_bias", _entries)]
    repetition_penalty: Annotated[float | None, At("sampling.repetition_penalty", _value)]
    presence_penalty: Annotated[float | None, At("sampling.presence_penalty", _value)]
    frequency_penalty: Annotated[float | None, At("sampling.frequency_penalty", _value)]
    temperature: Annotated[float | None, At("sampling.temperature", _value)]
    top_k: Annotated[int | None, At("sampling.top_k", _value)]
    top_p: Annotated[float | None, At("sampling.top_p", _value)]
    min_p: Annotated[float | None, At("sampling.min_p", _value)]
    typical_p: Annotated[float | None, At("sampling.typical_p", _value)]

    max_new_tokens: Annotated[int | None, At("stopping.max_new_tokens", _value)]
    min_new_tokens: Annotated[int | None, At("stopping.min_new_tokens", _value)]
    stop_sequences: Annotated[str | Sequence[str] | None, At("stopping.stop_sequences", _values)]
    stop_token_ids: Annotated[Sequence[int] | None, At("stopping.stop_token_ids", _values)]
    ignore_eos: Annotated[bool | None, At("stopping.ignore_eos", _value)]
    include_stop_sequence: Annotated[bool | None, At("stopping.include_stop_sequence", _value)]
    time_limit: Annotated[float | dt.timedelta | None, At("stopping.time_limit", _seconds)]

    json_schema: Annotated[
        str | Mapping[str, Any] | HasJsonSchema | None, At("structured_output.json_schema", _json_schema)
    ]
    json_object: Annotated[bool | None, At("structured_output.json_object", _present)]
    regex: Annotated[str | None, At("structured_output.regex", _value)]
    choice: Annotated[Sequence[str] | None, At("structured_output.choice.texts", _values)]
    lark_grammar: Annotated[str | None, At("structured_output.lark_grammar", _value)]

    reasoning: Annotated[bool | None, At("reasoning.enabled", _value)]
    max_reasoning_tokens: Annotated[int | None, At("reasoning.max_reasoning_tokens", _value)]
    include_reasoning_text: Annotated[bool | None, At("reasoning.include_text", _value)]

    logprobs: Annotated[bool | None, At("response.logprobs", _value)]
    top_logprobs: Annotated[int | None, At("response.top_logprobs", _value)]
    token_ids: Annotated[bool | None, At("response.token_ids", _value)]
    echo: Annotated[bool | None, At("response.echo", _value)]
    usage_interval: Annotated[int | None, At("response.usage_interval", _value)]

    latency_class: Annotated[LatencyClass | str | None, At("scheduling.latency_class", _named)]
    priority: Annotated[int | None, At("scheduling.priority", _value)]
    queue_timeout: Annotated[float | dt.timedelta | None, At("scheduling.queue_timeout", _seconds)]
    on_expiry: Annotated[ExpiryAction | str | None, At("scheduling.on_expiry", _named)]

    seed: Annotated[int | None, At("determinism.seed", _value)]
    strict: Annotated[bool | None, At("determinism.strict", _value)]

    prefix_cache: Annotated[CacheMode | str | None, At("cache.prefix", _named)]
    response_cache: Annotated[CacheMode | str | None, At("cache.response", _named)]
    response_cache_max_age: Annotated[float | dt.timedelta | None, At("cache.response_max_age", _seconds)]
    response_cache_ttl: Annotated[float | dt.timedelta | None, At("cache.response_ttl", _seconds)]
    response_cache_no_store: Annotated[bool | None, At("cache.response_no_store", _value)]
    response_cache_namespace: Annotated[str | None, At("cache.response_namespace", _value)]


class ScoreOptions(ChatOptions, total=False):
    """Options of a scoring, by the fields of ScoreRequest."""

    request_id: Annotated[str | None, At("request_id", _value)]
    idempotency_key: Annotated[str | None, At("idempotency_key", _value)]
    model: Annotated[str | None, At("model", _value)]

    tokens: Annotated[bool | None, At("response.tokens", _value)]
    top_logprobs: Annotated[int | None, At("response.top_logprobs", _value)]

    latency_class: Annotated[LatencyClass | str | None, At("scheduling.latency_class", _named)]
    priority: Annotated[int | None, At("scheduling.priority", _value)]
    queue_timeout: Annotated[float | dt.timedelta | None, At("scheduling.queue_timeout", _seconds)]

    strict: Annotated[bool | None, At("determinism.strict", _value)]

    prefix_cache: Annotated[CacheMode | str | None, At("cache.prefix", _named)]
    response_cache: Annotated[CacheMode | str | None, At("cache.response", _named)]
    response_cache_max_age: Annotated[float | dt.timedelta | None, At("cache.response_max_age", _seconds)]
    response_cache_ttl: Annotated[float | dt.timedelta | None, At("cache.response_ttl", _seconds)]
    response_cache_no_store: Annotated[bool | None, At("cache.response_no_store", _value)]
    response_cache_namespace: Annotated[str | None, At("cache.response_namespace", _value)]


OPTIONS: Final[Mapping[str, At]] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()
}
SCORE_OPTIONS: Final[Mapping[str, At]] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(ScoreOptions, include_extras=True).items()
}
CHAT_OPTIONS: Final = {name: OPTIONS[name] for name in ChatOptions.__annotations__}

_ELSEWHERE: Final = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "stop": "stop_sequences",
    "typical": "typical_p",
    "deadline": "timeout",
}
"""What other libraries call our options."""


def apply(
    spec: generation_pb2.GenerationSpec | scoring_pb2.ScoreRequest,
    options: Mapping[str, Any],
    table: Mapping[str, At] = OPTIONS,
) -> None:
    """Sets options on a request whose input is set. Raises TypeError for an unknown name or a value of the wrong type,
    ValueError for a value that cannot be; each names the option.
    """
    for name, value in options.items():
        at = table.get(name)
        if at is None:
            raise TypeError(_unknown(name, table))
        if value is not None:
            _apply(spec, name, at, value)


def _apply(spec: generation_pb2.GenerationSpec | scoring_pb2.ScoreRequest, name: str, at: At, value: Any) -> None:
    *parents, field = at.path.split(".")
    if parents == ["chat"] and not spec.HasField("chat"):
        raise ValueError(f"{name}: needs a conversation as the prompt")
    if isinstance(spec, generation_pb2.GenerationSpec) and parents[:1] == ["structured_output"]:
        _refuse_second_format(spec, name, at)
    message: Any = spec
    for parent in parents:
        message = getattr(message, parent)
    try:
        at.put(message, field, value)
    except (TypeError, AttributeError, KeyError) as error:
        raise TypeError(f"{name}: cannot be {value!r} ({error})") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _refuse_second_format(spec: generation_pb2.GenerationSpec, name: str, at: At) -> None:
    chosen = spec.structured_output.WhichOneof("format") if spec.HasField("structured_output") else None
    if chosen and chosen != at.path.split(".")[1]:
        raise ValueError(f"{name}: the output can have one shape only, and {chosen} is set already")


def _unknown(name: str, table: Mapping[str, At]) -> str:
    names = [*table, "timeout"]
    close = difflib.get_close_matches(name, names, n=1)
    meant = _ELSEWHERE.get(name) or (close[0] if close else None)
    hint = f"did you mean {meant!r}?" if meant in names else f"there is {', '.join(sorted(names))}"
    return f"unknown option {name!r}; {hint}"
