"""Turns with the fakes of Anthropic and of Gemini, which check what they are asked as the APIs do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.backends.api import WholeCallModel
from headrace.backends.errors import InvalidArgument, ProviderRefused, ProviderStatus
from headrace.backends.events import ChoiceFinish, FinishReason
from headrace.backends.remote.dialects.anthropic import AnthropicExtension
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    Reasoning,
    ResponseOptions,
    Role,
    Sampling,
    ToolCall,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.backends.types import Call
from headrace.backends.usage import AttemptOutcome
from tests.remote.asking import (
    ask,
    ask_in_vain,
    call_of,
    reasoning_of,
    remote_model,
    request_of,
    text_of,
    tool_calls_of,
)
from tests.remote.fakes import anthropic, gemini
from tests.remote.upstream import Handler, Upstream

WEATHER = ToolDefinition("get_weather", "Where it rains", '{"type": "object"}')
QUESTION = ChatMessage(Role.USER, "Regnet es in Zürich?")


@dataclass(frozen=True)
class There:
    """A provider that runs."""

    model: WholeCallModel
    upstream: Upstream


@pytest.fixture(params=["anthropic", "gemini"])
def there(request: pytest.FixtureRequest, tmp_path: Path):
    """Begins one of the fakes, and a model there."""
    handler: Handler
    handler, key, model = {
        "anthropic": (anthropic.FakeAnthropic(), anthropic.KEY, "claude-opus-5-5"),
        "gemini": (gemini.FakeGemini(), gemini.KEY, gemini.MODEL),
    }[request.param]

    @asynccontextmanager
    async def begin(key: str = key, **settings: object) -> AsyncIterator[There]:
        (tmp_path / "key").write_text(key)
        provider = {"api_key": f"file:{tmp_path / 'key'}"}
        async with (
            Upstream(handler) as upstream,
            remote_model(upstream.url, request.param, provider=provider, model=model, **settings) as loaded,
        ):
            yield There(loaded, upstream)
            await upstream.until(lambda it: it.num_open <= 1)

    return begin


def tools(*messages: ChatMessage, choice: ToolChoiceMode = ToolChoiceMode.AUTO) -> Call:
    return call_of(request_of(ChatInput((QUESTION, *messages), (WEATHER,), choice)))


async def test_a_tool_is_called_and_its_result_gets_an_answer(there):
    async with there() as provider:
        first = await ask(provider.model, tools(choice=ToolChoiceMode.REQUIRED))
        ((call_id, name, arguments),) = tool_calls_of(first.events)
        assert (name, arguments) == ("get_weather", '{"location": "Zürich"}')
        assert isinstance(first.events[-2], ChoiceFinish)
        assert first.events[-2].reason is FinishReason.TOOL_CALLS
        turn = ChatMessage(Role.ASSISTANT, text_of(first.events), tool_calls=(ToolCall(call_id, name, arguments),))
        second = await ask(provider.model, tools(turn, ChatMessage(Role.TOOL, "Ja.", tool_call_id=call_id)))
        assert text_of(second.events)


async def test_what_a_model_thought_before_it_called_a_tool_goes_back_with_the_result(there):
    async with there(reasoning=True) as provider:
        choice = ToolChoiceMode.AUTO if provider.model.card.provider_model != gemini.MODEL else ToolChoiceMode.REQUIRED
        first = await ask(provider.model, tools(choice=choice))
        ((call_id, name, arguments),) = tool_calls_of(first.events)
        assert reasoning_of(first.events)
        turn = ChatMessage(Role.ASSISTANT, text_of(first.events), tool_calls=(ToolCall(call_id, name, arguments),))
        second = await ask(provider.model, tools(turn, ChatMessage(Role.TOOL, "Ja.", tool_call_id=call_id)))
        assert text_of(second.events)
        sent = provider.upstream.requests[-1].body.decode()
        assert (anthropic.SIGNATURE in sent) or (gemini.SIGNATURE in sent)
        assert "~" not in sent


async def test_reasoning_comes_apart_from_the_text_and_is_counted(there):
    async with there() as provider:
        request = request_of(reasoning=Reasoning(max_reasoning_tokens=1024))
        answer = await ask(provider.model, call_of(request, max_new_tokens=1100))
        assert reasoning_of(answer.events).endswith("…")
        assert "…" not in text_of(answer.events)
        usage = answer.call.meter.usage()
        assert usage.reasoning_output_tokens == 7
        assert (usage.output_tokens, usage.estimated) == (674, False)


async def test_reasoning_that_is_not_wanted_is_not_asked_for(there):
    async with there(reasoning=True) as provider:
        request = request_of(reasoning=Reasoning(include_text=False))
        answer = await ask(provider.model, call_of(request))
        assert reasoning_of(answer.events) == ""
        assert answer.call.meter.usage().reasoning_output_tokens == 7
        request = request_of(reasoning=Reasoning(enabled=False))
        assert (await ask(provider.model, call_of(request))).call.meter.usage().reasoning_output_tokens is None


async def test_a_key_that_the_provider_does_not_know_is_the_operators_to_mend_and_in_no_message(there):
    async with there(key="sk-of-somebody") as provider:
        call = call_of()
        events, error = await ask_in_vain(provider.model, call)
        assert events == []
        assert isinstance(error, ProviderRefused)
        assert error.provider_status is not None
        assert error.provider_status.provider == "there"
        assert "sk-of-somebody" not in f"{error!s}{error!r}{error.__cause__!r}"
        (attempt,) = call.meter.attempts
        assert (attempt.outcome, attempt.usage.input_tokens) == (AttemptOutcome.FAILED, 0)
        assert "sk-of-somebody" not in provider.upstream.requests[0].path


async def test_what_the_provider_does_not_take_is_the_callers_to_mend(there):
    async with there() as provider:
        _, error = await ask_in_vain(provider.model, call_of(request_of("\0")))
        assert isinstance(error, InvalidArgument)
        assert error.provider_status is not None
        assert error.provider_status.status == 400


async def test_the_version_that_the_provider_reports_is_known(there):
    async with there() as provider:
        assert getattr(provider.model, "reported_version", "") is None
        await ask(provider.model, call_of())
        assert getattr(provider.model, "reported_version", "") == provider.model.card.provider_model


async def test_what_is_cached_at_anthropic_is_counted_apart(tmp_path):
    (tmp_path / "key").write_text(anthropic.KEY)
    provider = {"api_key": f"file:{tmp_path / 'key'}"}
    extension = AnthropicExtension.model_validate({"cache_control": {"type": "ephemeral"}})
    async with (
        Upstream(anthropic.FakeAnthropic()) as upstream,
        remote_model(upstream.url, "anthropic", provider=provider) as model,
    ):
        answer = await ask(model, call_of(extensions={"anthropic": extension}))
        plain = await ask(model, call_of())
    cached, uncached = answer.call.meter.usage(), plain.call.meter.usage()
    assert cached.cache_write_input_tokens
    assert cached.input_tokens == uncached.input_tokens


async def test_the_operator_may_choose_the_version_of_anthropics_api(tmp_path):
    (tmp_path / "key").write_text(anthropic.KEY)
    provider = {"api_key": f"file:{tmp_path / 'key'}", "headers": {"anthropic-version": "2026-10-21"}}
    async with (
        Upstream(anthropic.FakeAnthropic()) as upstream,
        remote_model(upstream.url, "anthropic", provider=provider) as model,
    ):
        assert text_of((await ask(model, call_of())).events)
        hot = request_of(sampling=Sampling(temperature=0.5), options=["sampling.temperature"])
        _, error = await ask_in_vain(model, call_of(hot))
    assert isinstance(error, InvalidArgument)
    assert "temperature" in error.problem


async def test_choices_and_logprobs_of_gemini_come_with_their_choice(tmp_path):
    (tmp_path / "key").write_text(gemini.KEY)
    provider = {"api_key": f"file:{tmp_path / 'key'}"}
    response = ResponseOptions(logprobs=True, top_logprobs=3)
    async with (
        Upstream(gemini.FakeGemini()) as upstream,
        remote_model(upstream.url, "gemini", provider=provider, model=gemini.MODEL) as model,
    ):
        answer = await ask(model, call_of(request_of(n=3, response=response), max_new_tokens=5))
    assert [len(answer.logprobs(choice)) for choice in range(3)] == [5, 5, 5]
    assert all(len(one.top) == 3 for one in answer.logprobs(1))
    assert answer.call.meter.usage().output_tokens == 15
    assert [answer.finish(choice).reason for choice in range(3)] == [FinishReason.MAX_TOKENS] * 3


async def test_a_model_that_is_not_there_is_the_operators_to_mend(tmp_path):
    async with (
        Upstream(gemini.FakeGemini()) as upstream,
        remote_model(upstream.url, "gemini", model="gemini-of-old") as model,
    ):
        _, error = await ask_in_vain(model, call_of())
    assert isinstance(error, ProviderRefused)
    assert error.provider_status == ProviderStatus("there", 404, "NOT_FOUND")
