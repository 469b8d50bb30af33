"""UsageService: EstimateCost."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass

from headrace.backends.components import Price
from headrace.backends.errors import BudgetHeld, BudgetSpent
from headrace.backends.events import StreamEnd
from headrace.backends.types import Call, Events, Target
from headrace.backends.usage import Usage
from headrace.server.accounting import queries
from headrace.server.accounting.accounts import Terms
from headrace.server.accounting.admission import Balance, admit
from headrace.server.accounting.charges import WorstCase, charge_nanos
from headrace.server.accounting.clock import month_of
from headrace.server.accounting.records import Account
from headrace.server.middleware.accounting import hold_request_of, rates_of, worst_case_of
from headrace.server.rpc.application import Application
from headrace.server.rpc.calls import Rpc, convert, parse
from headrace.server.rpc.convert import request_id_of, to_request
from headrace.server.rpc.generation import SPEC_PREFIX
from headrace.server.rpc.receipts import budget_message
from headrace.v1 import accounting_pb2 as pb

_BYTES_PER_TOKEN = 4
"""Of text, about, where nobody can count: a bound has a token for each byte."""


@dataclass(frozen=True, slots=True)
class Estimates:
    """Says what generations would cost."""

    application: Application

    async def estimate_cost(self, rpc: Rpc, raw: bytes) -> pb.EstimateCostResponse:
        """EstimateCost."""
        message = parse(pb.EstimateCostRequest, raw)
        rpc.field_prefix = SPEC_PREFIX
        rpc.label(request_id_of(message.spec))
        call = rpc.begin(await convert(self.application, raw, lambda: to_request(message)))
        found: list[pb.EstimateCostResponse] = []

        async def inner(prepared: Call) -> Events:
            found.append(await self._estimate(prepared))
            yield StreamEnd()

        async with aclosing(self.application.prepared(inner)(call)) as events:
            async for _ in events:
                pass
        if not found:
            raise RuntimeError("a plugin's middleware answered in place of the model; nobody can say what that costs")
        return found[0]

    async def _estimate(self, call: Call) -> pb.EstimateCostResponse:
        assert call.model is not None
        accounting = self.application.accounting
        rates = rates_of(call, accounting)
        worst_case = worst_case_of(call, rates)
        counted = all(target.model.tokenizer is not None for target in call.targets)
        cached = self.application.num_known_tokens(call)
        least_output = call.request.n * max(1, call.request.stopping.min_new_tokens)
        likely_output = accounting.expectations.output_tokens(
            call.model.card.name, worst_case.n * worst_case.max_new_tokens
        )
        expected_output = max(least_output, likely_output)
        terms = accounting.accounts.terms(call.principal)
        month = month_of(accounting.clock())
        balances = await self._balances(terms, month)
        message = pb.EstimateCostResponse(
            model=call.model.card.name,
            input_tokens=worst_case.input_tokens,
            expected_cache_read_input_tokens=cached,
            max_new_tokens=worst_case.max_new_tokens,
            expected_output_tokens=expected_output,
            budgets=[
                budget_message(
                    account,
                    limits,
                    balances[account],
                    plan=accounting.accounts.plan_of(account.tenant),
                    month=month,
                )
                for account, limits in terms
                if balances
            ],
            fits=self._fits(call, worst_case, terms, balances, month),
        )
        if not counted:
            message.estimated = True
        if worst_case.price is not None:
            first = call.targets[0]
            price = rates.charged.get(first.model.card.name)
            likely_input = _num_input_tokens(first) or worst_case.input_tokens // _BYTES_PER_TOKEN
            message.cost.CopyFrom(
                pb.CostRange(
                    currency=worst_case.price.currency,
                    price_id=(price or worst_case.price).id,
                    minimum_nanos=min(
                        _nanos(
                            _num_input_tokens(target), share, least_output, rates.charged.get(target.model.card.name)
                        )
                        for target in call.targets
                        for share in ((0, cached) if target is first else (0,))
                    ),
                    expected_nanos=_nanos(likely_input, cached, expected_output, price),
                    maximum_nanos=worst_case.nanos,
                )
            )
        return message

    async def _balances(self, terms: Terms, month: str) -> Mapping[Account, Balance]:
        """None without a ledger."""
        ledger = self.application.accounting.ledger
        if ledger is None:
            return {}
        accounts = [account for account, _ in terms]
        return await ledger.read(lambda connection: queries.balances_of(connection, accounts, month))

    def _fits(
        self, call: Call, worst_case: WorstCase, terms: Terms, balances: Mapping[Account, Balance], month: str
    ) -> bool:
        """As a call would be admitted."""
        if not self.application.within_rate_limits(call.principal, worst_case.tokens):
            return False
        ledger = self.application.accounting.ledger
        if ledger is None:
            return True
        try:
            admit(
                hold_request_of(call, worst_case, terms),
                [balances[account] for account, _ in terms],
                month=month,
                currency=ledger.currency,
            )
        except (BudgetSpent, BudgetHeld):
            return False
        return True


def _num_input_tokens(target: Target) -> int:
    """0: nobody can count them."""
    return 0 if target.model.tokenizer is None else target.num_input_tokens


def _nanos(input_tokens: int, cached: int, output_tokens: int, price: Price | None) -> int:
    """Of a model that nobody has a price for: nothing."""
    if price is None:
        return 0
    usage = Usage(input_tokens=input_tokens, cache_read_input_tokens=cached, output_tokens=output_tokens)
    return charge_nanos(usage, price)
