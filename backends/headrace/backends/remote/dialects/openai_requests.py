"""What requests of the OpenAI family have in common, and those of Chat Completions as a whole.

A dialect of Chat Completions is ``chat_dialect`` with its name, its options, and ``chat_body`` with what it has beside
that.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from headrace.backends.errors import UnsupportedOption
from headrace.backends.formats import JsonObjectFormat, JsonSchemaFormat
from headrace.backends.remote.dialect import Dialect
from headrace.backends.remote.dialects.chat import CONVERSATION, chat_of, json_object, stand_in, tools_of
from headrace.backends.remote.dialects.fields import sampling_of, seed_of, stop_of
from headrace.backends.remote.dialects.openai_answers import problem_of
from headrace.backends.remote.dialects.openai_stream import ChunkReader
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.requests import ChatInput, GenerateRequest, NamedTool, Role
from headrace.backends.types import Call

CHAT = CONVERSATION | {
    "chat.messages.name",
    "sampling.top_p",
    "stopping.stop_sequences",
    "structured_output.json_object",
}
"""What every chat of this family can."""
SAMPLING = {name: name for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")}
MAX_SEED = 2**63 - 1
"""Their seeds are signed; ours are not."""
_MAX_ID = 40
"""Characters of a call's id."""


def bearer(key: str | None) -> Mapping[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


openai_dialect = partial(Dialect, headers=bearer, problem=problem_of)
"""One of the family."""
chat_dialect = partial(openai_dialect, path=lambda _: "/chat/completions", reader=ChunkReader)
"""One of Chat Completions."""


def chat_body(
    call: Call,
    model: RemoteModelOptions,
    *,
    limit: str = "max_tokens",
    system: str = "system",
    reasoning: str | None = None,
    max_temperature: float | None = None,
    most_stops: int | None = None,
) -> dict[str, Any]:
    """What is said in the same way to all who understand it: who does not, does not declare its option.

    ``limit`` and ``reasoning`` are what ``max_new_tokens`` and the reasoning of an earlier turn are called there, and
    ``system`` what that role is.
    """
    request, chat = call.request, chat_of(call)
    return {
        "model": model.model,
        "messages": _messages_of(chat, system, reasoning),
        limit: call.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling_of(request, SAMPLING, max_temperature=max_temperature),
        **stop_of(request, "stop", most=most_stops),
        **seed_of(request, most=MAX_SEED),
        **_tools_of(chat),
        **_shape_of(request),
        **_choices_of(request),
    }


def _messages_of(chat: ChatInput, system: str, reasoning: str | None) -> list[dict[str, Any]]:
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


def _tools_of(chat: ChatInput) -> dict[str, Any]:
    """Nothing if none may be called, since the model is then not shown any."""
    if not chat.may_call_tools:
        return {}
    choice = chat.tool_choice
    return {
        "tools": [{"type": "function", "function": tool} for tool in tools_of(chat, schema="parameters")],
        "tool_choice": {"type": "function", "function": {"name": choice.name}}
        if isinstance(choice, NamedTool)
        else choice.name.lower(),
    }


def _shape_of(request: GenerateRequest) -> dict[str, Any]:
    match request.output_format:
        case JsonSchemaFormat() as output:
            return {"response_format": {"type": "json_schema", "json_schema": schema_of(output)}}
        case JsonObjectFormat():
            return {"response_format": {"type": "json_object"}}
        case _:
            return {}


def _choices_of(request: GenerateRequest) -> dict[str, Any]:
    """How tokens and answers are chosen, and what is told of that."""
    response, said = request.response, dict[str, Any]()
    if request.sampling.logit_bias:
        said["logit_bias"] = {str(token_id): value for token_id, value in request.sampling.logit_bias.items()}
    if request.n > 1:
        said["n"] = request.n
    if response.logprobs:
        said |= {"logprobs": True, "top_logprobs": response.top_logprobs}
    return said


def schema_of(output: JsonSchemaFormat) -> dict[str, Any]:
    """The schema as they name it; ``strict`` has the answer hold to it."""
    schema = json_object(output.schema, "structured_output.json_schema")
    return {"name": "answer", "schema": schema, "strict": True}


def id_of(call_id: str) -> str:
    """The id of a call, which another provider may have made: OpenAI takes 40 characters."""
    return call_id if len(call_id) <= _MAX_ID else stand_in(call_id)


def extension_of(call: Call, name: str) -> dict[str, Any]:
    """What ``extensions[name]`` has, as fields of the body."""
    extension = call.extensions.get(name)
    return {} if extension is None else extension.model_dump(exclude_none=True)


def unsupported(call: Call, field: str, needed: str) -> UnsupportedOption:
    assert call.model is not None
    return UnsupportedOption(field, model=call.model.card.name, backend=call.model.backend, needed=needed)
