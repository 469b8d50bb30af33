"""The Python client, over a real server, at the fakes of Anthropic and of Gemini."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from headrace.client import (
    AsyncClient,
    FinishReason,
    InvalidArgumentError,
    Message,
    ServerError,
    TextDelta,
    UnsupportedOptionError,
)
from headrace.server.app import running_app
from headrace.server.config import Settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.server import start_server
from tests.remote.fakes import anthropic, gemini
from tests.remote.upstream import Upstream

WEATHER = {"name": "get_weather", "description": "Where it rains", "parameters_json_schema": {"type": "object"}}
CLAUDE, FLASH = "claude", "flash"
HELLO = [Message("user", "Hello")]


@pytest.fixture
async def upstreams() -> AsyncIterator[dict[str, Upstream]]:
    async with (
        Upstream(anthropic.FakeAnthropic(seconds_per_token=0.001)) as claude,
        Upstream(gemini.FakeGemini(seconds_per_token=0.001)) as flash,
    ):
        yield {CLAUDE: claude, FLASH: flash}


@pytest.fixture
async def client(upstreams: dict[str, Upstream], tmp_path: Path) -> AsyncIterator[AsyncClient]:
    def provider(name: str, dialect: str, key: str, model: str) -> dict[str, Any]:
        (tmp_path / name).write_text(key)
        return {
            "dialect": dialect,
            "base_url": upstreams[name].url,
            "api_key": f"file:{tmp_path / name}",
            "models": {name: {"model": model, "context_length": 100_000}},
        }

    providers = {
        "anthropic": provider(CLAUDE, "anthropic", anthropic.KEY, "claude-opus-5-5"),
        "google": provider(FLASH, "gemini", gemini.KEY, gemini.MODEL),
    }
    price = {"input": 3, "output": 5, "cache_read_input": 1, "cache_write_input": 4}
    settings = Settings(
        plugins=("remote", "price_table"),
        backends={"remote": {"providers": providers}},
        price_sources={"table": {"id": "t", "currency": "USD", "models": {CLAUDE: price, FLASH: price}}},
        ledger="none",
    )
    async with running_app(settings) as app:
        server = await start_server(app, address="127.0.0.1:0", metrics=Metrics(CollectorRegistry()))
        try:
            async with AsyncClient(f"127.0.0.1:{server.port}") as made:
                yield made
        finally:
            await server.stop(0)


@pytest.mark.parametrize("model", [CLAUDE, FLASH])
async def test_a_tool_is_called_and_its_result_sent_back(client: AsyncClient, model: str):
    messages = [Message("system", "Be brief."), Message("user", "Regnet es in Zürich?")]
    answer = await client.generate(messages, tools=[WEATHER], tool_choice="required", model=model)
    (call,) = answer.tool_calls
    assert (call.name, call.arguments_json) == ("get_weather", '{"location": "Zürich"}')
    messages.append(Message("assistant", answer.text, tool_calls=answer.tool_calls))
    messages.append(Message("tool", "Ja.", tool_call_id=call.id))
    assert (await client.generate(messages, tools=[WEATHER], model=model)).text


@pytest.mark.parametrize(("begins", "goes_on"), [(CLAUDE, FLASH), (FLASH, CLAUDE)])
async def test_what_one_provider_began_another_can_end(client: AsyncClient, begins: str, goes_on: str):
    messages = [Message("user", "Regnet es in Zürich?")]
    thinking = {"reasoning": True} if begins == CLAUDE else {"tool_choice": "required"}
    answer = await client.generate(messages, tools=[WEATHER], model=begins, **thinking)
    (call,) = answer.tool_calls
    assert "~" in call.id
    messages.append(Message("assistant", answer.text, tool_calls=answer.tool_calls))
    messages.append(Message("tool", "Ja.", tool_call_id=call.id))
    assert (await client.generate(messages, tools=[WEATHER], model=goes_on)).text


@pytest.mark.parametrize("model", [CLAUDE, FLASH])
async def test_reasoning_is_streamed_apart_and_paid_for(client: AsyncClient, model: str):
    options = {"model": model, "max_reasoning_tokens": 1024, "max_new_tokens": 1030}
    async with client.stream([Message("user", "What is 17 * 23?")], **options) as events:
        deltas = [event async for event in events if isinstance(event, TextDelta)]
    assert "".join(delta.reasoning_text or "" for delta in deltas).endswith("…")
    assert "".join(delta.text for delta in deltas)
    assert events.report is not None
    usage, cost = events.report.usage, events.report.cost
    assert usage.reasoning_output_tokens == 7
    assert usage.input_tokens is not None
    assert usage.output_tokens is not None
    assert cost is not None
    assert cost.charge_nanos == 3000 * usage.input_tokens + 5000 * usage.output_tokens


async def test_what_is_written_to_the_cache_has_its_own_price(client: AsyncClient):
    extensions = {"anthropic": {"cache_control": {"type": "ephemeral"}}}
    answer = await client.generate(HELLO, model=CLAUDE, extensions=extensions)
    assert answer.report is not None
    usage, cost = answer.report.usage, answer.report.cost
    assert usage.input_tokens is not None
    assert usage.output_tokens is not None
    assert usage.cache_write_input_tokens
    assert cost is not None
    uncached = usage.input_tokens - usage.cache_write_input_tokens
    charge = 3000 * uncached + 4000 * usage.cache_write_input_tokens + 5000 * usage.output_tokens
    assert cost.charge_nanos == charge


@pytest.mark.parametrize("model", [CLAUDE, FLASH])
async def test_a_stream_that_its_reader_leaves_is_aborted_there(
    client: AsyncClient, upstreams: dict[str, Upstream], model: str
):
    async with client.stream(HELLO, model=model, max_new_tokens=600) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
    await upstreams[model].until(lambda it: len(it.aborted) == 1)


async def test_a_stop_sequence_is_not_in_the_text_and_named_where_the_provider_names_it(client: AsyncClient):
    for model, reason, named in ((CLAUDE, FinishReason.STOP_SEQUENCE, True), (FLASH, FinishReason.EOS_TOKEN, False)):
        whole = (await client.generate(HELLO, model=model)).text
        stop = whole[10:14]
        answer = await client.generate(HELLO, model=model, stop_sequences=[stop])
        assert answer.text == whole[: whole.index(stop)]
        finish = answer.choices[0].finish
        assert finish is not None
        assert (finish.reason, finish.stop_sequence) == (reason, stop if named else None)


REFUSALS: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    (CLAUDE, HELLO, {"seed": 7}, UnsupportedOptionError, "determinism.seed"),
    (CLAUDE, HELLO, {"n": 2}, UnsupportedOptionError, "n"),
    (CLAUDE, HELLO, {"min_p": 0.1}, UnsupportedOptionError, "sampling.min_p"),
    (CLAUDE, HELLO, {"temperature": 1.5}, InvalidArgumentError, "sampling.temperature"),
    (CLAUDE, "Once upon a time", {}, UnsupportedOptionError, "text"),
    (FLASH, HELLO, {"min_p": 0.1}, UnsupportedOptionError, "sampling.min_p"),
    (FLASH, HELLO, {"regex": "a+"}, UnsupportedOptionError, "structured_output.regex"),
    (FLASH, HELLO, {"stop_sequences": list("abcdef")}, InvalidArgumentError, "stopping.stop_sequences"),
    (FLASH, HELLO, {"extensions": {"gemini": {"tools": []}}}, InvalidArgumentError, "extensions['gemini'].tools"),
    (FLASH, "Once upon a time", {}, UnsupportedOptionError, "text"),
]


async def test_what_a_provider_lacks_is_refused_by_name_before_it_is_asked(
    client: AsyncClient, upstreams: dict[str, Upstream]
):
    for model, prompt, options, error, field in REFUSALS:
        with pytest.raises(error, match=f"^{re.escape(field)}: "):
            await client.generate(prompt, model=model, **options)
    assert [upstream.requests for upstream in upstreams.values()] == [[], []]


async def test_a_key_that_is_wrong_is_no_fault_of_the_callers(client: AsyncClient, tmp_path: Path):
    (tmp_path / FLASH).write_text("AIza-of-somebody")
    with pytest.raises(ServerError, match="'google' refuses this server") as refused:
        await client.generate(HELLO, model=FLASH)
    assert "AIza-of-somebody" not in str(refused.value)
