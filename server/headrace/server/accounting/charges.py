"""What tokens cost: after a call, what it used; before it, what it can use at most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from headrace.backends.components import Price
from headrace.backends.usage import Attempt, AttemptOutcome, Cost, Usage

TOKENS_PER_PRICE = 1_000_000

_COUNTS = (
    "input_tokens",
    "cache_read_input_tokens",
    "cache_write_input_tokens",
    "output_tokens",
    "reasoning_output_tokens",
    "accepted_draft_tokens",
    "rejected_draft_tokens",
)


def is_billed(attempt: Attempt) -> bool:
    """What failed before its first token is nobody's to pay."""
    return attempt.outcome is not AttemptOutcome.FAILED or bool(attempt.usage.output_tokens)


def billed_usage(attempts: Sequence[Attempt]) -> Usage:
    """What attempts used together, as far as it is billed. A count is reported if one of them reports it."""
    billed = [attempt.usage for attempt in attempts if is_billed(attempt)]
    if len(billed) == 1:
        return billed[0]
    total = Usage(estimated=any(usage.estimated for usage in billed))
    for name in _COUNTS:
        counts = [count for usage in billed if (count := getattr(usage, name)) is not None]
        setattr(total, name, sum(counts) if counts else None)
    return total


def charge_nanos(usage: Usage, price: Price) -> int:
    """What usage costs, each bucket rounded once, half up. A count that was not reported counts for nothing; what a
    backend says of cached input holds for as much as there was input.
    """
    whole = usage.input_tokens or 0
    read = min(usage.cache_read_input_tokens or 0, whole)
    written = min(usage.cache_write_input_tokens or 0, whole - read)
    return (
        _round(whole - read - written, price.input_nanos)
        + _round(read, _or(price.cache_read_input_nanos, price.input_nanos))
        + _round(written, _or(price.cache_write_input_nanos, price.input_nanos))
        + _round(usage.output_tokens or 0, price.output_nanos)
    )


@dataclass(frozen=True, slots=True)
class Rates:
    """The prices of a call, by the name of the model that an attempt is made at. Of a model that is not there nobody
    has a price.
    """

    charged: Mapping[str, Price]
    """What the tenant pays."""
    costs: Mapping[str, Price] = field(default_factory=dict)
    """What a provider asks of the operator."""

    def price_of(self, attempts: Sequence[Attempt]) -> Price | None:
        """That of the last attempt which has one."""
        return next((price for one in reversed(attempts) if (price := self.charged.get(one.model))), None)

    def dearest(self) -> Price | None:
        """No model's buckets cost more than its."""
        prices = list(self.charged.values())
        if len(prices) < 2:
            return next(iter(prices), None)
        most = max(prices, key=lambda price: price.output_nanos)
        return replace(
            most,
            input_nanos=max(map(_dearest_input, prices)),
            cache_read_input_nanos=None,
            cache_write_input_nanos=None,
        )


def billed_nanos(attempts: Iterable[Attempt], rates: Rates) -> int:
    """What attempts cost the tenant together, as far as they are billed."""
    return sum(
        charge_nanos(attempt.usage, rates.charged[attempt.model])
        for attempt in attempts
        if attempt.model in rates.charged and is_billed(attempt)
    )


def cost_of(attempts: Sequence[Attempt], rates: Rates) -> Cost | None:
    """What attempts cost together: the tenant, as far as they are billed; the operator, whatever became of them. Notes
    the price at each of them. ``None``: nobody has a price of any.
    """
    for attempt in attempts:
        if attempt.model in rates.charged:
            attempt.price_id = rates.charged[attempt.model].id
    price = rates.price_of(attempts)
    if price is None:
        return None
    known = [attempt for attempt in attempts if attempt.model in rates.costs]
    return Cost(
        currency=price.currency,
        charge_nanos=billed_nanos(attempts, rates),
        cost_nanos=sum(charge_nanos(one.usage, rates.costs[one.model]) for one in known) if known else None,
        price_id=price.id,
        estimated=any(attempt.usage.estimated for attempt in attempts if is_billed(attempt)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCase:
    """What a call can use at most. ``price`` is the dearest that may apply, ``None`` where nobody has one."""

    input_tokens: int
    """An upper bound; exact where the model's tokenizer is here."""
    n: int
    """Choices: each has output of its own, and they share the input."""
    max_new_tokens: int
    """Of each choice; 0 for a scoring."""
    price: Price | None

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.n * self.max_new_tokens

    @property
    def nanos(self) -> int:
        if self.price is None:
            return 0
        input_nanos = _round(self.input_tokens, _dearest_input(self.price))
        return input_nanos + _round(self.n * self.max_new_tokens, self.price.output_nanos)


def _dearest_input(price: Price) -> int:
    return max(price.input_nanos, price.cache_read_input_nanos or 0, price.cache_write_input_nanos or 0)


def _round(tokens: int, nanos: int) -> int:
    return (tokens * nanos + TOKENS_PER_PRICE // 2) // TOKENS_PER_PRICE


def _or(nanos: int | None, otherwise: int) -> int:
    return otherwise if nanos is None else nanos
