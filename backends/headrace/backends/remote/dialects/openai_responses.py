"""The dialect ``openai-responses``: the Responses API at OpenAI itself.

Nothing is stored there (``store``: false), so a conversation is sent as a whole each time. Log-probabilities are left
out: its stream gives tokens as text, and a token need not be whole characters.

Source: https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from headrace.backends.formats import JsonObjectFormat, JsonSchemaFormat
from headrace.backends.remote.dialect import AnswerReader, Problem
from headrace.backends.remote.dialects.counts import count
from headrace.backends.remote.dialects.openai_json import (
    bearer,
    chat_of,
    extension_of,
    failure_in,
    function_of,
    id_of,
    problem_of,
    sampling_of,
    schema_of,
)
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.remote.sse import ServerSentEvent
from headrace.backends.types import (
    Call,
    ChatInput,
    ChoiceFinish,
    Delta,
    Event,
    FinishReason,
    GenerateRequest,
    NamedTool,
    Role,
    ToolCallDelta,
    Usage,
)

_INCOMPLETE = {"max_output_tokens": FinishReason.MAX_TOKENS, "content_filter": FinishReason.CONTENT_FILTER}


class ResponsesExtension(BaseModel):
    """``extensions["openai-responses"]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    reasoning_effort: str | None = None
    """How much a model that reasons does so, such as "low"."""
    reasoning_summary: str | None = None
    """What is told of the reasoning: "auto", "concise" or "detailed"; none: nothing."""
    verbosity: str | None = None
    """How long answers are: "low", "medium" or "high"."""
    parallel_tool_calls: bool | None = None
    """Whether it may call several tools at once."""


class OpenAiResponses:
    """The Responses API (``Dialect``)."""

    name: ClassVar[str] = "openai-responses"
    base_url: ClassVar[str | None] = "https://api.openai.com/v1"
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
            "sampling.temperature",
            "sampling.top_p",
            "stopping.max_new_tokens",
            "structured_output.json_schema",
            "structured_output.json_object",
            "reasoning.include_text",
        }
    )
    max_n: ClassVar[int] = 1
    max_top_logprobs: ClassVar[int] = 0
    extension: ClassVar[type[BaseModel] | None] = ResponsesExtension

    def headers(self, key: str | None) -> Mapping[str, str]:
        return bearer(key)

    def path(self, model: RemoteModelOptions) -> str:  # noqa: ARG002  # it is the same for all
        return "/responses"

    def body(self, call: Call, model: RemoteModelOptions) -> dict[str, Any]:
        chat, extension = chat_of(call), extension_of(call, self.name)
        body = {
            "model": model.model,
            "input": _items_of(chat, system="developer" if model.reasoning else "system"),
            "max_output_tokens": call.max_new_tokens,
            "stream": True,
            "store": False,
            **sampling_of(call.request, {"temperature": "temperature", "top_p": "top_p"}),
            **_tools_of(chat),
        }
        renamed = {"reasoning_effort": "effort", "reasoning_summary": "summary"}
        if reasoning := {renamed[name]: extension.pop(name) for name in renamed if name in extension}:
            body["reasoning"] = reasoning
        text = _format_of(call.request)
        if "verbosity" in extension:
            text["verbosity"] = extension.pop("verbosity")
        if text:
            body["text"] = text
        return body | extension

    def reader(self, call: Call, usage: Usage) -> AnswerReader:
        return ResponseReader(call, usage)

    def problem(self, body: bytes) -> Problem:
        return problem_of(body)


def _items_of(chat: ChatInput, *, system: str) -> list[dict[str, Any]]:
    """The messages; calls of tools and their results are items of their own."""
    items: list[dict[str, Any]] = []
    for message in chat.messages:
        if message.role is Role.TOOL:
            call_id = id_of(message.tool_call_id or "")
            items.append({"type": "function_call_output", "call_id": call_id, "output": message.text})
            continue
        role = system if message.role is Role.SYSTEM else message.role.value
        if message.text or not message.tool_calls:
            items.append({"role": role, "content": message.text})
        items += (
            {"type": "function_call", "call_id": id_of(call.id), "name": call.name, "arguments": call.arguments_json}
            for call in message.tool_calls
        )
    return items


def _tools_of(chat: ChatInput) -> dict[str, Any]:
    """Tools are strict here unless they are said not to be, and strict ones allow few schemas."""
    if not chat.may_call_tools:
        return {}
    none = {"parameters": {"type": "object", "properties": {}}}
    choice = chat.tool_choice
    return {
        "tools": [
            {"type": "function", "strict": False, **none, **function_of(i, tool)} for i, tool in enumerate(chat.tools)
        ],
        "tool_choice": {"type": "function", "name": choice.name}
        if isinstance(choice, NamedTool)
        else choice.name.lower(),
    }


def _format_of(request: GenerateRequest) -> dict[str, Any]:
    match request.output_format:
        case JsonSchemaFormat() as output:
            return {"format": {"type": "json_schema", **schema_of(output)}}
        case JsonObjectFormat():
            return {"format": {"type": "json_object"}}
        case _:
            return {}


class ResponseReader:
    """Reads the events of a response (``AnswerReader``)."""

    finished = False
    reported_version: str | None = None

    def __init__(self, call: Call, usage: Usage) -> None:
        self._call = call
        self._usage = usage
        self._places: dict[int, int] = {}
        """Which call of a tool is which item of the output."""
        self._refused = False
        self._readers: dict[str, Callable[[Mapping[str, Any]], Sequence[Event]]] = {
            "response.created": self._begin,
            "response.output_text.delta": self._text,
            "response.refusal.delta": self._refusal,
            "response.reasoning_summary_part.added": self._reasoning_part,
            "response.reasoning_summary_text.delta": self._reasoning,
            "response.reasoning_text.delta": self._reasoning,
            "response.output_item.added": self._item,
            "response.function_call_arguments.delta": self._arguments,
            "response.completed": self._end,
            "response.incomplete": self._end,
            "response.failed": self._fail,
            "error": self._error,
        }
        """All others say again what these have said."""

    def read(self, event: ServerSentEvent) -> Sequence[Event]:
        said = json.loads(event.data)
        reader = self._readers.get(said["type"])
        return () if reader is None else reader(said)

    def end(self) -> Sequence[Event]:
        if not self.finished:
            raise EOFError("the stream ended before the response had")
        return ()

    def _begin(self, said: Mapping[str, Any]) -> Sequence[Event]:
        self.reported_version = said["response"].get("model")
        return ()

    def _text(self, said: Mapping[str, Any]) -> Sequence[Event]:
        return [Delta(0, said["delta"])]

    def _refusal(self, said: Mapping[str, Any]) -> Sequence[Event]:
        self._refused = True
        return [Delta(0, said["delta"])]

    def _reasoning_part(self, said: Mapping[str, Any]) -> Sequence[Event]:
        """A summary's parts are paragraphs."""
        return self._reasoning({"delta": "\n\n"}) if said["summary_index"] else ()

    def _reasoning(self, said: Mapping[str, Any]) -> Sequence[Event]:
        return [Delta(0, "", reasoning_text=said["delta"])] if self._call.request.reasoning.include_text else ()

    def _item(self, said: Mapping[str, Any]) -> Sequence[Event]:
        item = said["item"]
        if item["type"] != "function_call":
            return ()
        place = self._places[said["output_index"]] = len(self._places)
        return [Delta(0, "", tool_calls=(ToolCallDelta(place, item["call_id"], item["name"], item["arguments"]),))]

    def _arguments(self, said: Mapping[str, Any]) -> Sequence[Event]:
        call = ToolCallDelta(self._places[said["output_index"]], arguments_json=said["delta"])
        return [Delta(0, "", tool_calls=(call,))]

    def _end(self, said: Mapping[str, Any]) -> Sequence[Event]:
        response = said["response"]
        if usage := response.get("usage"):
            read_response_usage(usage, self._usage)
        self.finished = True
        if self._refused:
            reason = FinishReason.CONTENT_FILTER
        elif response["status"] == "incomplete":
            reason = _INCOMPLETE[response["incomplete_details"]["reason"]]
        else:
            reason = FinishReason.TOOL_CALLS if self._places else FinishReason.EOS_TOKEN
        return [ChoiceFinish(0, reason)]

    def _fail(self, said: Mapping[str, Any]) -> Sequence[Event]:
        response = said["response"]
        if usage := response.get("usage"):
            read_response_usage(usage, self._usage)
        raise failure_in({"error": response.get("error") or {}})

    def _error(self, said: Mapping[str, Any]) -> Sequence[Event]:
        raise failure_in({key: value for key, value in said.items() if key != "type"})


def read_response_usage(said: Mapping[str, Any], usage: Usage) -> None:
    """Cached tokens, read or written, are a part of the input's; reasoning is one of the output's. Raises TypeError or
    ValueError for what is no count.
    """
    usage.input_tokens = count(said, "input_tokens")
    usage.output_tokens = count(said, "output_tokens")
    inputs, outputs = said.get("input_tokens_details") or {}, said.get("output_tokens_details") or {}
    usage.cache_read_input_tokens = count(inputs, "cached_tokens")
    usage.cache_write_input_tokens = count(inputs, "cache_write_tokens")
    usage.reasoning_output_tokens = count(outputs, "reasoning_tokens")
