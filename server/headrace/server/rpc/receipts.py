"""What the ledger says, as messages."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from headrace.server.accounting import queries
from headrace.server.accounting.admission import Balance
from headrace.server.accounting.clock import month_end
from headrace.server.accounting.plans import Limits
from headrace.server.accounting.queries import Dimension
from headrace.server.accounting.records import Account
from headrace.server.rpc.answer import usage_message
from headrace.v1 import accounting_pb2 as pb
from headrace.v1 import usage_pb2


def totals_message(totals: queries.Totals, *, show_costs: bool) -> pb.UsageTotals:
    """``show_costs``: whether the caller may know what providers bill."""
    message = pb.UsageTotals(**{name: getattr(totals, name) for name in queries.COUNTS})
    if show_costs and totals.cost_nanos is not None:
        message.cost_nanos = totals.cost_nanos
    return message


def row_message(row: queries.UsageRow, *, show_costs: bool) -> pb.UsageRow:
    return pb.UsageRow(
        tenant=row.group.get(Dimension.TENANT),
        key_id=row.group.get(Dimension.KEY),
        model=row.group.get(Dimension.MODEL),
        day=row.group.get(Dimension.DAY),
        totals=totals_message(row.totals, show_costs=show_costs),
    )


def receipt_message(receipt: queries.Receipt, *, currency: str, show_costs: bool) -> pb.Receipt:
    """What only a settled call has stays unset while it runs."""
    message = pb.Receipt(
        id=receipt.id,
        sequence=receipt.sequence,
        request_id=receipt.request_id,
        state=f"RECEIPT_STATE_{receipt.state.name}",
        tenant=receipt.tenant,
        key_id=receipt.key or None,
        model=receipt.model,
        outcome=None if receipt.outcome is None else f"ATTEMPT_OUTCOME_{receipt.outcome.name}",
        usage=None if receipt.usage is None else usage_message(receipt.usage),
        held_nanos=receipt.held_nanos,
        held_tokens=receipt.held_tokens,
        held_at=timestamp(receipt.held_at),
        settled_at=None if receipt.settled_at is None else timestamp(receipt.settled_at),
    )
    if receipt.price_id is not None:
        message.cost.CopyFrom(_cost_message(receipt, receipt.price_id, currency, show_costs=show_costs))
    if receipt.recovered:
        message.recovered = True
    if receipt.is_hit:
        message.cache_hit = True
    return message


def budget_message(account: Account, limits: Limits, balance: Balance, *, plan: str | None, month: str) -> pb.Budget:
    """``plan`` is the tenant's; a key's limits are its own."""
    allowance = limits.allowance()
    return pb.Budget(
        tenant=account.tenant,
        key_id=account.key or None,
        plan=None if account.key else plan,
        money_nanos=_allowance(allowance.nanos, allowance.soft_nanos, balance.posted_nanos, balance.held_nanos),
        tokens=_allowance(allowance.tokens, allowance.soft_tokens, balance.posted_tokens, balance.held_tokens),
        resets_at=timestamp(month_end(month)),
    )


def timestamp(at: int) -> Timestamp:
    """``at`` is in nanoseconds since the epoch."""
    message = Timestamp()
    message.FromNanoseconds(at)
    return message


def _allowance(limit: int | None, soft_limit: int | None, posted: int, held: int) -> pb.Allowance:
    left = None if limit is None else max(0, limit - posted - held)
    return pb.Allowance(limit=limit, soft_limit=soft_limit, posted=posted, held=held, left=left)


def _cost_message(receipt: queries.Receipt, price_id: str, currency: str, *, show_costs: bool) -> usage_pb2.Cost:
    message = usage_pb2.Cost(currency=currency, charge_nanos=receipt.charge_nanos, price_id=price_id)
    if show_costs and receipt.cost_nanos is not None:
        message.cost_nanos = receipt.cost_nanos
    if receipt.usage is not None and receipt.usage.estimated:
        message.estimated = True
    return message
