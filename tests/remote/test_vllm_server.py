"""The dialect ``vllm`` before a real server, if there is one: ``vllm serve MODEL --enable-auto-tool-choice ...``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any

import pytest

from headrace.backends.events import FinishReason
from headrace.backends.formats import ChoiceFormat, JsonSchemaFormat, RegexFormat
from headrace.backends.remote.plugin import RemoteBackend
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    NamedTool,
    ResponseOptions,
    Role,
    Sampling,
    Stopping,
    ToolDefinition,
)
from headrace.backends.testing import BackendConformance
from headrace.backends.types import Call
from tests.remote.asking import ask, call_of, remote_backend, remote_model, request_of, tool_calls_of

VARIABLES = ("VLLM_URL", "VLLM_MODEL")

if os.environ.keys() >= set(VARIABLES):
    URL, MODEL = (os.environ[name] for name in VARIABLES)
    GREEDY = Sampling(temperature=0.0)
    SCHEMA = json.dumps({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]})

    class TestVllmServer(BackendConformance):
        failing_prompt = "and so on " * 100_000

        @pytest.fixture(scope="class")
        @classmethod
        def backend(cls) -> RemoteBackend:
            return remote_backend(URL, "vllm", model=MODEL)

    def greedy(source: Any = "Count from one to ten.", *, options: Iterable[str] = (), **request: Any) -> Call:
        made = request_of(source, sampling=GREEDY, options={"sampling.temperature", *options}, **request)
        return call_of(made, max_new_tokens=24)

    async def test_a_stop_sequence_and_a_stop_token_are_told_apart_from_the_models_own_end() -> None:
        ids = ResponseOptions(token_ids=True)
        async with remote_model(URL, "vllm", model=MODEL) as model:
            whole = await ask(model, greedy(response=ids))
            stop, token_id = whole.text()[8:12], whole.token_ids()[5]
            stopped = await ask(model, greedy(stopping=Stopping(stop_sequences=(stop,))))
            ended = await ask(model, greedy(stopping=Stopping(stop_token_ids=(token_id,)), response=ids))
        assert stopped.text() == whole.text()[: whole.text().find(stop)]
        assert (stopped.finish().reason, stopped.finish().stop_sequence) == (FinishReason.STOP_SEQUENCE, stop)
        assert (ended.finish().reason, ended.finish().stop_token_id) == (FinishReason.STOP_TOKEN, token_id)
        assert ended.token_ids()[-1] == token_id

    async def test_what_it_counts_is_no_estimate() -> None:
        async with remote_model(URL, "vllm", model=MODEL) as model:
            call = call_of(request_of("Count from one to ten.", n=2), max_new_tokens=3)
            await ask(model, call)
        usage = call.meter.attempts[0].usage
        assert not usage.estimated
        assert usage.output_tokens == 6
        assert usage.input_tokens

    async def test_an_output_has_the_shape_that_was_asked_for() -> None:
        async with remote_model(URL, "vllm", model=MODEL) as model:
            city = (await ask(model, greedy("Name a city.", output_format=JsonSchemaFormat(SCHEMA)))).text()
            number = (await ask(model, greedy(output_format=RegexFormat(r"[0-9]{3}-[0-9]{2}")))).text()
            choice = (await ask(model, greedy(output_format=ChoiceFormat(("left", "right"))))).text()
        assert json.loads(city)["city"] in ("Paris", "Rome")
        assert re.fullmatch(r"[0-9]{3}-[0-9]{2}", number)
        assert choice in ("left", "right")

    async def test_a_tool_that_must_be_called_is_called() -> None:
        tools = (ToolDefinition("weather", "The weather in a city.", SCHEMA),)
        messages = (ChatMessage(Role.USER, "What is the weather in Paris?"),)
        chat = ChatInput(messages, tools=tools, tool_choice=NamedTool("weather"))
        async with remote_model(URL, "vllm", model=MODEL) as model:
            answer = await ask(model, greedy(chat))
        [(call_id, name, arguments)] = tool_calls_of(answer.events)
        assert call_id
        assert name == "weather"
        if answer.finish().reason is FinishReason.TOOL_CALLS:  # a small model may go on with spaces for long
            assert json.loads(arguments)["city"] in ("Paris", "Rome")

else:

    def test_a_server_of_vllms_is_understood() -> None:
        pytest.skip("VLLM_URL (such as http://127.0.0.1:8000/v1) and VLLM_MODEL (its name there) are not set")
