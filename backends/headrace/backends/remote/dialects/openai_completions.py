"""The dialect ``openai-completions``: text completions, at servers of one's own.

Log-probabilities are left out: this API gives tokens as text, and a token need not be whole characters.

Source: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel

from headrace.backends.remote.dialect import AnswerReader, Problem
from headrace.backends.remote.dialects.openai_chat import SAMPLING
from headrace.backends.remote.dialects.openai_compatible import MAX_TEMPERATURE
from headrace.backends.remote.dialects.openai_json import bearer, problem_of, sampling_of, seed_of, stop_of
from headrace.backends.remote.dialects.openai_stream import ChunkReader, delta_of_text
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.types import Call, TextInput, Usage


class OpenAiCompletions:
    """Text completions at any server (``Dialect``)."""

    name: ClassVar[str] = "openai-completions"
    base_url: ClassVar[str | None] = None
    options: ClassVar[frozenset[str]] = frozenset(
        {
            "text",
            "sampling.temperature",
            "sampling.top_p",
            "sampling.presence_penalty",
            "sampling.frequency_penalty",
            "stopping.max_new_tokens",
            "stopping.stop_sequences",
            "determinism.seed",
        }
    )
    max_n: ClassVar[int] = 1
    max_top_logprobs: ClassVar[int] = 0
    extension: ClassVar[type[BaseModel] | None] = None

    def headers(self, key: str | None) -> Mapping[str, str]:
        return bearer(key)

    def path(self, model: RemoteModelOptions) -> str:  # noqa: ARG002  # it is the same for all
        return "/completions"

    def body(self, call: Call, model: RemoteModelOptions) -> dict[str, Any]:
        request = call.request
        assert isinstance(request.input, TextInput), "no other input is declared. This is a bug"
        return {
            "model": model.model,
            "prompt": request.input.text,
            "max_tokens": call.max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling_of(request, SAMPLING, max_temperature=MAX_TEMPERATURE),
            **stop_of(request),
            **seed_of(request),
        }

    def reader(self, call: Call, usage: Usage) -> AnswerReader:
        return ChunkReader(call, usage, delta_of=delta_of_text)

    def problem(self, body: bytes) -> Problem:
        return problem_of(body)
