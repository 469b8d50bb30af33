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
from headrace.server.accounting.bounds import max_input_tokens
from headrace.server.accounting.charges import Rates, WorstCase, billed_nanos, billed_usage, cost_of
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.prices import Priced
from headrace.server.accounting.records import Hold, HoldRequest, Settlement
from headrace.server.middleware.limits import RateLimits


def account(inner: Handler, *, accounting: Accounting, limits: RateLimits) -> Handler:
    """Sets ``call.meter.cost`` when a call of ``inner`` is over, by the price that held when it began. Raises
    RateLimited, BudgetSpent, BudgetHeld or LedgerUnavailable before anything is used.
    """

    async def handle(call: Call) -> Events:
        terms = accounting.accounts.terms(call.principal)
        rates = rates_of(call, accounting)
        worst_case = worst_case_of(call, rates)
        limits.take_tokens(terms, worst_case.tokens)
        try:
            async with aclosing(await _begin(inner, call, accounting.ledger, worst_case, rates, terms)) as events:
                async for event in events:
                    yield event
        finally:
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
    return WorstCase(
        input_tokens=max(
            max_input_tokens(call.request.input) if target.model.tokenizer is None else target.num_input_tokens
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


async def _begin(
    inner: Handler, call: Call, ledger: Ledger | None, worst_case: WorstCase, rates: Rates, terms: Terms
) -> Events:
    if ledger is None:
        return _priced(inner, call, rates)
    hold = await ledger.hold(hold_request_of(call, worst_case, terms))
    return _held(inner, call, ledger, hold, rates)


async def _priced(inner: Handler, call: Call, rates: Rates) -> Events:
    """Runs a call that is written down nowhere."""
    try:
        async with aclosing(inner(call)) as events:
            async for event in events:
                yield event
    finally:
        call.meter.cost = cost_of(call.meter.attempts, rates)


async def _held(inner: Handler, call: Call, ledger: Ledger, hold: Hold, rates: Rates) -> Events:
    """Runs a call for which its worst case is held."""
    is_clamped = _clamp(call, hold.worst_case.max_new_tokens)
    call.meter.warnings = tuple(account.subject for account in hold.soft_limits_exceeded)
    outcome = AttemptOutcome.CANCELLED
    try:
        async with aclosing(inner(call)) as events:
            async for event in events:
                if call.is_streamed and isinstance(event, Delta):
                    # Before it is handed over: a kill loses nothing that a caller has seen.
                    _note(call, ledger, hold, rates)
                yield _for_budget(event) if is_clamped else event
        outcome = AttemptOutcome.COMPLETED
    except Exception:
        outcome = AttemptOutcome.FAILED
        raise
    finally:
        # The last attempt knows better why it ended.
        if call.meter.attempts and call.meter.attempts[-1].outcome is not None:
            outcome = call.meter.attempts[-1].outcome
        ledger.settle(_settlement(call, hold, rates, outcome))


def _clamp(call: Call, most: int) -> bool:
    """Lets no target have more than ``most`` new tokens. Returns whether one wanted more."""
    if all(target.max_new_tokens <= most for target in call.targets):
        return False
    call.targets = tuple(replace(target, max_new_tokens=min(target.max_new_tokens, most)) for target in call.targets)
    call.max_new_tokens = min(call.max_new_tokens, most)
    return True


def _note(call: Call, ledger: Ledger, hold: Hold, rates: Rates) -> None:
    # The backend's thread goes on counting: what is noted, and what that costs, must be of one moment.
    attempts = [
        Attempt(one.backend, one.model, usage=one.usage.copy(), outcome=one.outcome) for one in call.meter.attempts
    ]
    if attempts:
        ledger.note(
            hold,
            billed_usage(attempts),
            billed_nanos(attempts, rates),
            rates.price_of(attempts),
            attempts[-1].backend,
        )


def _settlement(call: Call, hold: Hold, rates: Rates, outcome: AttemptOutcome) -> Settlement:
    attempts, held = call.meter.attempts, hold.worst_case.nanos
    cost = cost_of(attempts, rates)
    if cost is not None and cost.charge_nanos > held:
        # What is beyond is the operator's to pay; the report says what the ledger does.
        cost = replace(cost, charge_nanos=held)
    call.meter.cost = cost
    return Settlement(
        hold=hold,
        # Of a whole answer nothing has been sent yet.
        usage=replace(
            billed_usage(attempts), sent_output_tokens=call.meter.sent_output_tokens if call.is_streamed else None
        ),
        cost=cost,
        outcome=outcome,
        backend=attempts[-1].backend if attempts else None,
        model=_model_name(call),
    )


def _for_budget(event: Event) -> Event:
    if isinstance(event, ChoiceFinish) and event.reason is FinishReason.MAX_TOKENS:
        return replace(event, reason=FinishReason.BUDGET)
    return event


def _model_name(call: Call) -> str:
    assert call.model is not None
    return call.model.card.name
