"""What a ledger must do, in as few lines as it takes: no database, no groups, no crashes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from headrace.server.accounting.records import Account, HoldRequest

HELD, SPENT = "held", "spent"


@dataclass
class Open:
    """A hold."""

    accounts: tuple[Account, ...]
    month: str
    nanos: int
    tokens: int
    machine: str
    owner: str
    expires_at: int
    noted: tuple[int, int] | None = None
    """Nanos and tokens that it would be settled with if its server were killed now."""


@dataclass
class ReferenceLedger:
    """Money and tokens, by account and month."""

    posted: dict[tuple[Account, str], tuple[int, int]] = field(default_factory=lambda: defaultdict(lambda: (0, 0)))
    open: dict[str, Open] = field(default_factory=dict)
    settled: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By hold, what it was settled with; nothing if it was voided."""

    def held(self, account: Account, month: str) -> tuple[int, int]:
        of = [one for one in self.open.values() if account in one.accounts and one.month == month]
        return sum(one.nanos for one in of), sum(one.tokens for one in of)

    def decide(self, request: HoldRequest, month: str) -> int | str:
        """The new tokens that may be held, or why it is refused."""
        most, least = request.worst_case.max_new_tokens, request.least_new_tokens
        lengths = range(most, (most if least is None else min(least, most)) - 1, -1)
        reasons = [self._refusal(request, month, length) for length in lengths]
        return next((length for length, no in zip(lengths, reasons, strict=True) if no is None), reasons[-1] or HELD)

    def _refusal(self, request: HoldRequest, month: str, length: int) -> str | None:
        price = request.worst_case.price
        assert price is not None
        tokens = request.worst_case.input_tokens + length
        nanos = (request.worst_case.input_tokens * price.input_nanos + length * price.output_nanos) // 10**6
        refusals = set()
        for account, limits in request.allowances:
            posted, held = self.posted[account, month], self.held(account, month)
            for limit, used, others, need in zip(
                (limits.nanos, limits.tokens), posted, held, (nanos, tokens), strict=True
            ):
                if limit is not None and used + others + need > limit:
                    refusals.add(SPENT if used + need > limit else HELD)
        return SPENT if SPENT in refusals else HELD if refusals else None

    def settle(self, hold_id: str, used: tuple[int, int]) -> None:
        one = self.open.pop(hold_id, None)
        if one is None:
            return  # it had expired
        self.settled[hold_id] = used
        for account in one.accounts:
            nanos, tokens = self.posted[account, one.month]
            self.posted[account, one.month] = (nanos + used[0], tokens + used[1])
