"""What the dialect ``anthropic`` reads: the documentation's streams, in every way that they can be cut."""

from __future__ import annotations

import pytest

from headrace.backends.errors import BackendUnavailable, ProviderStatus
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.remote.dialect import StreamFailed
from headrace.backends.remote.dialects.anthropic import ANTHROPIC
from headrace.backends.remote.sse import EventParser
from headrace.backends.requests import Reasoning, Stopping
from headrace.backends.usage import AttemptOutcome, Usage
from tests.remote.asking import (
    DOCUMENTED,
    ask,
    ask_in_vain,
    call_of,
    read_events,
    reasoning_of,
    remote_model,
    request_of,
    splits,
    text_of,
    tool_calls_of,
)
from tests.remote.fakes.anthropic import event
from tests.remote.upstream import Answer, Ending, Upstream

DIALECT = ANTHROPIC
BASIC, TOOL_USE, THINKING, WEB_SEARCH, OVERLOADED = (
    (DOCUMENTED / f"anthropic-{name}.sse").read_bytes()
    for name in ("basic", "tool-use", "thinking", "web-search", "overloaded")
)
GCD = (
    "I need to find the GCD of 1071 and 462 using the Euclidean algorithm.\n\n1071 = 2 × 462 + 147"
    "\n462 = 3 × 147 + 21\n147 = 7 × 21 + 0\nThe remainder is 0, so GCD(1071, 462) = 21."
)
ANSWERS = {
    "basic": (BASIC, "Hello!", "", []),
    "tool use": (
        TOOL_USE,
        "Okay, let's check the weather for San Francisco, CA:",
        "",
        [("toolu_01T1x1fJ34qAmk2tNTrN7Up6", "get_weather", '{"location": "San Francisco, CA"}')],
    ),
    "thinking": (THINKING, "The greatest common divisor of 1071 and 462 is **21**.", GCD, []),
    "the provider's own tools": (
        WEB_SEARCH,
        (
            "I'll check the current weather in New York City for you."
            "Here's the current weather information for New York City:\n\n# Weather in New York City\n\n"
        ),
        "",
        [],
    ),
}


def stream(*data: dict[str, object]) -> bytes:
    return b"".join(map(event, data))


def started(**usage: object) -> dict[str, object]:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "claude-opus-5-5"}
    return {"type": "message_start", "message": message | {"usage": usage or {"input_tokens": 25, "output_tokens": 1}}}


def stopped(reason: str, sequence: str | None = None, **usage: object) -> list[dict[str, object]]:
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    return [
        {"type": "message_delta", "delta": delta, "usage": usage or {"output_tokens": 15}},
        {"type": "message_stop"},
    ]


def text(*pieces: str) -> list[dict[str, object]]:
    return [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": one}} for one in pieces),
        {"type": "content_block_stop", "index": 0},
    ]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_documented_stream_is_read(name):
    raw, said, thought, calls = ANSWERS[name]
    events, _ = read_events(DIALECT, raw)
    assert (text_of(events), reasoning_of(events), tool_calls_of(events)) == (said, thought, calls)
    reason = FinishReason.TOOL_CALLS if calls else FinishReason.EOS_TOKEN
    assert events[-1] == ChoiceFinish(0, reason)


@pytest.mark.parametrize("name", ANSWERS)
async def test_a_documented_stream_is_read_however_it_is_cut(name):
    raw, said, thought, calls = ANSWERS[name]
    pieces: list[bytes]
    async with Upstream(lambda _: Answer(pieces)) as upstream, remote_model(upstream.url, "anthropic") as model:
        for pieces in splits(raw):  # noqa: B007 -- the upstream sends them
            answer = await ask(model, call_of())
            events = answer.events
            assert (text_of(events), reasoning_of(events), tool_calls_of(events)) == (said, thought, calls)
            assert isinstance(events[-1], StreamEnd)
            assert isinstance(events[-2], ChoiceFinish)
            for delta in events[:-2]:
                assert isinstance(delta, Delta)
                (delta.text + delta.reasoning_text).encode()


def test_a_stream_that_is_cut_anywhere_is_no_answer():
    whole = len(BASIC) - len(b'event: message_stop\ndata: {"type": "message_stop"}\n\n')
    for end in range(whole):
        with pytest.raises(EOFError):
            read_events(DIALECT, BASIC[:end])
    for end in range(whole, len(BASIC)):  # the reason and the usage have come
        events, _ = read_events(DIALECT, BASIC[:end])
        assert events[-1] == ChoiceFinish(0, FinishReason.EOS_TOKEN)


def test_reasoning_that_is_not_wanted_is_left_out():
    events, _ = read_events(DIALECT, THINKING, call_of(request_of(reasoning=Reasoning(include_text=False))))
    assert reasoning_of(events) == ""
    assert text_of(events).startswith("The greatest")


def test_thinking_that_was_redacted_has_no_text():
    redacted = {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix"}
    events, _ = read_events(
        DIALECT,
        stream(
            started(),
            {"type": "content_block_start", "index": 0, "content_block": redacted},
            {"type": "content_block_stop", "index": 0},
            *text("Done."),
            *stopped("end_turn"),
        ),
    )
    assert [type(one) for one in events] == [Delta, ChoiceFinish]


def test_the_id_of_a_call_takes_the_thinking_before_it_along():
    def block(index: int, content: dict[str, object], *deltas: dict[str, object]) -> list[dict[str, object]]:
        return [
            {"type": "content_block_start", "index": index, "content_block": content},
            *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": index},
        ]

    thinking = {"type": "thinking", "thinking": "", "signature": ""}
    raw = stream(
        started(),
        *block(
            0, thinking, {"type": "thinking_delta", "thinking": "Hm"}, {"type": "signature_delta", "signature": "SigA="}
        ),
        *block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Größe "}),
        *block(2, {"type": "redacted_thinking", "data": "EmwK"}),
        *block(
            3, thinking, {"type": "thinking_delta", "thinking": ""}, {"type": "signature_delta", "signature": "SigB/"}
        ),
        *block(4, {"type": "tool_use", "id": "toolu_1", "name": "x", "input": {}}),
        *block(5, {"type": "tool_use", "id": "toolu_2", "name": "x", "input": {}}),
        *stopped("tool_use"),
    )
    events, _ = read_events(DIALECT, raw)
    assert [call_id for call_id, _, _ in tool_calls_of(events)] == ["toolu_1~0.SigA=~6:EmwK~6.SigB/", "toolu_2"]


def test_a_call_without_arguments_is_an_empty_object():
    block = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}}
    empty = {"type": "input_json_delta", "partial_json": ""}
    events, _ = read_events(
        DIALECT,
        stream(
            started(),
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "content_block_delta", "index": 0, "delta": empty},
            {"type": "content_block_stop", "index": 0},
            *stopped("tool_use"),
        ),
    )
    assert tool_calls_of(events) == [("toolu_1", "now", "{}")]


def test_parallel_calls_keep_apart():
    def call(index: int, call_id: str, *pieces: str) -> list[dict[str, object]]:
        block = {"type": "tool_use", "id": call_id, "name": "get_weather", "input": {}}
        return [
            {"type": "content_block_start", "index": index, "content_block": block},
            *(
                {
                    "type": "content_block_delta",
                    "index": index,
                    "delta": {"type": "input_json_delta", "partial_json": one},
                }
                for one in pieces
            ),
            {"type": "content_block_stop", "index": index},
        ]

    raw = stream(
        started(), *text("Both."), *call(1, "a", "", '{"x"', ": 1}"), *call(2, "b", '{"x": 2}'), *stopped("tool_use")
    )
    events, _ = read_events(DIALECT, raw)
    assert tool_calls_of(events) == [("a", "get_weather", '{"x": 1}'), ("b", "get_weather", '{"x": 2}')]


@pytest.mark.parametrize(
    ("reason", "means"),
    [
        ("end_turn", FinishReason.EOS_TOKEN),
        ("max_tokens", FinishReason.MAX_TOKENS),
        ("model_context_window_exceeded", FinishReason.MAX_TOKENS),
        ("tool_use", FinishReason.TOOL_CALLS),
        ("refusal", FinishReason.CONTENT_FILTER),
        ("pause_turn", FinishReason.MAX_TOKENS),
        ("a_reason_of_next_year", FinishReason.EOS_TOKEN),
    ],
)
def test_every_documented_reason_to_stop_has_its_own(reason, means):
    events, _ = read_events(DIALECT, stream(started(), *text("Hi"), *stopped(reason)))
    assert events[-1] == ChoiceFinish(0, means)


@pytest.mark.parametrize(("included", "said"), [(False, "One, two"), (True, "One, two, three")])
def test_the_stop_sequence_is_named_and_in_the_text_only_if_asked_for(included, said):
    stopping = Stopping(stop_sequences=(", three",), include_stop_sequence=included)
    raw = stream(started(), *text("One, two"), *stopped("stop_sequence", ", three"))
    events, _ = read_events(DIALECT, raw, call_of(request_of(stopping=stopping)))
    assert text_of(events) == said
    assert events[-1] == ChoiceFinish(0, FinishReason.STOP_SEQUENCE, ", three")


def test_the_counts_of_the_documented_streams_are_ours():
    assert read_events(DIALECT, BASIC)[1] == Usage(input_tokens=25, output_tokens=15)
    assert read_events(DIALECT, TOOL_USE)[1] == Usage(input_tokens=472, output_tokens=89)
    assert read_events(DIALECT, THINKING)[1] == Usage()  # it has none
    assert read_events(DIALECT, WEB_SEARCH)[1] == Usage(10682, 0, 0, 510)


def test_what_was_cached_is_counted_as_input():
    """https://platform.claude.com/docs/en/api/rate-limits: "with a 200K token cached document and a 50 token user
    question, you'd see `input_tokens: 50` even though the total input is 200,050 tokens".
    """
    usage = {
        "input_tokens": 50,
        "cache_read_input_tokens": 200_000,
        "cache_creation_input_tokens": 0,
        "output_tokens": 1,
    }
    _, read = read_events(DIALECT, stream(started(**usage), *text("Hi"), *stopped("end_turn", output_tokens=503)))
    assert read == Usage(200_050, 200_000, 0, 503)
    usage |= {"cache_read_input_tokens": 0, "cache_creation_input_tokens": 200_000}
    _, written = read_events(DIALECT, stream(started(**usage), *text("Hi"), *stopped("end_turn", output_tokens=503)))
    assert written == Usage(200_050, 0, 200_000, 503)


def test_thinking_is_counted_within_the_output():
    """``output_tokens_details`` of the API's ``Usage``: "Always ≤ `output_tokens`"."""
    raw = stream(
        started(),
        *text("Hi"),
        *stopped("end_turn", output_tokens=300, output_tokens_details={"thinking_tokens": 280}),
    )
    assert read_events(DIALECT, raw)[1] == Usage(input_tokens=25, output_tokens=300, reasoning_output_tokens=280)


def test_counts_are_there_as_soon_as_they_come():
    usage = Usage()
    reader = DIALECT.reader(call_of(), usage)
    for message in EventParser().feed(BASIC[: BASIC.index(b"event: content_block_start")]):
        reader.read(message)
    # It says 1 of the output, of which there is none yet.
    assert usage == Usage(input_tokens=25)
    assert reader.reported_version == "claude-opus-5-5"
    assert not reader.finished


def test_events_blocks_and_deltas_of_no_known_type_are_passed_over():
    raw = stream(
        {"type": "ping"},
        started(),
        {"type": "an_event_of_next_year", "what": [1]},
        {"type": "content_block_start", "index": 7, "content_block": {"type": "fallback", "to": "claude-haiku"}},
        {"type": "content_block_delta", "index": 7, "delta": {"type": "a_delta_of_next_year", "x": 1}},
        {"type": "content_block_delta", "index": 7, "delta": {"type": "citations_delta", "citation": {}}},
        {"type": "content_block_stop", "index": 7},
        *text("Hi"),
        *stopped("end_turn"),
    )
    events, _ = read_events(DIALECT, raw)
    assert events == [Delta(0, "Hi"), ChoiceFinish(0, FinishReason.EOS_TOKEN)]


@pytest.mark.parametrize(
    "raw",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: {}\n\n",
        b'data: {"type": "message_start", "message": 7}\n\n',
        b'data: {"type": "message_start", "message": {"usage": {"input_tokens": "7"}}}\n\n',
        b'data: {"type": "message_start", "message": {"usage": {"input_tokens": -7}}}\n\n',
        b'data: {"type": "message_start", "message": {"usage": []}}\n\n',
        b'data: {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use"}}\n\n',
        b'data: {"type": "content_block_delta", "index": 0, "delta": null}\n\n',
        b'data: {"type": "message_delta", "delta": "end"}\n\n',
        b'data: {"type": "message_stop"}\n\n',
    ],
)
def test_what_is_not_of_the_api_is_told_from_an_answer(raw):
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        read_events(DIALECT, raw)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("invalid_request_error", 400),
        ("authentication_error", 401),
        ("billing_error", 402),
        ("permission_error", 403),
        ("not_found_error", 404),
        ("request_too_large", 413),
        ("rate_limit_error", 429),
        ("api_error", 500),
        ("timeout_error", 504),
        ("overloaded_error", 529),
        ("an_error_of_next_year", None),
    ],
)
def test_an_error_in_a_stream_stands_for_its_status(kind, status):
    error = {"type": "error", "error": {"type": kind, "message": "Something"}, "request_id": "req_1"}
    with pytest.raises(StreamFailed) as failed:
        read_events(DIALECT, stream(started(), *text("Hi"), error))
    assert (failed.value.status, failed.value.problem.code, failed.value.problem.message) == (status, kind, "Something")


async def test_the_documented_error_after_some_text_keeps_the_text_and_its_usage():
    begun = BASIC[: BASIC.index(b"event: content_block_stop")]
    async with (
        Upstream(lambda _: Answer([begun, OVERLOADED])) as upstream,
        remote_model(upstream.url, "anthropic") as model,
    ):
        call = call_of()
        seen, error = await ask_in_vain(model, call)
        assert text_of(seen) == "Hello!"
        assert isinstance(error, BackendUnavailable)
        assert error.provider_status == ProviderStatus("there", 529, "overloaded_error")
        (attempt,) = call.meter.attempts
        assert attempt.outcome is AttemptOutcome.FAILED
        assert (attempt.usage.input_tokens, attempt.usage.estimated) == (25, True)
        assert attempt.usage.output_tokens
        await upstream.until(lambda it: not it.num_open)


async def test_an_error_before_any_output_has_used_none():
    """So it is not billed, and another model may be tried."""
    begun = BASIC[: BASIC.index(b"event: content_block_start")]
    async with (
        Upstream(lambda _: Answer([begun, OVERLOADED])) as upstream,
        remote_model(upstream.url, "anthropic") as model,
    ):
        call = call_of()
        seen, error = await ask_in_vain(model, call)
        assert not seen
        assert isinstance(error, BackendUnavailable)
        assert not call.meter.attempts[0].usage.output_tokens


async def test_a_dropped_connection_keeps_the_text_and_its_usage():
    begun = BASIC[: BASIC.index(b"event: content_block_stop")]
    async with (
        Upstream(lambda _: Answer([begun], ending=Ending.CUT)) as upstream,
        remote_model(upstream.url, "anthropic") as model,
    ):
        call = call_of()
        seen, error = await ask_in_vain(model, call)
        assert text_of(seen) == "Hello!"
        assert isinstance(error, BackendUnavailable)
        assert call.meter.attempts[0].usage.estimated


async def test_a_stream_without_usage_is_an_answer_whose_usage_is_estimated():
    async with (
        Upstream(lambda _: Answer([THINKING])) as upstream,
        remote_model(upstream.url, "anthropic") as model,
    ):
        call = call_of()
        await ask(model, call)
        (attempt,) = call.meter.attempts
        assert attempt.outcome is AttemptOutcome.COMPLETED
        assert attempt.usage.estimated
        assert attempt.usage.output_tokens


@pytest.mark.parametrize(
    ("raw", "code", "message"),
    [
        (
            (
                b'{"type":"error","error":{"type":"not_found_error","message":"The requested resource could not be '
                b'found."},"request_id":"req_011CSHoEeqs5C35K2UUqR7Fy"}'
            ),
            "not_found_error",
            "The requested resource could not be found.",
        ),
        (b"<html>502</html>", None, ""),
        (b"", None, ""),
        (b"[]", None, ""),
        (b'{"error": "text"}', None, ""),
        (b'{"error": {"type": 7, "message": null}}', None, ""),
        (b"\xff\xfe", None, ""),
        pytest.param(b"[" * 60_000, None, "", id="deep"),
    ],
)
def test_the_body_of_an_error_is_read_as_far_as_it_is_one(raw, code, message):
    problem = DIALECT.problem(raw)
    assert (problem.code, problem.message) == (code, message)
