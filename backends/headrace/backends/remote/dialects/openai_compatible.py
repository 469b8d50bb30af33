"""Chat Completions elsewhere: the dialects ``openai-compatible``, ``vllm``, ``llama-cpp`` and ``llama-cpp-python``.

Servers of this kind drop fields that they do not know without a word, so ``openai-compatible`` says only what they all
understand (these three, Ollama, LM Studio). The others say more, and switch off what these servers would otherwise do
by themselves: their defaults for top-p, top-k, min-p and repetition are not off.

Sources: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/ (0.12 and newer),
https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md,
https://llama-cpp-python.readthedocs.io/en/latest/server/, https://docs.ollama.com/api/openai-compatibility.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.formats import ChoiceFormat, JsonSchemaFormat, RegexFormat
from headrace.backends.remote.dialect import AnswerReader, Problem
from headrace.backends.remote.dialects.openai_chat import CHAT_OPTIONS, SAMPLING, chat_logprobs_of, several_of
from headrace.backends.remote.dialects.openai_json import (
    bearer,
    chat_of,
    extension_of,
    logit_bias_of,
    messages_of,
    problem_of,
    response_format_of,
    sampling_of,
    schema_of,
    seed_of,
    stop_of,
    tools_of,
)
from headrace.backends.remote.dialects.openai_stream import ChunkReader
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.types import Call, NamedTool, ToolChoiceMode, Usage

COMPATIBLE_OPTIONS = CHAT_OPTIONS | {
    "sampling.presence_penalty",
    "sampling.frequency_penalty",
    "structured_output.json_schema",
    "reasoning.include_text",
    "determinism.seed",
}
MAX_TEMPERATURE = 100.0
"""Servers of one's own take any."""


class OpenAiCompatible:
    """Chat Completions at any server (``Dialect``)."""

    name: ClassVar[str] = "openai-compatible"
    base_url: ClassVar[str | None] = None
    options: ClassVar[frozenset[str]] = COMPATIBLE_OPTIONS
    max_n: ClassVar[int] = 1
    max_top_logprobs: ClassVar[int] = 0
    extension: ClassVar[type[BaseModel] | None] = None

    def headers(self, key: str | None) -> Mapping[str, str]:
        return bearer(key)

    def path(self, model: RemoteModelOptions) -> str:  # noqa: ARG002  # it is the same for all
        return "/chat/completions"

    def body(self, call: Call, model: RemoteModelOptions) -> dict[str, Any]:
        _refuse_required(call, "a dialect that says which server it is, such as vllm or llama-cpp")
        return {
            **common_body(call, model),
            **sampling_of(call.request, SAMPLING, max_temperature=MAX_TEMPERATURE),
        }

    def reader(self, call: Call, usage: Usage) -> AnswerReader:
        return ChunkReader(call, usage)

    def problem(self, body: bytes) -> Problem:
        return problem_of(body)


class VllmExtension(BaseModel):
    """``extensions["vllm"]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    reasoning_effort: str | None = None
    """How much a model that reasons does so, such as "low"."""
    parallel_tool_calls: bool | None = None
    """Whether it may call several tools at once."""


class Vllm:
    """Chat Completions at vLLM (``Dialect``)."""

    name: ClassVar[str] = "vllm"
    base_url: ClassVar[str | None] = None
    options: ClassVar[frozenset[str]] = COMPATIBLE_OPTIONS | {
        "chat.messages.reasoning_text",
        "chat.tool_choice.name",
        "chat.add_generation_prompt",
        "chat.template_arguments",
        "sampling.logit_bias",
        "sampling.repetition_penalty",
        "sampling.top_k",
        "sampling.min_p",
        "stopping.min_new_tokens",
        "stopping.stop_token_ids",
        "stopping.ignore_eos",
        "stopping.include_stop_sequence",
        "structured_output.regex",
        "structured_output.choice.texts",
        "n",
        "response.logprobs",
        "response.top_logprobs",
        "response.token_ids",
    }
    max_n: ClassVar[int] = 16
    max_top_logprobs: ClassVar[int] = 20
    extension: ClassVar[type[BaseModel] | None] = VllmExtension

    def headers(self, key: str | None) -> Mapping[str, str]:
        return bearer(key)

    def path(self, model: RemoteModelOptions) -> str:  # noqa: ARG002  # it is the same for all
        return "/chat/completions"

    def body(self, call: Call, model: RemoteModelOptions) -> dict[str, Any]:
        request, chat = call.request, chat_of(call)
        sampling, stopping = request.sampling, request.stopping
        if request.n > 1 and sampling.temperature == 0:
            raise InvalidArgument("n", f"must be 1 where the temperature is 0 at this provider, got {request.n}")
        body = {
            **common_body(call, model, reasoning="reasoning"),
            **sampling_of(request, SAMPLING, max_temperature=MAX_TEMPERATURE),
            # Counts that come with every chunk are known when a call is broken off; they are those of one choice.
            "stream_options": {"include_usage": True, "continuous_usage_stats": request.n == 1},
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "min_tokens": stopping.min_new_tokens,
            "ignore_eos": stopping.ignore_eos,
            "stop_token_ids": list(stopping.stop_token_ids),
            "include_stop_str_in_output": stopping.include_stop_sequence,
            "return_token_ids": request.response.token_ids,
            **several_of(call),
            **logit_bias_of(request),
            **chat_logprobs_of(call),
            **extension_of(call, self.name),
        }
        if not chat.add_generation_prompt:
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        if chat.template_arguments:
            body["chat_template_kwargs"] = dict(chat.template_arguments)
        match request.output_format:
            case RegexFormat(pattern):
                body["structured_outputs"] = {"regex": pattern}
            case ChoiceFormat(texts):
                body["structured_outputs"] = {"choice": list(texts)}
        return body

    def reader(self, call: Call, usage: Usage) -> AnswerReader:
        return ChunkReader(call, usage)

    def problem(self, body: bytes) -> Problem:
        return problem_of(body)


class LlamaCpp:
    """Chat Completions at llama.cpp's own server, ``llama-server`` (``Dialect``)."""

    name: ClassVar[str] = "llama-cpp"
    base_url: ClassVar[str | None] = None
    options: ClassVar[frozenset[str]] = COMPATIBLE_OPTIONS | {
        "chat.messages.reasoning_text",
        "chat.tool_choice.name",
        "chat.template_arguments",
        "sampling.logit_bias",
        "sampling.top_k",
        "sampling.min_p",
        "sampling.typical_p",
        "stopping.ignore_eos",
        "response.logprobs",
        "response.top_logprobs",
    }
    max_n: ClassVar[int] = 1
    max_top_logprobs: ClassVar[int] = 20
    extension: ClassVar[type[BaseModel] | None] = None

    def headers(self, key: str | None) -> Mapping[str, str]:
        return bearer(key)

    def path(self, model: RemoteModelOptions) -> str:  # noqa: ARG002  # it is the same for all
        return "/chat/completions"

    def body(self, call: Call, model: RemoteModelOptions) -> dict[str, Any]:
        request, chat, sampling = call.request, chat_of(call), call.request.sampling
        body = {
            **common_body(call, model, reasoning="reasoning_content"),
            **sampling_of(request, SAMPLING, max_temperature=MAX_TEMPERATURE),
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            "min_p": sampling.min_p,
            "typical_p": sampling.typical_p,
            "repeat_penalty": 1.0,
            "ignore_eos": request.stopping.ignore_eos,
            **logit_bias_of(request),
            **chat_logprobs_of(call),
        }
        if chat.template_arguments:
            body["chat_template_kwargs"] = dict(chat.template_arguments)
        if isinstance(chat.tool_choice, NamedTool):  # it knows no demand by name
            named = [tool for tool in body["tools"] if tool["function"]["name"] == chat.tool_choice.name]
            body |= {"tools": named, "tool_choice": "required"}
        return body

    def reader(self, call: Call, usage: Usage) -> AnswerReader:
        return ChunkReader(call, usage)

    def problem(self, body: bytes) -> Problem:
        return problem_of(body)


class LlamaCppPython:
    """Chat Completions at llama-cpp-python's server, ``python -m llama_cpp.server`` (``Dialect``)."""

    name: ClassVar[str] = "llama-cpp-python"
    base_url: ClassVar[str | None] = None
    options: ClassVar[frozenset[str]] = COMPATIBLE_OPTIONS | {
        "chat.tool_choice.name",
        "sampling.logit_bias",
        "sampling.top_k",
        "sampling.min_p",
    }
    max_n: ClassVar[int] = 1
    max_top_logprobs: ClassVar[int] = 0
    extension: ClassVar[type[BaseModel] | None] = None

    def headers(self, key: str | None) -> Mapping[str, str]:
        return bearer(key)

    def path(self, model: RemoteModelOptions) -> str:  # noqa: ARG002  # it is the same for all
        return "/chat/completions"

    def body(self, call: Call, model: RemoteModelOptions) -> dict[str, Any]:
        request, sampling = call.request, call.request.sampling
        _refuse_required(call, "chat.tool_choice.name: this server heeds that alone")
        body = {
            **common_body(call, model),
            **sampling_of(request, SAMPLING, max_temperature=MAX_TEMPERATURE),
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            "min_p": sampling.min_p,
            "repeat_penalty": 1.0,
            **logit_bias_of(request),
        }
        if isinstance(request.output_format, JsonSchemaFormat):
            body["response_format"] = {"type": "json_object", "schema": schema_of(request.output_format)["schema"]}
        return body

    def reader(self, call: Call, usage: Usage) -> AnswerReader:
        return ChunkReader(call, usage)

    def problem(self, body: bytes) -> Problem:
        return problem_of(body)


def common_body(call: Call, model: RemoteModelOptions, *, reasoning: str | None = None) -> dict[str, Any]:
    """All but sampling. ``reasoning`` is what an earlier turn's is called."""
    request, chat = call.request, chat_of(call)
    return {
        "model": model.model,
        "messages": messages_of(chat, reasoning=reasoning),
        "max_tokens": call.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **stop_of(request),
        **seed_of(request),
        **tools_of(chat),
        **response_format_of(request),
    }


def _refuse_required(call: Call, needed: str) -> None:
    if chat_of(call).tool_choice is ToolChoiceMode.REQUIRED:
        raise unsupported(call, "chat.tool_choice.mode", needed)


def unsupported(call: Call, field: str, needed: str) -> UnsupportedOption:
    assert call.model is not None
    return UnsupportedOption(field, model=call.model.card.name, backend=call.model.backend, needed=needed)
