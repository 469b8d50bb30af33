"""Chat Completions elsewhere: the dialects ``openai-compatible``, ``vllm``, ``llama-cpp`` and ``llama-cpp-python``.

Servers of this kind drop fields that they do not know without a word, so ``openai-compatible`` says only what they all
understand (these three, Ollama, LM Studio). The others say more, and switch off what these servers would otherwise do
by themselves: their defaults for top-p, top-k, min-p and repetition are not off.

Sources: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/ (0.12 and newer),
https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md,
https://llama-cpp-python.readthedocs.io/en/latest/server/, https://docs.ollama.com/api/openai-compatibility.
"""

from __future__ import annotations

from typing import Any

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import ChoiceFormat, JsonSchemaFormat, RegexFormat
from headrace.backends.remote.dialect import Extension
from headrace.backends.remote.dialects.chat import chat_of
from headrace.backends.remote.dialects.openai_requests import (
    CHAT,
    chat_body,
    chat_dialect,
    extension_of,
    schema_of,
    unsupported,
)
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.requests import ToolChoiceMode
from headrace.backends.types import Call

_COMPATIBLE = CHAT | {
    "sampling.presence_penalty",
    "sampling.frequency_penalty",
    "structured_output.json_schema",
    "reasoning.include_text",
    "determinism.seed",
}


def _compatible(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    _refuse_required(call, "a dialect whose server heeds it, such as vllm")
    return chat_body(call, model)


COMPATIBLE = chat_dialect(name="openai-compatible", options=_COMPATIBLE, body=_compatible)
"""Chat Completions at any server."""


class VllmExtension(Extension):
    """``extensions["vllm"]``."""

    reasoning_effort: str | None = None
    """How much a model that reasons does so, such as "low"."""
    parallel_tool_calls: bool | None = None
    """Whether it may call several tools at once."""


def _vllm(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    request, stopping = call.request, call.request.stopping
    if request.n > 1 and request.sampling.temperature == 0:
        raise InvalidArgument("n", f"must be 1 where the temperature is 0 at this provider, got {request.n}")
    body = {
        **chat_body(call, model, reasoning="reasoning"),
        **_sampling(call),
        # Counts that come with every chunk are known when a call is broken off; they are those of one choice.
        "stream_options": {"include_usage": True, "continuous_usage_stats": request.n == 1},
        "repetition_penalty": request.sampling.repetition_penalty,
        "min_tokens": stopping.min_new_tokens,
        "ignore_eos": stopping.ignore_eos,
        "stop_token_ids": list(stopping.stop_token_ids),
        "include_stop_str_in_output": stopping.include_stop_sequence,
        "return_token_ids": request.response.token_ids,
        **_template(call),
        **extension_of(call, VLLM.name),
    }
    if not chat_of(call).add_generation_prompt:
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    match request.output_format:
        case RegexFormat(pattern):
            body["structured_outputs"] = {"regex": pattern}
        case ChoiceFormat(texts):
            body["structured_outputs"] = {"choice": list(texts)}
    return body


VLLM = chat_dialect(
    name="vllm",
    options=_COMPATIBLE
    | {
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
    },
    max_n=16,
    max_top_logprobs=20,
    extension=VllmExtension,
    body=_vllm,
)
"""Chat Completions at vLLM."""


def _llama_cpp(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    # A real one answered with text all the same, with each of four templates.
    _refuse_required(call, "a dialect whose server heeds it, such as vllm")
    return {
        **chat_body(call, model, reasoning="reasoning_content"),
        **_sampling(call),
        "typical_p": call.request.sampling.typical_p,
        "repeat_penalty": 1.0,
        "ignore_eos": call.request.stopping.ignore_eos,
        **_template(call),
    }


LLAMA_CPP = chat_dialect(
    name="llama-cpp",
    options=_COMPATIBLE
    | {
        "chat.messages.reasoning_text",
        "chat.template_arguments",
        "sampling.logit_bias",
        "sampling.top_k",
        "sampling.min_p",
        "sampling.typical_p",
        "stopping.ignore_eos",
        "response.logprobs",
        "response.top_logprobs",
    },
    max_top_logprobs=20,
    body=_llama_cpp,
)
"""Chat Completions at llama.cpp's own server, ``llama-server``."""


def _llama_cpp_python(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    _refuse_required(call, "chat.tool_choice.name: this server heeds that alone")
    body = {**chat_body(call, model), **_sampling(call), "repeat_penalty": 1.0}
    output = call.request.output_format
    if isinstance(output, JsonSchemaFormat):
        body["response_format"] = {"type": "json_object", "schema": schema_of(output)["schema"]}
    return body


LLAMA_CPP_PYTHON = chat_dialect(
    name="llama-cpp-python",
    options=_COMPATIBLE | {"chat.tool_choice.name", "sampling.logit_bias", "sampling.top_k", "sampling.min_p"},
    body=_llama_cpp_python,
)
"""Chat Completions at llama-cpp-python's server, ``python -m llama_cpp.server``."""


def _sampling(call: Call) -> dict[str, Any]:
    """What is not set is said to be off."""
    sampling = call.request.sampling
    return {"top_p": sampling.top_p, "top_k": sampling.top_k or 0, "min_p": sampling.min_p}


def _template(call: Call) -> dict[str, Any]:
    arguments = chat_of(call).template_arguments
    return {"chat_template_kwargs": dict(arguments)} if arguments else {}


def _refuse_required(call: Call, needed: str) -> None:
    if chat_of(call).tool_choice is ToolChoiceMode.REQUIRED:
        raise unsupported(call, "chat.tool_choice.mode", needed)
