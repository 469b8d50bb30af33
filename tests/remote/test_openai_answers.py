"""What is read of Chat Completions and of text completions, at OpenAI, DeepSeek, vLLM and others.

The streams in ``documented/`` are those of the documentation (of calls of tools it prints ``delta.tool_calls`` alone;
the chunks around them are as in ``openai-chat.sse``); ``captured/vllm-stop.sse`` is what vLLM 0.32 sent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.backends.errors import BackendError, BackendUnavailable, ProviderLimited
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd, TokenLogprob, TopLogprob
from headrace.backends.remote.dialect import Dialect, StreamFailed
from headrace.backends.remote.dialects.deepseek import DEEPSEEK
from headrace.backends.remote.dialects.openai import OPENAI
from headrace.backends.remote.dialects.openai_compatible import COMPATIBLE, LLAMA_CPP, VLLM
from headrace.backends.remote.dialects.openai_completions import COMPLETIONS
from headrace.backends.remote.sse import EventParser
from headrace.backends.requests import Reasoning, ResponseOptions, TextInput
from headrace.backends.types import Call
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
from tests.remote.fakes.openai_chat import event
from tests.remote.upstream import Answer, Ending, Upstream

CHAT = (DOCUMENTED / "openai-chat.sse").read_bytes()
TOOLS = (DOCUMENTED / "openai-chat-tools.sse").read_bytes()
DEEPSEEK_STREAM = (DOCUMENTED / "deepseek-chat.sse").read_bytes()
VLLM_STREAM = (Path(__file__).parent / "captured" / "vllm-stop.sse").read_bytes()
DONE = b"data: [DONE]\n\n"
PARIS = [("call_DdmO9pD3xa9XTPNJ32zg2hcA", "get_weather", '{"location":"Paris, France"}')]

STREAMS: dict[str, tuple[Dialect, bytes, str, list[tuple[str, str, str]], ChoiceFinish]] = {
    "chat": (OPENAI, CHAT, "Hello", [], ChoiceFinish(0, FinishReason.EOS_TOKEN)),
    "tools": (OPENAI, TOOLS, "", PARIS, ChoiceFinish(0, FinishReason.TOOL_CALLS)),
    "deepseek": (
        DEEPSEEK,
        DEEPSEEK_STREAM,
        "Hello! How can I assist you today?",
        [],
        ChoiceFinish(0, FinishReason.EOS_TOKEN),
    ),
    "vllm": (VLLM, VLLM_STREAM, "1. 1\n2. 2", [], ChoiceFinish(0, FinishReason.STOP_SEQUENCE, "\n3")),
}


def chunk(delta: dict[str, Any] | None, finish: str | None = None, *, index: int = 0, **fields: Any) -> bytes:
    """``delta``: of one choice; ``None``: there is no choice."""
    choices = [] if delta is None else [{"index": index, "delta": delta, "finish_reason": finish, **fields}]
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m-2025", "choices": choices})


def with_usage(**usage: Any) -> bytes:
    said = event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": usage})
    return chunk({"content": "Hi"}) + chunk({}, "stop") + said + DONE


def counts(dialect: Dialect, **usage: Any) -> Usage:
    return read_events(dialect, with_usage(**usage))[1]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_read(name):
    dialect, raw, said, calls, finish = STREAMS[name]
    events, _ = read_events(dialect, raw)
    assert (text_of(events), tool_calls_of(events), events[-1]) == (said, calls, finish)


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_is_read_however_it_is_cut_with_comments_between(name):
    dialect, raw, said, calls, finish = STREAMS[name]
    raw = raw.replace(b"\n\n", b"\n\n: keep-alive\n\n").replace(b"Hello", "Grüße 🙂".encode())
    pieces: list[bytes]
    async with Upstream(lambda _: Answer(pieces)) as upstream, remote_model(upstream.url, dialect.name) as model:
        for pieces in splits(raw):  # noqa: B007  # the upstream sends them
            answer = await ask(model, call_of())
            assert text_of(answer.events) == said.replace("Hello", "Grüße 🙂")
            assert tool_calls_of(answer.events) == calls
            assert answer.events[-2:] == [finish, StreamEnd()]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_is_cut_before_its_finish_is_no_answer(name):
    dialect, raw, *_ = STREAMS[name]
    last = raw.rindex(b'"finish_reason":"' if b'"finish_reason":"' in raw else b'"finish_reason": "')
    for end in range(0, last, 7):
        with pytest.raises(EOFError):
            read_events(dialect, raw[:end])


def test_the_counts_of_the_documentation_are_ours():
    """The usage of the default example of "Create chat completion", of "Prompt caching" and of "Reasoning models"
    (https://platform.openai.com/docs/guides).
    """
    details = {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0}
    default = {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29}
    default |= {"prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}, "completion_tokens_details": details}
    assert counts(OPENAI, **default) == Usage(19, 0, None, 10, 0)
    cached = {"prompt_tokens": 2006, "completion_tokens": 300, "total_tokens": 2306}
    cached |= {"prompt_tokens_details": {"cached_tokens": 1920}, "completion_tokens_details": details}
    assert counts(OPENAI, **cached) == Usage(2006, 1920, None, 300, 0)
    reasoned = {"prompt_tokens": 75, "completion_tokens": 1186, "total_tokens": 1261}
    reasoned |= {"prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 1024}}
    assert counts(OPENAI, **reasoned) == Usage(75, 0, None, 1186, 1024)


def test_what_is_written_to_the_cache_is_counted_apart():
    """``PromptTokensDetails.cache_write_tokens`` of the Python SDK."""
    usage = {"prompt_tokens": 2006, "completion_tokens": 1, "prompt_tokens_details": {"cache_write_tokens": 1920}}
    assert counts(OPENAI, **usage) == Usage(2006, None, 1920, 1)


def test_deepseeks_hits_are_what_was_read_from_its_cache():
    """https://api-docs.deepseek.com/api/create-chat-completion: prompt_tokens "equals prompt_cache_hit_tokens +
    prompt_cache_miss_tokens".
    """
    usage = {"prompt_tokens": 150, "completion_tokens": 30, "total_tokens": 180}
    usage |= {"prompt_cache_hit_tokens": 100, "prompt_cache_miss_tokens": 50}
    usage |= {"completion_tokens_details": {"reasoning_tokens": 8}}
    assert counts(DEEPSEEK, **usage) == Usage(150, 100, None, 30, 8)
    assert read_events(DEEPSEEK, DEEPSEEK_STREAM)[1] == Usage(input_tokens=17, output_tokens=9)


def test_a_server_that_counts_little_is_taken_at_its_word():
    assert counts(COMPATIBLE, prompt_tokens=7, completion_tokens=3) == Usage(7, None, None, 3)
    assert counts(COMPATIBLE, prompt_tokens=7, prompt_tokens_details=None) == Usage(7)
    assert read_events(OPENAI, CHAT)[1] == Usage()


@pytest.mark.parametrize("wrong", [-1, "7", 1.5, True])
def test_what_is_no_count_is_no_usage(wrong):
    with pytest.raises((TypeError, ValueError)):
        counts(OPENAI, prompt_tokens=wrong)


def test_vllm_counts_as_it_goes():
    reported = []
    usage = Usage()
    reader = VLLM.reader(call_of(), usage)
    for message in EventParser().feed(VLLM_STREAM):
        reader.read(message)
        reported.append(usage.output_tokens)
    assert reported == [*range(12), 11, 11]
    assert usage.input_tokens == 36


@pytest.mark.parametrize(
    ("said", "fields", "finish"),
    [
        ("stop", {}, ChoiceFinish(0, FinishReason.EOS_TOKEN, seed=5)),
        ("stop", {"stop_reason": None}, ChoiceFinish(0, FinishReason.EOS_TOKEN, seed=5)),
        ("stop", {"stop_reason": "###"}, ChoiceFinish(0, FinishReason.STOP_SEQUENCE, "###", seed=5)),
        ("stop", {"stop_reason": 42}, ChoiceFinish(0, FinishReason.STOP_TOKEN, stop_token_id=42, seed=5)),
        ("length", {}, ChoiceFinish(0, FinishReason.MAX_TOKENS, seed=5)),
        ("content_filter", {}, ChoiceFinish(0, FinishReason.CONTENT_FILTER, seed=5)),
        ("tool_calls", {}, ChoiceFinish(0, FinishReason.TOOL_CALLS, seed=5)),
        ("function_call", {}, ChoiceFinish(0, FinishReason.TOOL_CALLS, seed=5)),
        ("eos_token", {}, ChoiceFinish(0, FinishReason.EOS_TOKEN, seed=5)),
        ("stop_sequence", {}, ChoiceFinish(0, FinishReason.STOP_SEQUENCE, seed=5)),
        ("repetition", {"stop_reason": "repetition_detected"}, ChoiceFinish(0, FinishReason.MAX_TOKENS, seed=5)),
    ],
)
def test_every_reason_to_finish_has_its_own(said, fields, finish):
    events, _ = read_events(VLLM, chunk({"content": "Hi"}) + chunk({}, said, **fields), call_of(request_of(seed=5)))
    assert events[-1] == finish


@pytest.mark.parametrize("reason", ["insufficient_system_resource", "aborted", "abort", "error"])
def test_an_answer_that_the_provider_broke_off_is_none(reason):
    with pytest.raises(StreamFailed) as failed:
        read_events(DEEPSEEK, chunk({"content": "Hi"}) + chunk({}, reason))
    assert (failed.value.status, failed.value.problem.code) == (503, reason)


def test_a_stream_that_says_it_is_done_before_it_is_was_broken_off():
    """So llama-cpp-python's server lets one call go when another comes."""
    with pytest.raises(StreamFailed) as failed:
        read_events(COMPATIBLE, chunk({"content": "Hi"}) + DONE)
    assert failed.value.status == 503


def test_a_tool_that_had_to_be_called_was_called_though_the_model_is_said_to_have_stopped():
    call = {"index": 0, "id": "c1", "function": {"name": "now", "arguments": "{}"}}
    events, _ = read_events(OPENAI, chunk({"tool_calls": [call]}) + chunk({}, "stop"))
    assert events[-1] == ChoiceFinish(0, FinishReason.TOOL_CALLS)


def test_a_refusal_is_text_that_was_filtered():
    raw = chunk({"role": "assistant", "content": "", "refusal": None}) + chunk({"refusal": "I cannot"})
    events, _ = read_events(OPENAI, raw + chunk({"refusal": " help."}) + chunk({}, "stop") + DONE)
    assert text_of(events) == "I cannot help."
    assert events[-1] == ChoiceFinish(0, FinishReason.CONTENT_FILTER)


def calls(*parts: dict[str, Any]) -> bytes:
    return b"".join(chunk({"tool_calls": [part]}) for part in parts) + chunk({}, "tool_calls")


def test_parallel_calls_keep_apart():
    raw = calls(
        {"index": 0, "id": "a", "type": "function", "function": {"name": "now", "arguments": ""}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "then", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"x"'}},
        {"index": 1, "function": {"arguments": "{}"}},
        {"index": 0, "function": {"arguments": ": 1}"}},
    )
    assert tool_calls_of(read_events(OPENAI, raw)[0]) == [("a", "now", '{"x": 1}'), ("b", "then", "{}")]


def test_calls_that_are_all_number_0_are_told_apart_by_their_ids():
    """So Ollama counted them before 0.6."""
    raw = calls(
        {"index": 0, "id": "a", "function": {"name": "now", "arguments": "{}"}},
        {"index": 0, "id": "b", "function": {"name": "now", "arguments": '{"x": 1}'}},
    )
    assert tool_calls_of(read_events(COMPATIBLE, raw)[0]) == [("a", "now", "{}"), ("b", "now", '{"x": 1}')]


def test_a_call_whose_id_and_name_come_every_time_is_one():
    """So llama-cpp-python sends them."""
    head = {"index": 0, "id": "call__0_now_cmpl-1", "type": "function"}
    raw = calls(*({**head, "function": {"name": "now", "arguments": piece}} for piece in ("", '{"x"', ": 1}")))
    events, _ = read_events(COMPATIBLE, raw)
    assert tool_calls_of(events) == [("call__0_now_cmpl-1", "now", '{"x": 1}')]
    assert [delta.tool_calls[0].id is not None for delta in events[:-1]] == [True, False, False]


def test_a_call_without_an_id_gets_one():
    raw = calls({"index": 0, "function": {"name": "now", "arguments": "{}"}}, {"index": 0, "function": {}})
    assert tool_calls_of(read_events(COMPATIBLE, raw)[0]) == [("chatcmpl-1-0", "now", "{}")]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("dialect", [DEEPSEEK, VLLM, LLAMA_CPP, COMPATIBLE], ids=lambda it: it.name)
def test_reasoning_is_no_text_and_left_out_where_it_is_not_wanted(dialect, key):
    raw = chunk({key: "Let me see.", "content": None}) + chunk({"content": "Yes."}) + chunk({}, "stop")
    events, _ = read_events(dialect, raw)
    assert (reasoning_of(events), text_of(events)) == ("Let me see.", "Yes.")
    events, _ = read_events(dialect, raw, call_of(request_of(reasoning=Reasoning(include_text=False))))
    assert (reasoning_of(events), text_of(events)) == ("", "Yes.")


def wanting_logprobs(**response: Any) -> Call:
    return call_of(request_of(response=ResponseOptions(logprobs=True, top_logprobs=1, **response)))


def test_a_tokens_bytes_need_not_be_a_character():
    """The form of ``ChatCompletionTokenLogprob``; ``bytes`` is null where a token has no text."""
    half = {"token": "\\xc3", "logprob": -0.5, "bytes": [195], "top_logprobs": []}
    end = {"token": "<|end|>", "logprob": 0.0, "bytes": None, "top_logprobs": [{"token": "a", "logprob": 0.0}]}
    raw = chunk({"content": "ü"}, logprobs={"content": [half, end], "refusal": None}) + chunk({}, "stop")
    [delta, _], _ = read_events(OPENAI, raw, wanting_logprobs())
    top = TopLogprob(None, b"a", 0.0)
    assert delta.logprobs == (TokenLogprob(None, b"\xc3", -0.5), TokenLogprob(None, b"<|end|>", 0.0, (top,)))


def test_deepseek_gives_those_of_its_reasoning_too():
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    raw = chunk({"reasoning_content": "a"}, logprobs={"content": None, "reasoning_content": [entry]})
    [delta, _], _ = read_events(DEEPSEEK, raw + chunk({}, "stop"), wanting_logprobs())
    assert delta == Delta(0, "", logprobs=(TokenLogprob(None, b"a", -0.5),), reasoning_text="a")


def test_vllm_and_llama_cpp_say_which_tokens_they_are():
    events, _ = read_events(VLLM, VLLM_STREAM, wanting_logprobs(token_ids=True))
    logprobs = [entry for delta in events[:-1] for entry in delta.logprobs]
    assert [entry.token_id for entry in logprobs] == [33, 30, 216, 33, 198, 34, 30, 216, 34, 198, 35]
    assert b"".join(entry.token for entry in logprobs) == b"1. 1\n2. 2\n3"
    entry = {"id": 7, "token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    raw = chunk({"content": "a"}, logprobs={"content": [entry]}) + chunk({}, "stop")
    assert read_events(LLAMA_CPP, raw, wanting_logprobs())[0][0].logprobs == (TokenLogprob(7, b"a", -0.5),)


def test_choices_may_come_in_any_order():
    raw = chunk({"content": "b"}, index=1) + chunk({"content": "a"}) + chunk({}, "stop", index=1)
    raw += chunk({"content": "A"}) + chunk({}, "length")
    events, _ = read_events(OPENAI, raw, call_of(request_of(n=2)))
    assert text_of(event for event in events if event.choice == 0) == "aA"
    assert events[2] == ChoiceFinish(1, FinishReason.EOS_TOKEN)
    with pytest.raises(EOFError):
        read_events(OPENAI, raw, call_of(request_of(n=3)))


def test_a_choice_that_is_over_may_be_named_again_but_says_no_more():
    """So OpenRouter sends its usage."""
    raw = chunk({"content": "Hi"}) + chunk({}, "stop")
    events, _ = read_events(COMPATIBLE, raw + chunk({"role": "assistant", "content": ""}, "stop") + DONE)
    assert events == [Delta(0, "Hi"), ChoiceFinish(0, FinishReason.EOS_TOKEN)]
    with pytest.raises(ValueError, match="after its end"):
        read_events(COMPATIBLE, raw + chunk({"content": "!"}))


def test_the_model_is_as_it_is_reported():
    reader = OPENAI.reader(call_of(), Usage())
    for message in EventParser().feed(chunk({"content": "Hi"})):
        reader.read(message)
    assert reader.reported_version == "m-2025"
    assert not reader.finished


@pytest.mark.parametrize(
    "raw",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: {}\n\n",
        b'data: {"choices": 7}\n\n',
        b'data: {"choices": [7]}\n\n',
        b'data: {"choices": [{"delta": {}}]}\n\n',
        b'data: {"choices": [{"index": 1, "delta": {"content": "Hi"}}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": "Hi"}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "a"}]}}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {"tool_calls": [{"id": "a", "function": {"name": null}}]}}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "a_reason_of_next_year"}]}\n\n',
    ],
)
def test_what_is_not_of_the_api_is_told_from_an_answer(raw):
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        read_events(OPENAI, raw)


@pytest.mark.parametrize(
    ("said", "code", "status"),
    [
        ({"error": {"message": "M", "type": "server_error", "param": None, "code": None}}, "server_error", 500),
        ({"error": {"message": "M", "type": "tokens", "code": "rate_limit_exceeded"}}, "rate_limit_exceeded", 429),
        ({"error": {"message": "M", "type": "BadRequestError", "code": 400}}, "BadRequestError", 400),  # vLLM
        ({"object": "error", "message": "M", "type": "InternalServerError", "code": 500}, "InternalServerError", 500),
        ({"error": {"code": 503, "message": "M", "type": "unavailable_error"}}, "unavailable_error", 503),  # llama.cpp
        ({"error": "M"}, None, None),
        ({"error": {"message": "M", "type": "an_error_of_next_year"}}, "an_error_of_next_year", None),
    ],
)
def test_an_error_in_a_stream_is_the_providers(said, code, status):
    with pytest.raises(StreamFailed) as failed:
        read_events(COMPATIBLE, chunk({"content": "Hi"}) + event(said))
    problem = failed.value.problem
    assert (problem.message, problem.code, failed.value.status) == ("M", code, status)


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"error": {"message": "M", "type": "invalid_request_error", "param": "n", "code": "c"}}', "M", "c"),
        (b'{"error": {"message": "M", "type": "NotFoundError", "param": null, "code": 404}}', "M", "NotFoundError"),
        (b'{"error": {"message": "M", "type": "t", "code": ""}}', "M", "t"),
        (b'{"error": "M"}', "M", None),
        (b'{"detail": "Not Found"}', "Not Found", None),
        (b'{"detail": [{"loc": ["body"], "msg": "M"}]}', "", None),
        (b"<html>502 Bad Gateway</html>", "<html>502 Bad Gateway</html>", None),
        (b"", "", None),
        (b"\xff", "\ufffd", None),
        (b"7", "", None),
        (b"[" * 100_000, "[" * 100_000, None),
    ],
)
def test_the_body_of_an_error_is_understood_whatever_it_is(body, message, code):
    problem = OPENAI.problem(body)
    assert (problem.message, problem.code) == (message, code)


@pytest.mark.parametrize(
    ("ending", "error", "kind"),
    [
        (Ending.CUT, b"", BackendUnavailable),
        (Ending.CLEAN, b"", BackendUnavailable),
        (Ending.CLEAN, DONE, BackendUnavailable),
        (Ending.CLEAN, event({"error": {"message": "M", "code": "rate_limit_exceeded"}}), ProviderLimited),
        (Ending.CLEAN, b"data: {\n\n", BackendError),
    ],
)
async def test_what_came_before_an_error_is_kept_and_counted(ending, error, kind):
    pieces = [chunk({"content": "Grüße "}), chunk({"content": "aus"}), error]
    answer = Answer(pieces, ending=ending)
    async with Upstream(lambda _: answer) as upstream, remote_model(upstream.url, "openai") as model:
        call = call_of()
        events, raised = await ask_in_vain(model, call)
    assert text_of(events) == "Grüße aus"
    assert isinstance(raised, kind)
    [attempt] = call.meter.attempts
    assert attempt.outcome is AttemptOutcome.FAILED
    assert attempt.usage.estimated
    assert attempt.usage.output_tokens


async def test_an_answer_without_usage_is_estimated():
    async with Upstream(lambda _: Answer([CHAT])) as upstream, remote_model(upstream.url, "openai") as model:
        call = call_of()
        await ask(model, call)
    [attempt] = call.meter.attempts
    assert attempt.outcome is AttemptOutcome.COMPLETED
    assert attempt.usage.estimated


def test_a_text_is_read_as_a_chat_is():
    """The example of https://platform.openai.com/docs/api-reference/completions (streaming)."""
    head = (
        '{"id":"cmpl-7iA7iJjj8V2zOkCGvWF2hAkDWBQZe","object":"text_completion","created":1690759702,"choices":[{"text":'
    )
    tail = ',"index":0,"logprobs":null,"finish_reason":%s}],"model":"gpt-3.5-turbo-instruct"}'
    raw = "".join(
        f"data: {head}{json.dumps(text)}{tail % reason}\n\n"
        for text, reason in (("This", "null"), (" is", "null"), (" a test", '"length"'))
    ).encode()
    events, _ = read_events(COMPLETIONS, raw + DONE, call_of(request_of(TextInput("Say this is a test"))))
    assert text_of(events) == "This is a test"
    assert events[-1] == ChoiceFinish(0, FinishReason.MAX_TOKENS)
