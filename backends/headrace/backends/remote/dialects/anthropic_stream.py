"""Answers of Anthropic's Messages API (https://platform.claude.com/docs/en/build-with-claude/streaming)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, ToolCallDelta
from headrace.backends.remote.dialect import Problem, StreamFailed
from headrace.backends.remote.dialects.anthropic_thoughts import redacted, signed
from headrace.backends.remote.dialects.counts import count
from headrace.backends.remote.sse import ServerSentEvent
from headrace.backends.types import Call
from headrace.backends.usage import Usage

_REASONS = {
    "end_turn": FinishReason.EOS_TOKEN,
    "max_tokens": FinishReason.MAX_TOKENS,
    "model_context_window_exceeded": FinishReason.MAX_TOKENS,
    # A limit of the provider's on its own tools, which only ``extra_body`` can ask for.
    "pause_turn": FinishReason.MAX_TOKENS,
    "stop_sequence": FinishReason.STOP_SEQUENCE,
    "tool_use": FinishReason.TOOL_CALLS,
    "refusal": FinishReason.CONTENT_FILTER,
}
_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""Of HTTP, by the types of errors."""


class AnthropicReader:
    """Reads one answer (``AnswerReader``)."""

    def __init__(self, call: Call, usage: Usage) -> None:
        self.finished = False
        self.reported_version: str | None = None
        self._usage = usage
        self._counts: dict[str, int] = {}
        """What it has said of the input: later events may say some of it again."""
        self._with_reasoning = call.request.reasoning.include_text
        self._with_stop_sequence = call.request.stopping.include_stop_sequence
        self._tools: dict[int, tuple[int, bool]] = {}
        """By the index of its block: which call it is, and whether it has arguments."""
        self._num_characters = 0
        """Of text, so far."""
        self._thoughts = ""
        """What the id of the next call takes along."""
        self._finish: ChoiceFinish | None = None

    def read(self, event: ServerSentEvent) -> Sequence[Event]:
        return list(self._read(json.loads(event.data)))

    def end(self) -> Sequence[Event]:
        if self.finished:
            return ()
        if self._finish is None:
            raise EOFError
        return list(self._end(self._finish))

    def _read(self, data: Any) -> Iterator[Event]:
        match data["type"]:
            case "message_start":
                self.reported_version = data["message"].get("model")
                # Its output is a 1 that stands for nothing yet: an error may follow before there is any.
                if (usage := data["message"].get("usage")) is not None:
                    self._count({**usage, "output_tokens": None})
            case "content_block_start":
                yield from self._begin_block(data["index"], data["content_block"])
            case "content_block_delta":
                yield from self._continue_block(data["index"], data["delta"])
            case "content_block_stop":
                yield from self._end_block(data["index"])
            case "message_delta":
                self._count(data.get("usage"))
                if (reason := data["delta"].get("stop_reason")) is not None:
                    self._finish = ChoiceFinish(
                        0, _REASONS.get(reason, FinishReason.EOS_TOKEN), data["delta"].get("stop_sequence")
                    )
            case "message_stop":
                if self._finish is None:
                    raise ValueError("an answer ends without a reason")
                yield from self._end(self._finish)
            case "error":
                problem = problem_of(data["error"])
                raise StreamFailed(problem, status=_STATUSES.get(problem.code or ""))

    def _begin_block(self, index: int, block: Mapping[str, Any]) -> Iterator[Event]:
        match block["type"]:
            case "text" if block["text"]:
                yield self._text(block["text"])
            case "redacted_thinking":
                self._thoughts += redacted(self._num_characters, block["data"])
            case "tool_use":
                call, call_id = len(self._tools), block["id"] + self._thoughts
                self._tools[index] = call, False
                self._thoughts = ""
                yield Delta(0, "", tool_calls=(ToolCallDelta(call, call_id, block["name"]),))

    def _continue_block(self, index: int, delta: Mapping[str, Any]) -> Iterator[Event]:
        match delta["type"]:
            case "text_delta" if delta["text"]:
                yield self._text(delta["text"])
            case "thinking_delta" if self._with_reasoning and delta["thinking"]:
                yield Delta(0, "", reasoning_text=delta["thinking"])
            case "signature_delta" if delta["signature"]:
                self._thoughts += signed(self._num_characters, delta["signature"])
            # The provider's own tools have such deltas too.
            case "input_json_delta" if index in self._tools and delta["partial_json"]:
                call, _ = self._tools[index]
                self._tools[index] = call, True
                yield Delta(0, "", tool_calls=(ToolCallDelta(call, arguments_json=delta["partial_json"]),))

    def _text(self, text: str) -> Delta:
        self._num_characters += len(text)
        return Delta(0, text)

    def _end_block(self, index: int) -> Iterator[Event]:
        call, has_arguments = self._tools.get(index, (0, True))
        if not has_arguments:  # of a tool without parameters
            yield Delta(0, "", tool_calls=(ToolCallDelta(call, arguments_json="{}"),))

    def _end(self, finish: ChoiceFinish) -> Iterator[Event]:
        self.finished = True
        if self._with_stop_sequence and finish.stop_sequence:
            yield Delta(0, finish.stop_sequence)
        yield finish

    def _count(self, usage: Mapping[str, Any] | None) -> None:
        """Counts are cumulative. Of the input there are three that are disjoint; ours includes all."""
        if usage is None:
            return
        for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
            if (number := count(usage, name)) is not None:
                self._counts[name] = number
        if "input_tokens" in self._counts:
            self._usage.input_tokens = sum(self._counts.values())
        self._usage.cache_read_input_tokens = self._counts.get("cache_read_input_tokens")
        self._usage.cache_write_input_tokens = self._counts.get("cache_creation_input_tokens")
        if (number := count(usage, "output_tokens")) is not None:
            self._usage.output_tokens = number
        if (details := usage.get("output_tokens_details")) is not None:
            self._usage.reasoning_output_tokens = count(details, "thinking_tokens")


def problem_of(error: Mapping[str, Any]) -> Problem:
    """What an error says, in a stream or alone."""
    code, message = error.get("type"), error.get("message")
    return Problem(message if isinstance(message, str) else "", code if isinstance(code, str) else None)
