"""From the messages of UsageService to the types of this package."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from headrace.client import convert, usage_types
from headrace.client.convert import named, optional
from headrace.client.types import AttemptOutcome
from headrace.v1 import accounting_pb2 as pb


def usage_report(message: pb.GetUsageResponse) -> usage_types.UsageReport:
    return usage_types.UsageReport(
        rows=tuple(
            usage_types.UsageRow(
                tenant=optional(row, "tenant"),
                key_id=optional(row, "key_id"),
                model=optional(row, "model"),
                day=optional(row, "day"),
                totals=_totals(row.totals),
            )
            for row in message.rows
        ),
        total=_totals(message.total),
        currency=message.currency,
    )


def receipt(message: pb.Receipt) -> usage_types.Receipt:
    return usage_types.Receipt(
        id=message.id,
        sequence=optional(message, "sequence"),
        request_id=message.request_id,
        state=named(usage_types.ReceiptState, message, "state"),
        tenant=message.tenant,
        key_id=optional(message, "key_id"),
        model=message.model,
        outcome=named(AttemptOutcome, message, "outcome") if message.HasField("outcome") else None,
        usage=convert.usage(message.usage) if message.HasField("usage") else None,
        cost=convert.cost(message.cost) if message.HasField("cost") else None,
        held_nanos=message.held_nanos,
        held_tokens=message.held_tokens,
        held_at=_time(message.held_at),
        settled_at=_time(message.settled_at) if message.HasField("settled_at") else None,
        recovered=optional(message, "recovered"),
        cache_hit=optional(message, "cache_hit"),
    )


def receipts(message: pb.GetReceiptResponse) -> tuple[usage_types.Receipt, ...]:
    return tuple(map(receipt, message.receipts))


def budgets(message: pb.GetBudgetResponse) -> tuple[usage_types.Budget, ...]:
    return tuple(_budget(budget, message.currency) for budget in message.budgets)


def estimate(message: pb.EstimateCostResponse) -> usage_types.CostEstimate:
    cost = None
    if message.HasField("cost"):
        cost = usage_types.CostRange(
            currency=message.cost.currency,
            price_id=message.cost.price_id,
            minimum_nanos=message.cost.minimum_nanos,
            expected_nanos=message.cost.expected_nanos,
            maximum_nanos=message.cost.maximum_nanos,
        )
    return usage_types.CostEstimate(
        model=message.model,
        input_tokens=message.input_tokens,
        expected_cache_read_input_tokens=message.expected_cache_read_input_tokens,
        max_new_tokens=message.max_new_tokens,
        expected_output_tokens=message.expected_output_tokens,
        cost=cost,
        budgets=tuple(_budget(budget, cost.currency if cost else None) for budget in message.budgets),
        fits=message.fits,
        estimated=optional(message, "estimated"),
    )


def _totals(message: pb.UsageTotals) -> usage_types.UsageTotals:
    return usage_types.UsageTotals(
        requests=message.requests,
        cancelled_requests=message.cancelled_requests,
        failed_requests=message.failed_requests,
        cached_requests=message.cached_requests,
        input_tokens=message.input_tokens,
        cache_read_input_tokens=message.cache_read_input_tokens,
        cache_write_input_tokens=message.cache_write_input_tokens,
        output_tokens=message.output_tokens,
        reasoning_output_tokens=message.reasoning_output_tokens,
        charge_nanos=message.charge_nanos,
        cost_nanos=optional(message, "cost_nanos"),
    )


def _budget(message: pb.Budget, currency: str | None) -> usage_types.Budget:
    return usage_types.Budget(
        tenant=message.tenant,
        key_id=optional(message, "key_id"),
        plan=optional(message, "plan"),
        currency=currency,
        money_nanos=_allowance(message.money_nanos),
        tokens=_allowance(message.tokens),
        resets_at=_time(message.resets_at),
    )


def _allowance(message: pb.Allowance) -> usage_types.Allowance:
    return usage_types.Allowance(
        limit=optional(message, "limit"),
        soft_limit=optional(message, "soft_limit"),
        posted=message.posted,
        held=message.held,
        left=optional(message, "left"),
    )


def _time(message: Any) -> datetime:
    moment: datetime = message.ToDatetime(tzinfo=UTC)
    return moment
