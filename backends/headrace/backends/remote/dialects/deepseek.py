"""The dialect ``deepseek``: Chat Completions at DeepSeek.

Sources: https://api-docs.deepseek.com/api/create-chat-completion,
https://api-docs.deepseek.com/guides/thinking_mode, https://api-docs.deepseek.com/guides/kv_cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from headrace.backends.remote.dialect import AnswerReader, Problem
from headrace.backends.remote.dialects.counts import count
from headrace.backends.remote.dialects.openai_chat import CHAT_OPTIONS, chat_logprobs_of
from headrace.backends.remote.dialects.openai_compatible import common_body, unsupported
from headrace.backends.remote.dialects.openai_json import (
    bearer,
    extension_of,
    problem_of,
    read_usage,
    sampling_of,
)
from headrace.backends.remote.dialects.openai_stream import ChunkReader
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.types import Call, Usage


class DeepSeekExtension(BaseModel):
    """``extensions["deepseek"]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    reasoning_effort: str | None = None
    """How much it reasons: "low", "high" or "max"."""


class DeepSeek:
    """Chat Completions at DeepSeek (``Dialect``)."""

    name: ClassVar[str] = "deepseek"
    base_url: ClassVar[str | None] = "https://api.deepseek.com"
    options: ClassVar[frozenset[str]] = (CHAT_OPTIONS - {"sampling.top_p"}) | {
        "chat.messages.reasoning_text",
        "chat.tool_choice.name",
        "reasoning.enabled",
        "reasoning.include_text",
        "response.logprobs",
        "response.top_logprobs",
    }
    max_n: ClassVar[int] = 1
    max_top_logprobs: ClassVar[int] = 20
    extension: ClassVar[type[BaseModel] | None] = DeepSeekExtension

    def headers(self, key: str | None) -> Mapping[str, str]:
        return bearer(key)

    def path(self, model: RemoteModelOptions) -> str:  # noqa: ARG002  # it is the same for all
        return "/chat/completions"

    def body(self, call: Call, model: RemoteModelOptions) -> dict[str, Any]:
        """Its models reason unless they are told otherwise, and then drop the temperature without a word; so some do
        with top_p, and all with penalties.
        """
        request = call.request
        reasons = model.reasoning if request.reasoning.enabled is None else request.reasoning.enabled
        sampling = sampling_of(request, {"temperature": "temperature"})
        if reasons and sampling:
            raise unsupported(call, "sampling.temperature", "reasoning.enabled = false")
        return {
            **common_body(call, model, reasoning="reasoning_content"),
            "thinking": {"type": "enabled" if reasons else "disabled"},
            **sampling,
            **chat_logprobs_of(call),
            **extension_of(call, self.name),
        }

    def reader(self, call: Call, usage: Usage) -> AnswerReader:
        return ChunkReader(call, usage, read_usage=read_deepseek_usage)

    def problem(self, body: bytes) -> Problem:
        return problem_of(body)


def read_deepseek_usage(said: Mapping[str, Any], usage: Usage) -> None:
    """``prompt_tokens`` is ``prompt_cache_hit_tokens`` and ``prompt_cache_miss_tokens`` together. What it writes to its
    cache costs nothing more.
    """
    read_usage(said, usage)
    usage.cache_read_input_tokens = count(said, "prompt_cache_hit_tokens")
