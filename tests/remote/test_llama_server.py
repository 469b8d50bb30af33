"""Three dialects before a real server, llama-cpp-python's: its own, ``openai-compatible``, ``openai-completions``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any, ClassVar

import pytest

from headrace.backends.api import WholeCallModel
from headrace.backends.errors import BackendUnavailable
from headrace.backends.events import Delta, FinishReason
from headrace.backends.formats import JsonObjectFormat, JsonSchemaFormat
from headrace.backends.remote.plugin import RemoteBackend
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    NamedTool,
    Role,
    Sampling,
    Stopping,
    TextInput,
    ToolDefinition,
)
from headrace.backends.testing import BackendConformance
from headrace.backends.types import Call
from headrace.backends.usage import AttemptOutcome
from tests.remote.asking import ask, ask_with_seeds, call_of, remote_backend, remote_model, request_of, tool_calls_of
from tests.remote.llama_server import CONTEXT_LENGTH, NOT_THERE, is_there, llama_server

if is_there():
    GREEDY = Sampling(temperature=0.0)
    SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    ONE_AT_A_TIME = {"max_concurrent": 1, "queue_seconds": 60}
    """It breaks off the call that runs when another comes."""

    @pytest.fixture(scope="module")
    def server() -> Iterator[str]:
        with llama_server() as url:
            yield url

    class LlamaServerConformance(BackendConformance):
        dialect: ClassVar[str]
        prompts = BackendConformance.prompts[:4]
        # The server computes on every processor meanwhile.
        blocked_seconds = 0.5

        @pytest.fixture(scope="class")
        @classmethod
        def backend(cls, server: str) -> RemoteBackend:
            return remote_backend(server, cls.dialect, provider=ONE_AT_A_TIME, model="llama")

    class TestChat(LlamaServerConformance):
        dialect = "llama-cpp-python"

    class TestChatAtAServerOfNoName(LlamaServerConformance):
        dialect = "openai-compatible"

    class TestCompletions(LlamaServerConformance):
        dialect = "openai-completions"

    def greedy(source: Any = "Count from one to ten.", **request: Any) -> Call:
        return call_of(
            request_of(source, sampling=GREEDY, options={"sampling.temperature"}, **request), max_new_tokens=24
        )

    async def test_an_answer_comes_piece_by_piece(server: str) -> None:
        async with remote_model(server, "llama-cpp-python", model="llama") as model:
            answer = await ask(model, greedy())
        assert len(answer.deltas()) > 5
        assert answer.finish().reason is FinishReason.MAX_TOKENS
        assert model.reported_version == "llama"

    async def test_a_stop_sequence_ends_the_text_before_it(server: str) -> None:
        async with remote_model(server, "llama-cpp-python", model="llama") as model:
            whole = (await ask(model, greedy())).text()
            stop = whole[8:12]
            stopped = await ask(model, greedy(stopping=Stopping(stop_sequences=(stop,))))
        assert stopped.text() == whole[: whole.find(stop)]
        assert stopped.finish().reason is FinishReason.EOS_TOKEN  # it does not say which

    async def test_a_seed_repeats_an_answer_and_another_does_not(server: str) -> None:
        async with remote_model(server, "llama-cpp-python", model="llama") as model:
            # What it computes of the prompt at first is what the others begin with.
            _, first, again, other = await ask_with_seeds(model, [1, 1, 1, 2])
        assert first.text() == again.text() != other.text()
        assert first.finish().seed == 1

    async def test_json_has_the_shape_that_was_asked_for(server: str) -> None:
        chat = "Give me a JSON object with one key, city. One line."
        async with remote_model(server, "llama-cpp-python", model="llama") as model:
            anything = await ask(model, greedy(chat, output_format=JsonObjectFormat()))
            city = await ask(model, greedy(chat, output_format=JsonSchemaFormat(json.dumps(SCHEMA))))
        assert anything.text().lstrip().startswith("{")
        assert json.loads(city.text())["city"] in ("Paris", "Rome")

    async def test_a_tool_that_must_be_called_is_called(server: str) -> None:
        tools = (ToolDefinition("weather", "The weather in a city.", json.dumps(SCHEMA)),)
        messages = (ChatMessage(Role.USER, "What is the weather in Paris?"),)
        chat = ChatInput(messages, tools=tools, tool_choice=NamedTool("weather"))
        async with remote_model(server, "llama-cpp-python", model="llama") as model:
            answer = await ask(model, greedy(chat))
        [(call_id, name, arguments)] = tool_calls_of(answer.events)
        assert call_id
        assert name == "weather"
        assert json.loads(arguments)["city"] in ("Paris", "Rome")
        assert answer.finish().reason is FinishReason.TOOL_CALLS

    async def test_what_it_does_not_count_is_estimated_and_marked_so(server: str) -> None:
        async with remote_model(server, "llama-cpp-python", model="llama") as model:
            call = greedy()
            await ask(model, call)
        usage = call.meter.attempts[0].usage
        assert usage.estimated
        assert usage.input_tokens
        assert usage.output_tokens

    async def test_it_serves_on_after_a_caller_has_gone(server: str) -> None:
        async with remote_model(server, "openai-completions", model="llama") as model:
            gone = await _leave(model, "Once upon a time")
            assert gone.meter.attempts[0].outcome is AttemptOutcome.CANCELLED
            answer = await ask(model, greedy(TextInput("Once upon a time")))
        assert answer.text()

    async def test_a_prompt_that_does_not_fit_is_answered_with_nothing_which_is_an_error(server: str) -> None:
        async with remote_model(server, "llama-cpp-python", model="llama") as model:
            with pytest.raises(BackendUnavailable):
                await ask(model, greedy("and so on " * CONTEXT_LENGTH))

    async def _leave(model: WholeCallModel, text: str) -> Call:
        """Goes away at the first text."""
        call = call_of(request_of(TextInput(text)), max_new_tokens=400)
        async with aclosing(model.generate(call)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    break
        return call

else:

    def test_llama_cpp_pythons_server_is_understood() -> None:
        pytest.skip(NOT_THERE)
