"""What callers see of a provider's failures, through a whole server; each is counted once and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from headrace.backends import errors
from headrace.backends.remote.dialect import Problem
from headrace.backends.remote.failures import answered
from headrace.v1 import generation_pb2 as pb
from tests.accounting.calls_kit import Served
from tests.remote.asking import ask_in_vain, call_of, remote_model
from tests.remote.remote_kit import DONE, answer, chunk, error_body, generate, no_task_is_left, says, serving, stream
from tests.remote.upstream import JSON, Answer, Ending, Upstream, json_answer
from tests.rpc.rpc_kit import details_of, status_of
from tests.tls_kit import Authority

_Code = grpc.StatusCode


@dataclass(frozen=True)
class Failure:
    """An answer, and what its caller is told."""

    answer: Answer
    code: grpc.StatusCode
    reason: str
    status: int | None
    provider_code: str | None = None
    retry: float | None = None
    message: str = ""
    """A part of it."""
    outcome: str = "voided"
    """In the ledger: ``posted`` where something was said, ``voided`` otherwise."""
    options: dict[str, Any] = field(default_factory=dict)


def refuses(status: int, code: str | None = None, message: str = "what they say", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return json_answer(error_body(message, code), status, named)


async def _forever(*first: bytes) -> AsyncIterator[bytes]:
    for piece in first:
        yield piece
    await asyncio.Event().wait()


async def _endless(piece: bytes) -> AsyncIterator[bytes]:
    while True:
        yield piece


UNAVAILABLE = (_Code.UNAVAILABLE, "BACKEND_UNAVAILABLE")
FAILED = (_Code.INTERNAL, "BACKEND_ERROR")
REFUSED = (_Code.INTERNAL, "PROVIDER_REFUSED")
LIMITED = (_Code.RESOURCE_EXHAUSTED, "PROVIDER_LIMITED")
INVALID = (_Code.INVALID_ARGUMENT, "INVALID_ARGUMENT")
IMPATIENT = {"first_event_seconds": 0.5}
"""Time enough for a request to arrive."""

FAILURES = {
    "400": Failure(refuses(400, "bad", "too hot"), *INVALID, 400, "bad", message="too hot"),
    "401": Failure(refuses(401, "invalid_api_key"), *REFUSED, 401, "invalid_api_key"),
    "402": Failure(refuses(402), *REFUSED, 402),
    "403": Failure(refuses(403), *REFUSED, 403),
    "404": Failure(refuses(404, "model_not_found"), *REFUSED, 404, "model_not_found"),
    "408": Failure(refuses(408), *UNAVAILABLE, 408),
    "409": Failure(refuses(409), *UNAVAILABLE, 409),
    "413": Failure(refuses(413, message="too long"), *INVALID, 413, message="too long"),
    "422": Failure(refuses(422, message="top_p: too large"), *INVALID, 422, message="top_p: too large"),
    "429 that says when": Failure(refuses(429, retry_after="7"), *LIMITED, 429, retry=7.0),
    "429 that does not": Failure(refuses(429, "rate_limit_exceeded"), *LIMITED, 429, "rate_limit_exceeded", retry=1.0),
    "429 for want of money": Failure(refuses(429, "insufficient_quota"), *REFUSED, 429, "insufficient_quota"),
    "500": Failure(refuses(500), *UNAVAILABLE, 500),
    "502 in HTML": Failure(
        Answer([b"<html>Bad Gateway</html>"], 502, {"content-type": "text/html"}), *UNAVAILABLE, 502
    ),
    "503 that says when": Failure(refuses(503, retry_after="2"), *UNAVAILABLE, 503, retry=2.0),
    "504": Failure(Answer([], 504), *UNAVAILABLE, 504),
    "529": Failure(refuses(529, "overloaded_error"), *UNAVAILABLE, 529, "overloaded_error"),
    "418": Failure(refuses(418), *FAILED, 418),
    "redirect": Failure(Answer([], 307, {"location": "http://127.0.0.1:1/"}), *FAILED, 307),
    "filtered request": Failure(
        refuses(400, "content_filter", "The response was filtered"), *INVALID, 400, "content_filter", message="filtered"
    ),
    "error that is no stream": Failure(Answer([b'{"error": {"code": "odd"}}'], 200, JSON), *FAILED, None, "odd"),
    "malformed JSON": Failure(Answer([b'data: {"choices"\n\n']), *FAILED, 200),
    "nested JSON": Failure(Answer([b"data: " + b"[" * 100_000 + b"\n\n"]), *FAILED, 200),
    "something else": Failure(Answer([b"data: 17\n\n"]), *FAILED, 200),
    "a long event": Failure(Answer([b"data: ", *[b"x" * 65_536] * 80]), *FAILED, 200),
    "no HTTP": Failure(Answer(raw=b"SSH-2.0-OpenSSH_9.2\r\n"), *FAILED, None),
    "nothing": Failure(Answer(raw=b""), *UNAVAILABLE, None),
    "truncated stream": Failure(Answer([says("a")], ending=Ending.CUT), *UNAVAILABLE, None, outcome="posted"),
    "stream that ends too soon": Failure(Answer([says("a")]), *UNAVAILABLE, 200, outcome="posted"),
    "endless text": Failure(Answer(_endless(says("a" * 10_000))), *FAILED, 200, outcome="posted"),
    "endless comments": Failure(Answer(_endless(b": keep-alive\n" * 5000)), *FAILED, 200),
    "endless messages": Failure(Answer(_endless(chunk(padding="x" * 60_000))), *FAILED, 200),
    "stalled before its head": Failure(Answer(_forever()), *UNAVAILABLE, None, options=IMPATIENT),
    "stalled but alive": Failure(Answer(_forever(b": keep-alive\n\n")), *UNAVAILABLE, None, options=IMPATIENT),
    "stalled midway": Failure(
        Answer(_forever(says("a"))), *UNAVAILABLE, None, outcome="posted", options={"idle_seconds": 0.05}
    ),
    "error midway": Failure(
        Answer([says("a"), b'data: {"error": {"message": "x", "code": "server_error"}}\n\n']),
        *UNAVAILABLE,
        500,
        "server_error",
        outcome="posted",
    ),
}


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


def told(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    return details_of(status_of(error))


async def check_nothing_is_left(served: Served, upstream: Upstream | None, *, posted: str) -> None:
    """One try, which is in the ledger once and holds nothing; the upstream answers nobody."""
    await served.all_settled()
    [posting] = await served.postings()
    assert posting.state == posted
    assert posting.outcome == "failed"
    if upstream is not None:
        assert len(upstream.requests) == 1
        await upstream.until(lambda it: it.num_answering == 0)


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_a_failure_has_its_status_and_leaves_nothing_behind(failure: Failure, tmp_path: Path):
    before = asyncio.all_tasks()
    async with Upstream(lambda _: failure.answer) as upstream:
        async with serving(tmp_path, upstream.url, **failure.options) as served:
            error = await failure_of(generate(served))
            await check_nothing_is_left(served, upstream, posted=failure.outcome)
            [posting] = await served.postings()
        await upstream.until(lambda it: it.num_open == 0)
    await no_task_is_left(before)
    details = told(error)
    assert (error.code(), details["ErrorInfo"].reason) == (failure.code, failure.reason)
    expected = {"provider": "far", "provider_status": failure.status, "provider_code": failure.provider_code}
    metadata = dict(details["ErrorInfo"].metadata)
    assert {name: metadata.get(name) for name in expected} == {
        name: None if value is None else str(value) for name, value in expected.items()
    }
    retry = details.get("RetryInfo")
    assert (None if retry is None else retry.retry_delay.ToMilliseconds() / 1000) == failure.retry
    assert failure.message in error.details()
    if failure.outcome == "posted":
        assert posting.estimated
        assert posting.input_tokens > 0


async def test_a_provider_that_is_not_there(tmp_path: Path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with serving(tmp_path, f"http://127.0.0.1:{nobody.getsockname()[1]}") as served:
            error = await failure_of(generate(served))
            await check_nothing_is_left(served, None, posted="voided")
    assert (error.code(), told(error)["ErrorInfo"].metadata["provider"]) == (_Code.UNAVAILABLE, "far")


async def test_a_provider_whose_name_is_not_known(tmp_path: Path):
    async with serving(tmp_path, "http://no-such-host.invalid") as served:
        error = await failure_of(generate(served))
        await check_nothing_is_left(served, None, posted="voided")
    assert error.code() is _Code.UNAVAILABLE
    assert "its name is not known" in error.details()


async def test_a_provider_whose_certificate_nobody_signed_that_is_trusted(tmp_path: Path):
    authority = Authority(tmp_path)
    async with (
        Upstream(lambda _: Answer(answer("Hi")), tls=authority.server().server_context()) as upstream,
        serving(tmp_path, upstream.url) as served,
    ):
        error = await failure_of(generate(served))
        await check_nothing_is_left(served, None, posted="voided")
    assert upstream.requests == []
    assert error.code() is _Code.UNAVAILABLE
    assert "TLS failed" in error.details()


async def test_an_error_after_some_text_keeps_what_was_sent_and_bills_it(tmp_path: Path):
    async def pieces() -> AsyncIterator[bytes]:
        yield says("eight characters ")
        await asyncio.wait_for(seen.wait(), 30)

    seen = asyncio.Event()
    async with (
        Upstream(lambda _: Answer(pieces(), ending=Ending.CUT)) as upstream,
        serving(tmp_path, upstream.url) as served,
    ):
        texts = []

        async def read() -> None:
            async for event in stream(served):
                if event.WhichOneof("event") == "delta":
                    texts.append(event.delta.text)
                    seen.set()

        error = await failure_of(read())
        [posting] = await served.postings()
    assert texts == ["eight characters "]
    assert error.code() is _Code.UNAVAILABLE
    assert (posting.state, posting.outcome, posting.output_tokens, posting.estimated) == ("posted", "failed", 4, True)


async def test_a_content_filter_and_a_limit_of_length_are_ends_not_errors(tmp_path: Path):
    finishes = iter(["content_filter", "length"])
    async with (
        Upstream(lambda _: Answer(answer("Hi", finish=next(finishes)))) as upstream,
        serving(tmp_path, upstream.url) as served,
    ):
        reasons = [(await generate(served)).choices[0].finish.reason for _ in range(2)]
        postings = await served.postings()
    assert reasons == [pb.FINISH_REASON_CONTENT_FILTER, pb.FINISH_REASON_MAX_TOKENS]
    assert [(one.outcome, one.input_tokens, one.output_tokens) for one in postings] == [("completed", 7, 2)] * 2


async def test_an_answer_without_usage_is_billed_by_an_estimate(tmp_path: Path):
    async with (
        Upstream(lambda _: Answer(answer("twelve bytes", "x", usage=None))) as upstream,
        serving(tmp_path, upstream.url) as served,
    ):
        report = (await generate(served, text="sixteen bytes it")).report
        [posting] = await served.postings()
    assert (report.usage.input_tokens, report.usage.output_tokens, report.usage.estimated) == (4, 4, True)
    assert (posting.outcome, posting.estimated) == ("completed", True)


async def test_a_schema_that_a_provider_counts_as_input_is_held_and_paid_for(tmp_path: Path):
    schema = json.dumps({"type": "object", "description": "x" * 8000})
    usage = {"prompt_tokens": 2000, "completion_tokens": 2, "total_tokens": 2002}
    async with (
        Upstream(lambda _: Answer(answer("{}", usage=usage))) as upstream,
        serving(tmp_path, upstream.url) as served,
    ):
        shape = pb.StructuredOutput(json_schema=schema)
        await generate(served, text="Hi", most=2, structured_output=shape)
        [posting] = await served.postings()
    assert posting.charge_nanos == 2000 * 3_000 + 2 * 5_000
    assert posting.held_tokens >= len(schema)


async def test_a_body_of_an_error_is_read_no_further_than_it_may_be():
    endless = Answer(_endless(b"x" * 10_000), 500, {"content-type": "text/plain"})
    async with Upstream(lambda _: endless) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        _, error = await ask_in_vain(model, call_of())
        await upstream.until(lambda it: it.num_open == 0)
    assert isinstance(error, errors.BackendUnavailable)


async def test_an_error_whose_body_never_ends_is_known_by_its_status():
    stalled = Answer(_forever(b"x"), 500, {"content-type": "text/plain"})
    async with (
        Upstream(lambda _: stalled) as upstream,
        remote_model(upstream.url, "openai-compatible", provider=IMPATIENT) as model,
    ):
        _, error = await ask_in_vain(model, call_of())
    assert error.provider_status == errors.ProviderStatus("there", 500)


def _answered(status: int | None, problem: Problem | None = None, **headers: str) -> errors.HeadraceError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return answered("far", status, named, problem or Problem(), lambda text: text)


@pytest.mark.parametrize(
    ("headers", "problem", "seconds"),
    [
        ({"retry_after": "3"}, Problem(), 3.0),
        ({"retry_after": "0.5"}, Problem(), 0.5),
        ({"retry_after_ms": "250", "retry_after": "3"}, Problem(), 0.25),
        ({"retry_after": "3"}, Problem(retry_after=2.5), 2.5),
        ({"retry_after": "-3"}, Problem(), 0.0),
        ({"retry_after": "99999999"}, Problem(), 3600.0),
        ({"retry_after": "soon"}, Problem(), None),
        ({"retry_after": "nan"}, Problem(), None),
        ({"retry_after": "inf"}, Problem(), 3600.0),
        ({"retry_after": "Mon, 01 Jan 2001 00:00:00 GMT"}, Problem(), 0.0),
        ({}, Problem(), None),
    ],
)
def test_a_provider_says_in_many_ways_when_to_try_again(
    headers: dict[str, str], problem: Problem, seconds: float | None
):
    error = _answered(503, problem, **headers)
    assert isinstance(error, errors.BackendUnavailable)
    assert error.retry_after == seconds


def test_a_date_to_try_again_at_is_as_far_away_as_it_is():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=1800), usegmt=True)
    error = _answered(429, retry_after=soon)
    assert isinstance(error, errors.ProviderLimited)
    assert 0 < error.retry_after <= 1800


def test_what_a_provider_says_is_one_short_line_for_callers():
    error = _answered(400, Problem("one\ntwo\x1b[31m" + "x" * 10_000, "y" * 10_000))
    assert error.message.startswith("request: provider 'far' does not take it: one two [31mxxx")
    assert len(error.message) < 400
    assert error.message.isprintable()
    assert error.provider_status is not None
    assert len(error.provider_status.code or "") == 300


def test_what_a_provider_says_of_the_server_is_for_its_operator_alone():
    error = _answered(401, Problem("organization org-17 has no such key", "invalid_api_key"))
    assert "org-17" not in str(error)
    assert "org-17" in str(error.__cause__)


@pytest.mark.parametrize("header", ["request_id", "x_request_id"])
def test_the_log_has_the_number_that_a_provider_gives_a_request(header: str):
    assert str(_answered(503, Problem("busy"), **{header: "req_011\n"}).__cause__) == "request req_011"
    assert str(_answered(401, Problem("no"), **{header: "req_011"}).__cause__) == "request req_011: no"
    assert _answered(503).__cause__ is None


def test_a_bad_key_is_the_operators_to_mend_whatever_the_status():
    assert isinstance(_answered(400, Problem("API key not valid.", "API_KEY_INVALID")), errors.ProviderRefused)


async def test_a_stream_may_go_on_after_its_last_message():
    """Its connection is not kept then."""
    async with (
        Upstream(lambda _: Answer(_forever(*answer("Hi")))) as upstream,
        remote_model(upstream.url, "openai-compatible") as model,
    ):
        call = call_of()
        async for _ in model.generate(call):
            pass
        await upstream.until(lambda it: it.num_open == 0)
    assert DONE in b"".join(answer("Hi"))
    assert call.meter.usage().output_tokens == 2
