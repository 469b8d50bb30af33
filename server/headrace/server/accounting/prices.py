"""What tokens cost: the operator's price sources, and a guide to what providers ask."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from headrace.backends.components import ListedPrice, Price, PriceSource
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


class Prices:
    """Finds the price of a call. ``guide`` is listed only; nothing is charged by it."""

    def __init__(
        self, sources: Sequence[PriceSource], guide: Sequence[ListedPrice], *, currency: str, clock: Clock
    ) -> None:
        """``currency`` is the ledger's. Raises SettingsError if a source lists prices in another."""
        self._sources = sources
        self._guide = guide
        self._currency = currency
        self._clock = clock
        for source, entry in self._entries():
            if entry.price.currency != currency:
                raise SettingsError(
                    f"price_sources.{source.name}: {entry.price.id!r} is in {entry.price.currency}, and the ledger in"
                    f" {currency}; its prices must be, too"
                )

    def price(self, backend: str, model: str, at: int) -> Price | None:
        """The price of a call that begins ``at`` (nanoseconds since the epoch): that of the first source which knows
        one. ``None``: nobody does. Raises what a source raises.
        """
        found = self._find(backend, model, _time(at))
        return None if found is None else found[1]

    def current(self, backend: str, model: str) -> ListedPrice | None:
        """What a call that begins now would cost, with what is known of the price."""
        found = self._find(backend, model, _time(self._clock()))
        if found is None:
            return None
        source, price = found
        listed = (entry for entry in source.prices() if entry.price == price)
        # A source need not list what it knows.
        return next(listed, ListedPrice(provider=backend, model=model, price=price, source=source.name))

    def listed(self, served: Collection[tuple[str, str]]) -> list[Listing]:
        """The prices in force and those to come, by provider, model and time. ``served`` has the backend and the name
        of each model that the caller may use. Of others there is what providers ask: prices of the operator's own would
        tell their names.
        """
        now = _time(self._clock())
        found = [Listing(backend, entry, True) for backend, model in served for entry in self._served(backend, model)]
        shown = {id(one.entry) for one in found}
        book = [entry for _, entry in self._entries() if entry.provider is not None and id(entry) not in shown]
        known = {(entry.provider, entry.model) for entry in book}
        book += [entry for entry in self._guide if (entry.provider, entry.model) not in known]
        found += [Listing(entry.provider or "", entry, False) for entry in _not_past(book, now)]
        return sorted(found, key=lambda one: (one.provider, one.entry.model, one.entry.effective_from or _ALWAYS))

    def _served(self, backend: str, model: str) -> list[ListedPrice]:
        """Of one model, the price in force and those to come."""
        now, current = _time(self._clock()), self.current(backend, model)
        to_come = [
            entry
            for _, entry in self._entries()
            if entry.model == model
            and entry.provider in (None, backend)
            and entry.effective_from is not None
            and entry.effective_from > now
        ]
        return to_come if current is None else [current, *to_come]

    def _entries(self) -> Iterable[tuple[PriceSource, ListedPrice]]:
        return ((source, entry) for source in self._sources for entry in source.prices())

    def _find(self, backend: str, model: str, at: datetime) -> tuple[PriceSource, Price] | None:
        for source in self._sources:
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
