"""Idempotency keys over gRPC, through the whole server and its ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from headrace.v1 import generation_pb2 as pb
from headrace.v1 import scoring_pb2
from tests.accounting.calls_kit import Served, TimeOfDay, request, serving
from tests.rpc.rpc_kit import details_of, status_of
from tests.server.server_kit import until

ACME, GLOBEX = (("tenant", "acme"),), (("tenant", "globex"),)
REPLAYED = ("headrace-replayed", "true")


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as running:
        yield running


def keyed(text: str = "prompt", key: str = "order-1", **spec: Any) -> pb.GenerateRequest:
    return request(text, idempotency_key=key, **{"max_new_tokens": 8, "least": 8} | spec)


def streamed(made: pb.GenerateRequest, **options: Any) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(spec=made.spec, **options)


async def trailers(call: Any) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in await call.trailing_metadata() or ()]


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


def told(response: pb.GenerateResponse) -> tuple[Any, ...]:
    """What a replay repeats."""
    report = response.report
    attempts = [attempt.SerializeToString(deterministic=True) for attempt in report.attempts]
    return [*response.choices], report.usage, report.cost, report.model, report.model_digest, report.backend, attempts


async def test_a_repeated_call_gets_the_same_answer_and_is_billed_once(served: Served) -> None:
    first = served.generation.Generate(keyed(request_id="one"), metadata=ACME)
    second = served.generation.Generate(keyed(request_id="two"), metadata=ACME)
    answers = [await first, await second]
    assert told(answers[0]) == told(answers[1])
    assert [answer.request_id for answer in answers] == ["one", "two"]
    assert [REPLAYED in await trailers(call) for call in (first, second)].count(True) == 1
    assert len(await served.postings()) == 1
    assert await served.num_holds() == 0


async def test_a_replay_takes_no_time_of_the_model(served: Served) -> None:
    first = await served.generation.Generate(keyed(), metadata=ACME)
    again = await served.generation.Generate(keyed(), metadata=ACME)
    assert first.report.timings.HasField("time_to_first_token")
    assert not again.report.timings.HasField("time_to_first_token")
    assert again.report.timings.HasField("total")


async def test_streams_are_replayed_event_by_event_and_unary_calls_from_them(served: Served) -> None:
    async def stream() -> tuple[list[pb.GenerateStreamResponse], bool]:
        call = served.generation.GenerateStream(streamed(keyed()), metadata=ACME)
        events = [event async for event in call]
        return events, REPLAYED in await trailers(call)

    (first, was_replayed), (again, is_replayed) = await stream(), await stream()
    assert (was_replayed, is_replayed) == (False, True)
    assert again[:-1] == first[:-1]
    assert again[-1].end.usage == first[-1].end.usage
    assert again[-1].end.cost == first[-1].end.cost
    unary = await served.generation.Generate(keyed(), metadata=ACME)
    assert unary.choices[0].text == "".join(event.delta.text for event in first)
    assert len(await served.postings()) == 1


async def test_an_echoed_prompt_is_replayed(served: Served) -> None:
    made = keyed("tell me", response=pb.ResponseOptions(echo=True, token_ids=True))
    first = await served.generation.Generate(made, metadata=ACME)
    again = await served.generation.Generate(made, metadata=ACME)
    assert first.prompt == again.prompt
    assert again.prompt.text == "tell me"


async def test_whole_call_models_honour_keys_too(served: Served) -> None:
    made = pb.GenerateRequest(spec=pb.GenerationSpec(text="prompt", model="whole", idempotency_key="order-1"))
    answers = [await served.generation.Generate(made, metadata=ACME) for _ in range(2)]
    assert told(answers[0]) == told(answers[1])
    assert len(await served.postings()) == 1


async def test_scorings_are_replayed(served: Served) -> None:
    made = scoring_pb2.ScoreRequest(
        text="a text",
        idempotency_key="order-1",
        candidates=[scoring_pb2.ScoreCandidate(text=" b"), scoring_pb2.ScoreCandidate(text=" c")],
        response=scoring_pb2.ScoreResponseOptions(tokens=True, top_logprobs=2),
    )
    answers = [await served.scoring.Score(made, metadata=ACME) for _ in range(2)]
    assert list(answers[0].scores) == list(answers[1].scores)
    assert answers[0].report.usage == answers[1].report.usage
    assert len(await served.postings()) == 1
    error = await refused(served.generation.Generate(keyed("a text"), metadata=ACME))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_items_of_a_batch_are_replayed(served: Served) -> None:
    async def batch() -> list[pb.GenerateBatchResponse]:
        items = [pb.GenerateBatchRequest(index=i, spec=keyed(f"prompt {i}", f"order-{i}").spec) for i in range(4)]
        call = served.generation.GenerateBatch(iter(items), metadata=ACME)
        return sorted([answer async for answer in call], key=lambda answer: answer.index)

    first, again = await batch(), await batch()
    assert [told(answer.result) for answer in first] == [told(answer.result) for answer in again]
    assert len(await served.postings()) == 4


async def test_another_request_under_the_key_is_refused_by_its_name(served: Served) -> None:
    await served.generation.Generate(keyed(), metadata=ACME)
    error = await refused(served.generation.Generate(keyed("another"), metadata=ACME))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = details_of(status_of(error))["BadRequest"].field_violations
    assert violation.field == "spec.idempotency_key"


async def test_a_tenant_learns_nothing_of_another_s_keys(served: Served) -> None:
    await served.generation.Generate(keyed("a secret"), metadata=ACME)
    call = served.generation.Generate(keyed("something else"), metadata=GLOBEX)
    assert (await call).report.usage.input_tokens == len("something else")
    assert REPLAYED not in await trailers(call)
    assert {posting.tenant for posting in await served.postings()} == {"acme", "globex"}


async def test_an_expired_answer_is_already_exists(tmp_path: Path) -> None:
    time_of_day = TimeOfDay()
    async with serving(tmp_path, time_of_day=time_of_day, idempotency_hours=1) as served:
        await served.generation.Generate(keyed(), metadata=ACME)
        time_of_day.now = time_of_day.now.replace(hour=14)
        error = await refused(served.generation.Generate(keyed(), metadata=ACME))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert details_of(status_of(error))["ErrorInfo"].reason == "ANSWER_EXPIRED"
        assert len(await served.postings()) == 1


async def test_without_a_ledger_keys_are_refused_by_name(tmp_path: Path) -> None:
    async with serving(tmp_path, ledger=None) as served:
        error = await refused(served.generation.Generate(keyed(), metadata=ACME))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        [violation] = details_of(status_of(error))["BadRequest"].field_violations
        assert (violation.field, "keeps no answers" in violation.description) == ("spec.idempotency_key", True)


async def test_a_replay_needs_no_budget(tmp_path: Path) -> None:
    async with serving(tmp_path, plan={"monthly_tokens": len("prompt") + 8}) as served:
        first = await served.generation.Generate(keyed(), metadata=ACME)
        error = await refused(served.generation.Generate(keyed(key="order-2"), metadata=ACME))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert told(await served.generation.Generate(keyed(), metadata=ACME)) == told(first)


async def test_replays_count_in_metrics_as_such_and_their_tokens_once(served: Served) -> None:
    for _ in range(3):
        await served.generation.Generate(keyed(), metadata=ACME)
    registry = served.metrics.registry
    samples = {
        (sample.name, sample.labels.get("gen_ai_token_type")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }
    replayed = [value for (name, _), value in samples.items() if "replayed" in name and name.endswith("_total")]
    assert replayed == [2]


async def test_a_call_that_failed_is_billed_for_what_it_used_and_runs_anew(served: Served) -> None:
    made = keyed("fail \0")
    with capture_logs():  # to lay tracebacks out for a terminal takes seconds
        for _ in range(2):
            assert (await refused(served.generation.Generate(made, metadata=ACME))).code() is grpc.StatusCode.INTERNAL
    first, second = await served.postings()
    assert first.outcome == second.outcome == "failed"
    assert first.id != second.id


async def test_who_was_cut_off_finds_the_answer_of_the_same_run(served: Served) -> None:
    made = streamed(keyed(max_new_tokens=200, least=200, model="slow"))
    cut_off = served.generation.GenerateStream(made, metadata=ACME)
    async for _ in cut_off:
        break
    cut_off.cancel()
    call = served.generation.GenerateStream(made, metadata=ACME)
    events = [event async for event in call]
    assert events[-1].end.usage.output_tokens == 200
    assert REPLAYED in await trailers(call)
    [posting] = await served.postings()
    assert (posting.outcome, posting.output_tokens) == ("completed", 200)


async def test_what_nobody_waits_for_is_cancelled_and_settled(tmp_path: Path) -> None:
    async with serving(tmp_path, resume_window=0.01) as served:
        made = streamed(keyed(max_new_tokens=2000, least=2000, model="slow"))
        cut_off = served.generation.GenerateStream(made, metadata=ACME)
        async for _ in cut_off:
            break
        cut_off.cancel()
        await until(lambda: not served.app._idempotency._runs)
        [posting] = await served.postings()
        assert posting.outcome == "cancelled"
        assert 0 < posting.output_tokens < 2000


async def test_a_deadline_ends_the_run_and_frees_the_key(served: Served) -> None:
    made = keyed(max_new_tokens=2000, least=2000, model="slow")
    error = await refused(served.generation.Generate(made, metadata=ACME, timeout=0.5))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: not served.app._idempotency._runs)
    [posting] = await served.postings()
    assert posting.output_tokens < 2000


async def test_a_resumable_stream_with_a_key_is_resumed_and_replayed(served: Served) -> None:
    made = streamed(keyed(max_new_tokens=100, least=100, model="slow", request_id="stream-1"), resume_after_sequence=0)
    broken = served.generation.GenerateStream(made, metadata=ACME)
    events = []
    async for event in broken:
        events.append(event)
        if event.sequence == 3:
            break
    broken.cancel()
    made.resume_after_sequence = 3
    events += [event async for event in served.generation.GenerateStream(made, metadata=ACME)]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[-1].end.usage.output_tokens == 100
    # Another stream, from another client perhaps, with the same key.
    made.spec.request_id, made.resume_after_sequence = "stream-2", 0
    call = served.generation.GenerateStream(made, metadata=ACME)
    again = [event async for event in call]
    assert again[:-1] == events[:-1]
    assert REPLAYED in await trailers(call)
    assert len(await served.postings()) == 1


async def test_an_answer_outlives_its_server(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        async with serving(tmp_path) as served:
            found.append(told(await served.generation.Generate(keyed(), metadata=ACME)))
            assert len(await served.postings()) == 1
    assert found[0] == found[1]
