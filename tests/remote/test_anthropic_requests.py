"""What the dialect ``anthropic`` asks for. Examples marked so are those of the documentation
(https://platform.claude.com/docs/en/api/messages, .../build-with-claude/streaming, .../agents-and-tools/tool-use).
"""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import JsonSchemaFormat
from headrace.backends.remote.dialects.anthropic import ANTHROPIC, AnthropicExtension
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    NamedTool,
    Reasoning,
    Role,
    Sampling,
    Stopping,
    ToolCall,
    ToolChoiceMode,
    ToolDefinition,
)
from tests.remote.asking import body_of, call_of, request_of

DIALECT = ANTHROPIC
SYSTEM, USER, ASSISTANT, TOOL = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL
SCHEMA = {
    "type": "object",
    "properties": {"location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}},
    "required": ["location"],
}
WEATHER = ToolDefinition("get_weather", "Get the current weather in a given location", json.dumps(SCHEMA))
TOOL_ID = "toolu_01D7FLrfh4GYq7yT1ULFeyMV"


def chat(*turns: tuple[Role, str] | ChatMessage, **chat_fields: object) -> ChatInput:
    messages = tuple(turn if isinstance(turn, ChatMessage) else ChatMessage(*turn) for turn in turns)
    return ChatInput(messages, **chat_fields)


def body(
    source: ChatInput | str = "Hello", *, max_new_tokens: int = 1024, extension: object = None, model=None, **fields
):
    extensions = {} if extension is None else {"anthropic": AnthropicExtension.model_validate(extension)}
    call = call_of(request_of(source, **fields), max_new_tokens=max_new_tokens, extensions=extensions)
    return body_of(DIALECT, call, **(model or {}))


def field_of(error: pytest.ExceptionInfo[InvalidArgument]) -> str:
    return error.value.field


def test_a_message_is_asked_for_as_the_documentation_does():
    assert body("Hello, Claude") == {
        "model": "the-model",
        "max_tokens": 1024,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello, Claude"}]}],
        "stream": True,
    }


def test_several_turns_are_sent_as_the_documentation_does():
    turns = chat((USER, "Hello there."), (ASSISTANT, "Hi, I'm Claude. How can I help you?"), (USER, "Can you explain?"))
    assert [(turn["role"], turn["content"][0]["text"]) for turn in body(turns)["messages"]] == [
        ("user", "Hello there."),
        ("assistant", "Hi, I'm Claude. How can I help you?"),
        ("user", "Can you explain?"),
    ]


def test_the_system_prompt_stands_apart():
    sent = body(chat((SYSTEM, "Be brief."), (SYSTEM, "Be kind."), (USER, "Hello")))
    assert sent["system"] == "Be brief.\n\nBe kind."
    assert [turn["role"] for turn in sent["messages"]] == ["user"]


def test_a_system_message_among_others_is_refused_by_its_place():
    with pytest.raises(InvalidArgument) as error:
        body(chat((USER, "Hello"), (SYSTEM, "Be brief."), (USER, "And?")))
    assert field_of(error) == "chat.messages[1].role"


def test_a_conversation_of_the_system_alone_is_refused():
    with pytest.raises(InvalidArgument) as error:
        body(chat((SYSTEM, "Be brief.")))
    assert field_of(error) == "chat.messages"


def test_messages_of_one_side_in_a_row_are_one_turn():
    sent = body(chat((USER, "One."), (USER, "Two."), (ASSISTANT, "Three."), (ASSISTANT, "Four."), (USER, "Five.")))
    assert [(turn["role"], [block["text"] for block in turn["content"]]) for turn in sent["messages"]] == [
        ("user", ["One.", "Two."]),
        ("assistant", ["Three.", "Four."]),
        ("user", ["Five."]),
    ]


def test_an_empty_message_is_refused_by_its_place():
    with pytest.raises(InvalidArgument) as error:
        body(chat((USER, "Hello"), (ASSISTANT, ""), (USER, "And?")))
    assert field_of(error) == "chat.messages[1].content"


def test_an_assistants_beginning_is_continued_where_that_is_meant():
    greek = chat(
        (USER, "What's the Greek name for Sun?"), (ASSISTANT, "The best answer is ("), add_generation_prompt=False
    )
    assert body(greek)["messages"][-1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "The best answer is ("}],
    }


@pytest.mark.parametrize(
    ("turns", "opens", "field"),
    [
        ([(USER, "Hello"), (ASSISTANT, "Hi")], True, "chat.messages"),
        ([(USER, "Hello")], False, "chat.add_generation_prompt"),
    ],
)
def test_an_assistants_beginning_is_never_continued_by_accident(turns, opens, field):
    with pytest.raises(InvalidArgument) as error:
        body(chat(*turns, add_generation_prompt=opens))
    assert field_of(error) == field


def test_tools_are_sent_as_the_documentation_does():
    sent = body(chat((USER, "What is the weather like in San Francisco?"), tools=(WEATHER,)))
    assert sent["tools"] == [
        {
            "name": "get_weather",
            "description": "Get the current weather in a given location",
            "input_schema": SCHEMA,
        }
    ]


def test_a_tool_without_parameters_takes_an_empty_object():
    sent = body(chat((USER, "What time is it?"), tools=(ToolDefinition("now"),)))
    assert sent["tools"] == [{"name": "now", "input_schema": {"type": "object", "properties": {}}}]


def test_a_tools_schema_that_is_none_is_refused_by_its_place():
    with pytest.raises(InvalidArgument) as error:
        body(chat((USER, "Hello"), tools=(WEATHER, ToolDefinition("broken", None, "[1"))))
    assert field_of(error) == "chat.tools[1].parameters_json_schema"


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        (ToolChoiceMode.AUTO, {"type": "auto"}),
        (ToolChoiceMode.REQUIRED, {"type": "any"}),
        (ToolChoiceMode.NONE, {"type": "none"}),
        (NamedTool("get_weather"), {"type": "tool", "name": "get_weather"}),
    ],
)
def test_every_choice_of_tools_is_sent(choice, sent):
    assert body(chat((USER, "Hello"), tools=(WEATHER,), tool_choice=choice))["tool_choice"] == sent


def test_calls_of_tools_and_their_results_are_sent_as_the_documentation_does():
    price = ToolCall(TOOL_ID, "get_stock_price", '{"ticker": "^GSPC"}')
    sent = body(
        chat(
            (USER, "What's the S&P 500 at today?"),
            ChatMessage(ASSISTANT, "", tool_calls=(price,)),
            ChatMessage(TOOL, "259.75 USD", tool_call_id=TOOL_ID),
            tools=(ToolDefinition("get_stock_price"),),
        )
    )
    assert sent["messages"][1:] == [
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": TOOL_ID, "name": "get_stock_price", "input": {"ticker": "^GSPC"}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": TOOL_ID, "content": "259.75 USD"}],
        },
    ]


def test_results_of_parallel_calls_are_one_turn_with_what_the_user_adds():
    calls = (ToolCall("a", "get_weather", "{}"), ToolCall("b", "get_weather", "{}"))
    sent = body(
        chat(
            (USER, "Paris and Rome?"),
            ChatMessage(ASSISTANT, "Let me see.", tool_calls=calls),
            ChatMessage(TOOL, "Rain", tool_call_id="a"),
            ChatMessage(TOOL, "Sun", tool_call_id="b"),
            (USER, "In short, please."),
            tools=(WEATHER,),
        )
    )
    assert [block["type"] for block in sent["messages"][1]["content"]] == ["text", "tool_use", "tool_use"]
    assert [block["type"] for block in sent["messages"][2]["content"]] == ["tool_result", "tool_result", "text"]


def test_ids_of_another_provider_are_put_into_ones_that_the_api_takes():
    foreign = "headrace-1234~CiQB/+="
    sent = body(
        chat(
            (USER, "Paris?"),
            ChatMessage(ASSISTANT, "", tool_calls=(ToolCall(foreign, "get_weather", "{}"),)),
            ChatMessage(TOOL, "Rain", tool_call_id=foreign),
            tools=(WEATHER,),
        )
    )
    used, answered = sent["messages"][1]["content"][0]["id"], sent["messages"][2]["content"][0]["tool_use_id"]
    assert used == answered
    assert used.replace("_", "").isalnum()


def test_blocks_of_thinking_go_back_where_they_stood():
    """The documentation's turn of thinking, text and a call ("Thinking with tool use"), and one with more of each."""
    first = "toolu_01CswdEQBMshySk6Y9DFKrfq~0.BDaL4VrbR2Oj0hO4XpJxT28J5T"
    second = "toolu_2~0.SigB=~5:EmwKAhgBEgy3va3pzix~5.SigC/+"
    third = "toolu_3~12.SigD"
    sent = body(
        chat(
            (USER, "What is the weather in Paris?"),
            ChatMessage(ASSISTANT, "I can help you.", tool_calls=(ToolCall(first, "get_weather", "{}"),)),
            ChatMessage(TOOL, "Rain", tool_call_id=first),
            ChatMessage(
                ASSISTANT,
                "Now, Rome is",
                tool_calls=(ToolCall(second, "get_weather", "{}"), ToolCall(third, "get_weather", "{}")),
            ),
            ChatMessage(TOOL, "Sun", tool_call_id=second),
            ChatMessage(TOOL, "Wind", tool_call_id=third),
            tools=(WEATHER,),
        )
    )

    def use(call_id: str) -> dict[str, object]:
        return {"type": "tool_use", "id": call_id, "name": "get_weather", "input": {}}

    def thinking(signature: str) -> dict[str, object]:
        return {"type": "thinking", "thinking": "", "signature": signature}

    assert sent["messages"][1]["content"] == [
        thinking("BDaL4VrbR2Oj0hO4XpJxT28J5T"),
        {"type": "text", "text": "I can help you."},
        use("toolu_01CswdEQBMshySk6Y9DFKrfq"),
    ]
    assert sent["messages"][2]["content"][0]["tool_use_id"] == "toolu_01CswdEQBMshySk6Y9DFKrfq"
    assert sent["messages"][3]["content"] == [
        thinking("SigB="),
        {"type": "text", "text": "Now, "},
        {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix"},
        thinking("SigC/+"),
        {"type": "text", "text": "Rome is"},
        use("toolu_2"),
        thinking("SigD"),
        use("toolu_3"),
    ]


@pytest.mark.parametrize("place", [0, 3, 999_999_999])
def test_a_place_in_a_text_that_has_been_cut_does_no_harm(place):
    message = ChatMessage(ASSISTANT, "Hi", tool_calls=(ToolCall(f"toolu_1~{place}.Sig", "get_weather", "{}"),))
    sent = body(chat((USER, "Hello"), message, ChatMessage(TOOL, "Rain", tool_call_id=message.tool_calls[0].id)))
    kinds = [block["type"] for block in sent["messages"][1]["content"]]
    assert sorted(kinds) == ["text", "thinking", "tool_use"]
    assert kinds[-1] == "tool_use"


@pytest.mark.parametrize("call_id", ["other", None])
def test_a_result_of_no_call_is_refused_by_its_place(call_id):
    with pytest.raises(InvalidArgument) as error:
        body(chat((USER, "Hello"), ChatMessage(TOOL, "Rain", tool_call_id=call_id)))
    assert field_of(error) == "chat.messages[1].tool_call_id"


DEEP = '{"x":' * 5000 + "1" + "}" * 5000


@pytest.mark.parametrize(
    "arguments",
    ['"text"', "{", '{"x": NaN}', '{"x": -Infinity}', DEEP],
    ids=["a text", "cut", "no number", "infinite", "deep"],
)
def test_arguments_that_are_no_object_are_refused_by_their_place(arguments):
    broken = ChatMessage(ASSISTANT, "", tool_calls=(ToolCall("a", "x", "{}"), ToolCall("b", "x", arguments)))
    with pytest.raises(InvalidArgument) as error:
        body(chat((USER, "Hello"), broken, (USER, "And?")))
    assert field_of(error) == "chat.messages[1].tool_calls[1].arguments_json"


def test_what_is_set_of_sampling_is_sent_and_nothing_else():
    sampling = Sampling(temperature=0.5, top_k=40, top_p=0.9)
    assert {"temperature", "top_k", "top_p"}.isdisjoint(body(sampling=sampling))
    sent = body(sampling=sampling, options=["sampling.temperature", "sampling.top_p", "sampling.top_k"])
    assert (sent["temperature"], sent["top_p"], sent["top_k"]) == (0.5, 0.9, 40)


def test_a_temperature_above_one_is_refused_by_name():
    with pytest.raises(InvalidArgument, match="at most 1") as error:
        body(sampling=Sampling(temperature=1.5), options=["sampling.temperature"])
    assert field_of(error) == "sampling.temperature"


def test_stop_sequences_are_sent():
    assert body(stopping=Stopping(stop_sequences=("END", "\n\n")))["stop_sequences"] == ["END", "\n\n"]


def test_a_schema_is_sent_as_the_output_format():
    sent = body(output_format=JsonSchemaFormat(json.dumps(SCHEMA)))
    assert sent["output_config"] == {"format": {"type": "json_schema", "schema": SCHEMA}}


def test_a_schema_that_is_no_object_is_refused_by_name():
    with pytest.raises(InvalidArgument) as error:
        body(output_format=JsonSchemaFormat("true"))
    assert field_of(error) == "structured_output.json_schema"


@pytest.mark.parametrize(
    ("reasoning", "reasons", "sent"),
    [
        (Reasoning(), False, None),
        (Reasoning(), True, {"type": "adaptive", "display": "summarized"}),
        (Reasoning(enabled=True), False, {"type": "adaptive", "display": "summarized"}),
        (Reasoning(enabled=True, include_text=False), False, {"type": "adaptive", "display": "omitted"}),
        (Reasoning(enabled=False), True, {"type": "disabled"}),
        (Reasoning(max_reasoning_tokens=0), True, {"type": "disabled"}),
        (
            Reasoning(max_reasoning_tokens=2000),
            False,
            {"type": "enabled", "budget_tokens": 2000, "display": "summarized"},
        ),
        (
            Reasoning(max_reasoning_tokens=9999),
            False,
            {"type": "enabled", "budget_tokens": 4095, "display": "summarized"},
        ),
        (Reasoning(enabled=False, max_reasoning_tokens=2000), False, {"type": "disabled"}),
    ],
)
def test_thinking_is_asked_for_as_the_request_and_the_settings_say(reasoning, reasons, sent):
    got = body(reasoning=reasoning, max_new_tokens=4096, model={"reasoning": reasons})
    assert got.get("thinking") == sent


@pytest.mark.parametrize(("budget", "most"), [(1023, 4096), (2000, 1024)])
def test_a_budget_that_the_api_does_not_take_is_refused_by_name(budget, most):
    with pytest.raises(InvalidArgument, match="1024") as error:
        body(reasoning=Reasoning(max_reasoning_tokens=budget), max_new_tokens=most)
    assert field_of(error) == "reasoning.max_reasoning_tokens"


@pytest.mark.parametrize(
    ("source", "fields", "field"),
    [
        ("Hello", {"sampling": Sampling(temperature=0.5), "options": ["sampling.temperature"]}, "sampling.temperature"),
        ("Hello", {"sampling": Sampling(top_k=4), "options": ["sampling.top_k"]}, "sampling.top_k"),
        ("Hello", {"sampling": Sampling(top_p=0.5), "options": ["sampling.top_p"]}, "sampling.top_p"),
        (chat((USER, "Hi"), tools=(WEATHER,), tool_choice=ToolChoiceMode.REQUIRED), {}, "chat.tool_choice"),
        (chat((USER, "Hi"), tools=(WEATHER,), tool_choice=NamedTool("get_weather")), {}, "chat.tool_choice"),
        (
            chat((USER, "Hi"), (ASSISTANT, "It"), add_generation_prompt=False),
            {},
            "chat.add_generation_prompt",
        ),
    ],
)
def test_what_cannot_go_with_thinking_is_refused_by_name(source, fields, field):
    with pytest.raises(InvalidArgument, match="while the model reasons") as error:
        body(source, reasoning=Reasoning(enabled=True), **fields)
    assert field_of(error) == field


def test_what_the_api_takes_with_thinking_is_not_refused():
    options = ["sampling.temperature", "sampling.top_p"]
    tools = chat((USER, "Hi"), tools=(WEATHER,))
    sent = body(tools, reasoning=Reasoning(enabled=True), sampling=Sampling(temperature=1, top_p=0.95), options=options)
    assert (sent["temperature"], sent["top_p"], sent["tool_choice"]) == (1, 0.95, {"type": "auto"})


def test_the_extension_is_sent_under_the_names_of_the_api():
    sent = body(
        output_format=JsonSchemaFormat('{"type": "object"}'),
        extension={"cache_control": {"type": "ephemeral"}, "effort": "low", "user_id": "u-7"},
    )
    assert sent["cache_control"] == {"type": "ephemeral"}
    assert sent["metadata"] == {"user_id": "u-7"}
    assert sent["output_config"] == {
        "format": {"type": "json_schema", "schema": {"type": "object"}},
        "effort": "low",
    }


@pytest.mark.parametrize(
    "extension",
    [
        {"mcp_servers": [{"type": "url", "url": "http://10.0.0.1"}]},
        {"max_tokens": 100_000},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"effort": "much"},
    ],
)
def test_the_extension_takes_nothing_else(extension):
    with pytest.raises(ValidationError):
        AnthropicExtension.model_validate(extension)


def test_the_key_is_in_a_header_and_nowhere_else():
    assert DIALECT.headers("sk-ant-1") == {"x-api-key": "sk-ant-1", "anthropic-version": "2023-06-01"}
    assert DIALECT.headers(None) == {"anthropic-version": "2023-06-01"}
