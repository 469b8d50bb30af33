"""The built-in price source ``table``: prices that the operator writes into the settings.

[price_sources.table]
id = "2026-11"
currency = "USD"

[price_sources.table.models.smollm2-135m]    # for a million tokens
input = 0.02
output = "0.08"

[[price_sources.table.models.large]]         # until the next one begins
input = 1
output = 4
[[price_sources.table.models.large]]
from = 2026-12-01                            # UTC
input = 2
output = 6
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from headrace.backends.api import API_VERSION
from headrace.backends.components import ListedPrice, Price, PriceSource
from headrace.backends.hookspecs import hookimpl

Amount = Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=9)]
_ALWAYS = datetime.min.replace(tzinfo=UTC)


def _utc(value: Any) -> Any:
    """TOML has dates, times with an offset, and times without; the environment has strings."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    raise ValueError("must be a date or a time, such as 2026-12-01 or 2026-12-01T06:00:00Z")


Moment = Annotated[datetime, BeforeValidator(_utc)]


class ModelPrice(BaseModel):
    """Of one model, in the currency's unit for a million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    effective_from: Annotated[Moment | None, Field(alias="from")] = None
    """When it begins, in UTC if it says nothing else; by default it always held. A model may have several prices: each
    holds until the next begins."""
    input: Amount
    """Input tokens that no cache had."""
    output: Amount
    """Output tokens."""
    cache_read_input: Amount | None = None
    """Input tokens read from a cache; by default as other input."""
    cache_write_input: Amount | None = None
    """Input tokens written to a provider's cache; by default as other input."""

    def as_price(self, price_id: str, currency: str) -> Price:
        return Price(
            id=price_id,
            currency=currency,
            input_nanos=_nanos(self.input),
            output_nanos=_nanos(self.output),
            cache_read_input_nanos=None if self.cache_read_input is None else _nanos(self.cache_read_input),
            cache_write_input_nanos=None if self.cache_write_input is None else _nanos(self.cache_write_input),
        )


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Versions = Annotated[tuple[ModelPrice, ...], BeforeValidator(_as_list), Field(min_length=1)]


class TableOptions(BaseModel):
    """``[price_sources.table]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    id: Annotated[str, Field(min_length=1, max_length=64)]
    """What reports call this version of the prices."""
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    """ISO 4217, such as USD."""
    models: dict[str, Versions]
    """By the model's name: its price, or a list of prices that follow each other."""

    @model_validator(mode="after")
    def _check_versions(self) -> TableOptions:
        for model, versions in self.models.items():
            beginnings = [version.effective_from for version in versions]
            for beginning in beginnings:
                if beginnings.count(beginning) > 1:
                    what = "no from" if beginning is None else f"from = {_name(beginning)}"
                    raise ValueError(f"models.{model}: two prices have {what}; each must begin at a time of its own")
        return self


class PriceTable:
    """Knows the prices of its settings."""

    name: ClassVar[str] = "table"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = TableOptions

    def __init__(self, options: TableOptions) -> None:
        self._prices = {model: self._entries(model, versions, options) for model, versions in options.models.items()}

    def price(self, backend: str, model: str, at: datetime) -> Price | None:  # noqa: ARG002  # a name says it all here
        entry = in_force(self._prices.get(model, ()), at)
        return None if entry is None else entry.price

    def prices(self) -> Sequence[ListedPrice]:
        return [entry for entries in self._prices.values() for entry in entries]

    @staticmethod
    def _entries(model: str, versions: Sequence[ModelPrice], options: TableOptions) -> list[ListedPrice]:
        return [
            ListedPrice(
                provider=None,
                model=model,
                price=version.as_price(_price_id(options.id, model, version.effective_from), options.currency),
                effective_from=version.effective_from,
                source="settings",
            )
            for version in versions
        ]


def in_force(entries: Sequence[ListedPrice], at: datetime) -> ListedPrice | None:
    """The latest of one model's prices that has begun; ``None`` before the first."""
    begun = [entry for entry in entries if entry.effective_from is None or entry.effective_from <= at]
    return max(begun, key=lambda entry: entry.effective_from or _ALWAYS, default=None)


def _price_id(table: str, model: str, beginning: datetime | None) -> str:
    return f"{table}/{model}" if beginning is None else f"{table}/{model}@{_name(beginning)}"


def _name(beginning: datetime) -> str:
    """A day alone, if the price begins with one."""
    if beginning.time() == time():
        return beginning.date().isoformat()
    return beginning.isoformat().replace("+00:00", "Z")


def _nanos(amount: Decimal) -> int:
    return int(amount.scaleb(9))


@hookimpl
def headrace_price_sources() -> Sequence[type[PriceSource]]:
    return [PriceTable]
