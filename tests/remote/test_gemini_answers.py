"""What the dialect ``gemini`` reads, in every way that a stream can be cut."""

from __future__ import annotations

import pytest

from headrace.backends.errors import BackendError, BackendUnavailable, ProviderLimited, ProviderStatus
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd, TokenLogprob, TopLogprob
from headrace.backends.remote.dialect import StreamFailed
from headrace.backends.remote.dialects.gemini import GEMINI
from headrace.backends.requests import Reasoning, ResponseOptions
from headrace.backends.usage import AttemptOutcome, Usage
from tests.remote.asking import (
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
from tests.remote.fakes.gemini import error, error_info, event, retry_info
from tests.remote.upstream import Answer, Ending, Upstream

DIALECT = GEMINI


def response(*parts: object, reason: str | None = None, index: int = 0, usage: object = None, **more: object):
    candidate = {"content": {"parts": list(parts), "role": "model"}, "index": index}
    if reason is not None:
        candidate["finishReason"] = reason
    return {
        "candidates": [candidate | more],
        "usageMetadata": usage or {"promptTokenCount": 4, "candidatesTokenCount": 3, "totalTokenCount": 7},
        "modelVersion": "gemini-2.5-flash-001",
        "responseId": "x",
    }


def said(text: str) -> dict[str, object]:
    return {"text": text}


def thought(text: str) -> dict[str, object]:
    return {"text": text, "thought": True}


def stream(*responses: object) -> bytes:
    return b"".join(event(one) for one in responses)


FLIGHT = {"functionCall": {"name": "check_flight", "args": {"flight": "AA100"}}, "thoughtSignature": "SigA="}
ALL = stream(
    response(thought("**Überlegen**\n\n…")),
    response(said("Grüße ")),
    response(said("aus 東京 🙂\r\n\r\n")),
    response(said(""), FLIGHT),
    response({"functionCall": {"id": "xyz", "name": "book_taxi", "args": {"time": "10 Uhr früh"}}}),
    response(
        said(""), reason="STOP", usage={"promptTokenCount": 10, "candidatesTokenCount": 12, "thoughtsTokenCount": 20}
    ),
)
"""With everything that a stream can have."""
MULTILINE = """\
data: {
data:   "candidates": [{"content": {"parts": [{"text": "Hi"}]}, "finishReason": "STOP"}],
data:   "usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 1}
data: }

"""


def test_a_stream_with_everything_is_read():
    events, usage = read_events(DIALECT, ALL)
    assert reasoning_of(events) == "**Überlegen**\n\n…"
    assert text_of(events) == "Grüße aus 東京 🙂\r\n\r\n"
    made, given = tool_calls_of(events)
    assert made[1:] == ("check_flight", '{"flight": "AA100"}')
    assert given == ("xyz", "book_taxi", '{"time": "10 Uhr früh"}')
    assert events[-1] == ChoiceFinish(0, FinishReason.TOOL_CALLS)
    assert usage == Usage(input_tokens=10, output_tokens=32, reasoning_output_tokens=20)


async def test_a_stream_is_read_however_it_is_cut():
    pieces: list[bytes]
    async with Upstream(lambda _: Answer(pieces)) as upstream, remote_model(upstream.url, "gemini") as model:
        for pieces in splits(ALL):  # noqa: B007 -- the upstream sends them
            events = (await ask(model, call_of())).events
            assert text_of(events) == "Grüße aus 東京 🙂\r\n\r\n"
            assert reasoning_of(events) == "**Überlegen**\n\n…"
            assert [name for _, name, _ in tool_calls_of(events)] == ["check_flight", "book_taxi"]
            assert isinstance(events[-1], StreamEnd)
        assert model.reported_version == "gemini-2.5-flash-001"


def test_a_stream_that_is_cut_anywhere_is_no_answer():
    for end in range(len(ALL) - 1):  # the last byte is a LF that a CR has made needless
        with pytest.raises(EOFError):
            read_events(DIALECT, ALL[:end])


def test_an_event_over_several_lines_is_read():
    events, _ = read_events(DIALECT, MULTILINE.encode())
    assert events == [Delta(0, "Hi"), ChoiceFinish(0, FinishReason.EOS_TOKEN)]


def test_a_reason_that_comes_with_every_event_ends_nothing_early():
    events, _ = read_events(DIALECT, stream(*(response(said(one), reason="STOP") for one in ("a", "b", "c"))))
    assert text_of(events) == "abc"
    assert events[-1] == ChoiceFinish(0, FinishReason.EOS_TOKEN)


def test_reasoning_that_is_not_wanted_is_left_out():
    events, _ = read_events(DIALECT, ALL, call_of(request_of(reasoning=Reasoning(include_text=False))))
    assert reasoning_of(events) == ""


def test_ids_of_calls_are_the_same_for_the_same_call_and_carry_the_signature():
    def ids(request_id: str) -> list[str]:
        events, _ = read_events(DIALECT, ALL, call_of(request_id=request_id))
        return [call_id for call_id, _, _ in tool_calls_of(events)]

    assert ids("one") == ids("one")
    assert ids("one") != ids("another")
    assert ids("one")[0].endswith("~SigA=")


def test_a_call_without_arguments_is_an_empty_object():
    events, _ = read_events(DIALECT, stream(response({"functionCall": {"name": "now"}}, reason="STOP")))
    assert tool_calls_of(events)[0][1:] == ("now", "{}")


def test_choices_keep_apart():
    raw = stream(
        response(said("a")),
        response(said("x"), index=1),
        response(said("b"), reason="STOP"),
        response(said("y"), index=1, reason="MAX_TOKENS"),
    )
    events, _ = read_events(DIALECT, raw, call_of(request_of(n=2, seed=7)))
    assert [(one.choice, one.text) for one in events[:4]] == [(0, "a"), (1, "x"), (0, "b"), (1, "y")]
    assert events[4:] == [
        ChoiceFinish(0, FinishReason.EOS_TOKEN, seed=7),
        ChoiceFinish(1, FinishReason.MAX_TOKENS, seed=7),
    ]
    with pytest.raises(EOFError):
        read_events(DIALECT, raw, call_of(request_of(n=3)))


@pytest.mark.parametrize(
    ("reason", "means"),
    [
        ("STOP", FinishReason.EOS_TOKEN),
        ("MAX_TOKENS", FinishReason.MAX_TOKENS),
        *(
            (reason, FinishReason.CONTENT_FILTER)
            for reason in ("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "OTHER")
        ),
        ("A_REASON_OF_NEXT_YEAR", FinishReason.CONTENT_FILTER),
    ],
)
def test_every_documented_reason_has_its_own(reason, means):
    events, _ = read_events(DIALECT, stream(response(said("Hi"), reason=reason)))
    assert events[-1] == ChoiceFinish(0, means)


@pytest.mark.parametrize("reason", ["MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS"])
async def test_an_answer_that_the_model_spoilt_is_an_error_whose_usage_is_known(reason):
    raw = stream(response(said("Hi")), response(reason=reason, finishMessage="Malformed function call: print("))
    async with Upstream(lambda _: Answer([raw])) as upstream, remote_model(upstream.url, "gemini") as model:
        call = call_of()
        seen, failure = await ask_in_vain(model, call)
    assert text_of(seen) == "Hi"
    assert type(failure) is BackendError
    assert failure.provider_status == ProviderStatus("there", None, reason)
    assert call.meter.attempts[0].usage.input_tokens == 4


def test_a_prompt_that_is_blocked_ends_every_choice_by_its_content():
    blocked = {
        "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
        "usageMetadata": {"promptTokenCount": 9, "totalTokenCount": 9},
    }
    events, usage = read_events(DIALECT, stream(blocked), call_of(request_of(n=2)))
    assert events == [ChoiceFinish(choice, FinishReason.CONTENT_FILTER) for choice in (0, 1)]
    assert usage == Usage(input_tokens=9, output_tokens=0)


def test_a_prompt_that_was_rated_is_not_blocked():
    rated = response(said("Hi"), reason="STOP") | {"promptFeedback": {"safetyRatings": []}}
    events, _ = read_events(DIALECT, stream(rated))
    assert events[-1] == ChoiceFinish(0, FinishReason.EOS_TOKEN)


@pytest.mark.parametrize(
    ("reported", "counted"),
    [
        # "totalTokenCount: the sum of prompt, candidates, tool use and thoughts" (UsageMetadata of the API)
        (
            {"promptTokenCount": 10, "candidatesTokenCount": 1000, "thoughtsTokenCount": 500, "totalTokenCount": 1510},
            Usage(input_tokens=10, output_tokens=1500, reasoning_output_tokens=500),
        ),
        # "When cachedContent is set, this is still the total effective prompt size"
        (
            {"promptTokenCount": 696190, "cachedContentTokenCount": 696129, "candidatesTokenCount": 214},
            Usage(input_tokens=696190, cache_read_input_tokens=696129, output_tokens=214),
        ),
        (
            {"promptTokenCount": 10, "toolUsePromptTokenCount": 90, "candidatesTokenCount": 5},
            Usage(input_tokens=100, output_tokens=5),
        ),
        ({"promptTokenCount": 10, "thoughtsTokenCount": 64}, Usage(10, output_tokens=64, reasoning_output_tokens=64)),
        ({"promptTokenCount": 10}, Usage(input_tokens=10)),
        ({}, Usage()),
    ],
)
def test_counts_are_put_into_our_buckets(reported, counted):
    only = {"candidates": [{"content": {"parts": []}, "finishReason": "STOP"}], "usageMetadata": reported}
    assert read_events(DIALECT, stream(only))[1] == counted


def test_the_last_counts_are_those_of_the_call():
    raw = stream(
        response(said("a"), usage={"promptTokenCount": 4, "candidatesTokenCount": 1}),
        response(said("b"), reason="STOP", usage={"promptTokenCount": 4, "candidatesTokenCount": 2}),
    )
    assert read_events(DIALECT, raw)[1] == Usage(input_tokens=4, output_tokens=2)


def test_counts_after_the_last_candidate_are_read():
    raw = stream(
        {"candidates": [{"content": {"parts": [{"text": "a"}]}, "finishReason": "STOP"}]},
        {"usageMetadata": {"promptTokenCount": 20, "candidatesTokenCount": 5}},
    )
    assert read_events(DIALECT, raw)[1] == Usage(input_tokens=20, output_tokens=5)


def test_logprobs_are_read_where_they_are_wanted():
    chosen = {"token": "Grü", "tokenId": 7, "logProbability": -0.25}
    other = {"token": "Hi", "logProbability": -1.5}
    result = {"chosenCandidates": [chosen], "topCandidates": [{"candidates": [chosen, other]}]}
    raw = stream(response(said("Grü"), reason="STOP", logprobsResult=result))
    wanted = call_of(request_of(response=ResponseOptions(logprobs=True, top_logprobs=2)))
    events, _ = read_events(DIALECT, raw, wanted)
    token = "Grü".encode()
    assert [delta.logprobs for delta in events[:-1] if delta.logprobs] == [
        (TokenLogprob(7, token, -0.25, (TopLogprob(7, token, -0.25), TopLogprob(None, b"Hi", -1.5))),)
    ]
    events, _ = read_events(DIALECT, raw)
    assert events == [Delta(0, "Grü"), ChoiceFinish(0, FinishReason.EOS_TOKEN)]


def test_parts_of_no_known_kind_are_passed_over():
    code = {"executableCode": {"language": "PYTHON", "code": "1"}}
    raw = stream(response(code, {"thoughtSignature": "SigB="}, {"a_part_of_next_year": {}}, said("Hi"), reason="STOP"))
    assert read_events(DIALECT, raw)[0] == [Delta(0, "Hi"), ChoiceFinish(0, FinishReason.EOS_TOKEN)]


@pytest.mark.parametrize(
    "raw",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: 7\n\n",
        b'data: {"candidates": [7]}\n\n',
        b'data: {"candidates": [{"index": 1}]}\n\n',
        b'data: {"candidates": [{"index": "0"}]}\n\n',
        b'data: {"candidates": [{"content": {"parts": [{"functionCall": {"args": {}}}]}}]}\n\n',
        b'data: {"candidates": [{"content": []}, {"content": "x"}]}\n\n',
        b'data: {"usageMetadata": {"promptTokenCount": "9"}}\n\n',
        b'data: {"usageMetadata": {"promptTokenCount": -9}}\n\n',
    ],
)
def test_what_is_not_of_the_api_is_told_from_an_answer(raw):
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        read_events(DIALECT, raw)


def test_an_error_in_a_stream_stands_for_its_status():
    failure = {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}
    with pytest.raises(StreamFailed) as failed:
        read_events(DIALECT, stream(response(said("Hi")), failure))
    assert (failed.value.status, failed.value.problem.code) == (503, "UNAVAILABLE")


@pytest.mark.parametrize("ending", [Ending.CLEAN, Ending.CUT])
async def test_a_dropped_connection_keeps_the_text_and_its_usage(ending):
    raw = stream(response(said("Grüße")))
    async with (
        Upstream(lambda _: Answer([raw], ending=ending)) as upstream,
        remote_model(upstream.url, "gemini") as model,
    ):
        call = call_of()
        seen, failure = await ask_in_vain(model, call)
    assert text_of(seen) == "Grüße"
    assert isinstance(failure, BackendUnavailable)
    (attempt,) = call.meter.attempts
    assert attempt.outcome is AttemptOutcome.FAILED
    assert (attempt.usage.input_tokens, attempt.usage.estimated) == (4, True)


async def test_a_limit_says_when_to_come_back():
    quota = error(429, "You exceeded your current quota.", "RESOURCE_EXHAUSTED", retry_info("37.5s"))
    async with Upstream(lambda _: quota) as upstream, remote_model(upstream.url, "gemini") as model:
        _, failure = await ask_in_vain(model, call_of())
    assert isinstance(failure, ProviderLimited)
    assert failure.retry_after == 37.5
    assert failure.provider_status == ProviderStatus("there", 429, "RESOURCE_EXHAUSTED")


@pytest.mark.parametrize(
    ("answer", "code", "retry_after"),
    [
        (error(503, "Overloaded.", "UNAVAILABLE"), "UNAVAILABLE", None),
        (error(400, "No.", "INVALID_ARGUMENT", error_info("API_KEY_INVALID")), "API_KEY_INVALID", None),
        (error(429, "No.", "RESOURCE_EXHAUSTED", retry_info("1.203608125s")), "RESOURCE_EXHAUSTED", 1.203608125),
        (error(429, "No.", "RESOURCE_EXHAUSTED", retry_info("soon")), "RESOURCE_EXHAUSTED", None),
    ],
)
def test_the_body_of_an_error_is_read_with_its_details(answer, code, retry_after):
    (raw,) = answer.pieces
    for body in (raw, b"[" + raw + b"]"):  # a list, where the API would have streamed one
        problem = DIALECT.problem(body)
        assert (problem.code, problem.retry_after) == (code, retry_after)


@pytest.mark.parametrize(
    "raw",
    [b"", b"<html>", b"[]", b"7", b'{"error": 7}', b'{"error": {"details": 7}}', b"[" * 60_000],
    ids=["empty", "HTML", "a list", "a number", "no error", "no details", "deep"],
)
def test_the_body_of_an_error_may_be_anything(raw):
    problem = DIALECT.problem(raw)
    assert (problem.code, problem.message, problem.retry_after) == (None, "", None)
