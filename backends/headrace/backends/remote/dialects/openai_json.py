"""What the dialects of the OpenAI family have in common: parts of requests, usage, errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import JsonObjectFormat, JsonSchemaFormat
from headrace.backends.remote.dialect import Problem, StreamFailed
from headrace.backends.remote.dialects.chat import json_object, stand_in
from headrace.backends.remote.dialects.counts import count
from headrace.backends.types import Call, ChatInput, GenerateRequest, NamedTool, Role, ToolDefinition, Usage

MAX_SEED = 2**63 - 1
"""Their seeds are signed; ours are not."""
MAX_ID = 40
"""Characters of a call's id."""
_STATUSES = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "authentication_error": 401,
    "insufficient_quota": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "server_error": 500,
    "overloaded_error": 503,
}
"""What an error in a stream would have been as an answer, by its code or its type."""


# --- requests --------------------------------------------------------------------------------------------------------


def bearer(key: str | None) -> Mapping[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def sampling_of(request: GenerateRequest, keys: Mapping[str, str], *, max_temperature: float = 2.0) -> dict[str, Any]:
    """The fields of ``request.sampling`` that the caller set. ``keys`` says what each is called there. Raises
    InvalidArgument for a temperature that they refuse.
    """
    sampling, fields = request.sampling, {}
    if sampling.temperature is not None and sampling.temperature > max_temperature:
        problem = f"must be at most {max_temperature:g} at this provider, got {sampling.temperature:g}"
        raise InvalidArgument("sampling.temperature", problem)
    for name, key in keys.items():
        if f"sampling.{name}" in request.options:
            fields[key] = getattr(sampling, name)
    return fields


def logit_bias_of(request: GenerateRequest) -> dict[str, Any]:
    bias = request.sampling.logit_bias
    return {"logit_bias": {str(token_id): value for token_id, value in bias.items()}} if bias else {}


def stop_of(request: GenerateRequest, *, most: int | None = None) -> dict[str, Any]:
    """Raises InvalidArgument for more than ``most`` stop sequences."""
    stops = request.stopping.stop_sequences
    if most is not None and len(stops) > most:
        problem = f"must have at most {most} entries at this provider, got {len(stops)}"
        raise InvalidArgument("stopping.stop_sequences", problem)
    return {"stop": list(stops)} if stops else {}


def seed_of(request: GenerateRequest) -> dict[str, Any]:
    if request.seed is None:
        return {}
    if request.seed > MAX_SEED:
        raise InvalidArgument("determinism.seed", f"must be at most {MAX_SEED} at this provider, got {request.seed}")
    return {"seed": request.seed}


def extension_of(call: Call, name: str) -> dict[str, Any]:
    """What ``extensions[name]`` has, as fields of the body."""
    extension = call.extensions.get(name)
    return {} if extension is None else extension.model_dump(exclude_none=True)


def chat_of(call: Call) -> ChatInput:
    chat = call.request.input
    assert isinstance(chat, ChatInput), "no other input is declared. This is a bug"
    return chat


def messages_of(chat: ChatInput, *, system: str = "system", reasoning: str | None = None) -> list[dict[str, Any]]:
    """``system`` is what that role is called there, ``reasoning`` the field of an earlier turn's reasoning."""
    messages = []
    for message in chat.messages:
        role = system if message.role is Role.SYSTEM else message.role.value
        said: dict[str, Any] = {"role": role, "content": message.text}
        if message.name is not None:
            said["name"] = message.name
        if message.tool_calls:
            said["content"] = message.text or None
            said["tool_calls"] = [
                {
                    "id": id_of(call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments_json},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            said["tool_call_id"] = id_of(message.tool_call_id)
        if reasoning is not None and message.reasoning_text is not None:
            said[reasoning] = message.reasoning_text
        messages.append(said)
    return messages


def id_of(call_id: str) -> str:
    """The id of a call, which another provider may have made: OpenAI takes 40 characters."""
    return call_id if len(call_id) <= MAX_ID else stand_in(call_id)


def tools_of(chat: ChatInput) -> dict[str, Any]:
    """``tools`` and ``tool_choice``; nothing if none may be called, since the model is then not shown any."""
    if not chat.may_call_tools:
        return {}
    choice = chat.tool_choice
    return {
        "tools": [{"type": "function", "function": function_of(i, tool)} for i, tool in enumerate(chat.tools)],
        "tool_choice": {"type": "function", "function": {"name": choice.name}}
        if isinstance(choice, NamedTool)
        else choice.name.lower(),
    }


def function_of(index: int, tool: ToolDefinition) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters_json_schema is not None:
        path = f"chat.tools[{index}].parameters_json_schema"
        function["parameters"] = json_object(tool.parameters_json_schema, path)
    return function


def schema_of(output: JsonSchemaFormat) -> dict[str, Any]:
    """The schema as they name it; ``strict`` has the answer hold to it."""
    schema = json_object(output.schema, "structured_output.json_schema")
    return {"name": "answer", "schema": schema, "strict": True}


def response_format_of(request: GenerateRequest) -> dict[str, Any]:
    match request.output_format:
        case JsonSchemaFormat() as output:
            return {"response_format": {"type": "json_schema", "json_schema": schema_of(output)}}
        case JsonObjectFormat():
            return {"response_format": {"type": "json_object"}}
        case _:
            return {}


# --- answers ---------------------------------------------------------------------------------------------------------


def read_usage(said: Mapping[str, Any], usage: Usage) -> None:
    """Writes the ``usage`` of a completion. Theirs is as ours: cached tokens, read or written, are a part of the
    prompt's; reasoning is one of the completion's. Raises TypeError or ValueError for what is no count.
    """
    usage.input_tokens = count(said, "prompt_tokens")
    usage.output_tokens = count(said, "completion_tokens")
    prompt, completion = said.get("prompt_tokens_details") or {}, said.get("completion_tokens_details") or {}
    usage.cache_read_input_tokens = count(prompt, "cached_tokens")
    usage.cache_write_input_tokens = count(prompt, "cache_write_tokens")
    usage.reasoning_output_tokens = count(completion, "reasoning_tokens")


def problem_of(body: bytes) -> Problem:
    """What an error's body says. Never raises."""
    try:
        return problem_in(json.loads(body))
    except (ValueError, RecursionError):
        return Problem(body.decode(errors="replace"))


def problem_in(document: Any) -> Problem:
    """OpenAI's form is ``{"error": {"message", "type", "param", "code"}}``; others leave out the outer object, give the
    message alone, or call it ``detail``.
    """
    error = document.get("error", document) if isinstance(document, dict) else document
    if not isinstance(error, dict):
        return Problem(error if isinstance(error, str) else "")
    said = {key: value for key, value in error.items() if isinstance(value, str) and value}
    return Problem(said.get("message") or said.get("detail") or "", said.get("code") or said.get("type"))


def failure_in(document: Any) -> StreamFailed:
    """An error within a stream. Some give their status as its code."""
    problem = problem_in(document)
    error = document.get("error", document)
    named = [error.get(key) for key in ("code", "type")] if isinstance(error, dict) else []
    numbers = [code for code in named if isinstance(code, int) and 400 <= code < 600]
    known = [_STATUSES[code] for code in named if isinstance(code, str) and code in _STATUSES]
    return StreamFailed(problem, status=next(iter(numbers + known), None))
