"""Makes a price book of the package ``genai-prices``: what the providers of remote models ask.

Of each model it takes what the text of a call can be charged by: input, output, and input read from and written to a
cache. Where that is not all, the price gets a condition, or is left out (``docs/prices.md`` says which).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from importlib import metadata
from typing import Any

from genai_prices import UpdatePrices
from genai_prices.data import providers as bundled_providers
from genai_prices.types import ModelInfo, ModelPrice, Provider, StartDateConstraint, TieredPrices, TimeOfDateConstraint

from headrace.backends.price_book import PriceBook, PriceBookError, read_book

_PACKAGE = "genai-prices"
_AMOUNTS = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cache_read_input",
    "cache_write_mtok": "cache_write_input",
}
_OTHER_SHARES_OF_TEXT = ("requests_kcount", "output_reasoning_mtok", "output_citation_mtok")
"""Charged for calls of text beside the amounts, or instead: the amounts alone would be wrong."""
_SMALLEST = Decimal("1e-9")
_DEAREST_HOURS = "at the dearest time of day"


@dataclass(frozen=True, slots=True)
class Collected:
    """A price book, ready to be written, and how many models had no price that it could state."""

    raw: bytes
    book: PriceBook
    num_left_out: int


def today() -> date:
    """Of UTC."""
    return datetime.now(UTC).date()


def collect(*, offline: bool, day: date) -> Collected:
    """Reads what the installed package knows, or fetches what its makers have published since. Raises PriceBookError.
    ``day`` is today.
    """
    providers: Sequence[Provider] = bundled_providers
    if not offline:
        try:
            fetched = UpdatePrices().fetch()
        except Exception as error:  # the library raises what its HTTP client does, and more
            raise PriceBookError(f"cannot fetch prices: {type(error).__name__}: {error}") from error
        providers = fetched.providers if fetched is not None else bundled_providers
    models = [(provider, model) for provider in providers for model in provider.models]
    entries = [_entries(provider.id, model) for provider, model in models]
    return _book([entry for some in entries for entry in some], day, num_left_out=sum(not some for some in entries))


def _book(entries: list[dict[str, str]], day: date, *, num_left_out: int) -> Collected:
    head = {
        "format": 1,
        "source": _PACKAGE,
        "version": metadata.version(_PACKAGE),
        "date": day.isoformat(),
        "license": _license(),
        "currency": "USD",
    }
    entries.sort(key=lambda entry: (entry["provider"], entry["model"], entry.get("from", "")))
    # A line for each price, so that a change shows as one.
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}") + f',\n "prices": [\n{lines}\n ]\n}}\n'
    raw = text.encode()
    return Collected(raw, read_book(raw), num_left_out)


def _entries(provider: str, model: ModelInfo) -> list[dict[str, str]]:
    """The prices of a model, one after the other in time; none where they cannot be stated."""
    versions = list(_versions(model))
    amounts = [_amounts(prices) for _, prices, _ in versions]
    if not amounts or None in amounts or len({begin for begin, _, _ in versions}) < len(versions):
        return []
    return [
        {"provider": provider, "model": model.id}
        | ({"from": begin.isoformat()} if begin else {})
        | (some or {})
        | _condition(prices, at_dearest_hours=dearest)
        for (begin, prices, dearest), some in zip(versions, amounts, strict=True)
    ]


def _versions(model: ModelInfo) -> Iterator[tuple[date | None, ModelPrice, bool]]:
    """When each price begins, what it is, and whether it holds at some hours only."""
    if isinstance(model.prices, ModelPrice):
        yield None, model.prices, False
        return
    by_hour = [one.prices for one in model.prices if isinstance(one.constraint, TimeOfDateConstraint)]
    dated = [one for one in model.prices if not isinstance(one.constraint, TimeOfDateConstraint)]
    beginnings = [
        one.constraint.start_date if isinstance(one.constraint, StartDateConstraint) else None for one in dated
    ]
    if by_hour:
        # The hours are those of the latest price: what was before it is past.
        latest = dated[-1:] or model.prices[:1]
        yield (
            beginnings[-1] if beginnings else None,
            max([*by_hour, *(one.prices for one in latest)], key=_dearness),
            True,
        )
        return
    for begin, one in zip(beginnings, dated, strict=True):
        # The first holds before it begins, too, where nothing else does.
        yield None if one is dated[0] else begin, one.prices, False


def _dearness(prices: ModelPrice) -> tuple[Decimal, Decimal]:
    return _base(prices.output_mtok) or Decimal(), _base(prices.input_mtok) or Decimal()


def _amounts(prices: ModelPrice) -> dict[str, str] | None:
    """By the names of a price book; ``None`` where they are not all that text is charged by."""
    if any(getattr(prices, name) is not None for name in _OTHER_SHARES_OF_TEXT):
        return None
    amounts = {ours: _base(getattr(prices, theirs)) for theirs, ours in _AMOUNTS.items()}
    if amounts["input"] is None or amounts["output"] is None:
        return None
    if any(amount is not None and amount % _SMALLEST for amount in amounts.values()):
        return None
    return {name: f"{amount.normalize():f}" for name, amount in amounts.items() if amount is not None}


def _base(amount: Any) -> Decimal | None:
    return amount.base if isinstance(amount, TieredPrices) else amount


def _condition(prices: ModelPrice, *, at_dearest_hours: bool) -> dict[str, str]:
    tiers = [
        tier.start
        for name in _AMOUNTS
        if isinstance(some := getattr(prices, name), TieredPrices)
        for tier in some.tiers
    ]
    conditions = [f"up to {min(tiers):,} input tokens"] if tiers else []
    if at_dearest_hours:
        conditions.append(_DEAREST_HOURS)
    return {"condition": ", ".join(conditions)} if conditions else {}


def _license() -> str:
    """Of the data; it asks to be handed on with them."""
    for file in metadata.files(_PACKAGE) or ():
        if file.name == "LICENSE":
            return file.read_text()
    raise PriceBookError(f"the installed {_PACKAGE} has no licence with it")
