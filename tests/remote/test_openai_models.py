"""Models of the OpenAI family as callers see them, each before a server that speaks its API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from headrace.backends.api import WholeCallModel
from headrace.backends.errors import InvalidArgument, ProviderRefused
from headrace.backends.events import FinishReason
from headrace.backends.formats import JsonObjectFormat
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    NamedTool,
    Reasoning,
    ResponseOptions,
    Role,
    Stopping,
    ToolCall,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.backends.types import Call
from tests.remote.asking import ask, ask_in_vain, call_of, reasoning_of, remote_model, request_of, tool_calls_of
from tests.remote.fakes.openai_chat import (
    DEEPSEEK,
    KEY,
    LLAMA_CPP,
    LLAMA_CPP_PYTHON,
    OLLAMA,
    OPENAI,
    REFUSAL,
    REFUSED_PROMPT,
    VLLM,
    FakeChat,
)
from tests.remote.upstream import Upstream

APIS = {
    "openai": OPENAI,
    "openai-compatible": OLLAMA,
    "vllm": VLLM,
    "llama-cpp": LLAMA_CPP,
    "llama-cpp-python": LLAMA_CPP_PYTHON,
    "deepseek": DEEPSEEK,
}
WEATHER = ToolDefinition("get_weather", "Get the weather.", '{"type": "object"}')
LOCATION = '{"location": "Zürich"}'


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.write_text(KEY)
    return path


@asynccontextmanager
async def running(dialect: str, key_file: Any, **model: Any) -> AsyncIterator[WholeCallModel]:
    api = APIS[dialect]
    async with Upstream(FakeChat(api)) as upstream:
        url = upstream.url + api.path.removesuffix("/chat/completions")
        async with remote_model(url, dialect, provider={"api_key": f"file:{key_file}"}, **model) as running:
            yield running


def demanding(choice: Any, *earlier: ChatMessage) -> Call:
    messages = (ChatMessage(Role.USER, "The weather in Zürich?"), *earlier)
    return call_of(request_of(ChatInput(messages, tools=(WEATHER,), tool_choice=choice)))


@pytest.mark.parametrize("dialect", ["openai", "vllm", "llama-cpp", "llama-cpp-python", "deepseek"])
async def test_a_tool_is_called_and_its_result_goes_back(dialect, key_file):
    async with running(dialect, key_file) as model:
        answer = await ask(model, demanding(NamedTool("get_weather")))
        [(call_id, name, arguments)] = tool_calls_of(answer.events)
        assert (name, arguments) == ("get_weather", LOCATION)
        assert answer.finish().reason is FinishReason.TOOL_CALLS
        assert answer.text() == ""
        called = ChatMessage(Role.ASSISTANT, "", tool_calls=(ToolCall(call_id, name, arguments),))
        result = ChatMessage(Role.TOOL, "14 °C", tool_call_id=call_id)
        answer = await ask(model, demanding(ToolChoiceMode.AUTO, called, result))
        assert answer.text()
        assert tool_calls_of(answer.events) == []


@pytest.mark.parametrize("dialect", APIS)
async def test_an_answer_has_the_shape_that_was_asked_for(dialect, key_file):
    async with running(dialect, key_file) as model:
        answer = await ask(model, call_of(request_of("JSON, please", output_format=JsonObjectFormat())))
    assert json.loads(answer.text()) == {"location": "Zürich"}
    assert answer.finish().reason is FinishReason.EOS_TOKEN


async def test_a_refusal_is_told_from_an_answer(key_file):
    async with running("openai", key_file) as model:
        answer = await ask(model, call_of(request_of(REFUSED_PROMPT)))
    assert answer.text() == REFUSAL
    assert answer.finish().reason is FinishReason.CONTENT_FILTER


async def test_deepseek_reasons_if_it_is_asked_to(key_file):
    async with running("deepseek", key_file) as model:
        call = call_of(request_of(reasoning=Reasoning(enabled=True)))
        thought = await ask(model, call)
        plain = await ask(model, call_of())
    assert reasoning_of(thought.events) == "Let me see: …"
    assert reasoning_of(plain.events) == ""
    usage = call.meter.usage()
    assert usage.reasoning_output_tokens == 5
    assert usage.cache_read_input_tokens
    assert not usage.estimated


@pytest.mark.parametrize(
    ("dialect", "reason"), [("openai", FinishReason.EOS_TOKEN), ("vllm", FinishReason.STOP_SEQUENCE)]
)
async def test_a_stop_sequence_is_in_no_text_and_named_where_the_provider_names_it(dialect, reason, key_file):
    async with running(dialect, key_file) as model:
        whole = (await ask(model, call_of())).text()
        stop = whole[20:23]
        answer = await ask(model, call_of(request_of(stopping=Stopping(stop_sequences=(stop,)))))
    assert answer.text() == whole[: whole.index(stop)]
    assert answer.finish().reason is reason
    assert answer.finish().stop_sequence == (stop if reason is FinishReason.STOP_SEQUENCE else None)


@pytest.mark.parametrize("dialect", ["openai", "vllm", "llama-cpp", "deepseek"])
async def test_log_probabilities_have_bytes_and_others_beside_them(dialect, key_file):
    async with running(dialect, key_file) as model:
        response = ResponseOptions(logprobs=True, top_logprobs=2)
        answer = await ask(model, call_of(request_of(response=response), max_new_tokens=9))
    logprobs = answer.logprobs()
    assert b"".join(entry.token for entry in logprobs).decode() == answer.text()
    assert {len(entry.top) for entry in logprobs} == {2}


@pytest.mark.parametrize("dialect", APIS)
async def test_a_wrong_key_and_a_wrong_request_are_told_apart(dialect, key_file):
    async with running(dialect, key_file) as model:
        _, wrong = await ask_in_vain(model, call_of(request_of("\0")))
        key_file.write_text("sk-wrong-0123456789")
        _, refused = await ask_in_vain(model, call_of())
    assert isinstance(wrong, InvalidArgument)
    assert isinstance(refused, ProviderRefused)
    assert refused.provider_status.code == "invalid_api_key"
    assert "sk-wrong" not in f"{refused!r} {refused} {refused.__cause__}"
