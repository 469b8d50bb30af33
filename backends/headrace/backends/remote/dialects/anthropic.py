"""Anthropic's Messages API (https://platform.claude.com/docs/en/api/messages), version 2023-06-01."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import JsonSchemaFormat
from headrace.backends.remote.dialect import Problem
from headrace.backends.remote.dialects.anthropic_stream import AnthropicReader, problem_of
from headrace.backends.remote.dialects.anthropic_thoughts import read_id
from headrace.backends.remote.dialects.chat import called_tools, json_object, split_system
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.types import Call, ChatInput, ChatMessage, NamedTool, Role, ToolChoiceMode, Usage

_MIN_THINKING = 1024
"""What the API takes as ``budget_tokens``, at least."""
_MIN_TOP_P = 0.95
"""While it thinks."""
_CHOICE_MODES = {ToolChoiceMode.AUTO: "auto", ToolChoiceMode.REQUIRED: "any", ToolChoiceMode.NONE: "none"}
_SAMPLING = ("temperature", "top_k", "top_p")


class CacheControl(BaseModel):
    """What is cached lives for five minutes: there is one price for what is written, and an hour's is another."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["ephemeral"]


class AnthropicExtension(BaseModel):
    """``extensions["anthropic"]``: fields of the API's by their names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    cache_control: CacheControl | None = None
    """Caches the prompt up to the last block that can be."""
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """``output_config.effort``."""
    user_id: str | None = Field(None, max_length=256)
    """``metadata.user_id``: whom the call is for, by a name that tells nothing of them."""


class AnthropicDialect:
    """The dialect ``anthropic``."""

    name: ClassVar[str] = "anthropic"
    base_url: ClassVar[str | None] = "https://api.anthropic.com"
    options: ClassVar[frozenset[str]] = frozenset(
        {
            "chat.messages.role",
            "chat.messages.content.text",
            "chat.messages.tool_calls.id",
            "chat.messages.tool_calls.name",
            "chat.messages.tool_calls.arguments_json",
            "chat.messages.tool_call_id",
            "chat.tools.name",
            "chat.tools.description",
            "chat.tools.parameters_json_schema",
            "chat.tool_choice.mode",
            "chat.tool_choice.name",
            "chat.add_generation_prompt",
            "sampling.temperature",
            "sampling.top_k",
            "sampling.top_p",
            "stopping.max_new_tokens",
            "stopping.stop_sequences",
            "stopping.include_stop_sequence",
            "structured_output.json_schema",
            "reasoning.enabled",
            "reasoning.max_reasoning_tokens",
            "reasoning.include_text",
        }
    )
    max_n: ClassVar[int] = 1
    max_top_logprobs: ClassVar[int] = 0
    extension: ClassVar[type[BaseModel] | None] = AnthropicExtension

    def headers(self, key: str | None) -> Mapping[str, str]:
        return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key is not None else {})

    def path(self, model: RemoteModelOptions) -> str:  # noqa: ARG002 -- it is in the body
        return "/v1/messages"

    def body(self, call: Call, model: RemoteModelOptions) -> dict[str, Any]:
        request = call.request
        chat = request.input
        assert isinstance(chat, ChatInput)
        system, messages = split_system(chat)
        body: dict[str, Any] = {
            "model": model.model,
            "max_tokens": call.max_new_tokens,
            "stream": True,
            "messages": _messages(messages, continues=not chat.add_generation_prompt),
        }
        if system is not None:
            body["system"] = system
        for name in _SAMPLING:
            if f"sampling.{name}" in request.options:
                body[name] = getattr(request.sampling, name)
        if (body.get("temperature") or 0) > 1:
            problem = f"must be at most 1 for this model's provider, got {body['temperature']}"
            raise InvalidArgument("sampling.temperature", problem)
        if request.stopping.stop_sequences:
            body["stop_sequences"] = list(request.stopping.stop_sequences)
        if chat.tools:
            body["tools"] = _tools(chat)
            body["tool_choice"] = _tool_choice(chat)
        if (thinking := _thinking(call, model)) is not None:
            body["thinking"] = thinking
            if thinking["type"] != "disabled":
                _check_thinking(chat, body)
        output: dict[str, Any] = {}
        if isinstance(request.output_format, JsonSchemaFormat):
            schema = json_object(request.output_format.schema, "structured_output.json_schema")
            output["format"] = {"type": "json_schema", "schema": schema}
        extension = call.extensions.get(self.name)
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

    def reader(self, call: Call, usage: Usage) -> AnthropicReader:
        return AnthropicReader(call, usage)

    def problem(self, body: bytes) -> Problem:
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
    turns: list[dict[str, Any]] = []
    for i, message in messages:
        blocks = _blocks(f"chat.messages[{i}]", message)
        if not blocks:
            raise InvalidArgument(f"chat.messages[{i}].content", "must not be empty for this model's provider")
        role = "assistant" if message.role is Role.ASSISTANT else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return turns


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


def _tools(chat: ChatInput) -> list[dict[str, Any]]:
    tools = []
    for i, definition in enumerate(chat.tools):
        schema = definition.parameters_json_schema
        tool: dict[str, Any] = {
            "name": definition.name,
            "input_schema": {"type": "object", "properties": {}}
            if schema is None
            else json_object(schema, f"chat.tools[{i}].parameters_json_schema"),
        }
        if definition.description is not None:
            tool["description"] = definition.description
        tools.append(tool)
    return tools


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
