"""Holds what a call can cost at most before it runs, and settles what it did cost when it is over, however it ends."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

from headrace.backends.types import (
    Attempt,
    AttemptOutcome,
    Call,
    ChoiceFinish,
    Delta,
    Event,
    Events,
    FinishReason,
    Handler,
)
from headrace.server.accounting.accounting import Accounting
from headrace.server.accounting.accounts import Terms
from headrace.server.accounting.bounds import max_format_tokens, max_input_tokens
from headrace.server.accounting.charges import Rates, WorstCase, billed_nanos, billed_usage, cost_of
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.prices import Priced
from headrace.server.accounting.records import Hold, HoldRequest, Settlement
from headrace.server.middleware.limits import RateLimits


def account(inner: Handler, *, accounting: Accounting, limits: RateLimits) -> Handler:
    """Sets ``call.meter.cost`` when a call of ``inner`` is over, by the price that held when it began. Raises
    RateLimited, BudgetSpent, BudgetHeld or LedgerUnavailable before anything is used.
    """
    ledger = accounting.ledger

    async def handle(call: Call) -> Events:
        terms = accounting.accounts.terms(call.principal)
        rates = rates_of(call, accounting)
        worst_case = worst_case_of(call, rates)
        limits.take_tokens(terms, worst_case.tokens)
        book, outcome = None, AttemptOutcome.CANCELLED
        try:
            if ledger is not None:
                book = _Book(call, ledger, await ledger.hold(hold_request_of(call, worst_case, terms)), rates)
            async with aclosing(inner(call)) as events:
                async for event in events:
                    yield event if book is None else book.noted(event)
            outcome = AttemptOutcome.COMPLETED
        except Exception:
            outcome = AttemptOutcome.FAILED
            raise
        finally:
            call.meter.cost = cost_of(call.meter.attempts, rates)
            if book is not None:
                book.settle(outcome)
            usage = billed_usage(call.meter.attempts)
            limits.give_back(terms, worst_case.tokens - (usage.input_tokens or 0) - (usage.output_tokens or 0))
        if worst_case.max_new_tokens:
            allowed = worst_case.n * worst_case.max_new_tokens
            accounting.expectations.note(_model_name(call), usage.output_tokens or 0, allowed)

    return handle


def rates_of(call: Call, accounting: Accounting) -> Rates:
    """What it costs now, wherever ``call`` may go."""
    now, charged, costs = accounting.clock(), {}, {}
    for target in call.targets:
        priced = Priced.of(target.model.backend, target.model.card)
        if (price := accounting.prices.price(priced, now)) is not None:
            charged[priced.model] = price
        if (cost := accounting.prices.cost(priced, now)) is not None:
            costs[priced.model] = cost
    return Rates(charged, costs)


def worst_case_of(call: Call, rates: Rates) -> WorstCase:
    """What ``call``, which has its targets and its tokens, can use at most, wherever it goes."""
    request = call.request
    return WorstCase(
        input_tokens=max(
            max_input_tokens(request.input) + max_format_tokens(request.output_format)
            if target.model.tokenizer is None
            else target.num_input_tokens
            for target in call.targets
        ),
        n=call.request.n,
        max_new_tokens=max(target.max_new_tokens for target in call.targets),
        price=rates.dearest(),
    )


def hold_request_of(call: Call, worst_case: WorstCase, terms: Terms) -> HoldRequest:
    """What ``call`` asks the ledger for before it runs."""
    least = max(1, call.request.stopping.min_new_tokens) if call.request.clamp_to_budget else None
    return HoldRequest(
        tenant=call.principal.tenant,
        key=call.principal.key,
        model=_model_name(call),
        request_id=call.request_id,
        worst_case=worst_case,
        least_new_tokens=least,
        allowances=tuple((account, limits.allowance()) for account, limits in terms),
    )


class _Book:
    """What the ledger is told of a call for which its worst case is held."""

    def __init__(self, call: Call, ledger: Ledger, hold: Hold, rates: Rates) -> None:
        self._call, self._ledger, self._hold, self._rates = call, ledger, hold, rates
        self._clamped = _clamp(call, hold.worst_case.max_new_tokens)
        call.meter.warnings = tuple(account.subject for account in hold.soft_limits_exceeded)

    def noted(self, event: Event) -> Event:
        """The event, as it is handed over next: a kill loses nothing that a caller has seen."""
        if isinstance(event, Delta):
            if self._call.is_streamed:
                self._note()
        elif (
            self._clamped
            and isinstance(event, ChoiceFinish)
            and event.reason is FinishReason.MAX_TOKENS
            and _model_name(self._call) in self._clamped
        ):
            return replace(event, reason=FinishReason.BUDGET)
        return event

    def settle(self, outcome: AttemptOutcome) -> None:
        """The call is over, and priced."""
        call, attempts, cost = self._call, self._call.meter.attempts, self._call.meter.cost
        if cost is not None and cost.charge_nanos > self._hold.worst_case.nanos:
            # What is beyond is the operator's to pay; the report says what the ledger does.
            cost = call.meter.cost = replace(cost, charge_nanos=self._hold.worst_case.nanos)
        last = attempts[-1] if attempts else None
        # Of a whole answer nothing has been sent yet.
        sent = call.meter.sent_output_tokens if call.is_streamed else None
        self._ledger.settle(
            Settlement(
                hold=self._hold,
                usage=replace(billed_usage(attempts), sent_output_tokens=sent),
                cost=cost,
                # The last attempt knows better why it ended.
                outcome=outcome if last is None or last.outcome is None else last.outcome,
                backend=None if last is None else last.backend,
                model=_model_name(call),
            )
        )

    def _note(self) -> None:
        # The backend's thread goes on counting: what is noted, and what that costs, must be of one moment.
        attempts = [
            Attempt(one.backend, one.model, usage=one.usage.copy(), outcome=one.outcome)
            for one in self._call.meter.attempts
        ]
        if attempts:
            usage, charge = billed_usage(attempts), billed_nanos(attempts, self._rates)
            self._ledger.note(self._hold, usage, charge, self._rates.price_of(attempts), attempts[-1].backend)


def _clamp(call: Call, most: int) -> frozenset[str]:
    """Lets no target have more than ``most`` new tokens. Returns the models of those that could have had more."""
    clamped = frozenset(target.model.card.name for target in call.targets if target.max_new_tokens > most)
    if not clamped:
        return clamped
    call.targets = tuple(replace(target, max_new_tokens=min(target.max_new_tokens, most)) for target in call.targets)
    call.max_new_tokens = min(call.max_new_tokens, most)
    return clamped


def _model_name(call: Call) -> str:
    assert call.model is not None
    return call.model.card.name
