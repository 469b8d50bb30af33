"""How many tokens an input can have at most, where no tokenizer is at hand to count them."""

from __future__ import annotations

import json

from headrace.backends.formats import ChoiceFormat, JsonSchemaFormat, LarkFormat, OutputFormat, RegexFormat
from headrace.backends.requests import ChatInput, InfillInput, Input, TextInput, TokenIdsInput

_TOKENS_PER_MESSAGE = 16
"""Marks of a turn and of its role; the layouts that are known take up to 8."""


def max_input_tokens(source: Input) -> int:
    """A token stands for a byte of UTF-8 at least, in every vocabulary with whole characters or bytes."""
    match source:
        case TextInput(text):
            return _TOKENS_PER_MESSAGE + _bytes(text)
        case TokenIdsInput(ids):
            return len(ids)
        case InfillInput(prefix, suffix):
            return _TOKENS_PER_MESSAGE + _bytes(prefix) + _bytes(suffix)
        case ChatInput():
            return _of_chat(source)


def max_format_tokens(output_format: OutputFormat | None) -> int:
    """What the shape of an answer can add to its input: providers lay it before the model, and bill it."""
    match output_format:
        case None:
            return 0
        case JsonSchemaFormat(text) | RegexFormat(text) | LarkFormat(text):
            return _TOKENS_PER_MESSAGE + _bytes(text)
        case ChoiceFormat(texts):
            return _TOKENS_PER_MESSAGE * (1 + len(texts)) + sum(map(_bytes, texts))
        case _:
            return _TOKENS_PER_MESSAGE


def _of_chat(chat: ChatInput) -> int:
    texts = [json.dumps(dict(chat.template_arguments), default=str)]
    for message in chat.messages:
        texts += [message.role, message.text, message.name or "", message.tool_call_id or ""]
        texts.append(message.reasoning_text or "")
        for call in message.tool_calls:
            texts += [call.id, call.name, call.arguments_json]
    for tool in chat.tools:
        texts += [tool.name, tool.description or "", tool.parameters_json_schema or ""]
    num_parts = 2 + len(chat.messages) + len(chat.tools) + sum(len(message.tool_calls) for message in chat.messages)
    return num_parts * _TOKENS_PER_MESSAGE + sum(map(_bytes, texts))


def _bytes(text: str) -> int:
    return len(text.encode(errors="replace"))
