"""What a model's chat template says of tools and reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.backends.api import ChatTokenizer
from headrace.backends.dialect import PLAIN
from headrace.backends.errors import InvalidArgument
from headrace.backends.onnx.gguf_tokenizer import read_tokenizer
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    GenerateRequest,
    Role,
    ToolCall,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.backends.tokenizer import HuggingFaceTokenizer
from headrace.server.engine.channels import channels_of
from tests.backends import chat_templates as templates
from tests.onnx import tiny

CONTROL, USER_DEFINED = 3, 4
TOOLS = (ToolDefinition("weather", "How warm it is.", '{"type": "object"}'), ToolDefinition("clock"))
ARGUMENTS = '{"city": "Zürich", "days": [1, 2], "note": "a \\"}\\" b"}'


def tokenizer_with(template: str | None, marks: dict[str, int] | None = None) -> HuggingFaceTokenizer:
    """``marks`` are added tokens and their kinds."""
    tokens, types = tiny.byte_level_vocabulary()
    changes: dict[str, Any] = {
        "tokenizer.ggml.tokens": [*tokens, *(marks or {})],
        "tokenizer.ggml.token_type": [*types, *(marks or {}).values()],
    }
    read = read_tokenizer(Path("tiny.gguf"), tiny.metadata() | changes)
    return HuggingFaceTokenizer(
        read.tokenizer_json,
        model="tiny",
        backend="onnx",
        chat_template=template,
        eos_token_ids=read.eos_token_ids,
        bos_token_id=read.bos_token_id,
    )


HERMES_MARKS = dict.fromkeys(("<think>", "</think>", "<tool_call>", "</tool_call>"), USER_DEFINED)
MISTRAL_MARKS = dict.fromkeys(
    ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
     "[/TOOL_RESULTS]"), CONTROL
)  # fmt: skip
FAMILIES = {
    "qwen3": tokenizer_with(templates.QWEN3, HERMES_MARKS),
    "qwen3, marks that are control tokens": tokenizer_with(templates.QWEN3, dict.fromkeys(HERMES_MARKS, CONTROL)),
    "qwen3, marks that are text": tokenizer_with(templates.QWEN3),
    "smollm3": tokenizer_with(templates.SMOLLM3, HERMES_MARKS),
    "mistral": tokenizer_with(templates.MISTRAL, MISTRAL_MARKS),
    "llama": tokenizer_with(templates.LLAMA),
}


def test_a_template_of_text_alone_has_neither() -> None:
    assert tokenizer_with(None).dialect == PLAIN
    assert tokenizer_with(tiny.CHAT_TEMPLATE).dialect == PLAIN
    assert tokenizer_with(templates.XML_CALLS).dialect == PLAIN, "these calls cannot be read"
    assert isinstance(tokenizer_with(None), ChatTokenizer)


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_hermes_marks_reasoning_and_a_switch_are_found(family: str) -> None:
    dialect = FAMILIES[family].dialect
    assert dialect.tools is not None
    assert dialect.tools.begin is not None
    assert (dialect.tools.begin.text, dialect.tools.begin.is_control) == ("<tool_call>", False)
    assert dialect.reasoning is not None
    assert [len(mark.token_ids) for mark in (dialect.reasoning.begin, dialect.reasoning.end)] == [1, 1]
    assert dialect.reasoning_switch == "enable_thinking"


def test_a_mark_is_the_tokens_that_write_it() -> None:
    as_text = FAMILIES["qwen3, marks that are text"]
    assert as_text.dialect.reasoning is not None
    end = as_text.dialect.reasoning.end
    assert len(end.token_ids) > 1
    assert as_text.decode(end.token_ids) == "</think>"
    control = FAMILIES["qwen3, marks that are control tokens"].dialect.reasoning
    assert control is not None
    assert control.end.is_control


def test_a_model_that_always_reasons_has_no_switch() -> None:
    dialect = tokenizer_with(templates.THINKING_ONLY, HERMES_MARKS).dialect
    assert dialect.reasoning is not None
    assert (dialect.reasoning_switch, dialect.tools) == (None, None)


def test_mistral_takes_short_ids_and_lists() -> None:
    dialect = FAMILIES["mistral"].dialect
    assert dialect.tools is not None
    assert dialect.tools.begin is not None
    assert dialect.tools.begin.is_control
    assert (dialect.tools.is_list, dialect.tools.has_short_ids) == (True, True)
    assert dialect.reasoning is None


def conversation(*calls: ToolCall, **fields: Any) -> ChatInput:
    turns = [ChatMessage(Role.USER, "How warm?")]
    if calls:
        turns.append(ChatMessage(Role.ASSISTANT, "", tool_calls=calls))
        turns += [ChatMessage(Role.TOOL, "20", tool_call_id=call.id) for call in calls]
    return ChatInput(tuple(turns), tools=TOOLS, **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_the_template_writes_is_read_as_that_call(family: str) -> None:
    tokenizer = FAMILIES[family]
    calls = [ToolCall("123456789", "weather", ARGUMENTS), ToolCall("abcdefghi", "clock", "{}")]
    calls = calls[:1] if family == "llama" else calls
    asked = ChatInput((ChatMessage(Role.USER, "How warm?"),))
    turn = ChatMessage(Role.ASSISTANT, "", tool_calls=tuple(calls))
    written = tokenizer.encode_chat(ChatInput((*asked.messages, turn))).ids
    # The assistant's turn alone: what comes after the question, and before the end of the turn.
    written = written[len(tokenizer.encode_chat(asked).ids) :]
    channels = channels_of(GenerateRequest(input=conversation()), tokenizer.dialect, "")
    assert channels is not None
    deltas = []
    for token_id in written:
        if token_id in tokenizer.eos_token_ids:
            break
        deltas += channels.push(token_id, tokenizer.token_bytes(token_id)).tool_calls
    deltas += channels.finish().tool_calls
    for i, call in enumerate(calls):
        mine = [delta for delta in deltas if delta.index == i]
        assert mine[0].name == call.name
        assert json.loads("".join(delta.arguments_json for delta in mine)) == json.loads(call.arguments_json)


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_calls_and_results_are_laid_out(family: str) -> None:
    text = FAMILIES[family].encode_chat(conversation(ToolCall("123456789", "weather", ARGUMENTS))).text
    assert "Zürich" in text
    assert "20" in text
    if family != "mistral":  # which shows tools before the last question alone
        assert "How warm it is." in text
    assert "How warm it is." in FAMILIES[family].encode_chat(conversation()).text


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_that_may_not_be_called_are_not_shown_and_are_checked_all_the_same(family: str) -> None:
    tokenizer = FAMILIES[family]
    assert "How warm it is." not in tokenizer.encode_chat(conversation(tool_choice=ToolChoiceMode.NONE)).text
    bad = (*TOOLS, ToolDefinition("bad", parameters_json_schema="{"))
    for choice in (ToolChoiceMode.NONE, ToolChoiceMode.AUTO):
        chat = ChatInput((ChatMessage(Role.USER, "hi"),), tools=bad, tool_choice=choice)
        with pytest.raises(InvalidArgument) as refusal:
            tokenizer.encode_chat(chat)
        assert refusal.value.field == "chat.tools[2].parameters_json_schema"
