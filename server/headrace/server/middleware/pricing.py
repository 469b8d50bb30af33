"""Works out what a generation costs, however it ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from headrace.backends.components import Price, PriceSource
from headrace.backends.types import Attempt, Call, Cost, Events, Handler, Usage

_TOKENS_PER_PRICE = 1_000_000


def priced(inner: Handler, *, sources: Sequence[PriceSource]) -> Handler:
    """Sets ``call.meter.cost`` when a call of ``inner`` is over, by the price that held when it began."""
    if not sources:
        return inner

    async def handle(call: Call) -> Events:
        assert call.model is not None
        prices = (source.price(call.model.backend, call.model.card.name) for source in sources)
        price = next((price for price in prices if price is not None), None)
        try:
            async with aclosing(inner(call)) as events:
                async for event in events:
                    yield event
        finally:
            if price is not None and call.meter.attempts:
                call.meter.cost = cost_of(call.meter.attempts, price)

    return handle


def cost_of(attempts: Sequence[Attempt], price: Price) -> Cost:
    """What attempts cost together. Notes the price at each of them."""
    for attempt in attempts:
        attempt.price_id = price.id
    return Cost(
        currency=price.currency,
        charge_nanos=sum(charge_nanos(attempt.usage, price) for attempt in attempts),
        price_id=price.id,
        estimated=any(attempt.usage.estimated for attempt in attempts),
    )


def charge_nanos(usage: Usage, price: Price) -> int:
    """What usage costs, each bucket rounded once, half up. A count that was not reported counts for nothing."""
    read, written = usage.cache_read_input_tokens or 0, usage.cache_write_input_tokens or 0
    buckets = (
        ((usage.input_tokens or 0) - read - written, price.input_nanos),
        (read, price.input_nanos if price.cache_read_input_nanos is None else price.cache_read_input_nanos),
        (written, price.input_nanos if price.cache_write_input_nanos is None else price.cache_write_input_nanos),
        (usage.output_tokens or 0, price.output_nanos),
    )
    return sum((tokens * nanos + _TOKENS_PER_PRICE // 2) // _TOKENS_PER_PRICE for tokens, nanos in buckets)
