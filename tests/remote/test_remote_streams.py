"""From a provider's bytes to events, whatever pieces they come in; and what a call used, as it happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable

import pytest

from headrace.backends.events import Delta, Event, StreamEnd, ToolCallDelta
from headrace.backends.remote.counting import Counting
from headrace.backends.remote.dialects.openai_compatible import COMPATIBLE
from headrace.backends.remote.stream import AnswerStream
from headrace.backends.remote.surrogates import WholeCharacters
from headrace.backends.requests import ChatInput, ChatMessage, Role, ToolCall, ToolDefinition
from headrace.backends.usage import AttemptOutcome, Usage
from tests.remote.asking import ask, call_of, remote_model, request_of, splits, text_of
from tests.remote.remote_kit import answer, chunk, finish_of, says
from tests.remote.upstream import Answer, Upstream, every_byte

TEXTS = ["Grüße, ", "世界 🌍", ' {"a": ', "1}\n", "e\u0301nd"]
STREAM = b": hello\n\n" + b": ping\n\n".join(answer(*TEXTS))


def read_stream(pieces: Iterable[bytes], usage: Usage | None = None) -> list[Event]:
    call = call_of()
    counting = Counting(call.request, call.max_new_tokens, usage or Usage())
    counting.sent()
    reader = COMPATIBLE.reader(call, counting.reported)
    stream = AnswerStream(reader, counting, provider="far", num_tokens=64, top_logprobs=0, redact=lambda text: text)
    events = [event for piece in pieces for event in stream.feed(piece)]
    counting.end(is_complete=stream.finished)
    return events


def test_a_stream_is_the_same_split_at_every_byte():
    whole = read_stream([STREAM])
    assert text_of(whole) == "".join(TEXTS)
    for at in range(len(STREAM) + 1):
        usage = Usage()
        events = read_stream([STREAM[:at], STREAM[at:]], usage)
        assert (text_of(events), finish_of(events)) == (text_of(whole), finish_of(whole))
        assert (usage.input_tokens, usage.output_tokens, usage.estimated) == (7, 2, False)


async def test_a_stream_is_the_same_in_all_the_pieces_that_a_socket_may_give():
    for ends in (b"\n", b"\r\n"):
        for pieces in splits(STREAM.replace(b"\n", ends)):
            async with (
                Upstream(lambda _, pieces=pieces: Answer(pieces)) as upstream,
                remote_model(upstream.url, "openai-compatible") as model,
            ):
                call = call_of()
                found = await ask(model, call)
            assert found.text() == "".join(TEXTS)
            assert isinstance(found.events[-1], StreamEnd)
            assert call.meter.attempts[0].usage.output_tokens == 2


async def test_a_slow_drip_with_comments_is_an_answer_as_any_other():
    async def drip() -> AsyncIterator[bytes]:
        for byte in every_byte(STREAM):
            yield byte
            yield b""
            await asyncio.sleep(0)

    async with Upstream(lambda _: Answer(drip())) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        found = await ask(model, call_of())
    assert found.text() == "".join(TEXTS)


def test_deltas_that_come_together_are_one_and_others_stay_apart():
    together = [event for event in read_stream([b"".join(answer("a", "b", "c"))]) if isinstance(event, Delta)]
    apart = [event for event in read_stream(answer("a", "b", "c")) if isinstance(event, Delta)]
    assert [delta.text for delta in together] == ["abc"]
    assert [delta.text for delta in apart] == ["a", "b", "c"]


def test_calls_of_tools_stay_as_they_came():
    def calls(**function: str) -> bytes:
        part = {"index": 0, "id": "call_1" if "name" in function else None, "function": function}
        return chunk(choices=[{"index": 0, "delta": {"tool_calls": [part]}, "finish_reason": None}])

    stream = [says("Let me see. "), calls(name="f", arguments=""), calls(arguments="{}"), says("", finish="tool_calls")]
    deltas = [event for event in read_stream([b"".join(stream)]) if isinstance(event, Delta)]
    assert [delta.tool_calls for delta in deltas] == [
        (),
        (ToolCallDelta(0, "call_1", "f"),),
        (ToolCallDelta(0, arguments_json="{}"),),
    ]


def test_reasoning_stays_before_the_text_that_followed_it():
    def thinks(text: str) -> bytes:
        delta = {"reasoning_content": text}
        return chunk(choices=[{"index": 0, "delta": delta, "finish_reason": None}])

    stream = b"".join([thinks("hm"), thinks("!"), says("so"), thinks("or"), says("not", finish="stop")])
    deltas = [event for event in read_stream([stream]) if isinstance(event, Delta)]
    assert [(delta.reasoning_text, delta.text) for delta in deltas] == [("hm!", "so"), ("or", "not")]


def test_what_came_before_an_error_is_given_first():
    stream = AnswerStream(
        COMPATIBLE.reader(call_of(), Usage()),
        Counting(request_of(), 64, Usage()),
        provider="far",
        num_tokens=64,
        top_logprobs=0,
        redact=lambda text: text,
    )
    events = stream.feed(says("a") + says("b") + b"data: {\n\n")
    assert next(events) == Delta(0, "ab")
    with pytest.raises(Exception, match="what is not of its API"):
        next(events)


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (['"\\ud83c\\udf0d"'], "🌍"),
        (['"a\\ud83c"', '"\\udf0db"'], "a🌍b"),
        (['"\\ud83c"', '""', '"\\udf0d"'], "🌍"),
        (['"\\ud83cx"'], "\ufffdx"),
        (['"\\ud83c"', '"x"'], "\ufffdx"),
        (['"\\udf0d"'], "\ufffd"),
        (['"\\ud83c"'], ""),
    ],
)
def test_halves_of_characters_are_joined_or_replaced(parts: list[str], whole: str):
    characters = WholeCharacters()
    texts = [json.loads(part) for part in parts]
    assert "".join(characters.of(Delta(0, text)).text for text in texts) == whole
    characters = WholeCharacters()
    assert "".join(characters.of(Delta(1, "", reasoning_text=text)).reasoning_text for text in texts) == whole
    characters = WholeCharacters()
    calls = [characters.of(Delta(0, "", tool_calls=(ToolCallDelta(2, arguments_json=text),))) for text in texts]
    assert "".join(call.arguments_json for delta in calls for call in delta.tool_calls) == whole


def test_halves_of_two_choices_do_not_meet():
    characters = WholeCharacters()
    assert characters.of(Delta(0, "\ud83c")).text == ""
    assert characters.of(Delta(1, "\udf0d")).text == "\ufffd"
    assert characters.of(Delta(0, "\udf0d")).text == "🌍"


async def test_usage_is_an_estimate_until_the_provider_has_said_its_own():
    stages = [asyncio.Event() for _ in range(2)]

    async def pieces() -> AsyncIterator[bytes]:
        yield says("x")
        await stages[0].wait()
        yield says("twenty bytes of text")
        await stages[1].wait()
        for piece in answer():
            yield piece

    seen = []
    async with (
        Upstream(lambda _: Answer(pieces())) as upstream,
        remote_model(upstream.url, "openai-compatible") as model,
    ):
        call = call_of(request_of("sixteen bytes it"))
        async for event in model.generate(call):
            usage = call.meter.usage()
            if isinstance(event, Delta):
                seen.append((usage.input_tokens, usage.output_tokens, usage.estimated))
                stages[len(seen) - 1].set()
    assert seen == [(4, 1, True), (4, 6, True)]
    [attempt] = call.meter.attempts
    assert attempt.outcome is AttemptOutcome.COMPLETED
    assert (attempt.usage.input_tokens, attempt.usage.output_tokens, attempt.usage.estimated) == (7, 2, False)


def test_an_estimate_is_no_more_than_was_asked_for_and_a_count_is_what_it_is():
    usage = Usage()
    counting = Counting(request_of(), 4, usage)
    counting.sent()
    counting.delta(Delta(0, "x" * 4000))
    assert usage.output_tokens == 4
    counting.reported.output_tokens = 9
    counting.end(is_complete=False)
    assert (usage.output_tokens, usage.estimated) == (9, True)


def test_an_estimate_stays_where_the_provider_reports_no_input():
    usage = Usage()
    counting = Counting(request_of("sixteen bytes it"), 4, usage)
    counting.sent()
    counting.reported.output_tokens = 2
    counting.end(is_complete=True)
    assert (usage.input_tokens, usage.output_tokens, usage.estimated) == (4, 2, True)


def test_an_estimate_of_a_conversation_counts_all_that_is_sent():
    message = ChatMessage(Role.ASSISTANT, "1234", tool_calls=(ToolCall("id", "name", "{}--"),))
    tool = ToolDefinition("name", "1234", "{}--")
    usage = Usage()
    Counting(request_of(ChatInput((message,), (tool,))), 4, usage).sent()
    assert usage.input_tokens == 6


async def test_the_meter_knows_when_text_came_and_the_model_which_version_answered():
    async with (
        Upstream(lambda _: Answer(answer("Hi"))) as upstream,
        remote_model(upstream.url, "openai-compatible") as model,
    ):
        assert model.reported_version is None
        call = call_of()
        await ask(model, call)
        assert model.reported_version == "there-2026"
    meter = call.meter
    assert meter.started is not None
    assert meter.started <= meter.first_token == meter.first_answer_token <= meter.last_token


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer's last chunk may take its time."""
    monkeypatch.setattr("headrace.backends.remote.transport._LAST_CHUNK_SECONDS", 60.0)


@pytest.mark.usefixtures("patient")
async def test_connections_are_used_again_also_after_errors():
    answers = iter([Answer(answer("Hi")), Answer([b"{}"], 500), Answer(answer("Hi")), Answer(answer("Hi"))])
    async with Upstream(lambda _: next(answers)) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        for _ in range(4):
            await asyncio.gather(ask(model, call_of()), return_exceptions=True)
        assert upstream.num_connections == 1


@pytest.mark.usefixtures("patient")
async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced_by_a_new_one():
    answers = iter([Answer(answer("Hi")), Answer(raw=b""), Answer(answer("again"))])
    async with (
        Upstream(lambda _: next(answers)) as upstream,
        remote_model(upstream.url, "openai-compatible") as model,
    ):
        texts = [(await ask(model, call_of())).text() for _ in range(2)]
        assert upstream.num_connections == 2
    assert texts == ["Hi", "again"]
    assert len({request.body for request in upstream.requests}) == 1


@pytest.mark.usefixtures("patient")
async def test_a_closed_model_has_closed_its_connections():
    async with Upstream(lambda _: Answer(answer("Hi"))) as upstream:
        async with remote_model(upstream.url, "openai-compatible") as model:
            await ask(model, call_of())
            assert upstream.num_open == 1
        await upstream.until(lambda it: it.num_open == 0)


def test_what_follows_the_last_message_is_not_looked_at():
    events = read_stream([b"".join(answer("a")) + b"data: {nonsense\n\n"])
    assert (text_of(events), finish_of(events)) == ("a", finish_of(read_stream(answer("a"))))
