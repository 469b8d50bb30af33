"""The dialects that there are, by the names that the settings use."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.backends.remote.dialect import Dialect
from headrace.backends.remote.dialects.anthropic import ANTHROPIC
from headrace.backends.remote.dialects.deepseek import DEEPSEEK
from headrace.backends.remote.dialects.gemini import GEMINI
from headrace.backends.remote.dialects.openai import OPENAI
from headrace.backends.remote.dialects.openai_compatible import COMPATIBLE, LLAMA_CPP, LLAMA_CPP_PYTHON, VLLM
from headrace.backends.remote.dialects.openai_completions import COMPLETIONS
from headrace.backends.remote.dialects.openai_responses import RESPONSES

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        OPENAI,
        RESPONSES,
        COMPATIBLE,
        COMPLETIONS,
        VLLM,
        LLAMA_CPP,
        LLAMA_CPP_PYTHON,
        DEEPSEEK,
        ANTHROPIC,
        GEMINI,
    )
}
