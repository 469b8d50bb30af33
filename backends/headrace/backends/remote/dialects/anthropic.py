"""Anthropic's Messages API (https://platform.claude.com/docs/en/api/messages), version 2023-06-01."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import JsonSchemaFormat
from headrace.backends.remote.dialect import Problem, StreamFailed
from headrace.backends.remote.dialects.chat import called_tools, json_object, split_system
from headrace.backends.remote.dialects.counts import count
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.remote.sse import ServerSentEvent
from headrace.backends.types import (
    Call,
    ChatInput,
    ChatMessage,
    ChoiceFinish,
    Delta,
    Event,
    FinishReason,
    NamedTool,
    Role,
    ToolCallDelta,
    ToolChoiceMode,
    Usage,
)

_MIN_THINKING = 1024
"""What the API takes as ``budget_tokens``, at least."""
_MIN_TOP_P = 0.95
"""While it thinks."""
_TOOL_USE_ID = re.compile(r"[a-zA-Z0-9_-]+")
_CHOICE_MODES = {ToolChoiceMode.AUTO: "auto", ToolChoiceMode.REQUIRED: "any", ToolChoiceMode.NONE: "none"}
_SAMPLING = ("temperature", "top_k", "top_p")
_REASONS = {
    "end_turn": FinishReason.EOS_TOKEN,
    "max_tokens": FinishReason.MAX_TOKENS,
    "model_context_window_exceeded": FinishReason.MAX_TOKENS,
    # A limit of the provider's on its own tools, which only ``extra_body`` can ask for.
    "pause_turn": FinishReason.MAX_TOKENS,
    "stop_sequence": FinishReason.STOP_SEQUENCE,
    "tool_use": FinishReason.TOOL_CALLS,
    "refusal": FinishReason.CONTENT_FILTER,
}
_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""Of HTTP, by the types of errors."""


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
            return _problem(json.loads(body)["error"])
        except (ValueError, LookupError, TypeError, AttributeError):
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
        return [
            {"type": "tool_result", "tool_use_id": _tool_use_id(message.tool_call_id), "content": message.text},
        ]
    blocks: list[dict[str, Any]] = [{"type": "text", "text": message.text}] if message.text else []
    for i, call in enumerate(message.tool_calls):
        arguments = json_object(call.arguments_json, f"{path}.tool_calls[{i}].arguments_json")
        blocks.append({"type": "tool_use", "id": _tool_use_id(call.id), "name": call.name, "input": arguments})
    return blocks


def _tool_use_id(call_id: str) -> str:
    """As the API takes it: another provider, which made a call before, may write its ids otherwise."""
    if _TOOL_USE_ID.fullmatch(call_id):
        return call_id
    return f"toolu_{hashlib.sha256(call_id.encode()).hexdigest()[:24]}"


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


class AnthropicReader:
    """Reads one answer (https://platform.claude.com/docs/en/build-with-claude/streaming)."""

    def __init__(self, call: Call, usage: Usage) -> None:
        self.finished = False
        self.reported_version: str | None = None
        self._usage = usage
        self._counts: dict[str, int] = {}
        """What it has said of the input: later events may say some of it again."""
        self._with_reasoning = call.request.reasoning.include_text
        self._with_stop_sequence = call.request.stopping.include_stop_sequence
        self._tools: dict[int, tuple[int, bool]] = {}
        """By the index of its block: which call it is, and whether it has arguments."""
        self._finish: ChoiceFinish | None = None

    def read(self, event: ServerSentEvent) -> Sequence[Event]:
        return list(self._read(json.loads(event.data)))

    def end(self) -> Sequence[Event]:
        if self.finished:
            return ()
        if self._finish is None:
            raise EOFError
        return list(self._end(self._finish))

    def _read(self, data: Any) -> Iterator[Event]:
        match data["type"]:
            case "message_start":
                self.reported_version = data["message"].get("model")
                self._count(data["message"].get("usage"))
            case "content_block_start":
                yield from self._begin_block(data["index"], data["content_block"])
            case "content_block_delta":
                yield from self._continue_block(data["index"], data["delta"])
            case "content_block_stop":
                yield from self._end_block(data["index"])
            case "message_delta":
                self._count(data.get("usage"))
                if (reason := data["delta"].get("stop_reason")) is not None:
                    self._finish = ChoiceFinish(
                        0, _REASONS.get(reason, FinishReason.EOS_TOKEN), data["delta"].get("stop_sequence")
                    )
            case "message_stop":
                if self._finish is None:
                    raise ValueError("an answer ends without a reason")
                yield from self._end(self._finish)
            case "error":
                problem = _problem(data["error"])
                raise StreamFailed(problem, status=_STATUSES.get(problem.code or ""))

    def _begin_block(self, index: int, block: Mapping[str, Any]) -> Iterator[Event]:
        match block["type"]:
            case "text" if block["text"]:
                yield Delta(0, block["text"])
            case "tool_use":
                call = len(self._tools)
                self._tools[index] = call, False
                yield Delta(0, "", tool_calls=(ToolCallDelta(call, block["id"], block["name"]),))

    def _continue_block(self, index: int, delta: Mapping[str, Any]) -> Iterator[Event]:
        match delta["type"]:
            case "text_delta" if delta["text"]:
                yield Delta(0, delta["text"])
            case "thinking_delta" if self._with_reasoning and delta["thinking"]:
                yield Delta(0, "", reasoning_text=delta["thinking"])
            # The provider's own tools have such deltas too.
            case "input_json_delta" if index in self._tools and delta["partial_json"]:
                call, _ = self._tools[index]
                self._tools[index] = call, True
                yield Delta(0, "", tool_calls=(ToolCallDelta(call, arguments_json=delta["partial_json"]),))

    def _end_block(self, index: int) -> Iterator[Event]:
        call, has_arguments = self._tools.get(index, (0, True))
        if not has_arguments:  # of a tool without parameters
            yield Delta(0, "", tool_calls=(ToolCallDelta(call, arguments_json="{}"),))

    def _end(self, finish: ChoiceFinish) -> Iterator[Event]:
        self.finished = True
        if self._with_stop_sequence and finish.stop_sequence:
            yield Delta(0, finish.stop_sequence)
        yield finish

    def _count(self, usage: Mapping[str, Any] | None) -> None:
        """Counts are cumulative. Of the input there are three that are disjoint; ours includes all."""
        if usage is None:
            return
        for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
            if (number := count(usage, name)) is not None:
                self._counts[name] = number
        if "input_tokens" in self._counts:
            self._usage.input_tokens = sum(self._counts.values())
        self._usage.cache_read_input_tokens = self._counts.get("cache_read_input_tokens")
        self._usage.cache_write_input_tokens = self._counts.get("cache_creation_input_tokens")
        if (number := count(usage, "output_tokens")) is not None:
            self._usage.output_tokens = number
        if (details := usage.get("output_tokens_details")) is not None:
            self._usage.reasoning_output_tokens = count(details, "thinking_tokens")


def _problem(error: Mapping[str, Any]) -> Problem:
    code, message = error.get("type"), error.get("message")
    return Problem(message if isinstance(message, str) else "", code if isinstance(code, str) else None)
