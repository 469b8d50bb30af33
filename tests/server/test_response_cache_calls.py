"""The response cache in a whole server: over gRPC, with a ledger, with routes' and plans' limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest
from sqlalchemy import select

from headrace.backends.requests import Scoring
from headrace.backends.usage import CacheStatus
from headrace.server.accounting.clock import month_of
from headrace.server.accounting.schema import daily_usage
from headrace.v1 import accounting_pb2, accounting_pb2_grpc
from headrace.v1 import generation_pb2 as pb
from tests.accounting.calls_kit import INPUT_NANOS, OUTPUT_NANOS, Served, request, serving
from tests.rpc.rpc_kit import details_of, status_of
from tests.server.cache_kit import RedisServer
from tests.server.server_kit import app_with, call, events_of

HIT, MISS, BYPASS = pb.CACHE_STATUS_HIT, pb.CACHE_STATUS_MISS, pb.CACHE_STATUS_BYPASS
ACME = (("tenant", "acme"),)


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture(params=["memory", "redis"])
def target(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory"
    server: RedisServer = request.getfixturevalue("redis_server")
    with server.client() as client:
        client.flushall()
    return server.url


async def streamed(served: Served, text: str = "prompt", **spec: Any) -> list[pb.GenerateStreamResponse]:
    message = pb.GenerateStreamRequest(spec=request(text, **spec).spec)
    return [event async for event in served.generation.GenerateStream(message, metadata=ACME)]


async def test_a_hit_has_the_same_answer_and_says_what_it_is(tmp_path: Path, target: str) -> None:
    async with serving(tmp_path, response_cache=target) as served:
        first = await served.generate()
        again = await served.generate()
        assert again.choices == first.choices
        assert (first.report.cache_status, again.report.cache_status) == (MISS, HIT)
        assert len(again.report.attempts) == 0
        assert not again.report.usage.HasField("input_tokens")
        assert not again.report.usage.HasField("output_tokens")
        assert again.report.usage.sent_output_tokens == first.report.usage.sent_output_tokens == 8
        assert (again.report.model, again.report.backend) == ("letters", "scripted")
        assert again.report.cost.charge_nanos == 0
        assert first.report.cost.charge_nanos == 6 * INPUT_NANOS + 8 * OUTPUT_NANOS
        assert again.request_id != first.request_id


async def test_a_stream_that_hits_has_the_deltas_of_the_first_and_so_has_a_whole_answer(
    tmp_path: Path, target: str
) -> None:
    async with serving(tmp_path, response_cache=target) as served:
        first, again = await streamed(served), await streamed(served)
        assert again[:-1] == first[:-1]
        assert again[-1].end.cache_status == HIT
        whole = await served.generate()
        assert whole.report.cache_status == HIT
        assert whole.choices[0].text == "".join(event.delta.text for event in first)


async def test_an_echoed_prompt_and_token_ids_come_with_a_hit(tmp_path: Path, target: str) -> None:
    wanted = pb.ResponseOptions(echo=True, token_ids=True, logprobs=True, top_logprobs=2)
    async with serving(tmp_path, response_cache=target) as served:
        first = await served.generate(response=wanted)
        again = await served.generate(response=wanted)
    assert again.report.cache_status == HIT
    assert (again.prompt, again.choices) == (first.prompt, first.choices)


async def test_scores_batches_and_resumable_streams_hit_too(tmp_path: Path) -> None:
    async with serving(tmp_path, response_cache="memory") as served:
        first = await served.generate()
        message = pb.GenerateStreamRequest(spec=request(request_id="a").spec, resume_after_sequence=0)
        *_, last = [event async for event in served.generation.GenerateStream(message, metadata=ACME)]
        assert last.end.cache_status == HIT
        batch = request(scheduling=pb.SchedulingOptions(latency_class=pb.LATENCY_CLASS_CHAT)).spec
        items = [pb.GenerateBatchRequest(index=i, spec=batch) for i in range(2)]
        results = [one async for one in served.generation.GenerateBatch(iter(items), metadata=ACME)]
        assert [one.result.report.cache_status for one in results] == [HIT, HIT]
        assert results[0].result.choices == first.choices


async def test_a_whole_call_model_is_cached_where_a_request_asks_for_it(tmp_path: Path) -> None:
    use = pb.CachePolicy(response=pb.CACHE_MODE_USE)
    async with serving(tmp_path, response_cache="memory") as served:
        found = [
            (await served.generate(model="whole", **spec)).report.cache_status
            for spec in ({}, {}, {"cache": use}, {"cache": use})
        ]
        assert found == [BYPASS, BYPASS, MISS, HIT]


async def test_a_hit_is_a_posting_of_its_own_and_its_receipt_can_be_found(tmp_path: Path, target: str) -> None:
    async with serving(tmp_path, response_cache=target) as served:
        first = await served.generate()
        again = await served.generate(request_id="again")
        stub = accounting_pb2_grpc.UsageServiceStub(served.channel)
        receipts = (await stub.GetReceipt(accounting_pb2.GetReceiptRequest(request_id="again"), metadata=ACME)).receipts
        paid, hit = await served.postings()
        assert paid.charge_nanos == first.report.cost.charge_nanos
        assert (hit.state, hit.outcome, hit.charge_nanos, hit.held_nanos) == ("posted", "completed", 0, 0)
        assert (hit.input_tokens, hit.output_tokens) == (None, None)
        assert (hit.model, hit.backend, hit.price_id) == ("letters", "scripted", first.report.cost.price_id)
        assert hit.request_id == again.request_id == "again"
        assert [(one.state, one.cache_hit) for one in receipts] == [(accounting_pb2.RECEIPT_STATE_POSTED, True)]
        assert await served.num_holds() == 0
        balance = await served.balance()
        assert balance is None or balance.held_nanos == 0
        assert served.app.accounting.ledger is not None
        (day,) = await served.app.accounting.ledger.read(
            lambda connection: list(connection.execute(select(daily_usage)))
        )
        assert (day.requests, day.charge_nanos) == (2, paid.charge_nanos)


async def test_a_hit_with_a_price_is_charged_for(tmp_path: Path) -> None:
    async with serving(tmp_path, response_cache="memory", response_cache_hit_price=0.25) as served:
        first, again = await served.generate(), await served.generate()
        share = round(first.report.cost.charge_nanos * 0.25)
        assert again.report.cost.charge_nanos == share
        assert [one.charge_nanos for one in await served.postings()] == [first.report.cost.charge_nanos, share]
        balance = await served.balance(month=month_of(time.time_ns()))
        assert balance.posted_nanos == first.report.cost.charge_nanos + share


async def test_a_budget_is_never_exceeded_by_hits(tmp_path: Path) -> None:
    whole = 6 * INPUT_NANOS + 8 * OUTPUT_NANOS
    # For the first, and ten hits of a half.
    plan = {"monthly_money": f"{whole * 6 / 1e9:.9f}"}
    settings = {"response_cache": "memory", "response_cache_hit_price": 0.5, "plan": plan}
    async with serving(tmp_path, **settings) as served:
        await served.generate()
        results = await asyncio.gather(*(served.generate() for _ in range(30)), return_exceptions=True)
        refused = [one for one in results if isinstance(one, grpc.aio.AioRpcError)]
        assert len(refused) == 20
        assert {details_of(status_of(one))["ErrorInfo"].reason for one in refused} == {"BUDGET_SPENT"}
        assert sum(one.charge_nanos for one in await served.postings()) == 6 * whole


async def test_free_hits_need_no_budget_and_no_tokens_a_minute(tmp_path: Path) -> None:
    whole = 6 * INPUT_NANOS + 8 * OUTPUT_NANOS
    plan = {"monthly_money": f"{whole / 1e9:.9f}", "tokens_per_minute": 14}
    async with serving(tmp_path, response_cache="memory", plan=plan) as served:
        await served.generate()
        assert [(await served.generate()).report.cache_status for _ in range(5)] == [HIT] * 5
        with pytest.raises(grpc.aio.AioRpcError):
            await served.generate("other")


async def test_a_hit_counts_as_a_request_of_the_minute(tmp_path: Path) -> None:
    async with serving(tmp_path, response_cache="memory", plan={"requests_per_minute": 3}) as served:
        for _ in range(3):
            await served.generate()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await served.generate()
        assert details_of(status_of(error.value))["ErrorInfo"].reason == "RATE_LIMITED"


async def test_equal_calls_at_the_same_time_are_billed_once(tmp_path: Path) -> None:
    async with serving(tmp_path, response_cache="memory") as served:
        answers = await asyncio.gather(*(served.generate(model="slow", max_new_tokens=20) for _ in range(10)))
        assert len({one.choices[0].text for one in answers}) == 1
        statuses = [one.report.cache_status for one in answers]
        assert (statuses.count(MISS), statuses.count(HIT)) == (1, 9)
        rows = await served.postings()
        assert len(rows) == 10
        assert sum(one.output_tokens or 0 for one in rows) == 20
        assert sum(one.charge_nanos for one in rows) == 6 * INPUT_NANOS + 20 * OUTPUT_NANOS


async def test_a_run_whose_first_caller_cancels_goes_on_for_the_others_and_is_billed_once(tmp_path: Path) -> None:
    async with serving(tmp_path, response_cache="memory") as served:
        spec = request(model="slow", max_new_tokens=60, least=60).spec
        leader = served.generation.GenerateStream(pb.GenerateStreamRequest(spec=spec), metadata=ACME)
        await leader.read()
        follower = served.generation.GenerateStream(pb.GenerateStreamRequest(spec=spec), metadata=ACME)
        await follower.read()
        leader.cancel()
        while (event := await follower.read()) is not grpc.aio.EOF:
            last = event
        assert last.end.cache_status == HIT
        await served.all_settled()
        rows = await served.postings()
        assert sorted((one.output_tokens or 0, one.outcome) for one in rows) == [(0, "completed"), (60, "completed")]
        assert (await served.generate(model="slow", max_new_tokens=60, least=60)).report.cache_status == HIT


async def test_when_all_have_cancelled_it_is_settled_with_what_it_had_used(tmp_path: Path) -> None:
    async with serving(tmp_path, response_cache="memory") as served:
        spec = request(model="slow", max_new_tokens=2000, least=2000).spec
        calls = [served.generation.GenerateStream(pb.GenerateStreamRequest(spec=spec), metadata=ACME) for _ in range(3)]
        for one in calls:
            await one.read()
        for one in calls:
            one.cancel()
        await served.all_settled()
        (row,) = await served.postings()
        assert row.outcome == "cancelled"
        assert 0 < row.output_tokens < 2000


async def test_two_servers_that_share_a_redis_share_answers(tmp_path: Path, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.flushall()
    async with (
        serving(tmp_path / "a", response_cache=redis_server.url) as one,
        serving(tmp_path / "b", response_cache=redis_server.url) as other,
    ):
        first, again = await one.generate(), await other.generate()
        assert again.report.cache_status == HIT
        assert again.choices == first.choices
        assert (await other.generate(tenant="zeta")).report.cache_status == MISS


async def test_a_redis_that_goes_away_fails_no_call(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, response_cache=redis_server.url) as served:
        await served.generate()
        redis_server.stop()
        try:
            answers = [await served.generate() for _ in range(3)]
        finally:
            redis_server.start()
        assert [one.report.cache_status for one in answers] == [MISS] * 3
        assert served.app.num_cache_failures() > 0


async def test_the_options_of_a_request_are_honoured(tmp_path: Path) -> None:
    bypass = pb.CachePolicy(response=pb.CACHE_MODE_BYPASS)
    use = pb.CachePolicy(response=pb.CACHE_MODE_USE, response_namespace="a")
    warm = pb.SamplingOptions(temperature=1)
    no_store = pb.CachePolicy(response_no_store=True)
    async with serving(tmp_path, response_cache="memory") as served:
        found = [
            (await served.generate(**spec)).report.cache_status
            for spec in (
                {"cache": no_store},
                {"cache": bypass},
                {},
                {"cache": no_store},
                {"cache": bypass},
                {"sampling": warm},
                {"sampling": warm, "cache": use},
                {"sampling": warm, "cache": use},
            )
        ]
        assert found == [MISS, BYPASS, MISS, HIT, BYPASS, BYPASS, MISS, HIT]


@pytest.mark.parametrize(
    ("cache", "field"),
    [
        (pb.CachePolicy(response=pb.CACHE_MODE_USE), "cache.response"),
        (pb.CachePolicy(response_no_store=True), "cache.response_no_store"),
        (pb.CachePolicy(response_namespace="a"), "cache.response_namespace"),
    ],
)
async def test_without_a_cache_what_asks_for_it_is_refused_by_name(
    tmp_path: Path, cache: pb.CachePolicy, field: str
) -> None:
    async with serving(tmp_path, response_cache=None) as served:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await served.generate(cache=cache)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert details_of(status_of(error.value))["ErrorInfo"].metadata["field"].endswith(field)
        answer = await served.generate(cache=pb.CachePolicy(response=pb.CACHE_MODE_BYPASS))
        assert answer.report.cache_status == pb.CACHE_STATUS_UNSPECIFIED


async def test_scores_hit(tmp_path: Path) -> None:
    async with app_with({"letters": {"max_scores": 8}}, response_cache="memory") as app:
        calls = [call(scoring=Scoring()) for _ in range(2)]
        first, again = [await events_of(app.generate, one) for one in calls]
        assert again == first
        assert [one.meter.cache for one in calls] == [CacheStatus.MISS, CacheStatus.HIT]


async def test_metrics_count_by_model_what_the_cache_had(tmp_path: Path) -> None:
    async with serving(tmp_path, response_cache="memory") as served:
        for _ in range(3):
            await served.generate()
        await served.generate(cache=pb.CachePolicy(response=pb.CACHE_MODE_BYPASS))
        served.metrics.observe_response_cache(
            num_bytes=served.app.num_cached_bytes, failures=served.app.num_cache_failures
        )
        text = generate_latest(served.metrics.registry).decode()
        assert 'headrace_response_cache_lookups_total{model="letters",status="hit"} 2.0' in text
        assert 'headrace_response_cache_lookups_total{model="letters",status="miss"} 1.0' in text
        assert 'headrace_response_cache_lookups_total{model="letters",status="bypass"} 1.0' in text
        assert served.app.num_cached_bytes() > 0
        assert "headrace_response_cache_bytes 0.0" not in text
        # Of tokens, nothing but what was sent.
        assert 'gen_ai_usage_tokens_total{model="letters",type="output"} 16.0' in text
        assert 'gen_ai_usage_tokens_total{model="letters",type="sent_output"} 32.0' in text


async def test_a_key_answers_with_what_the_cache_had_and_is_replayed_as_such(tmp_path: Path) -> None:
    async with serving(tmp_path, response_cache="memory") as served:
        first = await served.generate()
        keyed = await served.generate(idempotency_key="a")
        assert keyed.report.cache_status == HIT
        replayed = await served.generate(idempotency_key="a")
        assert replayed.choices == keyed.choices == first.choices
        assert len(await served.postings()) == 2


async def test_an_answer_that_a_route_has_led_to_is_its_model_s(tmp_path: Path) -> None:
    routes = {"any": {"targets": [{"model": "letters"}, {"model": "unpriced"}]}}
    async with serving(tmp_path, response_cache="memory", routes=routes) as served:
        first = await served.generate(model="any")
        again, direct, other = [await served.generate(model=name) for name in ("any", "letters", "unpriced")]
        statuses = [one.report.cache_status for one in (first, again, direct, other)]
        assert statuses == [MISS, HIT, HIT, MISS]
        assert {one.report.model for one in (first, again, direct)} == {"letters"}


async def test_a_hundred_equal_streams_of_two_tenants_are_two_runs(tmp_path: Path) -> None:
    async with serving(tmp_path, response_cache="memory") as served:
        answers = await asyncio.gather(
            *(served.generate(model="slow", max_new_tokens=20, tenant=f"tenant-{i % 2}") for i in range(100))
        )
        assert [one.report.cache_status for one in answers].count(MISS) == 2
        assert len({one.choices[0].text for one in answers}) == 1
        assert len([row for row in await served.postings() if row.output_tokens]) == 2
