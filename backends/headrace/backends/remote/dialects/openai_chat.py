"""The dialect ``openai``: Chat Completions at OpenAI itself.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from headrace.backends.remote.dialect import AnswerReader, Problem
from headrace.backends.remote.dialects.openai_json import (
    bearer,
    chat_of,
    extension_of,
    logit_bias_of,
    messages_of,
    problem_of,
    response_format_of,
    sampling_of,
    seed_of,
    stop_of,
    tools_of,
)
from headrace.backends.remote.dialects.openai_stream import ChunkReader
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.types import Call, Usage

CHAT_OPTIONS = frozenset(
    {
        "chat.messages.role",
        "chat.messages.content.text",
        "chat.messages.name",
        "chat.messages.tool_calls.id",
        "chat.messages.tool_calls.name",
        "chat.messages.tool_calls.arguments_json",
        "chat.messages.tool_call_id",
        "chat.tools.name",
        "chat.tools.description",
        "chat.tools.parameters_json_schema",
        "chat.tool_choice.mode",
        "sampling.temperature",
        "sampling.top_p",
        "stopping.max_new_tokens",
        "stopping.stop_sequences",
        "structured_output.json_object",
    }
)
"""What every chat of this family can."""

PENALTIES = {"presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty"}
SAMPLING = {"temperature": "temperature", "top_p": "top_p", **PENALTIES}


class OpenAiExtension(BaseModel):
    """``extensions["openai"]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    reasoning_effort: str | None = None
    """How much a model that reasons does so, such as "low"."""
    verbosity: str | None = None
    """How long answers are: "low", "medium" or "high"."""
    parallel_tool_calls: bool | None = None
    """Whether it may call several tools at once."""


class OpenAiChat:
    """Chat Completions at OpenAI (``Dialect``)."""

    name: ClassVar[str] = "openai"
    base_url: ClassVar[str | None] = "https://api.openai.com/v1"
    options: ClassVar[frozenset[str]] = CHAT_OPTIONS | {
        "chat.tool_choice.name",
        "sampling.logit_bias",
        "sampling.presence_penalty",
        "sampling.frequency_penalty",
        "structured_output.json_schema",
        "n",
        "response.logprobs",
        "response.top_logprobs",
        "determinism.seed",
    }
    max_n: ClassVar[int] = 16
    max_top_logprobs: ClassVar[int] = 20
    extension: ClassVar[type[BaseModel] | None] = OpenAiExtension

    def headers(self, key: str | None) -> Mapping[str, str]:
        return bearer(key)

    def path(self, model: RemoteModelOptions) -> str:  # noqa: ARG002  # it is the same for all
        return "/chat/completions"

    def body(self, call: Call, model: RemoteModelOptions) -> dict[str, Any]:
        request, chat = call.request, chat_of(call)
        return {
            "model": model.model,
            "messages": messages_of(chat, system="developer" if model.reasoning else "system"),
            "max_completion_tokens": call.max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **several_of(call),
            **sampling_of(request, SAMPLING),
            **logit_bias_of(request),
            **stop_of(request, most=4),
            **seed_of(request),
            **tools_of(chat),
            **response_format_of(request),
            **chat_logprobs_of(call),
            **extension_of(call, self.name),
        }

    def reader(self, call: Call, usage: Usage) -> AnswerReader:
        return ChunkReader(call, usage)

    def problem(self, body: bytes) -> Problem:
        return problem_of(body)


def several_of(call: Call) -> dict[str, Any]:
    return {"n": call.request.n} if call.request.n > 1 else {}


def chat_logprobs_of(call: Call) -> dict[str, Any]:
    response = call.request.response
    return {"logprobs": True, "top_logprobs": response.top_logprobs} if response.logprobs else {}
