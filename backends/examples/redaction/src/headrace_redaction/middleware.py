"""The middleware ``redaction``."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from headrace.backends.components import Place
from headrace.backends.errors import InvalidArgument
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    GenerateRequest,
    InfillInput,
    Input,
    TextInput,
    TokenIdsInput,
    ToolDefinition,
)
from headrace.backends.types import Call, Events, Handler
from headrace_redaction.finders import Kind
from headrace_redaction.redactor import Redactor


class RedactionOptions(BaseModel):
    """``[middleware.redaction]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kinds: tuple[Kind, ...] = Field(tuple(Kind), min_length=1)
    """What is taken out."""


class Redaction:
    """Takes e-mail addresses, phone numbers, card numbers and IBANs out of prompts."""

    name: ClassVar[str] = "redaction"
    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type[BaseModel]] = RedactionOptions
    place: ClassVar[Place] = Place.REQUEST

    def __init__(self, options: RedactionOptions) -> None:
        self._kinds = options.kinds

    def wrap(self, inner: Handler) -> Handler:
        async def handle(call: Call) -> Events:
            # In a thread: a long prompt takes a while, and other calls are waiting for the event loop.
            call.request = await asyncio.to_thread(redact_request, call.request, Redactor(self._kinds))
            async with aclosing(inner(call)) as events:
                async for event in events:
                    yield event

        return handle


def redact_request(request: GenerateRequest, redactor: Redactor) -> GenerateRequest:
    """A request whose prompt has no personal data, nor have the candidates that are to be scored after it. Raises
    InvalidArgument for token ids, which nobody here can read.
    """
    redacted, scoring = redact_input(request.input, redactor), request.scoring
    if scoring is not None:
        scoring = replace(scoring, candidates=tuple(_candidate(one, redactor) for one in scoring.candidates))
    return replace(request, input=redacted, scoring=scoring)


def _candidate(source: TextInput | TokenIdsInput, redactor: Redactor) -> TextInput:
    if isinstance(source, TokenIdsInput):
        raise InvalidArgument("candidates.token_ids", "not taken by this server, which redacts prompts; send text")
    return TextInput(redactor.text(source.text))


def redact_input(source: Input, redactor: Redactor) -> Input:
    """A prompt without personal data. Raises InvalidArgument for token ids."""
    match source:
        case TextInput(text):
            return TextInput(redactor.text(text))
        case ChatInput():
            return replace(
                source,
                messages=tuple(_message(message, redactor) for message in source.messages),
                tools=tuple(_tool(tool, redactor) for tool in source.tools),
                template_arguments=redactor.value(dict(source.template_arguments)),
            )
        case InfillInput(prefix, suffix):
            return InfillInput(redactor.text(prefix), redactor.text(suffix))
        case TokenIdsInput():
            raise InvalidArgument("token_ids", "not taken by this server, which redacts prompts; send text")


def _message(message: ChatMessage, redactor: Redactor) -> ChatMessage:
    calls = (replace(call, arguments_json=redactor.json(call.arguments_json)) for call in message.tool_calls)
    return replace(
        message,
        text=redactor.text(message.text),
        name=_optional(message.name, redactor),
        tool_calls=tuple(calls),
        reasoning_text=_optional(message.reasoning_text, redactor),
    )


def _tool(tool: ToolDefinition, redactor: Redactor) -> ToolDefinition:
    schema = tool.parameters_json_schema
    return replace(
        tool,
        description=_optional(tool.description, redactor),
        parameters_json_schema=None if schema is None else redactor.json(schema),
    )


def _optional(text: str | None, redactor: Redactor) -> str | None:
    return None if text is None else redactor.text(text)
