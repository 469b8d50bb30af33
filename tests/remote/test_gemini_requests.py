"""What the dialect ``gemini`` asks for. Examples marked so are those of the documentation
(https://ai.google.dev/api/generate-content, https://ai.google.dev/gemini-api/docs/thought-signatures).
"""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import ChoiceFormat, JsonSchemaFormat
from headrace.backends.remote.dialects.gemini import GEMINI, GeminiExtension
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    NamedTool,
    Reasoning,
    ResponseOptions,
    Role,
    Sampling,
    Stopping,
    ToolCall,
    ToolChoiceMode,
    ToolDefinition,
)
from tests.remote.asking import body_of, call_of, request_of

DIALECT = GEMINI
SYSTEM, USER, ASSISTANT, TOOL = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL
SCHEMA = {"type": "object", "properties": {"flight": {"type": "string"}}, "required": ["flight"]}
FLIGHT = ToolDefinition("check_flight", "Gets the current status of a flight", json.dumps(SCHEMA))
TAXI = ToolDefinition("book_taxi", "Book a taxi")


def chat(*turns: tuple[Role, str] | ChatMessage, **chat_fields: object) -> ChatInput:
    messages = tuple(turn if isinstance(turn, ChatMessage) else ChatMessage(*turn) for turn in turns)
    return ChatInput(messages, **chat_fields)


def body(
    source: ChatInput | str = "Hello", *, max_new_tokens: int = 64, extension: object = None, model=None, **fields
):
    extensions = {} if extension is None else {"gemini": GeminiExtension.model_validate(extension)}
    call = call_of(request_of(source, **fields), max_new_tokens=max_new_tokens, extensions=extensions)
    return body_of(DIALECT, call, **(model or {}))


def config(**fields):
    return body(**fields)["generationConfig"]


def calls(*made: ToolCall, text: str = "") -> ChatMessage:
    return ChatMessage(ASSISTANT, text, tool_calls=made)


def result(call_id: str | None, text: str) -> ChatMessage:
    return ChatMessage(TOOL, text, tool_call_id=call_id)


def test_a_message_is_asked_for_as_the_documentation_does():
    assert body("Write a story about a magic backpack.") == {
        "contents": [{"role": "user", "parts": [{"text": "Write a story about a magic backpack."}]}],
        "generationConfig": {"maxOutputTokens": 64},
    }


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gemini-2.5-flash", "/models/gemini-2.5-flash:streamGenerateContent?alt=sse"),
        ("tunedModels/mine-7", "/tunedModels/mine-7:streamGenerateContent?alt=sse"),
    ],
)
def test_the_model_is_in_the_path_and_the_key_is_not(model, path):
    assert DIALECT.path(RemoteModelOptions(model=model, context_length=1000)) == path
    assert DIALECT.headers("AIza1") == {"x-goog-api-key": "AIza1"}
    assert DIALECT.headers(None) == {}


def test_the_system_prompt_stands_apart_and_turns_are_the_users_and_the_models():
    sent = body(chat((SYSTEM, "You are a cat."), (USER, "Hello"), (USER, "there"), (ASSISTANT, "Meow"), (USER, "And?")))
    assert sent["systemInstruction"] == {"parts": [{"text": "You are a cat."}]}
    assert sent["contents"] == [
        {"role": "user", "parts": [{"text": "Hello"}, {"text": "there"}]},
        {"role": "model", "parts": [{"text": "Meow"}]},
        {"role": "user", "parts": [{"text": "And?"}]},
    ]


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([(SYSTEM, "Be brief.")], "chat.messages"),
        ([(USER, "Hello"), (SYSTEM, "Be brief."), (USER, "And?")], "chat.messages[1].role"),
        ([(USER, "Hello"), (ASSISTANT, "Hi")], "chat.messages"),
        ([(USER, "Hello"), (ASSISTANT, ""), (USER, "And?")], "chat.messages[1].content"),
        ([(USER, "Hello"), result("other", "Rain")], "chat.messages[1].tool_call_id"),
        ([(USER, "Hello"), result(None, "Rain")], "chat.messages[1].tool_call_id"),
        (
            [(USER, "Hello"), calls(ToolCall("a", "x", "{}"), ToolCall("b", "x", "[]")), (USER, "And?")],
            "chat.messages[1].tool_calls[1].arguments_json",
        ),
    ],
)
def test_a_conversation_that_the_api_does_not_take_is_refused_by_its_place(turns, field):
    with pytest.raises(InvalidArgument) as error:
        body(chat(*turns))
    assert error.value.field == field


def test_tools_are_declared_with_their_schemas():
    sent = body(chat((USER, "Check flight status for AA100."), tools=(FLIGHT, TAXI)))
    assert sent["tools"] == [
        {
            "functionDeclarations": [
                {
                    "name": "check_flight",
                    "description": "Gets the current status of a flight",
                    "parametersJsonSchema": SCHEMA,
                },
                {"name": "book_taxi", "description": "Book a taxi"},
            ]
        }
    ]


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        (ToolChoiceMode.AUTO, {"mode": "AUTO"}),
        (ToolChoiceMode.REQUIRED, {"mode": "ANY"}),
        (ToolChoiceMode.NONE, {"mode": "NONE"}),
        (NamedTool("check_flight"), {"mode": "ANY", "allowedFunctionNames": ["check_flight"]}),
    ],
)
def test_every_choice_of_tools_is_sent(choice, sent):
    tools = chat((USER, "Hello"), tools=(FLIGHT,), tool_choice=choice)
    assert body(tools)["toolConfig"] == {"functionCallingConfig": sent}


def test_calls_go_back_with_their_signatures_as_the_documentation_does():
    """Of "Sequential function calling": turn 1, step 3."""
    sent = body(
        chat(
            (USER, "Check flight status for AA100 and book a taxi 2 hours before if delayed."),
            calls(ToolCall("headrace-1-0-0~SigA=", "check_flight", '{"flight": "AA100"}')),
            result("headrace-1-0-0~SigA=", '{"status": "delayed"}'),
            calls(ToolCall("headrace-2-0-0~SigB=", "book_taxi", '{"time": "10 AM"}')),
            result("headrace-2-0-0~SigB=", '{"booking_status": "success"}'),
            tools=(FLIGHT, TAXI),
        )
    )
    assert sent["contents"][1:] == [
        {
            "role": "model",
            "parts": [
                {"functionCall": {"name": "check_flight", "args": {"flight": "AA100"}}, "thoughtSignature": "SigA="}
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "check_flight", "response": {"output": '{"status": "delayed"}'}}},
            ],
        },
        {
            "role": "model",
            "parts": [
                {"functionCall": {"name": "book_taxi", "args": {"time": "10 AM"}}, "thoughtSignature": "SigB="},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "book_taxi", "response": {"output": '{"booking_status": "success"}'}}},
            ],
        },
    ]


def test_the_first_of_parallel_calls_alone_needs_a_signature():
    sent = body(
        chat(
            (USER, "Paris and Rome?"),
            calls(ToolCall("headrace-1-0-0~SigA=", "x", "{}"), ToolCall("headrace-1-0-1", "x", "{}"), text="Both."),
            result("headrace-1-0-0~SigA=", "Rain"),
            result("headrace-1-0-1", "Sun"),
        )
    )
    assert [part.get("thoughtSignature") for part in sent["contents"][1]["parts"]] == [None, "SigA=", None]
    assert len(sent["contents"][2]["parts"]) == 2


def test_results_go_back_in_the_order_of_their_calls():
    sent = body(
        chat(
            (USER, "Paris and Rome?"),
            calls(ToolCall("headrace-1-0-0", "x", "{}"), ToolCall("headrace-1-0-1", "x", "{}")),
            result("headrace-1-0-1", "Sun"),
            result("headrace-1-0-0", "Rain"),
        )
    )
    parts = sent["contents"][2]["parts"]
    assert [part["functionResponse"]["response"]["output"] for part in parts] == ["Rain", "Sun"]


def test_calls_of_another_model_go_with_the_documented_stand_in_for_a_signature():
    sent = body(chat((USER, "Paris?"), calls(ToolCall("toolu_1", "x", "{}")), result("toolu_1", "Rain")))
    assert sent["contents"][1]["parts"] == [
        {
            "functionCall": {"id": "toolu_1", "name": "x", "args": {}},
            "thoughtSignature": "skip_thought_signature_validator",
        }
    ]
    assert sent["contents"][2]["parts"][0]["functionResponse"]["id"] == "toolu_1"


def test_what_another_provider_puts_behind_its_ids_is_no_signature():
    foreign = "toolu_1~0.BDaL4VrbR2Oj0hO4XpJxT28J5T"
    sent = body(chat((USER, "Paris?"), calls(ToolCall(foreign, "x", "{}")), result(foreign, "Rain")))
    (part,) = sent["contents"][1]["parts"]
    assert part["thoughtSignature"] == "skip_thought_signature_validator"
    assert part["functionCall"]["id"] == sent["contents"][2]["parts"][0]["functionResponse"]["id"]
    assert "~" not in part["functionCall"]["id"]


def test_what_is_set_of_sampling_is_sent_and_nothing_else():
    sampling = Sampling(temperature=0.5, top_k=40, top_p=0.9, presence_penalty=0.5, frequency_penalty=-0.5)
    assert config(sampling=sampling) == {"maxOutputTokens": 64}
    names = ("temperature", "top_k", "top_p", "presence_penalty", "frequency_penalty")
    assert config(sampling=sampling, options=[f"sampling.{name}" for name in names]) == {
        "maxOutputTokens": 64,
        "temperature": 0.5,
        "topK": 40,
        "topP": 0.9,
        "presencePenalty": 0.5,
        "frequencyPenalty": -0.5,
    }


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": Sampling(temperature=2.5), "options": ["sampling.temperature"]}, "sampling.temperature"),
        ({"stopping": Stopping(stop_sequences=tuple("abcdef"))}, "stopping.stop_sequences"),
        ({"seed": 2**31}, "determinism.seed"),
        ({"output_format": JsonSchemaFormat("[]")}, "structured_output.json_schema"),
        (
            {"extension": {"thinkingLevel": "LOW"}, "reasoning": Reasoning(max_reasoning_tokens=100)},
            "extensions['gemini'].thinkingLevel",
        ),
        (
            {"extension": {"thinkingLevel": "LOW"}, "reasoning": Reasoning(enabled=False)},
            "extensions['gemini'].thinkingLevel",
        ),
    ],
)
def test_a_value_that_the_api_does_not_take_is_refused_by_name(fields, field):
    with pytest.raises(InvalidArgument) as error:
        body(**fields)
    assert error.value.field == field


def test_the_other_options_are_sent_under_the_names_of_the_api():
    response = ResponseOptions(logprobs=True, top_logprobs=3)
    assert config(n=2, seed=7, response=response, stopping=Stopping(stop_sequences=("END",)), max_new_tokens=9) == {
        "maxOutputTokens": 9,
        "candidateCount": 2,
        "seed": 7,
        "responseLogprobs": True,
        "logprobs": 3,
        "stopSequences": ["END"],
    }


def test_a_shape_of_the_output_is_sent():
    sent = config(output_format=JsonSchemaFormat(json.dumps(SCHEMA)))
    assert (sent["responseMimeType"], sent["responseJsonSchema"]) == ("application/json", SCHEMA)
    sent = config(output_format=ChoiceFormat(("Percussion", "String")))
    assert sent["responseMimeType"] == "text/x.enum"
    assert sent["responseSchema"] == {"type": "STRING", "enum": ["Percussion", "String"]}


@pytest.mark.parametrize(
    ("reasoning", "reasons", "sent"),
    [
        (Reasoning(), False, None),
        (Reasoning(), True, {"includeThoughts": True}),
        (Reasoning(include_text=False), True, {"includeThoughts": False}),
        (Reasoning(enabled=True), False, {"thinkingBudget": -1, "includeThoughts": True}),
        (Reasoning(max_reasoning_tokens=1024), True, {"thinkingBudget": 1024, "includeThoughts": True}),
        (Reasoning(max_reasoning_tokens=0), True, {"thinkingBudget": 0}),
        (Reasoning(enabled=False), True, {"thinkingBudget": 0}),
    ],
)
def test_thinking_is_asked_for_as_the_request_and_the_settings_say(reasoning, reasons, sent):
    assert config(reasoning=reasoning, model={"reasoning": reasons}).get("thinkingConfig") == sent


def test_a_level_of_thinking_is_sent_from_the_extension():
    sent = config(extension={"thinkingLevel": "LOW"}, reasoning=Reasoning(enabled=True))
    assert sent["thinkingConfig"] == {"thinkingLevel": "LOW", "includeThoughts": True}


@pytest.mark.parametrize(
    "extension",
    [{"cachedContent": "cachedContents/of-somebody"}, {"tools": [{"urlContext": {}}]}, {"thinkingLevel": "x"}],
)
def test_the_extension_takes_nothing_else(extension):
    with pytest.raises(ValidationError):
        GeminiExtension.model_validate(extension)
