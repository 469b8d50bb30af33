from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

import pytest

from headrace.backends.errors import InvalidArgument
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, StreamEnd
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    GenerateRequest,
    InfillInput,
    Input,
    Role,
    Scoring,
    TextInput,
    TokenIdsInput,
    ToolCall,
    ToolDefinition,
)
from headrace.backends.types import Call, Events
from headrace.server.plugins import load_plugins
from headrace_redaction.finders import Kind
from headrace_redaction.middleware import Redaction, RedactionOptions, redact_request
from headrace_redaction.redactor import Redactor

ANSWER: list[Event] = [Delta(0, "Write to c@x.org."), ChoiceFinish(0, FinishReason.EOS_TOKEN), StreamEnd()]


async def run(source: Input, *, options: RedactionOptions | None = None) -> tuple[Call, list[Event]]:
    """The call as it gets through the middleware, and what comes back."""
    arrived: list[Call] = []

    async def inner(call: Call) -> Events:
        arrived.append(call)
        for event in ANSWER:
            yield event

    handler = Redaction(options or RedactionOptions()).wrap(inner)
    request = GenerateRequest(input=source, options=frozenset({"text"}))
    async with aclosing(handler(Call(request=request, request_id="1", arrived=0.0))) as events:
        answer = [event async for event in events]
    return arrived[0], answer


async def test_a_text_arrives_without_personal_data_and_the_answer_is_left_alone() -> None:
    call, answer = await run(TextInput("From a@x.org, card 4111 1111 1111 1111, account DE89370400440532013000."))
    assert call.request.input == TextInput("From [EMAIL_1], card [CARD_1], account [IBAN_1].")
    assert call.request.options == {"text"}
    assert answer == ANSWER


async def test_every_part_of_a_conversation_is_redacted_with_one_numbering() -> None:
    chat = ChatInput(
        messages=(
            ChatMessage(Role.SYSTEM, "The customer is a@x.org."),
            ChatMessage(Role.USER, "I am b@x.org.", name="b@x.org"),
            ChatMessage(
                Role.ASSISTANT,
                "",
                tool_calls=(ToolCall("1", "find", '{"who": "a@x.org"}'),),
                reasoning_text="Who is b@x.org?",
            ),
        ),
        tools=(ToolDefinition("find", "Ask a@x.org.", '{"description": "such as b@x.org"}'),),
        template_arguments={"owner": "a@x.org"},
    )
    call, _ = await run(chat)
    redacted = call.request.input
    assert isinstance(redacted, ChatInput)
    assert "x.org" not in repr(redacted)
    assert redacted.messages[0].text == "The customer is [EMAIL_1]."
    assert (redacted.messages[1].text, redacted.messages[1].name) == ("I am [EMAIL_2].", "[EMAIL_2]")
    assert redacted.messages[2].tool_calls[0].arguments_json == '{"who": "[EMAIL_1]"}'
    assert redacted.messages[2].reasoning_text == "Who is [EMAIL_2]?"
    assert redacted.tools[0].parameters_json_schema == '{"description": "such as [EMAIL_2]"}'
    assert redacted.template_arguments == {"owner": "[EMAIL_1]"}


async def test_both_sides_of_a_hole_are_redacted() -> None:
    call, _ = await run(InfillInput("to = 'a@x.org'", "# b@x.org"))
    assert call.request.input == InfillInput("to = '[EMAIL_1]'", "# [EMAIL_2]")


async def test_candidates_that_are_scored_are_redacted_too() -> None:
    request = GenerateRequest(
        input=TextInput("To a@x.org:"), scoring=Scoring(candidates=(TextInput(" a@x.org"), TextInput(" b@x.org")))
    )
    redacted = redact_request(request, Redactor(tuple(Kind)))
    assert redacted.input == TextInput("To [EMAIL_1]:")
    assert redacted.scoring == Scoring(candidates=(TextInput(" [EMAIL_1]"), TextInput(" [EMAIL_2]")))
    unreadable = replace(request, scoring=Scoring(candidates=(TokenIdsInput((1,)),)))
    with pytest.raises(InvalidArgument, match=r"candidates\.token_ids"):
        redact_request(unreadable, Redactor(tuple(Kind)))


async def test_each_request_is_numbered_anew() -> None:
    for address in ("a@x.org", "b@x.org"):
        call, _ = await run(TextInput(address))
        assert call.request.input == TextInput("[EMAIL_1]")


async def test_token_ids_are_refused_since_nobody_here_can_read_them() -> None:
    with pytest.raises(InvalidArgument, match="token_ids"):
        await run(TokenIdsInput((1, 2)))


async def test_kinds_can_be_chosen() -> None:
    call, _ = await run(TextInput("a@x.org, 555-223-4567"), options=RedactionOptions(kinds=(Kind.EMAIL,)))
    assert call.request.input == TextInput("[EMAIL_1], 555-223-4567")


def test_headrace_finds_the_plugin_and_accepts_it() -> None:
    (plugin,) = load_plugins(["redaction"])
    assert plugin.middleware == (Redaction,)
