"""What the Python clients say of usage, receipts, budgets, prices and estimates, before a real server with a ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from headrace.client import (
    AnswerExpiredError,
    AsyncClient,
    BudgetHeldError,
    BudgetSpentError,
    Client,
    HeadraceError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RateLimitedError,
    Receipt,
    ReceiptState,
    UnavailableError,
)
from headrace.client.errors import ERROR_BY_REASON
from headrace.server.rpc.status import TABLE
from tests.rpc.usage_kit import PLAN, Served, serving
from tests.server.server_kit import until
from tests.tcp_proxy import CuttingProxy


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, plans=PLAN, default_plan="free") as running:
        yield running


def client(served: Served, who: str = "a", **options: Any) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{served.server.port}", metadata=(("who", who),), **options)


async def both(served: Served, ask: Callable[[Any], Any], who: str = "a") -> Any:
    """What both clients get, which is the same."""

    def sync() -> Any:
        with Client(f"127.0.0.1:{served.server.port}", metadata=(("who", who),)) as one:
            return ask(one)

    async with client(served, who) as one:
        found = await ask(one)
    assert await asyncio.to_thread(sync) == found
    return found


async def test_usage_is_reported_by_group(served: Served) -> None:
    await served.generate("a")
    report = await both(served, lambda one: one.get_usage(["model", "day"], first_day=date(2026, 11, 1)))
    assert [(row.model, row.day, row.tenant) for row in report.rows] == [("letters", "2026-11-23", None)]
    assert (report.total.requests, report.total.charge, report.total.cost) == (1, Decimal("0.00001"), None)
    assert report.currency == "USD"
    assert (await both(served, lambda one: one.get_usage("tenant", tenant="acme"), "o")).rows[0].tenant == "acme"
    with pytest.raises(ValueError, match="by: 'week' is not a valid UsageDimension; there is tenant, key, model, day"):
        await both(served, lambda one: one.get_usage("week"))
    with pytest.raises(InvalidArgumentError) as caught:
        await both(served, lambda one: one.get_usage(last_day="today"))
    assert caught.value.violations[0].field == "last_day"
    with pytest.raises(PermissionDeniedError):
        await both(served, lambda one: one.get_usage(tenant="basic"))


async def test_a_receipt_is_found_by_the_request_id(served: Served) -> None:
    await served.generate("a", request_id="mine")
    [receipt] = await both(served, lambda one: one.get_receipt("mine"))
    assert (receipt.state, receipt.model, receipt.sequence) == (ReceiptState.POSTED, "letters", 1)
    assert receipt.cost is not None
    assert receipt.usage is not None
    assert (receipt.cost.charge, receipt.held, receipt.usage.output_tokens) == (
        Decimal("0.00001"),
        Decimal("0.00001"),
        3,
    )
    assert receipt.held_at == datetime(2026, 11, 23, 12, tzinfo=UTC)
    with pytest.raises(NotFoundError):
        await both(served, lambda one: one.get_receipt("other"))


async def test_a_budget_is_given_in_units_and_in_nanos(served: Served) -> None:
    await served.generate("a")
    [budget] = await both(served, lambda one: one.get_budget())
    assert (budget.tenant, budget.plan, budget.currency) == ("acme", "free", "USD")
    assert budget.money.left == Decimal("0.00099")
    assert (budget.money_nanos.left, budget.tokens.left, budget.tokens.soft_limit) == (990_000, 493, None)
    assert budget.resets_at == datetime(2026, 12, 1, tzinfo=UTC)


async def test_prices_are_listed(served: Served) -> None:
    [price] = await both(served, lambda one: one.list_prices(served_only=True))
    assert (price.input, price.output, price.cache_read_input) == (1, 2, Decimal("0.25"))
    assert (price.cache_write_input, price.effective_from, price.served) == (None, None, True)
    found = await both(served, lambda one: one.list_prices("gpt-4.1"))
    assert Decimal(2) in [price.input for price in found if (price.provider, price.model) == ("openai", "gpt-4.1")]


async def test_a_cost_is_estimated_with_the_arguments_of_generate(served: Served) -> None:
    estimate = await both(served, lambda one: one.estimate_cost("four", max_new_tokens=50, n=2, model="letters"))
    assert (estimate.input_tokens, estimate.max_new_tokens, estimate.fits) == (4, 50, True)
    assert estimate.cost is not None
    assert (estimate.cost.minimum, estimate.cost.maximum) == (Decimal("0.000008"), Decimal("0.000204"))
    assert estimate.budgets[0].tokens.left == 500
    assert estimate.budgets[0].currency == "USD"


async def test_models_have_their_price(served: Served) -> None:
    model = await both(served, lambda one: one.get_model("letters"))
    assert model.price is not None
    assert model.price.price_id == "p/letters"


# --- watching


async def test_a_watch_gives_receipts_until_it_is_closed(served: Served) -> None:
    await served.generate("a")
    async with client(served) as one, one.watch_usage(after_sequence=0) as receipts:
        assert (await anext(receipts)).sequence == 1
        await served.generate("a")
        assert (await anext(receipts)).sequence == receipts.sequence == 2

    def sync() -> list[Receipt]:
        with (
            Client(f"127.0.0.1:{served.server.port}", metadata=(("who", "a"),)) as one,
            one.watch_usage(after_sequence=0) as receipts,
        ):
            return [next(receipts), next(receipts)]

    assert [receipt.sequence for receipt in await asyncio.to_thread(sync)] == [1, 2]


async def test_a_watch_goes_on_over_connections_that_break_without_gap_or_repeat(served: Served) -> None:
    async with CuttingProxy(served.server.port) as proxy:
        one = AsyncClient(f"127.0.0.1:{proxy.port}", metadata=(("who", "a"),))
        async with one, one.watch_usage() as receipts:
            reading = asyncio.create_task(anext(receipts))
            async with asyncio.timeout(10):
                while receipts.sequence is None:  # noqa: ASYNC110  # nothing tells when it has begun
                    await asyncio.sleep(0.005)
            seen = []
            for _ in range(4):
                proxy.cut_all()
                await served.generate("a")
                seen.append((await reading).sequence)
                reading = asyncio.create_task(anext(receipts))
            reading.cancel()
            assert seen == [1, 2, 3, 4]


async def test_a_watch_gives_up_on_a_server_that_stays_away(served: Served) -> None:
    one = client(served, max_resumptions=1)
    async with one, one.watch_usage(after_sequence=0) as receipts:
        reading = asyncio.create_task(anext(receipts))
        await served.server.stop(0)
        with pytest.raises(UnavailableError):
            await reading


async def test_a_watch_that_may_not_be_is_refused(served: Served) -> None:
    async with client(served) as one, one.watch_usage(tenant="basic") as receipts:
        with pytest.raises(PermissionDeniedError):
            await anext(receipts)


# --- errors and trailers


async def test_a_call_beyond_a_soft_limit_is_warned_in_every_kind_of_answer(served: Served) -> None:
    options: dict[str, Any] = {"model": "letters", "max_new_tokens": 300}

    def sync() -> tuple[str, ...]:
        with Client(f"127.0.0.1:{served.server.port}", metadata=(("who", "a"),)) as one:
            assert one.generate("four", model="letters", max_new_tokens=1).budget_warnings == ()
            return one.generate("four", **options).budget_warnings

    assert await asyncio.to_thread(sync) == ("tenant:acme",)

    def sync_stream() -> tuple[str, ...]:
        with (
            Client(f"127.0.0.1:{served.server.port}", metadata=(("who", "b"),)) as one,
            one.stream("four", **options) as stream,
        ):
            assert list(stream)
            return stream.budget_warnings

    assert await asyncio.to_thread(sync_stream) == ("tenant:basic",)
    async with client(served, "o") as one, one.stream("four", **options) as stream:
        assert [event async for event in stream]
        assert stream.budget_warnings == ("tenant:house",)
        assert not stream.replayed


async def test_a_spent_budget_is_an_error_of_its_own_says_whose_and_is_not_tried_again(served: Served) -> None:
    with capture_logs() as logs:
        async with client(served) as one:
            with pytest.raises(BudgetSpentError) as caught:
                await one.generate("four", model="letters", max_new_tokens=4000)
        # The status is sent before the line is written.
        await until(lambda: any(entry["event"] == "call_finished" for entry in logs))
    assert [entry["error_type"] for entry in logs if entry["event"] == "call_finished"] == ["BUDGET_SPENT"]
    assert (caught.value.subject, caught.value.retry_after) == ("tenant:acme", None)
    assert isinstance(caught.value, OverloadedError)
    assert "has 500 tokens left" in str(caught.value) or "USD left" in str(caught.value)


def test_every_reason_with_an_error_of_its_own_is_one_of_the_servers() -> None:
    codes = {row.reason: row.code for row in TABLE.values()}
    from headrace.client.errors import ERROR_BY_CODE

    for reason, error in ERROR_BY_REASON.items():
        assert issubclass(error, ERROR_BY_CODE[codes[reason]])
    assert set(ERROR_BY_REASON.values()) == {AnswerExpiredError, BudgetHeldError, BudgetSpentError, RateLimitedError}


def test_an_error_of_another_domain_is_one_of_its_code() -> None:
    from google.protobuf import any_pb2
    from google.rpc import error_details_pb2

    from headrace.client import errors
    from headrace.v1 import generation_pb2

    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason="BUDGET_SPENT", domain="elsewhere"))
    error = errors.from_item(
        generation_pb2.Error(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], details=[packed]), None
    )
    assert type(error) is OverloadedError
    assert isinstance(error, HeadraceError)
    assert error.subject is None
