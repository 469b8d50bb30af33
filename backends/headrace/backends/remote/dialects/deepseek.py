"""The dialect ``deepseek``: Chat Completions at DeepSeek.

Sources: https://api-docs.deepseek.com/api/create-chat-completion,
https://api-docs.deepseek.com/guides/thinking_mode, https://api-docs.deepseek.com/guides/kv_cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from headrace.backends.remote.dialect import Extension
from headrace.backends.remote.dialects.counts import count
from headrace.backends.remote.dialects.openai_answers import read_usage
from headrace.backends.remote.dialects.openai_requests import CHAT, chat_body, chat_dialect, extension_of, unsupported
from headrace.backends.remote.dialects.openai_stream import ChunkReader
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.types import Call
from headrace.backends.usage import Usage


class DeepSeekExtension(Extension):
    """``extensions["deepseek"]``."""

    reasoning_effort: str | None = None
    """How much it reasons: "low", "high" or "max"."""


def _body(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    """Its models reason unless they are told otherwise, and then drop the temperature without a word; so some do with
    top_p, and all with penalties.
    """
    reasoning = call.request.reasoning.enabled
    reasons = model.reasoning if reasoning is None else reasoning
    body = chat_body(call, model, reasoning="reasoning_content", max_temperature=2.0)
    if reasons and "temperature" in body:
        raise unsupported(call, "sampling.temperature", "reasoning.enabled = false")
    body["thinking"] = {"type": "enabled" if reasons else "disabled"}
    return body | extension_of(call, DEEPSEEK.name)


def _read_usage(said: Mapping[str, Any], usage: Usage) -> None:
    """``prompt_tokens`` is ``prompt_cache_hit_tokens`` and ``prompt_cache_miss_tokens`` together. What it writes to its
    cache costs nothing more.
    """
    read_usage(said, usage)
    usage.cache_read_input_tokens = count(said, "prompt_cache_hit_tokens")


DEEPSEEK = chat_dialect(
    name="deepseek",
    base_url="https://api.deepseek.com",
    options=(CHAT - {"sampling.top_p"})
    | {
        "chat.messages.reasoning_text",
        "chat.tool_choice.name",
        "reasoning.enabled",
        "reasoning.include_text",
        "response.logprobs",
        "response.top_logprobs",
    },
    max_top_logprobs=20,
    extension=DeepSeekExtension,
    body=_body,
    reader=partial(ChunkReader, read_usage=_read_usage),
)
"""Chat Completions at DeepSeek."""
