"""Holds what a call can cost at most before it runs, and settles what it did cost when it is over, however it ends."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import structlog

from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason
from headrace.backends.types import Call, Events, Handler
from headrace.backends.usage import Attempt, AttemptOutcome
from headrace.server.accounting.accounting import Accounting
from headrace.server.accounting.accounts import Terms
from headrace.server.accounting.bounds import max_format_tokens, max_input_tokens
from headrace.server.accounting.charges import Rates, WorstCase, billed_nanos, billed_usage, cost_of
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.prices import Priced
from headrace.server.accounting.records import Hold, HoldRequest, Settlement
from headrace.server.middleware.early import EarlyStarts
from headrace.server.middleware.limits import RateLimits

logger = structlog.get_logger("headrace.ledger")


def account(inner: Handler, *, accounting: Accounting, limits: RateLimits) -> Handler:
    """Sets ``call.meter.cost`` when a call of ``inner`` is over, by the price that held when it began. Raises
    RateLimited, BudgetSpent, BudgetHeld or LedgerUnavailable before anything is handed over: ``inner`` may begin while
    the hold becomes durable, where nothing speaks against it.
    """
    ledger, early = accounting.ledger, EarlyStarts()

    async def handle(call: Call) -> Events:
        terms = accounting.accounts.terms(call.principal)
        rates = rates_of(call, accounting)
        worst_case = worst_case_of(call, rates)
        limits.take_tokens(terms, worst_case.tokens)
        holding, outcome = None, AttemptOutcome.CANCELLED
        try:
            if ledger is not None:
                request = hold_request_of(call, worst_case, terms)
                holding = _Holding(call, ledger, request, rates, early)
                if not holding.is_early:
                    await holding.held()
            async with aclosing(inner(call)) as events:
                if holding is not None and holding.is_early:
                    yield await holding.first(events)
                async for event in events:
                    yield event if holding is None or holding.book is None else holding.book.noted(event)
            outcome = AttemptOutcome.COMPLETED
        except Exception:
            outcome = AttemptOutcome.FAILED
            raise
        finally:
            try:
                if holding is not None:
                    await holding.decided()
            finally:
                call.meter.cost = cost_of(call.meter.attempts, rates)
                if holding is not None:
                    holding.settle(outcome)
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


class _Holding:
    """A hold that was asked for."""

    def __init__(self, call: Call, ledger: Ledger, request: HoldRequest, rates: Rates, early: EarlyStarts) -> None:
        """Raises LedgerUnavailable."""
        self._call, self._ledger, self._request, self._rates, self._early = call, ledger, request, rates, early
        self.is_early = early.may_begin(request, is_costly=bool(rates.costs))
        """Whether the call may begin."""
        self.book: _Book | None = None
        self._asked = ledger.ask(request)

    async def held(self) -> None:
        """Returns when it is durable, and there is a book. Raises BudgetSpent, BudgetHeld or LedgerUnavailable."""
        # Shielded: a call that is cancelled may have used something; whether that is held is not to be lost.
        hold = await asyncio.shield(self._asked)
        self._early.held(hold)
        self._open(hold)

    async def first(self, events: Events) -> Event:
        """The first of the events of a call that has begun early, as soon as it is held. Raises what ``held`` does,
        whatever the call is waiting for.
        """
        loop, waiting, is_waiting = asyncio.get_running_loop(), asyncio.timeout(None), True

        def cut_off(_: asyncio.Future[Hold]) -> None:
            if is_waiting and self._is_refused():
                waiting.reschedule(loop.time())

        self._asked.add_done_callback(cut_off)
        try:
            async with waiting:
                event = await anext(events)
        except TimeoutError:
            if not waiting.expired():
                raise
        finally:
            is_waiting = False
            self._asked.remove_done_callback(cut_off)
        await self.held()
        assert self.book is not None
        return self.book.noted(event)

    async def decided(self) -> None:
        """The call is over: returns when it is known whether it is held, if that matters. What was used by one that is
        refused is not the caller's to pay.
        """
        if self.book is None and self.is_early and not self._asked.done():
            await asyncio.wait({self._asked})
        if self._is_refused():
            self._early.refused(self._request)
            if attempts := self._call.meter.attempts:
                usage = billed_usage(attempts)
                logger.warning(
                    "refused_after_its_start",
                    model=_model_name(self._call),
                    input_tokens=usage.input_tokens,
                    output_tokens=usage.output_tokens,
                )
                attempts.clear()

    def settle(self, outcome: AttemptOutcome) -> None:
        """The call is over, and priced."""
        if self.book is not None:
            self.book.settle(outcome)
        elif self.is_early or self._asked.done():
            self._asked.add_done_callback(partial(self._settle_late, outcome))
        else:
            self._asked.cancel()

    def _settle_late(self, outcome: AttemptOutcome, asked: asyncio.Future[Hold]) -> None:
        if not self._is_refused():
            self._open(asked.result()).settle(outcome)

    def _open(self, hold: Hold) -> _Book:
        self.book = _Book(self._call, self._ledger, hold, self._rates)
        return self.book

    def _is_refused(self) -> bool:
        return self._asked.done() and not self._asked.cancelled() and self._asked.exception() is not None


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
