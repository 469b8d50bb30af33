"""The dialect ``llama-cpp`` before a real server, if there is one: ``llama-server -m FILE --jinja -np 4``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import pytest

from headrace.backends.errors import InvalidArgument
from headrace.backends.events import FinishReason
from headrace.backends.formats import JsonObjectFormat, JsonSchemaFormat
from headrace.backends.remote.plugin import RemoteBackend
from headrace.backends.requests import (
    ResponseOptions,
    Sampling,
    Stopping,
)
from headrace.backends.testing import BackendConformance
from headrace.backends.types import Call
from tests.remote.asking import ask, ask_with_seeds, call_of, remote_backend, remote_model, request_of

if "LLAMA_SERVER_URL" in os.environ:
    URL = os.environ["LLAMA_SERVER_URL"]
    GREEDY = Sampling(temperature=0.0)
    SCHEMA = json.dumps({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]})

    class TestLlamaServer(BackendConformance):
        failing_prompt = "and so on " * 100_000
        # The server computes on the same processors.
        blocked_seconds = 0.5

        @pytest.fixture(scope="class")
        @classmethod
        def backend(cls) -> RemoteBackend:
            return remote_backend(URL, "llama-cpp", model="any")

    def greedy(source: Any = "Count from one to ten.", *, options: Iterable[str] = (), **request: Any) -> Call:
        made = request_of(source, sampling=GREEDY, options={"sampling.temperature", *options}, **request)
        return call_of(made, max_new_tokens=24)

    async def test_an_answer_comes_piece_by_piece_and_is_counted() -> None:
        async with remote_model(URL, "llama-cpp", model="any") as model:
            call = greedy()
            answer = await ask(model, call)
        usage = call.meter.attempts[0].usage
        assert len(answer.deltas()) > 5
        assert answer.finish().reason is FinishReason.MAX_TOKENS
        assert (usage.output_tokens, usage.estimated) == (24, False)
        assert usage.input_tokens

    async def test_what_it_has_in_its_cache_is_reported() -> None:
        async with remote_model(URL, "llama-cpp", model="any") as model:
            await ask(model, greedy("Tell me of the sea, of rivers, of lakes and of rain."))
            again = greedy("Tell me of the sea, of rivers, of lakes and of rain.")
            await ask(model, again)
        usage = again.meter.attempts[0].usage
        assert 0 < (usage.cache_read_input_tokens or 0) <= (usage.input_tokens or 0)

    async def test_a_stop_sequence_ends_the_text_before_it() -> None:
        async with remote_model(URL, "llama-cpp", model="any") as model:
            whole = (await ask(model, greedy())).text()
            stop = whole[8:12]
            stopped = await ask(model, greedy(stopping=Stopping(stop_sequences=(stop,))))
        assert stopped.text() == whole[: whole.find(stop)]

    async def test_a_seed_repeats_an_answer_and_another_does_not() -> None:
        async with remote_model(URL, "llama-cpp", model="any") as model:
            # What it computes of the prompt at first is what the others begin with.
            _, first, again, other = await ask_with_seeds(model, [1, 1, 1, 2])
        assert first.text() == again.text() != other.text()

    async def test_tokens_come_with_their_log_probabilities() -> None:
        response = ResponseOptions(logprobs=True, top_logprobs=3)
        async with remote_model(URL, "llama-cpp", model="any") as model:
            answer = await ask(model, greedy(response=response, options={"response.logprobs", "response.top_logprobs"}))
        tokens = [token for delta in answer.deltas() for token in delta.logprobs]
        assert len(tokens) == 24
        assert all(token.logprob <= 0 and len(token.top) == 3 for token in tokens)

    async def test_json_has_the_shape_that_was_asked_for() -> None:
        chat = "Give me a JSON object with one key, city. One line."
        async with remote_model(URL, "llama-cpp", model="any") as model:
            anything = await ask(model, greedy(chat, output_format=JsonObjectFormat()))
            city = await ask(model, greedy(chat, output_format=JsonSchemaFormat(SCHEMA)))
        assert anything.text().lstrip().startswith("{")
        assert json.loads(city.text())["city"] in ("Paris", "Rome")

    async def test_a_prompt_that_does_not_fit_is_refused() -> None:
        async with remote_model(URL, "llama-cpp", model="any") as model:
            with pytest.raises(InvalidArgument, match="context"):
                await ask(model, greedy("and so on " * 20_000))

else:

    def test_a_server_of_llama_cpps_is_understood() -> None:
        pytest.skip("LLAMA_SERVER_URL (such as http://127.0.0.1:8080/v1) is not set")
