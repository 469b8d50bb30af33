"""What an attempt at a remote model uses, as it happens: an estimate, until its provider has said all."""

from __future__ import annotations

from functools import cached_property

from headrace.backends.events import Delta
from headrace.backends.requests import ChatInput, GenerateRequest, InfillInput, TextInput, TokenIdsInput
from headrace.backends.usage import Usage

_BYTES_PER_TOKEN = 4
"""Of UTF-8, about, in most tokenizers and languages."""


class Counting:
    """Writes an attempt's usage. What a provider does not report is estimated, and marked as such."""

    def __init__(self, request: GenerateRequest, max_new_tokens: int, usage: Usage) -> None:
        """``usage`` is the attempt's."""
        self.reported = Usage()
        """For the provider's counts."""
        self._request = request
        self._most = max_new_tokens * request.n
        self._usage = usage
        self._input = 0
        self._output = 0
        usage.input_tokens = usage.output_tokens = 0

    @cached_property
    def estimated_input(self) -> int:
        """Tokens."""
        return estimated_input(self._request)

    def sent(self) -> None:
        """The request goes out: whoever has it may bill it."""
        self._input = self.estimated_input
        self._write(is_final=False)

    def refused(self) -> None:
        """Nothing was billed: the request did not arrive, or was turned down."""
        self._input = self._output = 0
        self._usage.input_tokens = self._usage.output_tokens = 0
        self._usage.estimated = False

    def delta(self, delta: Delta) -> None:
        self._output += len(delta.logprobs) or len(delta.token_ids) or max(1, _num_bytes(delta) // _BYTES_PER_TOKEN)
        self._write(is_final=False)

    def end(self, *, is_complete: bool) -> None:
        """Nothing more comes. ``is_complete``: the provider has said all that it says."""
        if self._input:
            self._write(is_final=is_complete)

    def _write(self, *, is_final: bool) -> None:
        usage, reported = self._usage, self.reported
        usage.input_tokens = self._input if reported.input_tokens is None else reported.input_tokens
        usage.cache_read_input_tokens = reported.cache_read_input_tokens
        usage.cache_write_input_tokens = reported.cache_write_input_tokens
        usage.reasoning_output_tokens = reported.reasoning_output_tokens
        usage.accepted_draft_tokens = reported.accepted_draft_tokens
        usage.rejected_draft_tokens = reported.rejected_draft_tokens
        if is_final and reported.output_tokens is not None:
            usage.output_tokens = reported.output_tokens
        else:
            usage.output_tokens = max(min(self._output, self._most), reported.output_tokens or 0)
        usage.estimated = not is_final or reported.input_tokens is None or reported.output_tokens is None


def estimated_input(request: GenerateRequest) -> int:
    """Tokens of its input, by the bytes of its text."""
    match request.input:
        case TextInput(text):
            num_bytes = len(text.encode())
        case TokenIdsInput(ids):
            return len(ids)
        case InfillInput(prefix, suffix):
            num_bytes = len(prefix.encode()) + len(suffix.encode())
        case ChatInput() as chat:
            texts = [message.text for message in chat.messages]
            texts += [call.name + call.arguments_json for message in chat.messages for call in message.tool_calls]
            texts += [tool.name + (tool.description or "") for tool in chat.tools]
            texts += [tool.parameters_json_schema or "" for tool in chat.tools]
            num_bytes = sum(len(text.encode()) for text in texts)
    return max(1, num_bytes // _BYTES_PER_TOKEN)


def _num_bytes(delta: Delta) -> int:
    num_bytes = len(delta.text.encode()) + len(delta.reasoning_text.encode())
    for call in delta.tool_calls:
        num_bytes += len(call.arguments_json.encode()) + len((call.name or "").encode())
    return num_bytes
