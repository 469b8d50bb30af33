"""Google's Gemini API, ``streamGenerateContent`` (https://ai.google.dev/api/generate-content), version v1beta."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import ChoiceFormat, JsonSchemaFormat
from headrace.backends.remote.dialect import Dialect, Extension, Problem
from headrace.backends.remote.dialects.chat import (
    CONVERSATION,
    called_tools,
    chat_of,
    json_object,
    split_system,
    tools_of,
    turns_of,
)
from headrace.backends.remote.dialects.fields import sampling_of, seed_of, stop_of
from headrace.backends.remote.dialects.gemini_signatures import NO_SIGNATURE, read_id
from headrace.backends.remote.dialects.gemini_stream import GeminiReader, problem_of
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.requests import ChatInput, ChatMessage, NamedTool, Reasoning, Role, ToolChoiceMode
from headrace.backends.types import Call

_ANY_BUDGET = -1
"""``thinkingBudget``: as much as the model finds right."""
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
_CHOICE_MODES = {ToolChoiceMode.AUTO: "AUTO", ToolChoiceMode.REQUIRED: "ANY", ToolChoiceMode.NONE: "NONE"}


class GeminiExtension(Extension):
    """``extensions["gemini"]``: fields of the API's by their names."""

    thinkingLevel: Literal["MINIMAL", "LOW", "MEDIUM", "HIGH"] | None = None  # noqa: N815 -- the API's name
    """How much a model thinks that takes no number of tokens."""


def _headers(key: str | None) -> Mapping[str, str]:
    return {} if key is None else {"x-goog-api-key": key}


def _path(model: RemoteModelOptions) -> str:
    assert model.model is not None
    name = model.model if "/" in model.model else f"models/{model.model}"
    return f"/{name}:streamGenerateContent?alt=sse"


def _body(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    chat = chat_of(call)
    system, messages = split_system(chat)
    body: dict[str, Any] = {"contents": _contents(messages), "generationConfig": _config(call, model)}
    if system is not None:
        body["systemInstruction"] = {"parts": [{"text": system}]}
    if chat.tools:
        body["tools"] = [{"functionDeclarations": tools_of(chat, schema="parametersJsonSchema")}]
        body["toolConfig"] = {"functionCallingConfig": _calling(chat)}
    return body


def _problem(body: bytes) -> Problem:
    try:
        data = json.loads(body)
        return problem_of((data[0] if isinstance(data, list) else data)["error"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Problem()


def _contents(messages: Sequence[tuple[int, ChatMessage]]) -> list[dict[str, Any]]:
    """Turns of user and model, in alternation."""
    if messages[-1][1].role is Role.ASSISTANT:
        raise InvalidArgument("chat.messages", "must not end with the assistant's for this model's provider")
    names = called_tools(messages)
    parts_of = partial(_parts, names)
    return turns_of(_in_order(messages, names), parts_of, assistant="model", parts="parts")


def _in_order(messages: Iterable[tuple[int, ChatMessage]], names: Iterable[str]) -> Iterator[tuple[int, ChatMessage]]:
    """Results in the order of the calls: where calls have no ids of the provider's, it goes by that."""
    places = {call_id: place for place, call_id in enumerate(names)}
    for are_results, group in groupby(messages, key=lambda one: one[1].role is Role.TOOL):
        run = list(group)
        if are_results:
            run.sort(key=lambda one: places[one[1].tool_call_id or ""])
        yield from run


def _parts(names: Mapping[str, str], path: str, message: ChatMessage) -> list[dict[str, Any]]:
    if message.role is Role.TOOL:
        assert message.tool_call_id is not None
        own_id, _ = read_id(message.tool_call_id)
        result = {"name": names[message.tool_call_id], "response": {"output": message.text}}
        return [{"functionResponse": own_id | result}]
    parts: list[dict[str, Any]] = [{"text": message.text}] if message.text else []
    for i, call in enumerate(message.tool_calls):
        own_id, signature = read_id(call.id)
        arguments = json_object(call.arguments_json, f"{path}.tool_calls[{i}].arguments_json")
        part: dict[str, Any] = {"functionCall": own_id | {"name": call.name, "args": arguments}}
        if signature or i == 0:
            part["thoughtSignature"] = signature or NO_SIGNATURE
        parts.append(part)
    return parts


def _config(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    request = call.request
    config: dict[str, Any] = {
        "maxOutputTokens": call.max_new_tokens,
        **sampling_of(request, _SAMPLING, max_temperature=2.0),
        **stop_of(request, "stopSequences", most=5),
        **seed_of(request, most=2**31 - 1),
    }
    if request.n > 1:
        config["candidateCount"] = request.n
    if request.response.logprobs:
        config["responseLogprobs"] = True
        if request.response.top_logprobs:
            config["logprobs"] = request.response.top_logprobs
    match request.output_format:
        case JsonSchemaFormat(schema):
            config["responseMimeType"] = "application/json"
            config["responseJsonSchema"] = json_object(schema, "structured_output.json_schema")
        case ChoiceFormat(texts):
            config["responseMimeType"] = "text/x.enum"
            config["responseSchema"] = {"type": "STRING", "enum": list(texts)}
    extension = call.extensions.get(GEMINI.name)
    level = extension.thinkingLevel if isinstance(extension, GeminiExtension) else None
    if (thinking := _thinking(request.reasoning, level, model)) is not None:
        config["thinkingConfig"] = thinking
    return config


def _thinking(reasoning: Reasoning, level: str | None, model: RemoteModelOptions) -> dict[str, Any] | None:
    """``None``: as the model has it; one that does not think takes nothing else."""
    if level is not None:
        if reasoning.enabled is False or reasoning.max_reasoning_tokens is not None:
            problem = "must be unset with reasoning.max_reasoning_tokens, or where reasoning.enabled is false"
            raise InvalidArgument("extensions['gemini'].thinkingLevel", problem)
        return {"thinkingLevel": level, "includeThoughts": reasoning.include_text}
    if reasoning.enabled is False or reasoning.max_reasoning_tokens == 0:
        return {"thinkingBudget": 0}
    if reasoning.max_reasoning_tokens is not None:
        return {"thinkingBudget": reasoning.max_reasoning_tokens, "includeThoughts": reasoning.include_text}
    if reasoning.enabled:
        return {"thinkingBudget": _ANY_BUDGET, "includeThoughts": reasoning.include_text}
    if model.reasoning:
        return {"includeThoughts": reasoning.include_text}
    return None


def _calling(chat: ChatInput) -> dict[str, Any]:
    if isinstance(chat.tool_choice, NamedTool):
        return {"mode": "ANY", "allowedFunctionNames": [chat.tool_choice.name]}
    return {"mode": _CHOICE_MODES[chat.tool_choice]}


GEMINI = Dialect(
    name="gemini",
    base_url="https://generativelanguage.googleapis.com/v1beta",
    options=CONVERSATION
    | {
        "chat.tool_choice.name",
        "sampling.top_k",
        "sampling.top_p",
        "sampling.presence_penalty",
        "sampling.frequency_penalty",
        "stopping.stop_sequences",
        "structured_output.json_schema",
        "structured_output.choice.texts",
        "reasoning.enabled",
        "reasoning.max_reasoning_tokens",
        "reasoning.include_text",
        "response.logprobs",
        "response.top_logprobs",
        "determinism.seed",
        "n",
    },
    max_n=8,
    max_top_logprobs=20,
    extension=GeminiExtension,
    headers=_headers,
    path=_path,
    body=_body,
    reader=GeminiReader,
    problem=_problem,
)
"""The dialect ``gemini``."""
