"""What the dialects of Chat Completions and of text completions ask for. Examples marked so are those of the
documentation (https://platform.openai.com/docs/api-reference/chat, .../guides/function-calling).
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.formats import ChoiceFormat, JsonObjectFormat, JsonSchemaFormat, RegexFormat
from headrace.backends.remote.dialect import Dialect
from headrace.backends.remote.dialects.deepseek import DEEPSEEK, DeepSeekExtension
from headrace.backends.remote.dialects.openai import OPENAI, OpenAiExtension
from headrace.backends.remote.dialects.openai_compatible import (
    COMPATIBLE,
    LLAMA_CPP,
    LLAMA_CPP_PYTHON,
    VLLM,
    VllmExtension,
)
from headrace.backends.remote.dialects.openai_completions import COMPLETIONS
from headrace.backends.remote.dialects.openai_responses import RESPONSES
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    NamedTool,
    Reasoning,
    ResponseOptions,
    Role,
    Sampling,
    Stopping,
    TextInput,
    ToolCall,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.backends.types import Call
from tests.remote.asking import body_of, call_of, remote_backend, request_of

SYSTEM, USER, ASSISTANT, TOOL = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL
PARAMETERS = {
    "type": "object",
    "properties": {"location": {"type": "string", "description": "City and country e.g. Bogotá, Colombia"}},
    "required": ["location"],
    "additionalProperties": False,
}
WEATHER = ToolDefinition("get_weather", "Get current temperature for a given location.", json.dumps(PARAMETERS))
CHATS: list[Dialect] = [OPENAI, COMPATIBLE, VLLM, LLAMA_CPP, LLAMA_CPP_PYTHON, DEEPSEEK]


def chat(*turns: tuple[Role, str] | ChatMessage, **fields: Any) -> ChatInput:
    return ChatInput(tuple(turn if isinstance(turn, ChatMessage) else ChatMessage(*turn) for turn in turns), **fields)


def body(
    dialect: Dialect,
    source: Any = "Hello!",
    *,
    extension: Any = None,
    model: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    return body_of(dialect, call(dialect, source, extension=extension, **fields), **(model or {}))


def call(dialect: Dialect, source: Any = "Hello!", *, extension: Any = None, **fields: Any) -> Call:
    extensions = {} if extension is None else {dialect.name: extension}
    made = call_of(request_of(source, **fields), max_new_tokens=50, extensions=extensions)
    made.model = remote_backend("http://127.0.0.1", dialect.name).load("it")
    return made


def test_a_conversation_is_asked_for_as_the_documentation_does():
    source = chat((SYSTEM, "You are a helpful assistant."), (USER, "Hello!"))
    assert body(OPENAI, source) == {
        "model": "the-model",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello!"},
        ],
        "max_completion_tokens": 50,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_model_that_reasons_has_developers_and_no_system():
    source = chat((SYSTEM, "Be brief."), (USER, "Hello!"))
    messages = body(OPENAI, source, model={"reasoning": True})["messages"]
    assert [message["role"] for message in messages] == ["developer", "user"]


@pytest.mark.parametrize("dialect", CHATS, ids=lambda dialect: dialect.name)
def test_calls_of_tools_and_their_results_keep_together(dialect):
    """The messages of "Function calling"."""
    called = ToolCall("call_12345xyz", "get_weather", '{"location":"Paris, France"}')
    source = chat(
        (USER, "What is the weather like in Paris today?"),
        ChatMessage(ASSISTANT, "", tool_calls=(called,)),
        ChatMessage(TOOL, "14 °C", tool_call_id="call_12345xyz"),
        tools=(WEATHER,),
    )
    asked = body(dialect, source)
    function = {"name": "get_weather", "arguments": '{"location":"Paris, France"}'}
    assert asked["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_12345xyz", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "14 °C", "tool_call_id": "call_12345xyz"},
    ]
    described = {"name": "get_weather", "description": WEATHER.description, "parameters": PARAMETERS}
    assert asked["tools"] == [{"type": "function", "function": described}]
    assert asked["tool_choice"] == "auto"


@pytest.mark.parametrize("dialect", [*CHATS, RESPONSES], ids=lambda dialect: dialect.name)
def test_an_id_that_is_too_long_has_the_same_stand_in_in_call_and_result(dialect):
    """Other providers make such ids, and a conversation may move on."""
    long = "toolu_1~" + "x" * 500
    called = ChatMessage(ASSISTANT, "", tool_calls=(ToolCall(long, "now", "{}"),))
    asked = body(dialect, chat((USER, "Time?"), called, ChatMessage(TOOL, "12:00", tool_call_id=long)))
    call, result = (asked.get("messages") or asked["input"])[1:]
    made = call["tool_calls"][0]["id"] if "tool_calls" in call else call["call_id"]
    assert made == (result.get("tool_call_id") or result["call_id"])
    assert len(made) <= 40


def test_a_tool_can_be_demanded_by_mode_or_by_name():
    def choice(dialect: Dialect, tool_choice: Any) -> Any:
        return body(dialect, chat((USER, "Hi"), tools=(WEATHER,), tool_choice=tool_choice)).get("tool_choice")

    for dialect in (OPENAI, VLLM, DEEPSEEK):
        assert choice(dialect, ToolChoiceMode.REQUIRED) == "required"
        assert choice(dialect, NamedTool("get_weather")) == {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("dialect", CHATS, ids=lambda dialect: dialect.name)
def test_where_no_tool_may_be_called_the_model_is_shown_none(dialect):
    asked = body(dialect, chat((USER, "Hi"), tools=(WEATHER,), tool_choice=ToolChoiceMode.NONE))
    assert asked.keys().isdisjoint({"tools", "tool_choice"})


@pytest.mark.parametrize("dialect", [COMPATIBLE, LLAMA_CPP])
def test_servers_that_may_not_heed_a_demand_for_tools_are_not_asked_to(dialect: Dialect) -> None:
    source = chat((USER, "Hi"), tools=(WEATHER,), tool_choice=ToolChoiceMode.REQUIRED)
    with pytest.raises(UnsupportedOption, match=r"chat\.tool_choice\.mode.*such as vllm"):
        body(dialect, source)
    assert "chat.tool_choice.name" not in dialect.options


def test_a_server_that_heeds_a_demand_by_name_alone_is_asked_in_no_other_way() -> None:
    source = chat((USER, "Hi"), tools=(WEATHER,), tool_choice=ToolChoiceMode.REQUIRED)
    with pytest.raises(UnsupportedOption, match=r"chat\.tool_choice\.mode.*chat\.tool_choice\.name"):
        body(LLAMA_CPP_PYTHON, source)


def test_only_what_the_caller_set_is_sent():
    sampling = Sampling(temperature=0.5, top_p=0.9, presence_penalty=1.0)
    asked = body(OPENAI, sampling=sampling, options={"sampling.temperature", "sampling.presence_penalty"})
    assert (asked["temperature"], asked["presence_penalty"]) == (0.5, 1.0)
    assert "top_p" not in asked


def test_every_option_of_the_openai_dialect_has_its_field():
    asked = body(
        OPENAI,
        sampling=Sampling(top_p=0.9, frequency_penalty=-1.0, logit_bias={17: -100.0}),
        options={"sampling.top_p", "sampling.frequency_penalty", "sampling.logit_bias"},
        stopping=Stopping(stop_sequences=("\n", "END")),
        response=ResponseOptions(logprobs=True, top_logprobs=2),
        n=3,
        seed=7,
        extension=OpenAiExtension(reasoning_effort="low", verbosity="high", parallel_tool_calls=False),
    )
    assert (
        asked
        | {
            "top_p": 0.9,
            "frequency_penalty": -1.0,
            "logit_bias": {"17": -100.0},
            "stop": ["\n", "END"],
            "logprobs": True,
            "top_logprobs": 2,
            "n": 3,
            "seed": 7,
            "reasoning_effort": "low",
            "verbosity": "high",
            "parallel_tool_calls": False,
        }
        == asked
    )


def test_a_shape_is_a_strict_schema():
    output = JsonSchemaFormat(json.dumps(PARAMETERS))
    for dialect in (OPENAI, COMPATIBLE, VLLM, LLAMA_CPP):
        asked = body(dialect, output_format=output)["response_format"]
        assert asked == {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": PARAMETERS, "strict": True},
        }
    assert body(OPENAI, output_format=JsonObjectFormat())["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize("schema", ["{", "[]", "[" * 60_000, "7"])
def test_a_schema_that_is_no_object_is_refused_by_its_field(schema):
    with pytest.raises(InvalidArgument) as refused:
        body(OPENAI, output_format=JsonSchemaFormat(schema))
    assert refused.value.field == "structured_output.json_schema"
    tool = ToolDefinition("now", None, schema)
    with pytest.raises(InvalidArgument) as refused:
        body(OPENAI, chat((USER, "Hi"), tools=(WEATHER, tool)))
    assert refused.value.field == "chat.tools[1].parameters_json_schema"


@pytest.mark.parametrize(
    ("dialect", "fields", "path"),
    [
        (OPENAI, {"sampling": Sampling(temperature=2.5)}, "sampling.temperature"),
        (DEEPSEEK, {"sampling": Sampling(temperature=2.5)}, "sampling.temperature"),
        (OPENAI, {"stopping": Stopping(stop_sequences=tuple("abcde"))}, "stopping.stop_sequences"),
        (OPENAI, {"seed": 2**63}, "determinism.seed"),
        (VLLM, {"seed": 2**63}, "determinism.seed"),
        (VLLM, {"n": 2, "sampling": Sampling(temperature=0.0)}, "n"),
    ],
)
def test_a_value_that_the_provider_refuses_is_refused_before_the_call(dialect, fields, path):
    with pytest.raises(InvalidArgument) as refused:
        body(dialect, **fields, options={path})
    assert refused.value.field == path


@pytest.mark.parametrize("extension", [OpenAiExtension, VllmExtension, DeepSeekExtension])
def test_an_extension_takes_no_field_that_it_does_not_know(extension):
    with pytest.raises(ValidationError):
        extension.model_validate({"service_tier": "priority"})


def test_vllm_is_told_to_switch_off_what_it_would_do_by_itself():
    """The defaults of ``generation_config.json`` are not off."""
    asked = body(VLLM)
    off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert asked | off == asked
    assert asked["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert body(VLLM, n=2)["stream_options"]["continuous_usage_stats"] is False


def test_every_option_of_vllm_has_its_field():
    earlier = ChatMessage(ASSISTANT, "Four", reasoning_text="2 + 2")
    source = chat((USER, "2+2?"), earlier, template_arguments={"enable_thinking": False}, add_generation_prompt=False)
    asked = body(
        VLLM,
        source,
        sampling=Sampling(top_k=5, min_p=0.1, repetition_penalty=1.1, temperature=50.0),
        options={"sampling.temperature"},
        stopping=Stopping(min_new_tokens=3, stop_token_ids=(9, 10), ignore_eos=True, include_stop_sequence=True),
        response=ResponseOptions(token_ids=True),
        extension=VllmExtension(reasoning_effort="low"),
    )
    assert asked["messages"][1] == {"role": "assistant", "content": "Four", "reasoning": "2 + 2"}
    assert (
        asked
        | {
            "temperature": 50.0,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 3,
            "stop_token_ids": [9, 10],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "return_token_ids": True,
            "add_generation_prompt": False,
            "continue_final_message": True,
            "chat_template_kwargs": {"enable_thinking": False},
            "reasoning_effort": "low",
        }
        == asked
    )
    assert body(VLLM, output_format=RegexFormat("a+"))["structured_outputs"] == {"regex": "a+"}
    assert body(VLLM, output_format=ChoiceFormat(("a", "b")))["structured_outputs"] == {"choice": ["a", "b"]}


def test_llama_cpp_is_told_to_switch_off_what_it_would_do_by_itself():
    asked = body(LLAMA_CPP)
    off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0}
    assert asked | off == asked
    earlier = ChatMessage(ASSISTANT, "Four", reasoning_text="2 + 2")
    asked = body(
        LLAMA_CPP,
        chat((USER, "2+2?"), earlier, template_arguments={"enable_thinking": False}),
        sampling=Sampling(top_k=5, typical_p=0.5, logit_bias={3: 1.5}),
        stopping=Stopping(ignore_eos=True),
    )
    assert asked["messages"][1]["reasoning_content"] == "2 + 2"
    assert asked["logit_bias"] == {"3": 1.5}
    assert (asked["top_k"], asked["typical_p"], asked["ignore_eos"]) == (5, 0.5, True)
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}


def test_llama_cpp_python_is_told_in_its_own_way():
    asked = body(LLAMA_CPP_PYTHON, output_format=JsonSchemaFormat(json.dumps(PARAMETERS)), sampling=Sampling(top_k=7))
    off = {"top_p": 1.0, "top_k": 7, "min_p": 0.0, "repeat_penalty": 1.0}
    assert asked | off == asked
    assert asked["response_format"] == {"type": "json_object", "schema": PARAMETERS}


def test_deepseek_reasons_only_if_it_is_to():
    assert body(DEEPSEEK)["thinking"] == {"type": "disabled"}
    assert body(DEEPSEEK, model={"reasoning": True})["thinking"] == {"type": "enabled"}
    assert body(DEEPSEEK, reasoning=Reasoning(enabled=True))["thinking"] == {"type": "enabled"}
    asked = body(DEEPSEEK, reasoning=Reasoning(enabled=False), model={"reasoning": True})
    assert asked["thinking"] == {"type": "disabled"}


def test_deepseek_is_not_given_a_temperature_that_its_reasoning_would_drop():
    fields = {"sampling": Sampling(temperature=0.5), "options": {"sampling.temperature"}}
    assert body(DEEPSEEK, **fields)["temperature"] == 0.5
    with pytest.raises(UnsupportedOption, match=r"sampling\.temperature.*reasoning\.enabled = false"):
        body(DEEPSEEK, **fields, reasoning=Reasoning(enabled=True))


def test_deepseek_gets_its_reasoning_back():
    earlier = ChatMessage(ASSISTANT, "", reasoning_text="Let me look.", tool_calls=(ToolCall("c1", "now", "{}"),))
    source = chat((USER, "Time?"), earlier, ChatMessage(TOOL, "12:00", tool_call_id="c1"))
    asked = body(DEEPSEEK, source, extension=DeepSeekExtension(reasoning_effort="max"))
    assert asked["messages"][1]["reasoning_content"] == "Let me look."
    assert asked["reasoning_effort"] == "max"


def test_a_text_is_continued_as_it_is():
    asked = body(
        COMPLETIONS,
        TextInput("Say this is a test"),
        sampling=Sampling(temperature=0.0),
        options={"sampling.temperature"},
        stopping=Stopping(stop_sequences=("\n",)),
        seed=3,
    )
    assert asked == {
        "model": "the-model",
        "prompt": "Say this is a test",
        "max_tokens": 50,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "stop": ["\n"],
        "seed": 3,
    }


@pytest.mark.parametrize("dialect", [*CHATS, COMPLETIONS], ids=lambda dialect: dialect.name)
def test_a_key_is_a_bearer_and_none_is_no_header(dialect):
    assert dialect.headers("sk-1") == {"Authorization": "Bearer sk-1"}
    assert dialect.headers(None) == {}
