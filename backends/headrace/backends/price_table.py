"""The built-in price source ``table``: prices that the operator writes into the settings.

[price_sources.table]
id = "2026-11"
currency = "USD"

[price_sources.table.models.smollm2-135m]    # for a million tokens
input = 0.02
output = "0.08"
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from headrace.backends.api import API_VERSION
from headrace.backends.components import Price, PriceSource
from headrace.backends.hookspecs import hookimpl

Amount = Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=9)]


class ModelPrice(BaseModel):
    """Of one model, in the currency's unit for a million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    input: Amount
    """Input tokens that no cache had."""
    output: Amount
    """Output tokens."""
    cache_read_input: Amount | None = None
    """Input tokens read from a cache; by default as other input."""
    cache_write_input: Amount | None = None
    """Input tokens written to a provider's cache; by default as other input."""


class TableOptions(BaseModel):
    """``[price_sources.table]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    id: Annotated[str, Field(min_length=1, max_length=64)]
    """What reports call this version of the prices."""
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    """ISO 4217, such as USD."""
    models: dict[str, ModelPrice]
    """By the model's name."""


class PriceTable:
    """Knows the prices of its settings."""

    name: ClassVar[str] = "table"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = TableOptions

    def __init__(self, options: TableOptions) -> None:
        self._prices = {
            model: Price(
                id=options.id,
                currency=options.currency,
                input_nanos=_nanos(price.input),
                output_nanos=_nanos(price.output),
                cache_read_input_nanos=None if price.cache_read_input is None else _nanos(price.cache_read_input),
                cache_write_input_nanos=None if price.cache_write_input is None else _nanos(price.cache_write_input),
            )
            for model, price in options.models.items()
        }

    def price(self, backend: str, model: str) -> Price | None:  # noqa: ARG002  # a model's name says it all here
        return self._prices.get(model)


def _nanos(amount: Decimal) -> int:
    return int(amount.scaleb(9))


@hookimpl
def headrace_price_sources() -> Sequence[type[PriceSource]]:
    return [PriceTable]
