"""The dialect ``openai``: Chat Completions at OpenAI itself.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from typing import Any

from headrace.backends.remote.dialect import Extension
from headrace.backends.remote.dialects.openai_requests import CHAT, chat_body, chat_dialect, extension_of
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.types import Call


class OpenAiExtension(Extension):
    """``extensions["openai"]``."""

    reasoning_effort: str | None = None
    """How much a model that reasons does so, such as "low"."""
    verbosity: str | None = None
    """How long answers are: "low", "medium" or "high"."""
    parallel_tool_calls: bool | None = None
    """Whether it may call several tools at once."""


def _body(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    system = "developer" if model.reasoning else "system"
    body = chat_body(call, model, limit="max_completion_tokens", system=system, max_temperature=2.0, most_stops=4)
    return body | extension_of(call, OPENAI.name)


OPENAI = chat_dialect(
    name="openai",
    base_url="https://api.openai.com/v1",
    options=CHAT
    | {
        "chat.tool_choice.name",
        "sampling.logit_bias",
        "sampling.presence_penalty",
        "sampling.frequency_penalty",
        "structured_output.json_schema",
        "n",
        "response.logprobs",
        "response.top_logprobs",
        "determinism.seed",
    },
    max_n=16,
    max_top_logprobs=20,
    extension=OpenAiExtension,
    body=_body,
)
"""Chat Completions at OpenAI."""
