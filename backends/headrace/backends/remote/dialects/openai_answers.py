"""What answers of the OpenAI family have in common: usage and errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headrace.backends.remote.dialect import Problem, StreamFailed
from headrace.backends.remote.dialects.counts import count
from headrace.backends.usage import Usage

_STATUSES = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "authentication_error": 401,
    "insufficient_quota": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "server_error": 500,
    "overloaded_error": 503,
}
"""What an error in a stream would have been as an answer, by its code or its type."""


def read_usage(said: Mapping[str, Any], usage: Usage, *, prompt: str = "prompt", answer: str = "completion") -> None:
    """Writes the ``usage`` of an answer; ``prompt`` and ``answer`` are what these are called there. Theirs is as ours:
    cached tokens, read or written, are a part of the prompt's; reasoning is one of the answer's. Raises TypeError or
    ValueError for what is no count.
    """
    usage.input_tokens = count(said, f"{prompt}_tokens")
    usage.output_tokens = count(said, f"{answer}_tokens")
    inputs, outputs = said.get(f"{prompt}_tokens_details") or {}, said.get(f"{answer}_tokens_details") or {}
    usage.cache_read_input_tokens = count(inputs, "cached_tokens")
    usage.cache_write_input_tokens = count(inputs, "cache_write_tokens")
    usage.reasoning_output_tokens = count(outputs, "reasoning_tokens")


def problem_of(body: bytes) -> Problem:
    """What an error's body says. Never raises."""
    try:
        return problem_in(json.loads(body))
    except (ValueError, RecursionError):
        return Problem(body.decode(errors="replace"))


def problem_in(document: Any) -> Problem:
    """OpenAI's form is ``{"error": {"message", "type", "param", "code"}}``; others leave out the outer object, give the
    message alone, or call it ``detail``.
    """
    error = document.get("error", document) if isinstance(document, dict) else document
    if not isinstance(error, dict):
        return Problem(error if isinstance(error, str) else "")
    said = {key: value for key, value in error.items() if isinstance(value, str) and value}
    return Problem(said.get("message") or said.get("detail") or "", said.get("code") or said.get("type"))


def failure_in(document: Any) -> StreamFailed:
    """An error within a stream. Some give their status as its code."""
    problem = problem_in(document)
    error = document.get("error", document)
    named = [error.get(key) for key in ("code", "type")] if isinstance(error, dict) else []
    numbers = [code for code in named if isinstance(code, int) and 400 <= code < 600]
    known = [_STATUSES[code] for code in named if isinstance(code, str) and code in _STATUSES]
    return StreamFailed(problem, status=next(iter(numbers + known), None))
