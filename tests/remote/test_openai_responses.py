"""The dialect ``openai-responses``: what it asks for, and what is read of its streams. Those in ``documented/`` are
those of the documentation; what it leaves out as "..." is filled in, and so is the end of the one with calls of tools.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from headrace.backends.errors import BackendUnavailable, InvalidArgument
from headrace.backends.events import ChoiceFinish, FinishReason, StreamEnd
from headrace.backends.formats import JsonObjectFormat, JsonSchemaFormat
from headrace.backends.remote.dialect import StreamFailed
from headrace.backends.remote.dialects.openai_responses import RESPONSES, ResponsesExtension
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    NamedTool,
    Reasoning,
    Role,
    Sampling,
    ToolCall,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.backends.usage import Usage
from tests.remote.asking import (
    DOCUMENTED,
    ask,
    ask_in_vain,
    body_of,
    call_of,
    read_events,
    reasoning_of,
    remote_model,
    request_of,
    splits,
    text_of,
    tool_calls_of,
)
from tests.remote.fakes.openai_chat import KEY
from tests.remote.fakes.openai_responses import FakeResponses
from tests.remote.upstream import Answer, Upstream

DIALECT = RESPONSES
TEXT = (DOCUMENTED / "openai-responses.sse").read_bytes()
TOOLS = (DOCUMENTED / "openai-responses-tools.sse").read_bytes()
PARIS = [("call_1234xyz", "get_weather", '{"location":"Paris, France"}')]
STREAMS = {
    "text": (TEXT, "Hi there! How can I assist you today?", [], FinishReason.EOS_TOKEN),
    "tools": (TOOLS, "", PARIS, FinishReason.TOOL_CALLS),
}
SCHEMA = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}


def body(source: Any = "Hello!", *, extension: Any = None, model: dict[str, Any] | None = None, **fields: Any) -> Any:
    extensions = {} if extension is None else {DIALECT.name: extension}
    call = call_of(request_of(source, **fields), max_new_tokens=50, extensions=extensions)
    return body_of(DIALECT, call, **(model or {}))


def stream(*said: dict[str, Any]) -> bytes:
    return b"".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in said)


def ended(status: str = "completed", **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{status}", "response": {"status": status, **fields}}


def text(delta: str) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": delta}


def test_a_conversation_is_asked_for_and_not_kept():
    messages = (ChatMessage(Role.SYSTEM, "You are a helpful assistant."), ChatMessage(Role.USER, "Hello!"))
    assert body(ChatInput(messages)) == {
        "model": "the-model",
        "input": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello!"},
        ],
        "max_output_tokens": 50,
        "stream": True,
        "store": False,
    }
    assert body(ChatInput(messages), model={"reasoning": True})["input"][0]["role"] == "developer"


def test_calls_of_tools_and_their_results_are_items_of_their_own():
    """Those of "Function calling"."""
    called = ToolCall("call_12345xyz", "get_weather", '{"location":"Paris, France"}')
    messages = (
        ChatMessage(Role.USER, "What is the weather like in Paris today?"),
        ChatMessage(Role.ASSISTANT, "I will look.", tool_calls=(called,)),
        ChatMessage(Role.TOOL, "14 °C", tool_call_id="call_12345xyz"),
    )
    tools = (ToolDefinition("get_weather", "Current temperature.", json.dumps(SCHEMA)), ToolDefinition("now"))
    asked = body(ChatInput(messages, tools=tools, tool_choice=NamedTool("now")))
    assert asked["input"][1:] == [
        {"role": "assistant", "content": "I will look."},
        {
            "type": "function_call",
            "call_id": "call_12345xyz",
            "name": "get_weather",
            "arguments": '{"location":"Paris, France"}',
        },
        {"type": "function_call_output", "call_id": "call_12345xyz", "output": "14 °C"},
    ]
    described = {"type": "function", "strict": False, "name": "get_weather", "description": "Current temperature."}
    none = {"type": "function", "strict": False, "name": "now", "parameters": {"type": "object", "properties": {}}}
    assert asked["tools"] == [{**described, "parameters": SCHEMA}, none]
    assert asked["tool_choice"] == {"type": "function", "name": "now"}
    required = ChatInput(messages, tools=tools, tool_choice=ToolChoiceMode.REQUIRED)
    assert body(required)["tool_choice"] == "required"
    assert "tools" not in body(ChatInput(messages, tools=tools, tool_choice=ToolChoiceMode.NONE))


def test_every_other_option_has_its_field():
    asked = body(
        sampling=Sampling(temperature=0.5, top_p=0.9),
        options={"sampling.temperature", "sampling.top_p"},
        output_format=JsonSchemaFormat(json.dumps(SCHEMA)),
        extension=ResponsesExtension(
            reasoning_effort="low", reasoning_summary="auto", verbosity="low", parallel_tool_calls=False
        ),
    )
    shape = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
    assert (
        asked
        | {
            "temperature": 0.5,
            "top_p": 0.9,
            "text": {"format": shape, "verbosity": "low"},
            "reasoning": {"effort": "low", "summary": "auto"},
            "parallel_tool_calls": False,
        }
        == asked
    )
    assert asked.keys().isdisjoint({"reasoning_effort", "reasoning_summary", "verbosity"})
    assert body(output_format=JsonObjectFormat())["text"] == {"format": {"type": "json_object"}}
    with pytest.raises(InvalidArgument, match=r"sampling\.temperature: must be at most 2"):
        body(sampling=Sampling(temperature=3.0), options={"sampling.temperature"})


@pytest.mark.parametrize("name", STREAMS)
def test_a_documented_stream_is_read(name):
    raw, said, calls, reason = STREAMS[name]
    events, _ = read_events(DIALECT, raw)
    assert (text_of(events), tool_calls_of(events), events[-1]) == (said, calls, ChoiceFinish(0, reason))


@pytest.mark.parametrize("name", STREAMS)
async def test_a_documented_stream_is_read_however_it_is_cut(name):
    raw, said, calls, reason = STREAMS[name]
    raw = raw.replace(b'"Hi"', '"Grüße 🙂"'.encode())
    pieces: list[bytes]
    async with Upstream(lambda _: Answer(pieces)) as upstream, remote_model(upstream.url, "openai-responses") as model:
        for pieces in splits(raw):  # noqa: B007  # the upstream sends them
            answer = await ask(model, call_of())
            assert text_of(answer.events) == said.replace("Hi", "Grüße 🙂")
            assert tool_calls_of(answer.events) == calls
            assert answer.events[-2:] == [ChoiceFinish(0, reason), StreamEnd()]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_is_cut_before_its_end_is_no_answer(name):
    raw = STREAMS[name][0]
    for end in range(raw.index(b"event: response.completed"), len(raw) - 1, 37):
        with pytest.raises(EOFError):
            read_events(DIALECT, raw[:end])


def test_the_counts_of_the_documentation_are_ours():
    """The stream's own, and the usage of "Reasoning models" (https://platform.openai.com/docs/guides/reasoning)."""
    assert read_events(DIALECT, TEXT)[1] == Usage(37, None, None, 11, 0)
    usage = {"input_tokens": 75, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 1186}
    usage |= {"output_tokens_details": {"reasoning_tokens": 1024}, "total_tokens": 1261}
    assert read_events(DIALECT, stream(text("Hi"), ended(usage=usage)))[1] == Usage(75, 0, None, 1186, 1024)
    usage["input_tokens_details"] = {"cached_tokens": 40, "cache_write_tokens": 30}
    assert read_events(DIALECT, stream(text("Hi"), ended(usage=usage)))[1] == Usage(75, 40, 30, 1186, 1024)
    assert read_events(DIALECT, stream(text("Hi"), ended(usage=None)))[1] == Usage()


@pytest.mark.parametrize(
    ("why", "reason"),
    [("max_output_tokens", FinishReason.MAX_TOKENS), ("content_filter", FinishReason.CONTENT_FILTER)],
)
def test_an_incomplete_response_says_why(why, reason):
    events, _ = read_events(DIALECT, stream(text("Hi"), ended("incomplete", incomplete_details={"reason": why})))
    assert events[-1] == ChoiceFinish(0, reason)


async def test_a_fake_one_reasons_refuses_and_gives_shapes(tmp_path):
    """What the documentation has no whole stream of, by the types of the SDK."""
    (tmp_path / "key").write_text(KEY)
    provider = {"api_key": f"file:{tmp_path / 'key'}"}
    shape = JsonSchemaFormat(json.dumps(SCHEMA))
    extensions = {DIALECT.name: ResponsesExtension(reasoning_summary="auto")}
    async with Upstream(FakeResponses()) as upstream:
        url = f"{upstream.url}/v1"
        async with remote_model(url, "openai-responses", provider=provider) as model:
            thought = await ask(model, call_of(extensions=extensions))
            quiet = request_of(reasoning=Reasoning(include_text=False))
            unheard = await ask(model, call_of(quiet, extensions=extensions))
            refused = await ask(model, call_of(request_of("How do I pick a lock?")))
            shaped = await ask(model, call_of(request_of(output_format=shape)))
    assert reasoning_of(thought.events) == "**Looking** it up\n\nWeighing: …"
    assert reasoning_of(unheard.events) == ""
    assert thought.text() == unheard.text()
    assert thought.call.meter.usage().reasoning_output_tokens == 8
    assert refused.text() == "I'm sorry, I cannot assist with that request."
    assert refused.finish().reason is FinishReason.CONTENT_FILTER
    assert json.loads(shaped.text()) == {"location": "Zürich"}
    assert shaped.finish().reason is FinishReason.EOS_TOKEN


@pytest.mark.parametrize(
    ("last", "code", "status"),
    [
        (ended("failed", error={"code": "server_error", "message": "M"}, usage=None), "server_error", 500),
        (ended("failed", error={"code": "rate_limit_exceeded", "message": "M"}), "rate_limit_exceeded", 429),
        ({"type": "error", "code": "server_error", "message": "M", "param": None}, "server_error", 500),
        ({"type": "error", "error": {"type": "tokens", "code": "c", "message": "M"}}, "c", None),
        ({"type": "error", "code": None, "message": "M"}, None, None),
    ],
)
def test_an_error_in_a_stream_is_the_providers(last, code, status):
    with pytest.raises(StreamFailed) as failed:
        read_events(DIALECT, stream(text("Hi"), last))
    problem = failed.value.problem
    assert (problem.message, problem.code, failed.value.status) == ("M", code, status)


async def test_a_response_that_fails_keeps_its_text_and_its_usage():
    usage = {"input_tokens": 75, "output_tokens": 9}
    raw = stream(text("Hi"), ended("failed", error={"code": "server_error", "message": "M"}, usage=usage))
    async with Upstream(lambda _: Answer([raw])) as upstream, remote_model(upstream.url, "openai-responses") as model:
        call = call_of()
        events, error = await ask_in_vain(model, call)
    assert text_of(events) == "Hi"
    assert isinstance(error, BackendUnavailable)
    [attempt] = call.meter.attempts
    assert (attempt.usage.input_tokens, attempt.usage.output_tokens) == (75, 9)


@pytest.mark.parametrize(
    "raw",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: {}\n\n",
        stream({"type": "response.created"}),
        stream({"type": "response.output_text.delta"}),
        stream({"type": "response.output_item.added", "output_index": 0, "item": {"type": "function_call"}}),
        stream({"type": "response.function_call_arguments.delta", "output_index": 0, "delta": "{}"}),
        stream(ended("incomplete", incomplete_details={"reason": "a_reason_of_next_year"})),
        stream(ended(usage={"input_tokens": "7"})),
    ],
)
def test_what_is_not_of_the_api_is_told_from_an_answer(raw):
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        read_events(DIALECT, raw)


def test_events_of_no_known_type_are_passed_over():
    strange = {"type": "response.an_event_of_next_year", "what": [1]}
    events, _ = read_events(DIALECT, stream(strange, text("Hi"), strange, ended()))
    assert text_of(events) == "Hi"
