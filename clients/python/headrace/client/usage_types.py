"""What UsageService gives: usage, receipts, budgets, estimates.

The fields are those of the proto (``headrace/v1/accounting.proto``), where their meaning is written down. Money comes
in whole billionths of the currency's unit (``…_nanos``), and beside them as an exact ``Decimal`` in that unit.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from headrace.client.types import AttemptOutcome, Cost, Usage, in_units


class UsageDimension(enum.StrEnum):
    """What usage can be told apart by."""

    TENANT = "tenant"
    KEY = "key"
    MODEL = "model"
    DAY = "day"


class ReceiptState(enum.StrEnum):
    """How far a call has come in the ledger."""

    HELD = "held"
    POSTED = "posted"
    VOIDED = "voided"


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageTotals:
    """Sums over settled calls."""

    requests: int
    cancelled_requests: int
    failed_requests: int
    cached_requests: int
    input_tokens: int
    cache_read_input_tokens: int
    cache_write_input_tokens: int
    output_tokens: int
    reasoning_output_tokens: int
    charge_nanos: int
    cost_nanos: int | None = None

    @property
    def charge(self) -> Decimal:
        """What the tenant pays."""
        return in_units(self.charge_nanos)

    @property
    def cost(self) -> Decimal | None:
        """What providers bill the operator, where that is known and the caller's to see."""
        return in_units(self.cost_nanos)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """The usage of one group. A dimension that was not asked for is ``None``; the key ``""`` is no key at all."""

    tenant: str | None = None
    key_id: str | None = None
    model: str | None = None
    day: str | None = None
    totals: UsageTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    """The answer of ``get_usage``."""

    rows: tuple[UsageRow, ...]
    total: UsageTotals
    currency: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a call used and costs. While it runs, ``sequence``, ``usage``, ``cost`` and the like are ``None``."""

    id: str
    sequence: int | None = None
    request_id: str
    state: ReceiptState | None
    tenant: str
    key_id: str | None = None
    model: str
    outcome: AttemptOutcome | None = None
    usage: Usage | None = None
    cost: Cost | None = None
    held_nanos: int
    held_tokens: int
    held_at: datetime
    settled_at: datetime | None = None
    recovered: bool | None = None
    cache_hit: bool | None = None

    @property
    def held(self) -> Decimal:
        """What the call could have cost at most."""
        return in_units(self.held_nanos)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How much of one thing may be used in this month, and was."""

    limit: int | None = None
    soft_limit: int | None = None
    posted: int
    held: int
    left: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoneyAllowance:
    """The same of money, in the currency's unit."""

    limit: Decimal | None
    soft_limit: Decimal | None
    posted: Decimal
    held: Decimal
    left: Decimal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be spent in this month, of a tenant or of one of its keys."""

    tenant: str
    key_id: str | None = None
    plan: str | None = None
    currency: str | None = None
    """``None``: the answer does not say (that of ``estimate_cost`` has it beside the cost)."""
    money_nanos: Allowance
    tokens: Allowance
    resets_at: datetime

    @property
    def money(self) -> MoneyAllowance:
        nanos = self.money_nanos
        return MoneyAllowance(
            limit=in_units(nanos.limit),
            soft_limit=in_units(nanos.soft_limit),
            posted=in_units(nanos.posted),
            held=in_units(nanos.held),
            left=in_units(nanos.left),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRange:
    """What a request can cost."""

    currency: str
    price_id: str
    minimum_nanos: int
    expected_nanos: int
    maximum_nanos: int

    @property
    def minimum(self) -> Decimal:
        return in_units(self.minimum_nanos)

    @property
    def expected(self) -> Decimal:
        return in_units(self.expected_nanos)

    @property
    def maximum(self) -> Decimal:
        return in_units(self.maximum_nanos)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEstimate:
    """The answer of ``estimate_cost``. ``cost`` is ``None`` where nobody has a price for the model."""

    model: str
    input_tokens: int
    expected_cache_read_input_tokens: int
    max_new_tokens: int
    expected_output_tokens: int
    cost: CostRange | None = None
    budgets: tuple[Budget, ...] = ()
    fits: bool
    estimated: bool | None = None
