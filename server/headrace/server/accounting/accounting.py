"""What the rest of the server needs of accounting, in one hand."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.server.accounting.accounts import Accounts
from headrace.server.accounting.clock import Clock
from headrace.server.accounting.expectations import Expectations
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.prices import Prices


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """Who may use what, what that costs, and where it is written down."""

    clock: Clock
    accounts: Accounts
    prices: Prices
    expectations: Expectations
    ledger: Ledger | None
    """``None``: the operator wants none."""
