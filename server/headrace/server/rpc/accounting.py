"""UsageService: what was used and cost, what is left, what tokens cost. EstimateCost is in ``estimates``."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, TypeVar

from google.protobuf.message import Message
from sqlalchemy import Connection

from headrace.backends.errors import (
    Draining,
    InvalidArgument,
    NoLedger,
    PermissionDenied,
    ReceiptNotFound,
    Unauthenticated,
)
from headrace.backends.types import Call, Principal
from headrace.server.accounting import queries
from headrace.server.accounting.clock import day_of, month_of
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.prices import Listing, Priced
from headrace.server.accounting.queries import Dimension
from headrace.server.rpc.application import Application
from headrace.server.rpc.calls import NO_REQUEST, Rpc, parse, run_in_front
from headrace.server.rpc.options import unknown_fields
from headrace.server.rpc.prices import price_message
from headrace.server.rpc.receipts import budget_message, receipt_message, row_message, totals_message
from headrace.v1 import accounting_pb2 as pb

T = TypeVar("T")
M = TypeVar("M", bound=Message)

SEQUENCE_KEY = "headrace-usage-sequence"
"""Metadata that WatchUsage sends at once: the sequence after which it begins."""

_MAX_SEQUENCE = 2**63 - 1
_LOOKS_PER_CHECK = 60
"""Looks at the ledger after which a watch verifies its caller once more."""
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_DIMENSIONS: dict[int, Dimension] = {
    pb.USAGE_DIMENSION_TENANT: Dimension.TENANT,
    pb.USAGE_DIMENSION_KEY: Dimension.KEY,
    pb.USAGE_DIMENSION_MODEL: Dimension.MODEL,
    pb.USAGE_DIMENSION_DAY: Dimension.DAY,
}


@dataclass(frozen=True, slots=True)
class UsageReports:
    """Answers from the ledger. A tenant sees its own, an operator all."""

    application: Application
    stopping: asyncio.Event
    """Set when the server is about to stop."""
    poll_seconds: float
    """Between two looks at the ledger, for those who watch it."""

    async def get_usage(self, rpc: Rpc, raw: bytes) -> pb.GetUsageResponse:
        """GetUsage."""
        message = _parse(pb.GetUsageRequest, raw)
        group_by = _dimensions(message.group_by)
        first_day, last_day = self._days(message)

        async def work(principal: Principal) -> pb.GetUsageResponse:
            tenant = _tenant_or_all(principal, _given(message, "tenant"))
            ledger = self._ledger()
            rows = await ledger.read(
                lambda connection: queries.usage(
                    connection,
                    first_day=first_day,
                    last_day=last_day,
                    group_by=group_by,
                    tenant=tenant,
                    key=_given(message, "key_id"),
                    model=_given(message, "model"),
                )
            )
            total = queries.add([row.totals for row in rows])
            return pb.GetUsageResponse(
                rows=[row_message(row, show_costs=principal.operator) for row in rows],
                total=totals_message(total, show_costs=principal.operator),
                currency=ledger.currency,
            )

        return await self._for_principal(rpc, work)

    async def watch_usage(self, rpc: Rpc, raw: bytes) -> None:
        """WatchUsage. It reads the ledger no faster than its client, in pages, and holds nothing else."""
        message = _parse(pb.WatchUsageRequest, raw)

        async def work(principal: Principal) -> None:
            tenant = _tenant_or_all(principal, _given(message, "tenant"))
            ledger = self._ledger()
            after = _given(message, "after_sequence")
            if after is None:
                after = await ledger.read(queries.last_sequence)
            elif after > _MAX_SEQUENCE:
                raise InvalidArgument("after_sequence", f"must be at most {_MAX_SEQUENCE}, got {after}")
            await rpc.context.send_initial_metadata(((SEQUENCE_KEY, str(after)),))
            for look in itertools.count(1):
                if look % _LOOKS_PER_CHECK == 0:
                    await self._check_again(rpc, principal)
                page = await ledger.read(_page_after(after, tenant))
                for receipt in page.receipts:
                    told = receipt_message(receipt, currency=ledger.currency, show_costs=principal.operator)
                    await rpc.write(pb.WatchUsageResponse(receipt=told))
                after = page.upto
                await self._pause(0 if page.more else self.poll_seconds)

        await self._for_principal(rpc, work)

    async def get_receipt(self, rpc: Rpc, raw: bytes) -> pb.GetReceiptResponse:
        """GetReceipt."""
        message = _parse(pb.GetReceiptRequest, raw)
        if not message.request_id:
            raise InvalidArgument("request_id", "must be set")

        async def work(principal: Principal) -> pb.GetReceiptResponse:
            tenant = _tenant(principal, _given(message, "tenant"))
            ledger = self._ledger()
            found = await ledger.read(lambda connection: queries.receipts(connection, tenant, message.request_id))
            if not found:
                raise ReceiptNotFound(f"the ledger has no call {message.request_id!r} of tenant {tenant!r}")
            return pb.GetReceiptResponse(
                receipts=[
                    receipt_message(receipt, currency=ledger.currency, show_costs=principal.operator)
                    for receipt in found
                ]
            )

        return await self._for_principal(rpc, work)

    async def get_budget(self, rpc: Rpc, raw: bytes) -> pb.GetBudgetResponse:
        """GetBudget."""
        message = _parse(pb.GetBudgetRequest, raw)

        async def work(principal: Principal) -> pb.GetBudgetResponse:
            accounting, tenant = self.application.accounting, _tenant(principal, _given(message, "tenant"))
            ledger, month = self._ledger(), month_of(accounting.clock())
            terms = accounting.accounts.terms(principal if tenant == principal.tenant else Principal(tenant))
            accounts = [account for account, _ in terms]
            balances = await ledger.read(lambda connection: queries.balances_of(connection, accounts, month))
            plan = accounting.accounts.plan_of(tenant)
            return pb.GetBudgetResponse(
                budgets=[
                    budget_message(account, limits, balances[account], plan=plan, month=month)
                    for account, limits in terms
                ],
                currency=ledger.currency,
            )

        return await self._for_principal(rpc, work)

    async def list_prices(self, rpc: Rpc, raw: bytes) -> pb.ListPricesResponse:
        """ListPrices."""
        message = _parse(pb.ListPricesRequest, raw)
        wanted = message.name_contains.lower()

        async def work(principal: Principal) -> list[Listing]:
            served = [Priced.of(model.backend, model.card) for model in self.application.list_models(principal)]
            return self.application.accounting.prices.listed(served)

        listings = [
            one
            for one in await self._for_principal(rpc, work)
            if wanted in one.entry.model.lower() and (one.served or not message.served_only)
        ]
        # Thousands of messages: not on the event loop.
        return await self.application.run_blocking(_price_list, listings)

    async def _check_again(self, rpc: Rpc, principal: Principal) -> None:
        """Refuses whoever may no longer call, or is somebody else now: a watch can outlive a key."""

        async def who(call: Call) -> Principal:
            return call.principal

        now = await run_in_front(self.application, rpc.make_call(NO_REQUEST), who, resolve_model=False)
        if (now.tenant, now.operator) != (principal.tenant, principal.operator):
            raise Unauthenticated("the credentials of this call are somebody else's now")

    async def _for_principal(self, rpc: Rpc, work: Callable[[Principal], Awaitable[T]]) -> T:
        async def work_on(call: Call) -> T:
            return await work(call.principal)

        return await run_in_front(self.application, rpc.begin(NO_REQUEST), work_on, resolve_model=False)

    def _ledger(self) -> Ledger:
        ledger = self.application.accounting.ledger
        if ledger is None:
            raise NoLedger
        return ledger

    def _days(self, message: pb.GetUsageRequest) -> tuple[str, str]:
        today = day_of(self.application.accounting.clock())
        last_day = _day(message, "last_day") or today
        first_day = _day(message, "first_day") or f"{last_day[:7]}-01"
        if first_day > last_day:
            raise InvalidArgument("first_day", f"must not be after last_day, {last_day}; got {first_day}")
        return first_day, last_day

    async def _pause(self, seconds: float) -> None:
        """Raises Draining when the server stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        if self.stopping.is_set():
            raise Draining


def _parse(message_type: type[M], raw: bytes) -> M:
    """Refuses what only a newer version of the proto knows: a filter that is ignored would show too much."""
    message = parse(message_type, raw)
    for unknown in unknown_fields(message):
        raise InvalidArgument(f"#{unknown.field_number}", "is a field that this server does not know")
    for field, value in message.ListFields():
        if isinstance(value, str) and "\0" in value:
            raise InvalidArgument(field.name, "must not have a NUL")
    return message


def _page_after(after: int, tenant: str | None) -> Callable[[Connection], queries.Page]:
    return lambda connection: queries.settled_after(connection, after, tenant=tenant)


def _tenant(principal: Principal, asked: str | None) -> str:
    """Whose calls are asked for. The refusal is the same whether there is such a tenant or not."""
    if asked is None or asked == principal.tenant:
        return principal.tenant
    if not principal.operator:
        raise PermissionDenied("only an operator may see what other tenants use")
    return asked


def _tenant_or_all(principal: Principal, asked: str | None) -> str | None:
    return None if asked is None and principal.operator else _tenant(principal, asked)


def _dimensions(numbers: Sequence[int]) -> list[Dimension]:
    dimensions: list[Dimension] = []
    for i, number in enumerate(numbers):
        dimension = _DIMENSIONS.get(number)
        if dimension is None:
            raise InvalidArgument(f"group_by[{i}]", "must be one of TENANT, KEY, MODEL, DAY")
        if dimension in dimensions:
            raise InvalidArgument(f"group_by[{i}]", f"{dimension.name} is there twice")
        dimensions.append(dimension)
    return dimensions


def _day(message: pb.GetUsageRequest, field: str) -> str | None:
    text = _given(message, field)
    if text is None:
        return None
    try:
        if not _DAY.fullmatch(text):
            raise ValueError
        date.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(field, f"must be a day such as 2026-11-01, got {text!r}") from None
    return str(text)


def _given(message: Message, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _price_list(listings: Sequence[Listing]) -> pb.ListPricesResponse:
    return pb.ListPricesResponse(
        prices=[price_message(one.entry, provider=one.provider, served=one.served) for one in listings]
    )
