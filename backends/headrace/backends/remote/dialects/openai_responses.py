"""The dialect ``openai-responses``: the Responses API at OpenAI itself.

Nothing is stored there (``store``: false), so a conversation is sent as a whole each time. Log-probabilities are left
out: its stream gives tokens as text, and a token need not be whole characters.

Source: https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, ToolCallDelta
from headrace.backends.formats import JsonObjectFormat, JsonSchemaFormat
from headrace.backends.remote.dialects.chat import CONVERSATION, chat_of, tools_of
from headrace.backends.remote.dialects.fields import sampling_of
from headrace.backends.remote.dialects.openai import OpenAiExtension
from headrace.backends.remote.dialects.openai_answers import failure_in, read_usage
from headrace.backends.remote.dialects.openai_requests import extension_of, id_of, openai_dialect, schema_of
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.remote.sse import ServerSentEvent
from headrace.backends.requests import ChatInput, GenerateRequest, NamedTool, Role
from headrace.backends.types import Call
from headrace.backends.usage import Usage

_SAMPLING = {"temperature": "temperature", "top_p": "top_p"}
_INCOMPLETE = {"max_output_tokens": FinishReason.MAX_TOKENS, "content_filter": FinishReason.CONTENT_FILTER}


class ResponsesExtension(OpenAiExtension):
    """``extensions["openai-responses"]``."""

    reasoning_summary: str | None = None
    """What is told of the reasoning: "auto", "concise" or "detailed"; none: nothing."""


def _body(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    chat, extension = chat_of(call), extension_of(call, RESPONSES.name)
    body = {
        "model": model.model,
        "input": _items_of(chat, system="developer" if model.reasoning else "system"),
        "max_output_tokens": call.max_new_tokens,
        "stream": True,
        "store": False,
        **sampling_of(call.request, _SAMPLING, max_temperature=2.0),
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
    choice = chat.tool_choice
    return {
        "tools": tools_of(
            chat, schema="parameters", type="function", strict=False, parameters={"type": "object", "properties": {}}
        ),
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
        self._count(response)
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
        self._count(response)
        raise failure_in({"error": response.get("error") or {}})

    def _error(self, said: Mapping[str, Any]) -> Sequence[Event]:
        raise failure_in({key: value for key, value in said.items() if key != "type"})

    def _count(self, response: Mapping[str, Any]) -> None:
        if usage := response.get("usage"):
            read_usage(usage, self._usage, prompt="input", answer="output")


RESPONSES = openai_dialect(
    name="openai-responses",
    base_url="https://api.openai.com/v1",
    options=CONVERSATION
    | {
        "chat.tool_choice.name",
        "sampling.top_p",
        "structured_output.json_schema",
        "structured_output.json_object",
        "reasoning.include_text",
    },
    extension=ResponsesExtension,
    path=lambda _: "/responses",
    body=_body,
    reader=ResponseReader,
)
"""The Responses API."""
