"""Anthropic's Messages API (https://platform.claude.com/docs/en/api/messages), version 2023-06-01."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import JsonSchemaFormat
from headrace.backends.remote.dialect import Dialect, Extension, Problem
from headrace.backends.remote.dialects.anthropic_stream import AnthropicReader, problem_of
from headrace.backends.remote.dialects.anthropic_thoughts import read_id
from headrace.backends.remote.dialects.chat import (
    CONVERSATION,
    called_tools,
    chat_of,
    json_object,
    split_system,
    tools_of,
    turns_of,
)
from headrace.backends.remote.dialects.fields import sampling_of, stop_of
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.requests import ChatInput, ChatMessage, NamedTool, Role, ToolChoiceMode
from headrace.backends.types import Call

_MIN_THINKING = 1024
"""What the API takes as ``budget_tokens``, at least."""
_MIN_TOP_P = 0.95
"""While it thinks."""
_CHOICE_MODES = {ToolChoiceMode.AUTO: "auto", ToolChoiceMode.REQUIRED: "any", ToolChoiceMode.NONE: "none"}
_SAMPLING = {name: name for name in ("temperature", "top_k", "top_p")}


class CacheControl(BaseModel):
    """What is cached lives for five minutes: there is one price for what is written, and an hour's is another."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["ephemeral"]


class AnthropicExtension(Extension):
    """``extensions["anthropic"]``: fields of the API's by their names."""

    cache_control: CacheControl | None = None
    """Caches the prompt up to the last block that can be."""
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """``output_config.effort``."""
    user_id: str | None = Field(None, max_length=256)
    """``metadata.user_id``: whom the call is for, by a name that tells nothing of them."""


def _headers(key: str | None) -> Mapping[str, str]:
    return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key is not None else {})


def _body(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    request, chat = call.request, chat_of(call)
    system, messages = split_system(chat)
    body: dict[str, Any] = {
        "model": model.model,
        "max_tokens": call.max_new_tokens,
        "stream": True,
        "messages": _messages(messages, continues=not chat.add_generation_prompt),
        **sampling_of(request, _SAMPLING, max_temperature=1.0),
        **stop_of(request, "stop_sequences"),
    }
    if system is not None:
        body["system"] = system
    if chat.tools:
        body["tools"] = tools_of(chat, schema="input_schema", input_schema={"type": "object", "properties": {}})
        body["tool_choice"] = _tool_choice(chat)
    if (thinking := _thinking(call, model)) is not None:
        body["thinking"] = thinking
        if thinking["type"] != "disabled":
            _check_thinking(chat, body)
    output: dict[str, Any] = {}
    if isinstance(request.output_format, JsonSchemaFormat):
        schema = json_object(request.output_format.schema, "structured_output.json_schema")
        output["format"] = {"type": "json_schema", "schema": schema}
    extension = call.extensions.get(ANTHROPIC.name)
    if isinstance(extension, AnthropicExtension):
        if extension.cache_control is not None:
            body["cache_control"] = extension.cache_control.model_dump()
        if extension.effort is not None:
            output["effort"] = extension.effort
        if extension.user_id is not None:
            body["metadata"] = {"user_id": extension.user_id}
    if output:
        body["output_config"] = output
    return body


def _problem(body: bytes) -> Problem:
    try:
        return problem_of(json.loads(body)["error"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Problem()


def _messages(messages: Sequence[tuple[int, ChatMessage]], *, continues: bool) -> list[dict[str, Any]]:
    """Turns of user and assistant, in alternation. ``continues``: the answer goes on with the last one."""
    last = messages[-1][1].role
    if continues and last is not Role.ASSISTANT:
        raise InvalidArgument("chat.add_generation_prompt", "must be true unless the last message is the assistant's")
    if not continues and last is Role.ASSISTANT:
        problem = "must not end with the assistant's, which the provider would continue: set add_generation_prompt to "
        raise InvalidArgument("chat.messages", f"{problem}false if that is meant")
    called_tools(messages)
    return turns_of(messages, _blocks, assistant="assistant", parts="content")


def _blocks(path: str, message: ChatMessage) -> list[dict[str, Any]]:
    if message.role is Role.TOOL:
        assert message.tool_call_id is not None
        call_id, _ = read_id(message.tool_call_id)
        return [{"type": "tool_result", "tool_use_id": call_id, "content": message.text}]
    blocks: list[dict[str, Any]] = []
    done = 0
    for i, call in enumerate(message.tool_calls):
        call_id, thoughts = read_id(call.id)
        for place, thought in thoughts:
            blocks += _text(message.text[done:place])
            blocks.append(thought)
            done = max(done, place)
        blocks += _text(message.text[done:])
        done = len(message.text)
        arguments = json_object(call.arguments_json, f"{path}.tool_calls[{i}].arguments_json")
        blocks.append({"type": "tool_use", "id": call_id, "name": call.name, "input": arguments})
    return blocks + _text(message.text[done:])


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _tool_choice(chat: ChatInput) -> dict[str, Any]:
    if isinstance(chat.tool_choice, NamedTool):
        return {"type": "tool", "name": chat.tool_choice.name}
    return {"type": _CHOICE_MODES[chat.tool_choice]}


def _thinking(call: Call, model: RemoteModelOptions) -> dict[str, Any] | None:
    """``None``: as the model has it."""
    reasoning = call.request.reasoning
    budget = reasoning.max_reasoning_tokens
    if reasoning.enabled is False or budget == 0:
        return {"type": "disabled"}
    display = "summarized" if reasoning.include_text else "omitted"
    if budget is not None:
        # The answer's tokens hold the thinking, so that no more than these is no limit.
        budget = min(budget, call.max_new_tokens - 1)
        if budget < _MIN_THINKING:
            problem = f"must be at least {_MIN_THINKING} for this model's provider, and below stopping.max_new_tokens "
            raise InvalidArgument(
                "reasoning.max_reasoning_tokens",
                f"{problem}({call.max_new_tokens}), got {reasoning.max_reasoning_tokens}",
            )
        return {"type": "enabled", "budget_tokens": budget, "display": display}
    if reasoning.enabled or model.reasoning:
        return {"type": "adaptive", "display": display}
    return None


def _check_thinking(chat: ChatInput, body: Mapping[str, Any]) -> None:
    """What the API does not take while it thinks."""
    wrong = None
    if body.get("temperature", 1) != 1:
        wrong = "sampling.temperature", f"must be 1 or unset while the model reasons, got {body['temperature']}"
    elif "top_k" in body:
        wrong = "sampling.top_k", "must be unset while the model reasons"
    elif body.get("top_p", 1) < _MIN_TOP_P:
        wrong = "sampling.top_p", f"must be at least {_MIN_TOP_P} while the model reasons, got {body['top_p']}"
    elif "tool_choice" in body and body["tool_choice"]["type"] in ("any", "tool"):
        wrong = "chat.tool_choice", "must be auto or none while the model reasons"
    elif not chat.add_generation_prompt:
        wrong = "chat.add_generation_prompt", "must be true while the model reasons"
    if wrong is not None:
        field, problem = wrong
        raise InvalidArgument(field, f"{problem}: this model's provider cannot do both")


ANTHROPIC = Dialect(
    name="anthropic",
    base_url="https://api.anthropic.com",
    options=CONVERSATION
    | {
        "chat.tool_choice.name",
        "chat.add_generation_prompt",
        "sampling.top_k",
        "sampling.top_p",
        "stopping.stop_sequences",
        "stopping.include_stop_sequence",
        "structured_output.json_schema",
        "reasoning.enabled",
        "reasoning.max_reasoning_tokens",
        "reasoning.include_text",
    },
    extension=AnthropicExtension,
    headers=_headers,
    path=lambda _: "/v1/messages",
    body=_body,
    reader=AnthropicReader,
    problem=_problem,
)
"""The dialect ``anthropic``."""
