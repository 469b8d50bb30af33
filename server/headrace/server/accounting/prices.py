"""What tokens cost: the operator's price sources, and a guide to what providers ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import product

from headrace.backends.api import ModelCard
from headrace.backends.components import ListedPrice, Price, PriceSource
from headrace.backends.price_table import in_force
from headrace.server.accounting.clock import Clock
from headrace.server.config import SettingsError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ALWAYS = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Listing:
    """An entry to show: whose model it is, and whether the server serves it."""

    provider: str
    entry: ListedPrice
    served: bool


@dataclass(frozen=True, slots=True)
class Priced:
    """A model, as price sources know it."""

    backend: str
    model: str
    """Its name here."""
    provider: str | None = None
    """Of a remote model."""
    provider_model: str = ""
    """Its name there."""

    @classmethod
    def of(cls, backend: str, card: ModelCard) -> Priced:
        return cls(backend, card.name, card.provider, card.provider_model or card.name)

    @property
    def names(self) -> Sequence[tuple[str, str]]:
        """What sources are asked for: what the operator calls it, then what its provider does."""
        own = (self.backend, self.model)
        return [own] if self.provider is None else [own, (self.provider, self.provider_model)]


class Prices:
    """Finds the price of a call. ``guide`` is listed only; nothing is charged by it."""

    def __init__(
        self, sources: Sequence[PriceSource], guide: Sequence[ListedPrice], *, currency: str, clock: Clock
    ) -> None:
        """``currency`` is the ledger's. Raises SettingsError if a source lists prices in another."""
        self._sources = sources
        self._guide = guide
        self._asked: defaultdict[tuple[str | None, str], list[ListedPrice]] = defaultdict(list)
        """The guide, by provider and model."""
        for entry in guide:
            self._asked[entry.provider, entry.model].append(entry)
        self._currency = currency
        self._clock = clock
        for source, entry in self._entries():
            if entry.price.currency != currency:
                raise SettingsError(
                    f"price_sources.{source.name}: {entry.price.id!r} is in {entry.price.currency}, and the ledger in"
                    f" {currency}; its prices must be, too"
                )

    def price(self, priced: Priced, at: int) -> Price | None:
        """The price of a call that begins ``at`` (nanoseconds since the epoch): that of the first source which knows
        one. ``None``: nobody does. Raises what a source raises.
        """
        found = self._find(priced, _time(at))
        return None if found is None else found[1]

    def cost(self, priced: Priced, at: int) -> Price | None:
        """What the provider of a remote model asks, as far as the sources know it, or else the guide."""
        if priced.provider is None:
            return None
        there = replace(priced, backend=priced.provider, model=priced.provider_model, provider=None)
        price = self.price(there, at)
        if price is not None:
            return price
        entry = in_force(self._asked.get((there.backend, there.model), ()), _time(at))
        return entry.price if entry is not None and entry.price.currency == self._currency else None

    def current(self, priced: Priced) -> ListedPrice | None:
        """What a call that begins now would cost, with what is known of the price."""
        found = self._find(priced, _time(self._clock()))
        if found is None:
            return None
        source, price = found
        listed = (entry for entry in source.prices() if entry.price == price)
        # A source need not list what it knows.
        return next(listed, ListedPrice(provider=priced.backend, model=priced.model, price=price, source=source.name))

    def listed(self, served: Collection[Priced]) -> list[Listing]:
        """The prices in force and those to come, by provider, model and time. ``served`` are the models that the caller
        may use. Of others there is what providers ask: prices of the operator's own would tell their names.
        """
        now = _time(self._clock())
        found = [Listing(priced.backend, entry, True) for priced in served for entry in self._served(priced)]
        shown = {id(one.entry) for one in found}
        book = [entry for _, entry in self._entries() if entry.provider is not None and id(entry) not in shown]
        known = {(entry.provider, entry.model) for entry in book}
        book += [entry for entry in self._guide if (entry.provider, entry.model) not in known]
        found += [Listing(entry.provider or "", entry, False) for entry in _not_past(book, now)]
        return sorted(found, key=lambda one: (one.provider, one.entry.model, one.entry.effective_from or _ALWAYS))

    def _served(self, priced: Priced) -> list[ListedPrice]:
        """Of one model, the price in force and those to come."""
        now, current = _time(self._clock()), self.current(priced)
        to_come = [
            entry
            for _, entry in self._entries()
            if any(entry.model == model and entry.provider in (None, backend) for backend, model in priced.names)
            and entry.effective_from is not None
            and entry.effective_from > now
        ]
        return to_come if current is None else [current, *to_come]

    def _entries(self) -> Iterable[tuple[PriceSource, ListedPrice]]:
        return ((source, entry) for source in self._sources for entry in source.prices())

    def _find(self, priced: Priced, at: datetime) -> tuple[PriceSource, Price] | None:
        for source, (backend, model) in product(self._sources, priced.names):
            price = source.price(backend, model, at)
            if price is None:
                continue
            if price.currency != self._currency:
                raise RuntimeError(
                    f"price source {source.name!r} gave {price.id!r} in {price.currency}; the ledger is in"
                    f" {self._currency}"
                )
            return source, price
        return None


def _not_past(entries: Collection[ListedPrice], now: datetime) -> list[ListedPrice]:
    """Without those that later ones have replaced."""
    begun: dict[tuple[str | None, str], datetime] = {}
    for entry in entries:
        since, key = entry.effective_from or _ALWAYS, (entry.provider, entry.model)
        if since <= now:
            begun[key] = max(begun.get(key, since), since)
    return [
        entry
        for entry in entries
        if (entry.effective_from or _ALWAYS) >= begun.get((entry.provider, entry.model), _ALWAYS)
    ]


def _time(at: int) -> datetime:
    return _EPOCH + timedelta(microseconds=at // 1000)
