"""The built-in price source ``book``: a file of what providers ask, as ``headrace prices refresh`` writes it.

[price_sources.book]
file = "prices.json"
digest = "sha256:…"     # the start is refused if the file has another
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from datetime import date, datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace.backends.api import API_VERSION
from headrace.backends.components import ListedPrice, Price, PriceSource
from headrace.backends.hookspecs import hookimpl
from headrace.backends.price_table import ModelPrice, in_force

_GUIDE = "price_guide.json"
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class PriceBookError(Exception):
    """A price-book file cannot be used; the message says why."""


class BookEntry(ModelPrice):
    """What one provider asks for one model."""

    provider: _Name
    model: _Name
    condition: str | None = None
    """When it is true, such as "up to 200,000 input tokens", where that is not always. Such a price is listed, and
    nothing is charged by it."""


class PriceBook(BaseModel):
    """A file of prices."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal[1]
    source: _Name
    """Who collected the prices, such as "genai-prices"."""
    version: _Name
    """Its release."""
    day: Annotated[date, Field(alias="date")]
    """When it was read."""
    license: str
    """The terms of the source."""
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    prices: tuple[BookEntry, ...]

    def listed(self) -> list[ListedPrice]:
        return [
            ListedPrice(
                provider=entry.provider,
                model=entry.model,
                price=entry.as_price(self._price_id(entry), self.currency),
                effective_from=entry.effective_from,
                source=", ".join(filter(None, (f"{self.source} {self.version}", entry.condition))),
            )
            for entry in self.prices
        ]

    def _price_id(self, entry: BookEntry) -> str:
        """Names the amounts themselves: books that agree on them give the same name, and no others do."""
        amounts = entry.as_price("", self.currency)
        digest = hashlib.sha256(repr(amounts).encode()).hexdigest()
        return f"{entry.provider}/{entry.model}@{digest[:12]}"


def digest_of(raw: bytes) -> str:
    """What a file is pinned by."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def read_book(raw: bytes) -> PriceBook:
    """Raises PriceBookError."""
    try:
        book = PriceBook.model_validate_json(raw)
    except ValidationError as error:
        [first, *more] = error.errors(include_url=False)
        place = ".".join(map(str, first["loc"])) or "the file"
        others = f", and {len(more)} more" if more else ""
        raise PriceBookError(f"{place}: {first['msg']}{others}") from None
    seen = set()
    for i, entry in enumerate(book.prices):
        key = entry.provider, entry.model, entry.effective_from
        if key in seen:
            raise PriceBookError(f"prices.{i}: {entry.provider} {entry.model} has two prices from the same time")
        seen.add(key)
    return book


@functools.cache
def cost_guide() -> tuple[ListedPrice, ...]:
    """The prices that come with this package, for comparison. Nothing is charged by them."""
    return tuple(read_book(resources.files("headrace.backends").joinpath(_GUIDE).read_bytes()).listed())


class BookOptions(BaseModel):
    """``[price_sources.book]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    file: Path
    """What ``headrace prices refresh`` wrote."""
    digest: Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")] | None = None
    """Of the file; the start is refused if it has another. By default any will do."""
    providers: dict[str, str] = {}
    """Whose models a backend has, by the backend's name: { gateway = "openai" }. By default, those of the provider of
    the backend's name."""


class BookPrices:
    """Knows the prices of a file, which it reads once."""

    name: ClassVar[str] = "book"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = BookOptions

    def __init__(self, options: BookOptions) -> None:
        """Raises PriceBookError."""
        path = options.file.expanduser()
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise PriceBookError(f"file: cannot read {path}: {error.strerror}") from error
        digest = digest_of(raw)
        if options.digest not in (None, digest):
            raise PriceBookError(f"digest: {path} has {digest}; the settings want {options.digest}")
        try:
            book = read_book(raw)
        except PriceBookError as error:
            raise PriceBookError(f"file: {path}: {error}") from error
        self._providers = options.providers
        self._listed = book.listed()
        self._by_model: dict[tuple[str | None, str], list[ListedPrice]] = {}
        for listed in self._listed:
            self._by_model.setdefault((listed.provider, listed.model), []).append(listed)
        self._conditional = {
            (entry.provider, entry.model, entry.effective_from) for entry in book.prices if entry.condition is not None
        }

    def price(self, backend: str, model: str, at: datetime) -> Price | None:
        provider = self._providers.get(backend, backend)
        entry = in_force(self._by_model.get((provider, model), ()), at)
        if entry is None or (provider, model, entry.effective_from) in self._conditional:
            return None
        return entry.price

    def prices(self) -> Sequence[ListedPrice]:
        return self._listed


@hookimpl
def headrace_price_sources() -> Sequence[type[PriceSource]]:
    return [BookPrices]
