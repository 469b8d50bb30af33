"""``headrace prices``, and what `headrace models` says of prices and speed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from headrace.backends.price_book import digest_of, read_book
from headrace.cli.main import cli
from tests.rpc.usage_kit import Served, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as running:
        yield running


async def run(served: Served, *args: str) -> Result:
    options = ["--address", f"127.0.0.1:{served.server.port}", "--api-key", "a"]
    with capture_logs():  # they would go to the same standard output
        return await asyncio.to_thread(CliRunner().invoke, cli, [*args, *options])


async def test_prices_of_served_models_are_marked(served: Served) -> None:
    expected = (
        "PROVIDER  MODEL      INPUT  CACHED  OUTPUT  CURRENCY  FROM  SOURCE\n"
        "scripted  letters *  1      0.25    2       USD       -     settings\n"
    )
    assert (await run(served, "prices", "--served")).stdout == expected
    assert (await run(served, "prices", "list", "LETTER")).stdout == expected


async def test_the_cost_guide_is_listed_by_default(served: Served) -> None:
    lines = (await run(served, "prices", "gpt-4o")).stdout.splitlines()
    assert any(line.split()[:5] == ["openai", "gpt-4o", "2.5", "1.25", "10"] for line in lines)
    first = json.loads((await run(served, "prices", "gemini-2.0-flash", "--json")).stdout.splitlines()[0])
    assert {"provider", "model", "input_nanos", "output_nanos", "source"} <= set(first)


async def test_a_name_without_a_price_says_where_prices_are_set(served: Served) -> None:
    result = await run(served, "prices", "no-such-model")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "[price_sources.table]" in result.stderr


def test_a_refresh_writes_a_book_and_prints_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "book.json"
    result = CliRunner().invoke(cli, ["prices", "refresh", "--offline", "--output", str(file)])
    assert result.exit_code == 0
    assert result.stdout.strip() == digest_of(file.read_bytes())
    assert f"{len(read_book(file.read_bytes()).prices):,} prices of genai-prices" in result.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_a_book_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["prices", "refresh", "--offline", "--output", str(tmp_path / "none" / "b.json")])
    assert result.exit_code == 1
    assert "error: cannot write" in result.stderr


def test_prices_that_cannot_be_fetched_are_an_error_that_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_self: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("genai_prices.UpdatePrices.fetch", fails)
    result = CliRunner().invoke(cli, ["prices", "refresh", "--output", str(tmp_path / "book.json")])
    assert result.exit_code == 1
    assert result.stderr == (
        "error: cannot fetch prices: OSError: no route; --offline takes those of the installed genai-prices\n"
    )


def test_help_shows_both_commands() -> None:
    shown = CliRunner().invoke(cli, ["prices", "--help"]).stdout
    assert "refresh" in shown
    assert "list" in shown


async def test_models_are_listed_with_price_and_speed(served: Served) -> None:
    await served.generate("a")
    head, *rows = (await run(served, "models", "list")).stdout.splitlines()
    assert head.endswith("PRICE in/out")
    assert "FIRST TOKEN p50/p99" in head
    [letters] = [row for row in rows if row.startswith("letters")]
    assert letters.endswith("1 / 2 USD")
    assert " ms " in letters
    shown = (await run(served, "models", "show", "letters")).stdout
    assert "input 1, output 2, cached input 0.25 USD for a million tokens (p/letters)" in shown
