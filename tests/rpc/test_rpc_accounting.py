"""UsageService over a real server with a real ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from headrace.backends.price_table import PriceTable, TableOptions
from headrace.backends.types import Principal
from headrace.v1 import accounting_pb2 as pb
from headrace.v1 import accounting_pb2_grpc, generation_pb2, models_pb2
from tests.rpc.rpc_kit import details_of, says, status_of
from tests.rpc.rpc_kit import serving as tiny_serving
from tests.rpc.usage_kit import MONDAY, PLAN, PRINCIPALS, Served, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as running:
        yield running


async def refused(awaitable: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


# --- GetUsage


async def test_usage_adds_up_by_the_dimensions_asked_for(served: Served) -> None:
    await served.generate("a")
    await served.generate("k", "sevenal")
    await served.generate("a", model="whole")
    await served.generate("b")
    by_key = await served.get("a", group_by=["USAGE_DIMENSION_KEY", "USAGE_DIMENSION_DAY"])
    assert [(row.key_id, row.day, row.totals.requests) for row in by_key.rows] == [
        ("", "2026-11-23", 2),
        ("key1", "2026-11-23", 1),
    ]
    assert not by_key.rows[0].HasField("tenant")
    assert not by_key.rows[0].HasField("model")
    assert by_key.currency == "USD"
    total = by_key.total
    assert (total.requests, total.cancelled_requests, total.failed_requests, total.cached_requests) == (3, 0, 0, 0)
    assert (total.input_tokens, total.output_tokens) == (4 + 7 + 4, 9)
    assert total.charge_nanos == (4 + 3 * 2 + 7 + 3 * 2) * 1000
    one_row = await served.get("a", model="letters", key_id="")
    assert [row.totals.requests for row in one_row.rows] == [1]
    assert not (await served.get("a", last_day="2026-11-22")).rows


async def test_a_tenant_sees_its_own_usage_and_an_operator_all(served: Served) -> None:
    await served.generate("a")
    await served.generate("b")
    by_tenant = ["USAGE_DIMENSION_TENANT"]
    assert [row.tenant for row in (await served.get("a", group_by=by_tenant)).rows] == ["acme"]
    assert [row.tenant for row in (await served.get("o", group_by=by_tenant)).rows] == ["acme", "basic"]
    assert (await served.get("o", tenant="basic")).total.requests == 1
    assert (await served.get("a", tenant="acme")).total.requests == 1


async def test_naming_another_tenant_is_refused_alike_whether_there_is_one_or_not(served: Served) -> None:
    await served.generate("b")
    metadata = (("who", "a"),)
    texts = set()
    for tenant in ("basic", "nobody"):
        watching = served.watch("a", tenant=tenant)
        for asking in (
            served.get("a", tenant=tenant),
            served.usage.GetReceipt(pb.GetReceiptRequest(request_id="x", tenant=tenant), metadata=metadata),
            served.usage.GetBudget(pb.GetBudgetRequest(tenant=tenant), metadata=metadata),
            watching.read(),
        ):
            error = await refused(asking)
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            texts.add(error.details())
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"first_day": "23.11.2026"}, "first_day", "must be a day such as 2026-11-01, got '23.11.2026'"),
        ({"last_day": "2026-02-30"}, "last_day", "must be a day such as 2026-11-01, got '2026-02-30'"),
        ({"first_day": "20261101"}, "first_day", "must be a day such as 2026-11-01, got '20261101'"),
        ({"first_day": "2026-11-24"}, "first_day", "must not be after last_day, 2026-11-23; got 2026-11-24"),
        ({"group_by": [0]}, "group_by[0]", "must be one of TENANT, KEY, MODEL, DAY"),
        ({"group_by": [1, 77]}, "group_by[1]", "must be one of TENANT, KEY, MODEL, DAY"),
        ({"group_by": [3, 4, 3]}, "group_by[2]", "MODEL is there twice"),
        ({"model": "a\0b"}, "model", "must not have a NUL"),
    ],
)
async def test_what_cannot_be_asked_for_is_refused_by_name(
    served: Served, fields: dict[str, Any], field: str, problem: str
) -> None:
    error = await refused(served.get("a", **fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = details_of(status_of(error))["BadRequest"].field_violations
    assert (violation.field, violation.description) == (field, problem)


async def test_a_filter_that_only_a_newer_client_knows_is_not_ignored(served: Served) -> None:
    call = served.channel.unary_unary(
        "/headrace.v1.UsageService/GetUsage",
        request_serializer=lambda raw: raw,
        response_deserializer=pb.GetUsageResponse.FromString,
    )
    error = await refused(call(b"\x9a\x06\x01x", metadata=(("who", "a"),)))  # field 99
    assert (error.code(), error.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "#99: is a field that this server does not know",
    )


# --- receipts


async def test_a_receipt_says_what_a_call_used_and_cost(served: Served) -> None:
    answer = await served.generate("a", request_id="mine")
    response = await served.usage.GetReceipt(pb.GetReceiptRequest(request_id="mine"), metadata=(("who", "a"),))
    [receipt] = response.receipts
    assert (receipt.state, receipt.tenant, receipt.model) == (pb.RECEIPT_STATE_POSTED, "acme", "letters")
    assert (receipt.usage.input_tokens, receipt.usage.output_tokens) == (4, 3)
    assert receipt.cost.charge_nanos == answer.report.cost.charge_nanos == 10_000
    assert (receipt.cost.currency, receipt.cost.price_id) == ("USD", "p/letters")
    assert not receipt.cost.HasField("cost_nanos")
    assert receipt.outcome == 1
    assert receipt.sequence == 1
    assert (receipt.held_nanos, receipt.held_tokens) == (10_000, 7)
    assert receipt.held_at.ToNanoseconds() == receipt.settled_at.ToNanoseconds() == MONDAY
    assert not receipt.HasField("key_id")
    assert not receipt.HasField("recovered")


async def test_a_running_call_has_a_receipt_of_what_is_held_for_it(tmp_path: Path) -> None:
    scripts = {"letters": {"seconds_per_step": 0.01}}
    async with serving(tmp_path, scripts=scripts) as served:
        running = asyncio.create_task(
            served.generate("a", request_id="mine", stopping={"max_new_tokens": 4000, "ignore_eos": True})
        )
        async with asyncio.timeout(10):
            while not served.app.num_open_holds():  # noqa: ASYNC110  # a hold sets no event for tests
                await asyncio.sleep(0.005)
        request = pb.GetReceiptRequest(request_id="mine")
        [receipt] = (await served.usage.GetReceipt(request, metadata=(("who", "a"),))).receipts
        assert (receipt.state, receipt.held_tokens) == (pb.RECEIPT_STATE_HELD, 4004)
        for absent in ("sequence", "usage", "cost", "settled_at", "outcome"):
            assert not receipt.HasField(absent)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


async def test_the_receipt_of_another_tenant_is_not_found(served: Served) -> None:
    await served.generate("b", request_id="secret")
    request = pb.GetReceiptRequest(request_id="secret")
    theirs = await refused(served.usage.GetReceipt(request, metadata=(("who", "a"),)))
    request_of_none = pb.GetReceiptRequest(request_id="secres")
    nobodys = await refused(served.usage.GetReceipt(request_of_none, metadata=(("who", "a"),)))
    assert theirs.code() is nobodys.code() is grpc.StatusCode.NOT_FOUND
    assert theirs.details() == nobodys.details().replace("secres", "secret")
    as_operator = pb.GetReceiptRequest(request_id="secret", tenant="basic")
    assert (await served.usage.GetReceipt(as_operator, metadata=(("who", "o"),))).receipts


# --- WatchUsage


async def test_a_watch_catches_up_and_follows_without_gap_or_repeat(served: Served) -> None:
    for _ in range(3):
        await served.generate("a")
    await served.generate("b")
    watching = served.watch("a", after_sequence=1)
    seen = [(await watching.read()).receipt.sequence for _ in range(2)]
    assert seen == [2, 3]
    await served.generate("b")
    await served.generate("a")
    assert (await watching.read()).receipt.sequence == 6
    watching.cancel()
    again = served.watch("a", after_sequence=3)
    assert (await again.read()).receipt.sequence == 6
    again.cancel()


async def test_a_watch_begins_with_what_is_settled_from_now_on_and_says_where_that_is(served: Served) -> None:
    await served.generate("a")
    watching = served.watch("o")
    assert dict(await watching.initial_metadata())["headrace-usage-sequence"] == "1"
    await served.generate("b")
    receipt = (await watching.read()).receipt
    assert (receipt.sequence, receipt.tenant) == (2, "basic")
    watching.cancel()


async def test_a_watch_ends_when_its_credentials_are_revoked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    watching, other = served.watch("a"), served.watch("o")
    await watching.initial_metadata()
    await other.initial_metadata()
    monkeypatch.delitem(PRINCIPALS, "a")
    monkeypatch.setitem(PRINCIPALS, "o", Principal("house"))
    assert (await refused(watching.read())).code() is grpc.StatusCode.UNAUTHENTICATED
    assert (await refused(other.read())).code() is grpc.StatusCode.UNAUTHENTICATED, "no operator any more"


async def test_a_watch_that_nobody_reads_holds_up_nobody(served: Served) -> None:
    idle = served.watch("o", after_sequence=0)
    await idle.initial_metadata()
    for _ in range(3):
        await asyncio.gather(*(served.generate("a") for _ in range(20)))
    reading = served.watch("o", after_sequence=0)
    assert [(await reading.read()).receipt.sequence for _ in range(60)] == list(range(1, 61))
    assert [(await idle.read()).receipt.sequence for _ in range(60)] == list(range(1, 61))
    idle.cancel()
    reading.cancel()


async def test_a_long_past_is_handed_over_in_pages(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.server.accounting.queries.SPAN", 3)
    await asyncio.gather(*(served.generate("ab"[i % 5 == 0]) for i in range(20)))
    watching = served.watch("a", after_sequence=0)
    sequences = [(await watching.read()).receipt.sequence for _ in range(16)]
    assert sequences == sorted(set(sequences))
    watching.cancel()


async def test_a_watch_ends_when_the_server_stops(served: Served) -> None:
    watching = served.watch("a")
    await watching.initial_metadata()
    stopping = asyncio.create_task(served.server.stop(30))
    error = await refused(watching.read())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(status_of(error))["ErrorInfo"].reason == "DRAINING"
    async with asyncio.timeout(10):
        await stopping


# --- GetBudget


async def test_a_budget_says_what_is_left_of_the_month(tmp_path: Path) -> None:
    async with serving(tmp_path, plans=PLAN, default_plan="free") as served:
        await served.generate("a")
        response = await served.usage.GetBudget(pb.GetBudgetRequest(), metadata=(("who", "a"),))
        [budget] = response.budgets
        assert (budget.tenant, budget.plan, response.currency) == ("acme", "free", "USD")
        assert not budget.HasField("key_id")
        money, tokens = budget.money_nanos, budget.tokens
        assert (money.limit, money.soft_limit, money.posted, money.held, money.left) == (
            1_000_000,
            500_000,
            10_000,
            0,
            990_000,
        )
        assert (tokens.limit, tokens.posted, tokens.left) == (500, 7, 493)
        assert not tokens.HasField("soft_limit")
        assert budget.resets_at.ToDatetime(UTC) == datetime(2026, 12, 1, tzinfo=UTC)
        request = pb.GetBudgetRequest(tenant="acme")
        assert (await served.usage.GetBudget(request, metadata=(("who", "o"),))).budgets == response.budgets
        served.clock.now = int(datetime(2026, 12, 1, tzinfo=UTC).timestamp()) * 10**9
        [december] = (await served.usage.GetBudget(pb.GetBudgetRequest(), metadata=(("who", "a"),))).budgets
        assert december.money_nanos.posted == 0


# --- ListPrices


async def prices(served: Served, who: str, **fields: Any) -> list[pb.ModelPrice]:
    response = await served.usage.ListPrices(pb.ListPricesRequest(**fields), metadata=(("who", who),))
    return list(response.prices)


async def test_prices_of_served_models_and_of_others_to_compare(served: Served) -> None:
    [letters] = await prices(served, "a", served_only=True)
    assert (letters.price_id, letters.provider, letters.model, letters.served) == (
        "p/letters",
        "scripted",
        "letters",
        True,
    )
    assert (letters.input_nanos, letters.output_nanos, letters.cache_read_input_nanos) == (
        10**9,
        2 * 10**9,
        250_000_000,
    )
    assert not letters.HasField("cache_write_input_nanos")
    assert not letters.HasField("effective_from")
    listed = await prices(served, "a")
    assert [(one.provider, one.model) for one in listed] == sorted((one.provider, one.model) for one in listed)
    gpt = {(one.provider, one.model): one for one in await prices(served, "a", name_contains="GPT-4o")}
    assert gpt["openai", "gpt-4o"].output_nanos == 10 * 10**9
    assert gpt["openai", "gpt-4o"].source.startswith("genai-prices ")
    assert all("gpt-4o" in model.lower() for _, model in gpt)
    assert not any(one.served for one in gpt.values())


async def test_prices_do_not_tell_of_models_that_the_caller_may_not_use(served: Served) -> None:
    assert "letters" not in {one.model for one in await prices(served, "m")}


# --- EstimateCost


async def test_an_estimate_bounds_what_a_call_then_costs(tmp_path: Path) -> None:
    async with serving(tmp_path, plans=PLAN, default_plan="free") as served:
        estimate = await served.estimate("a")
        assert (estimate.model, estimate.input_tokens, estimate.max_new_tokens) == ("letters", 4, 100)
        assert estimate.expected_output_tokens == 100, "nothing is known of what answers need"
        cost = estimate.cost
        assert (cost.currency, cost.price_id) == ("USD", "p/letters")
        assert (cost.minimum_nanos, cost.expected_nanos, cost.maximum_nanos) == (6000, 204_000, 204_000)
        assert estimate.fits
        assert not estimate.HasField("estimated")
        assert [budget.tokens.left for budget in estimate.budgets] == [500]
        spent = (await served.generate("a", stopping={"max_new_tokens": 100})).report.cost.charge_nanos
        assert cost.minimum_nanos <= spent <= cost.maximum_nanos
        assert (await served.get("a")).total.requests == 1, "estimates count for nothing"


async def test_an_estimate_follows_what_recent_answers_needed(tmp_path: Path) -> None:
    async with serving(tmp_path, scripts={"letters": {"answer": "Hi"}}) as served:
        answer = await served.generate("a", stopping={"max_new_tokens": 100})
        assert answer.report.usage.output_tokens == 3
        estimate = await served.estimate("a", n=2)
        assert estimate.expected_output_tokens == 6
        assert estimate.cost.minimum_nanos < estimate.cost.expected_nanos < estimate.cost.maximum_nanos
        at_least_90 = {"min_new_tokens": 90, "max_new_tokens": 100}
        assert (await served.estimate("a", stopping=at_least_90)).expected_output_tokens == 90


async def test_an_estimate_knows_what_is_cached_for_the_tenant(tmp_path: Path) -> None:
    async with serving(tmp_path, scripts={"letters": {}}) as served:
        text = "a" * 100
        assert (await served.estimate("a", text)).expected_cache_read_input_tokens == 0
        await served.generate("a", text)
        estimate = await served.estimate("a", text)
        cached = (await served.generate("a", text)).report.usage.cache_read_input_tokens
        assert estimate.expected_cache_read_input_tokens == cached > 0
        assert estimate.cost.minimum_nanos == (100 - cached) * 1000 + cached * 250 + 2000
        assert estimate.cost.maximum_nanos == 100_000 + 200_000
        assert (await served.estimate("b", text)).expected_cache_read_input_tokens == 0
        bypassed = {"prefix": generation_pb2.CACHE_MODE_BYPASS}
        assert (await served.estimate("a", text, cache=bypassed)).expected_cache_read_input_tokens == 0


async def test_an_estimate_says_whether_the_budget_would_let_the_call_run(tmp_path: Path) -> None:
    async with serving(tmp_path, plans=PLAN, default_plan="free") as served:
        assert (await served.estimate("a", stopping={"max_new_tokens": 496})).fits
        too_much = {"max_new_tokens": 497}
        assert not (await served.estimate("a", stopping=too_much)).fits
        clamped = await served.estimate("a", stopping=too_much, budget_policy="BUDGET_POLICY_CLAMP")
        assert clamped.fits
        error = await refused(served.generate("a", stopping=too_much))
        assert details_of(status_of(error))["QuotaFailure"].violations[0].subject == "tenant:acme"


async def test_an_estimate_refuses_what_a_generation_would(served: Served) -> None:
    error = await refused(served.estimate("a", sampling={"top_p": 2.0}))
    [violation] = details_of(status_of(error))["BadRequest"].field_violations
    assert violation.field == "spec.sampling.top_p"
    assert (await refused(served.estimate("a", model="other"))).code() is grpc.StatusCode.NOT_FOUND
    assert (await refused(served.estimate("m"))).code() is grpc.StatusCode.NOT_FOUND


async def test_a_model_without_a_price_is_estimated_as_far_as_can_be(served: Served) -> None:
    estimate = await served.estimate("a", model="whole")
    assert not estimate.HasField("cost")
    assert estimate.fits


async def test_where_nobody_can_count_an_estimate_rests_on_a_bound() -> None:
    async with tiny_serving(says()) as served:
        served.application.tokenizes = False
        table = {"id": "p", "currency": "USD", "models": {"tiny": {"input": 1, "output": 2}}}
        served.application.price_sources = [PriceTable(TableOptions.model_validate(table))]
        stub: Any = accounting_pb2_grpc.UsageServiceStub(served.channel)
        spec = generation_pb2.GenerationSpec(text="x" * 100)
        estimate = await stub.EstimateCost(pb.EstimateCostRequest(spec=spec))
    assert estimate.estimated
    assert estimate.input_tokens >= 100, "each byte may be a token"
    cost = estimate.cost
    assert cost.minimum_nanos == 2000, "one token of output, and nobody knows how few of input"
    assert cost.expected_nanos == estimate.input_tokens // 4 * 1000 + 10 * 2000
    assert cost.maximum_nanos == estimate.input_tokens * 1000 + 10 * 2000


# --- without a ledger


async def test_without_a_ledger_only_prices_and_estimates_are_answered(tmp_path: Path) -> None:
    async with serving(tmp_path, ledger=None) as served:
        metadata = (("who", "a"),)
        for asking in (
            served.get("a"),
            served.usage.GetReceipt(pb.GetReceiptRequest(request_id="x"), metadata=metadata),
            served.usage.GetBudget(pb.GetBudgetRequest(), metadata=metadata),
            served.watch("a").read(),
        ):
            error = await refused(asking)
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert details_of(status_of(error))["ErrorInfo"].reason == "NO_LEDGER"
        assert await prices(served, "a", served_only=True)
        estimate = await served.estimate("a")
        assert estimate.cost.maximum_nanos == 204_000
        assert (estimate.fits, list(estimate.budgets)) == (True, [])


async def test_credentials_come_first(served: Served) -> None:
    for asking in (served.get("?", group_by=[1]), served.watch("?").read(), served.estimate("?")):
        assert (await refused(asking)).code() is grpc.StatusCode.UNAUTHENTICATED


# --- models


async def test_models_show_their_price_and_how_fast_recent_calls_were(served: Served) -> None:
    metadata = (("who", "a"),)

    async def model(name: str) -> models_pb2.Model:
        return (await served.models.GetModel(models_pb2.GetModelRequest(name=name), metadata=metadata)).model

    assert not (await model("whole")).HasField("measured_speed")
    await served.generate("a")
    await served.generate("a", model="whole")
    letters, whole = await model("letters"), await model("whole")
    assert letters.price.price_id == "p/letters"
    assert letters.price.served
    assert not whole.HasField("price")
    assert not whole.HasField("measured_speed"), "its backend says nothing of times"
    speed = letters.measured_speed
    assert speed.decode_tokens_per_second > 0
    assert 0 < speed.time_to_first_token_p50.ToNanoseconds() <= speed.time_to_first_token_p99.ToNanoseconds()
