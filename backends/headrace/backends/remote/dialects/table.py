"""The dialects that there are, by the names that the settings use."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.backends.remote.dialect import Dialect
from headrace.backends.remote.dialects.anthropic import AnthropicDialect
from headrace.backends.remote.dialects.deepseek import DeepSeek
from headrace.backends.remote.dialects.gemini import GeminiDialect
from headrace.backends.remote.dialects.openai_chat import OpenAiChat
from headrace.backends.remote.dialects.openai_compatible import LlamaCpp, LlamaCppPython, OpenAiCompatible, Vllm
from headrace.backends.remote.dialects.openai_completions import OpenAiCompletions
from headrace.backends.remote.dialects.openai_responses import OpenAiResponses

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        OpenAiChat(),
        OpenAiResponses(),
        OpenAiCompatible(),
        OpenAiCompletions(),
        Vllm(),
        LlamaCpp(),
        LlamaCppPython(),
        DeepSeek(),
        AnthropicDialect(),
        GeminiDialect(),
    )
}
