"""The dialect ``openai-completions``: text completions, at servers of one's own.

Log-probabilities are left out: this API gives tokens as text, and a token need not be whole characters.

Source: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from functools import partial
from typing import Any

from headrace.backends.remote.dialects.fields import sampling_of, seed_of, stop_of
from headrace.backends.remote.dialects.openai_requests import MAX_SEED, SAMPLING, openai_dialect
from headrace.backends.remote.dialects.openai_stream import ChunkReader, delta_of_text
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.requests import TextInput
from headrace.backends.types import Call


def _body(call: Call, model: RemoteModelOptions) -> dict[str, Any]:
    request = call.request
    assert isinstance(request.input, TextInput), "no other input is declared. This is a bug"
    return {
        "model": model.model,
        "prompt": request.input.text,
        "max_tokens": call.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling_of(request, SAMPLING),
        **stop_of(request, "stop"),
        **seed_of(request, most=MAX_SEED),
    }


COMPLETIONS = openai_dialect(
    name="openai-completions",
    options=frozenset(
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
    ),
    path=lambda _: "/completions",
    body=_body,
    reader=partial(ChunkReader, delta_of=delta_of_text),
)
"""Text completions at any server."""
