"""Prices: tables with dates, price books, the cost guide, and what is listed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import genai_prices.data
import pytest
from genai_prices.types import ModelPrice as ProvidersPrice
from genai_prices.types import TieredPrices
from pydantic import BaseModel, ValidationError

from headrace.backends.components import ListedPrice, Price
from headrace.backends.price_book import (
    BookOptions,
    BookPrices,
    PriceBookError,
    cost_guide,
    digest_of,
    read_book,
)
from headrace.backends.price_refresh import collect
from headrace.backends.price_table import PriceTable, TableOptions
from headrace.server.accounting.prices import Priced, Prices
from headrace.server.components import make_price_sources
from headrace.server.config import Settings, SettingsError
from headrace.server.plugins import PluginError, load_plugins


def nanos(*moment: int) -> int:
    return int(datetime(*moment, tzinfo=UTC).timestamp()) * 10**9


def table(models: Mapping[str, Any], currency: str = "USD") -> PriceTable:
    return PriceTable(TableOptions.model_validate({"id": "t", "currency": currency, "models": models}))


def prices_of(*sources: Any, guide: Sequence[ListedPrice] = (), now: int = nanos(2026, 11, 23)) -> Prices:
    return Prices(sources, guide, currency="USD", clock=lambda: now)


VERSIONS = [
    {"from": date(2026, 12, 1), "input": 3, "output": 6},
    {"input": 1, "output": 4},
    {"from": "2026-12-24T20:00:00+02:00", "input": 0, "output": 0},
]


# --- tables


def test_a_price_holds_until_the_next_begins() -> None:
    prices = prices_of(table({"m": VERSIONS}))
    for moment, price_id, amount in (
        ((2000, 1, 1), "t/m", 1),
        ((2026, 11, 30, 23, 59, 59), "t/m", 1),
        ((2026, 12, 1), "t/m@2026-12-01", 3),
        ((2026, 12, 24, 17, 59, 59), "t/m@2026-12-01", 3),
        ((2026, 12, 24, 18), "t/m@2026-12-24T18:00:00Z", 0),
    ):
        price = prices.price(Priced("any", "m"), nanos(*moment))
        assert price is not None
        assert (price.id, price.input_nanos) == (price_id, amount * 10**9)
    assert prices.price(Priced("any", "other"), 0) is None


def test_before_the_first_price_begins_there_is_none() -> None:
    prices = prices_of(table({"m": [{"from": date(2026, 12, 1), "input": 1, "output": 1}]}))
    assert prices.price(Priced("any", "m"), nanos(2026, 12, 1) - 1) is None


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        ({"m": []}, "at least 1 item"),
        ({"m": [{"input": 1, "output": 1}] * 2}, "models.m: two prices have no from"),
        (
            {"m": [{"from": day, "input": 1, "output": 1} for day in ("2026-12-01", date(2026, 12, 1))]},
            "models.m: two prices have from = 2026-12-01",
        ),
        ({"m": {"from": 3, "input": 1, "output": 1}}, "must be a date or a time"),
        ({"m": {"from": "soon", "input": 1, "output": 1}}, "Invalid isoformat string"),
    ],
)
def test_versions_that_cannot_be_are_refused(models: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        table(models)


# --- which price applies, and what is listed


def test_the_first_source_that_knows_a_price_is_believed() -> None:
    prices = prices_of(table({"a": {"input": 1, "output": 1}}), table({"a": {"input": 2, "output": 2}, "b": VERSIONS}))
    first, second = prices.price(Priced("x", "a"), 0), prices.price(Priced("x", "b"), 0)
    assert first is not None
    assert second is not None
    assert (first.input_nanos, second.id) == (10**9, "t/b")


def test_a_source_with_another_currency_is_refused_at_the_start() -> None:
    with pytest.raises(SettingsError, match=r"price_sources.table: 't/m' is in EUR, and the ledger in USD"):
        prices_of(table({"m": VERSIONS[1]}, currency="EUR"))


class Secretive:
    """Knows a price that it does not list."""

    name = "secretive"
    api_version = (1, 0)
    Options = BaseModel
    currency = "USD"

    def price(self, backend: str, model: str, at: datetime) -> Price | None:
        assert at.tzinfo is UTC
        return Price(id="s", currency=self.currency, input_nanos=5, output_nanos=5) if model == "m" else None

    def prices(self) -> Sequence[ListedPrice]:
        return ()


def test_another_currency_that_shows_late_is_refused_at_the_call() -> None:
    source = Secretive()
    prices = prices_of(source)
    assert prices.price(Priced("x", "m"), 0) is not None
    source.currency = "EUR"
    with pytest.raises(RuntimeError, match="'secretive' gave 's' in EUR; the ledger is in USD"):
        prices.price(Priced("x", "m"), 0)


def listed(provider: str | None, model: str, day: int | None = None, output: int = 1) -> ListedPrice:
    price = Price(id=f"{provider}/{model}/{day}", currency="USD", input_nanos=1, output_nanos=output)
    return ListedPrice(
        provider=provider,
        model=model,
        price=price,
        effective_from=None if day is None else datetime(2026, 11, day, tzinfo=UTC),
    )


def test_served_models_are_listed_with_the_price_in_force_and_those_to_come() -> None:
    prices = prices_of(table({"m": VERSIONS, "hidden": VERSIONS}), now=nanos(2026, 12, 5))
    found = prices.listed([Priced("onnx", "m"), Priced("onnx", "priceless")])
    assert [(one.provider, one.entry.price.id, one.served) for one in found] == [
        ("onnx", "t/m@2026-12-01", True),
        ("onnx", "t/m@2026-12-24T18:00:00Z", True),
    ]
    current = prices.current(Priced("onnx", "m"))
    assert current is not None
    assert current.price.id == "t/m@2026-12-01"


REMOTE = Priced("remote", "fast", provider="openai", provider_model="gpt-x")


def test_a_remote_model_is_charged_by_its_name_here_or_else_by_its_providers() -> None:
    book = {"gpt-x": {"input": 1, "output": 2}}
    by_provider = prices_of(table(book)).price(REMOTE, 0)
    assert by_provider is not None
    assert by_provider.id == "t/gpt-x"
    own = prices_of(table(book | {"fast": {"input": 3, "output": 4}})).price(REMOTE, 0)
    assert own is not None
    assert own.id == "t/fast"


def test_what_a_provider_asks_is_known_from_the_guide_unless_a_source_knows_better() -> None:
    guide = [listed("openai", "gpt-x", output=7), listed("other", "gpt-x", output=8)]
    own = {"fast": {"input": 3, "output": 4}}
    from_guide = prices_of(table(own), guide=guide).cost(REMOTE, nanos(2026, 11, 23))
    assert from_guide is not None
    assert from_guide.output_nanos == 7
    known = prices_of(table(own | {"gpt-x": {"input": 1, "output": 2}}), guide=guide).cost(REMOTE, 0)
    assert known is not None
    assert known.id == "t/gpt-x"


def test_what_runs_here_has_no_provider_that_asks_for_anything() -> None:
    guide = [listed("onnx", "m")]
    assert prices_of(table({"m": VERSIONS}), guide=guide).cost(Priced("onnx", "m"), nanos(2026, 12, 5)) is None


def test_what_a_source_does_not_list_is_listed_where_it_is_served() -> None:
    [one] = prices_of(Secretive()).listed([Priced("x", "m")])
    assert (one.entry.price.id, one.entry.source, one.entry.effective_from) == ("s", "secretive", None)


def test_the_guide_is_listed_without_what_is_past() -> None:
    guide = [listed("p", "m", day) for day in (None, 1, 20, 30)] + [listed("o", "m")]
    found = prices_of(guide=guide).listed([])
    assert [one.entry.price.id for one in found] == ["o/m/None", "p/m/20", "p/m/30"]
    assert not any(one.served for one in found)


# --- price books


def book(**changes: Any) -> bytes:
    fields = {
        "format": 1,
        "source": "s",
        "version": "1",
        "date": "2026-11-23",
        "license": "MIT",
        "currency": "USD",
        "prices": [
            {"provider": "p", "model": "m", "input": "1", "output": "2"},
            {"provider": "p", "model": "m", "from": "2026-12-01", "input": "3", "output": "4"},
            {"provider": "p", "model": "tiered", "input": "1", "output": "2", "condition": "up to 9 input tokens"},
        ],
    }
    return json.dumps(fields | changes).encode()


def source_of(tmp_path: Path, raw: bytes, **options: Any) -> BookPrices:
    file = tmp_path / "prices.json"
    file.write_bytes(raw)
    return BookPrices(BookOptions(file=file, **options))


def test_a_book_has_the_prices_of_the_provider_that_is_named_like_the_backend(tmp_path: Path) -> None:
    prices = prices_of(source_of(tmp_path, book(), digest=digest_of(book())))
    now, later = prices.price(Priced("p", "m"), nanos(2026, 11, 30)), prices.price(Priced("p", "m"), nanos(2026, 12, 1))
    assert now is not None
    assert later is not None
    assert (now.input_nanos, later.input_nanos) == (10**9, 3 * 10**9)
    assert prices.price(Priced("other", "m"), 0) is None
    named = prices_of(source_of(tmp_path, book(), providers={"gateway": "p"}))
    assert named.price(Priced("gateway", "m"), nanos(2026, 11, 30)) == now


def test_nothing_is_charged_by_a_price_with_a_condition(tmp_path: Path) -> None:
    prices = prices_of(source_of(tmp_path, book()))
    assert prices.price(Priced("p", "tiered"), nanos(2026, 12, 1)) is None
    [tiered] = [one for one in prices.listed([]) if one.entry.model == "tiered"]
    assert tiered.entry.source == "s 1, up to 9 input tokens"


def test_a_condition_that_comes_later_ends_the_price_before_it(tmp_path: Path) -> None:
    entries = [
        {"provider": "p", "model": "m", "input": "1", "output": "2"},
        {"provider": "p", "model": "m", "from": "2026-12-01", "input": "1", "output": "2", "condition": "at night"},
    ]
    prices = prices_of(source_of(tmp_path, book(prices=entries)))
    assert prices.price(Priced("p", "m"), nanos(2026, 11, 30)) is not None
    assert prices.price(Priced("p", "m"), nanos(2026, 12, 1)) is None


def test_equal_amounts_have_equal_ids_and_others_have_others(tmp_path: Path) -> None:
    def ids(*amounts: str, **more: str) -> str:
        entry = {"provider": "p", "model": "m", "input": amounts[0], "output": amounts[1], **more}
        return read_book(book(prices=[entry])).listed()[0].price.id

    assert ids("1", "2") == ids("1.0", "2") == ids("1", "2", **{"from": "2026-12-01"})
    different = [
        ids("1", "2"),
        ids("2", "1"),
        ids("1", "2", cache_read_input="1"),
        ids("1", "2", cache_write_input="1"),
    ]
    assert len(set(different)) == 4


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"{", "the file: Invalid JSON"),
        (book(format=2), "format: Input should be 1"),
        (book(extra=1), "extra: Extra inputs are not permitted"),
        (book(currency="dollars"), "currency: String should match pattern"),
        (book(prices=[{"provider": "p", "model": "m", "input": "-1", "output": "1"}]), "prices.0.input: Input should"),
        (book(prices=[{"provider": "p", "model": "m", "input": "1"}]), "prices.0.output: Field required"),
        (
            book(prices=[{"provider": "p", "model": "m", "input": "1", "output": "2"}] * 2),
            "prices.1: p m has two prices",
        ),
    ],
)
def test_a_file_that_is_no_price_book_is_refused_by_name(tmp_path: Path, raw: bytes, problem: str) -> None:
    with pytest.raises(PriceBookError) as caught:
        source_of(tmp_path, raw)
    assert problem in str(caught.value)
    assert "prices.json" in str(caught.value)


def test_a_book_with_another_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PriceBookError, match=r"digest: .*prices.json has sha256:.*; the settings want sha256:00"):
        source_of(tmp_path, book(), digest=f"sha256:{'0' * 64}")
    with pytest.raises(PriceBookError, match=r"file: cannot read .*/none.json: No such file"):
        BookPrices(BookOptions(file=tmp_path / "none.json"))


def test_a_server_that_is_to_use_such_a_file_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    file.write_bytes(book(currency="EUR"))

    def prices(**options: Any) -> Prices:
        settings = Settings(price_sources={"book": {"file": str(file)} | options}, plugins=("price_book",), ledger=None)
        return prices_of(*make_price_sources(settings, load_plugins(settings.plugins)))

    with pytest.raises(SettingsError, match=r"price_sources.book: 'p/m@[0-9a-f]{12}' is in EUR, and the ledger in USD"):
        prices()
    with pytest.raises(PluginError, match=r"price_sources.book: PriceBookError: digest: .* has sha256:"):
        prices(digest=f"sha256:{'0' * 64}")
    with pytest.raises(SettingsError, match=r"price_sources.book.digest: String should match pattern"):
        prices(digest="md5:1")
    file.write_bytes(book())
    assert prices(digest=digest_of(book())).price(Priced("p", "m"), nanos(2026, 11, 30)) is not None


# --- the cost guide, and how it is made


@pytest.mark.parametrize(
    ("provider", "model", "amounts"),
    [
        ("openai", "gpt-4o", ("2.5", "10", "1.25")),
        ("openai", "gpt-4.1", ("2", "8", "0.5")),
        ("anthropic", "claude-sonnet-4-0", ("3", "15", "0.3")),
        ("google", "gemini-2.0-flash", ("0.1", "0.4", "0.025")),
        ("novita", "deepseek/deepseek-r1", ("4", "4", None)),
    ],
)
def test_the_guide_has_what_people_ask_for(provider: str, model: str, amounts: tuple[str | None, ...]) -> None:
    [entry] = [one for one in cost_guide() if (one.provider, one.model) == (provider, model)]
    price = entry.price
    assert price.currency == "USD"
    assert entry.source == "genai-prices 0.2.3"
    assert (price.input_nanos, price.output_nanos, price.cache_read_input_nanos) == tuple(
        None if amount is None else int(Decimal(amount) * 10**9) for amount in amounts
    )


def test_the_guide_has_deepseek_r1_of_its_makers_at_its_dearest() -> None:
    [entry] = [one for one in cost_guide() if (one.provider, one.model) == ("deepseek", "deepseek-reasoner")]
    assert entry.source.endswith("at the dearest time of day")
    assert entry.price.output_nanos == 2_190_000_000


def test_a_refresh_is_the_same_every_day_but_for_the_date() -> None:
    first, second = (collect(offline=True, day=date(2026, 11, day)) for day in (1, 2))
    assert first.raw == second.raw.replace(b'"date": "2026-11-02"', b'"date": "2026-11-01"')
    assert first.book.prices == second.book.prices
    keys = [(entry.provider, entry.model, entry.effective_from) for entry in first.book.prices]
    assert len(set(keys)) == len(keys)
    assert "Permission is hereby granted" in first.book.license


def test_a_refresh_says_what_the_package_says_or_leaves_it_out() -> None:
    book = collect(offline=True, day=date(2026, 11, 23)).book
    entries = {(one.provider, one.model, one.effective_from): one for one in book.prices}
    kinds = Counter[str]()
    for provider in genai_prices.data.providers:
        for model in provider.models:
            known, entry = model.prices, entries.get((provider.id, model.id, None))
            if not isinstance(known, ProvidersPrice):
                continue
            amounts = (known.input_mtok, known.output_mtok, known.cache_read_mtok, known.cache_write_mtok)
            if (
                None in amounts[:2]
                or known.requests_kcount
                or known.output_reasoning_mtok
                or known.output_citation_mtok
            ):
                assert entry is None
                kinds["left out"] += 1
            elif entry is not None:
                is_tiered = any(isinstance(amount, TieredPrices) for amount in amounts)
                assert (entry.condition or "").startswith("up to ") is is_tiered
                kinds["tiered" if is_tiered else "plain"] += 1
                assert (entry.input, entry.output, entry.cache_read_input, entry.cache_write_input) == tuple(
                    amount.base if isinstance(amount, TieredPrices) else amount for amount in amounts
                )
    assert all(kinds[kind] for kind in ("plain", "tiered", "left out"))


def test_a_model_served_under_a_name_of_the_guide_is_not_priced_by_it() -> None:
    prices = prices_of(guide=cost_guide())
    assert prices.price(Priced("openai", "gpt-4o"), nanos(2026, 11, 23)) is None
    assert replace(cost_guide()[0], source="") != cost_guide()[0]
