"""Whether a call may run: a pure function over the balances of its accounts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from headrace.backends.errors import BudgetHeld, BudgetSpent
from headrace.server.accounting.charges import WorstCase
from headrace.server.accounting.clock import month_end
from headrace.server.accounting.records import Account, Allowance, HoldRequest

RETRY_SECONDS = 1.0
"""After which a call may try again whose budget is held by others."""


@dataclass(slots=True)
class Balance:
    """Of an account in a month."""

    posted_nanos: int = 0
    posted_tokens: int = 0
    held_nanos: int = 0
    held_tokens: int = 0


Allowances = Sequence[tuple[Account, Allowance]]


class Need(Protocol):
    """What has to fit."""

    @property
    def nanos(self) -> int: ...

    @property
    def tokens(self) -> int: ...


def check(allowances: Allowances, balances: Sequence[Balance], need: Need, *, month: str, currency: str) -> None:
    """Raises BudgetSpent or BudgetHeld unless ``posted + held + need <= limit`` for money and tokens of each allowance,
    whose balances are given in their order.
    """
    if not _fits(allowances, balances, need.nanos, need.tokens):
        raise _refusal(allowances, balances, need, month, currency)


def admit(
    request: HoldRequest, balances: Sequence[Balance], *, month: str, currency: str
) -> tuple[WorstCase, tuple[Account, ...]]:
    """What may be held for a call: its worst case, or one of as many new tokens as fit if it has ``least_new_tokens``.
    And the accounts that this brings beyond a soft limit. ``balances`` are those of the request's allowances, in their
    order. Raises BudgetSpent or BudgetHeld.

    ``posted + held + worst case <= limit`` is true of what it returns, for money and tokens of each allowance.
    """
    worst_case = request.worst_case
    nanos, tokens = worst_case.nanos, worst_case.tokens
    if not _fits(request.allowances, balances, nanos, tokens):
        worst_case = _lowered(request, balances, month, currency)
        nanos, tokens = worst_case.nanos, worst_case.tokens
    exceeded = tuple(
        account
        for (account, allowance), balance in zip(request.allowances, balances, strict=True)
        if _beyond(allowance.soft_nanos, balance.posted_nanos + balance.held_nanos + nanos)
        or _beyond(allowance.soft_tokens, balance.posted_tokens + balance.held_tokens + tokens)
    )
    return worst_case, exceeded


def _lowered(request: HoldRequest, balances: Sequence[Balance], month: str, currency: str) -> WorstCase:
    """The worst case of the most new tokens that fit, where not all do."""
    whole, least = request.worst_case, request.least_new_tokens
    if least is None or least >= whole.max_new_tokens:
        raise _refusal(request.allowances, balances, whole, month, currency)

    def is_too_long(length: int) -> bool:
        tried = replace(whole, max_new_tokens=length)
        return not _fits(request.allowances, balances, tried.nanos, tried.tokens)

    if is_too_long(least):
        raise _refusal(request.allowances, balances, replace(whole, max_new_tokens=least), month, currency)
    # What a worst case takes never falls with its tokens, so the first that does not fit ends those that do.
    lengths = range(least, whole.max_new_tokens + 1)
    return replace(whole, max_new_tokens=lengths[bisect_left(lengths, True, key=is_too_long) - 1])


def left(allowances: Allowances, balances: Sequence[Balance]) -> tuple[int | None, int | None]:
    """What the narrowest limits leave: of money in nano-units, and of tokens. ``None``: there is no limit."""
    nanos = [
        allowance.nanos - balance.posted_nanos - balance.held_nanos
        for (_, allowance), balance in zip(allowances, balances, strict=True)
        if allowance.nanos is not None
    ]
    tokens = [
        allowance.tokens - balance.posted_tokens - balance.held_tokens
        for (_, allowance), balance in zip(allowances, balances, strict=True)
        if allowance.tokens is not None
    ]
    return min(nanos, default=None), min(tokens, default=None)


def _beyond(limit: int | None, used: int) -> bool:
    return limit is not None and used > limit


def _fits(allowances: Allowances, balances: Sequence[Balance], nanos: int, tokens: int) -> bool:
    for (_, allowance), balance in zip(allowances, balances, strict=True):
        if _beyond(allowance.nanos, balance.posted_nanos + balance.held_nanos + nanos) or _beyond(
            allowance.tokens, balance.posted_tokens + balance.held_tokens + tokens
        ):
            return False
    return True


def _refusal(
    allowances: Allowances, balances: Sequence[Balance], need: Need, month: str, currency: str
) -> BudgetSpent | BudgetHeld:
    """Why it does not fit. What would stay so without other calls' holds comes first."""
    held: BudgetHeld | None = None
    for (account, allowance), balance in zip(allowances, balances, strict=True):
        for limit, posted, others, needed, money in _sides(allowance, balance, need):
            if limit is None or posted + others + needed <= limit:
                continue
            unit = currency if money else "tokens"
            whose = f"the monthly budget of {account.subject}"
            could_need = f"this call could need {_amount(needed, money)} {unit}"
            if posted + needed > limit:
                ends = datetime.fromtimestamp(month_end(month) // 10**9, UTC)
                return BudgetSpent(
                    f"{whose} has {_amount(max(limit - posted, 0), money)} {unit} left, and {could_need}; "
                    f"the month ends at {ends:%Y-%m-%dT%H:%M:%SZ}",
                    subject=account.subject,
                )
            held = held or BudgetHeld(
                f"{whose} has {_amount(limit - posted, money)} {unit} left, of which {_amount(others, money)} are held "
                f"for calls that run, and {could_need}; try again when some have ended",
                subject=account.subject,
                retry_after=RETRY_SECONDS,
            )
    assert held is not None, "it fits. This is a bug"
    return held


def _sides(allowance: Allowance, balance: Balance, need: Need) -> tuple[tuple[int | None, int, int, int, bool], ...]:
    """Of money, then of tokens: the limit, what is posted, what is held, what is needed, whether it is money."""
    return (
        (allowance.nanos, balance.posted_nanos, balance.held_nanos, need.nanos, True),
        (allowance.tokens, balance.posted_tokens, balance.held_tokens, need.tokens, False),
    )


def _amount(count: int, money: bool) -> str:
    """Money in units of the currency, without the zeros at its end."""
    if not money:
        return str(count)
    units, rest = divmod(count, 10**9)
    return f"{units}.{rest:09}".rstrip("0").rstrip(".")
