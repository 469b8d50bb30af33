"""``headrace estimate`` against a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from headrace.cli.main import cli
from tests.rpc.usage_kit import PLAN, Served, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, plans=PLAN, default_plan="free") as running:
        yield running


async def run(served: Served, *args: str, stdin: str | None = None) -> Result:
    options = ["--address", f"127.0.0.1:{served.server.port}", "--api-key", "a"]
    with capture_logs():  # they would go to the same standard output
        return await asyncio.to_thread(CliRunner().invoke, cli, ["estimate", *args, *options], input=stdin)


async def test_a_prompt_is_counted_and_priced_beside_what_is_left(served: Served) -> None:
    assert (await run(served, "four", "--raw", "-n", "100", "-m", "letters")).stdout == (
        "model   letters\n"
        "input   4 tokens\n"
        "output  at most 100 tokens an answer, 100 in all expected\n"
        "cost    0.000006 at least, 0.000204 to be expected, 0.000204 at most, in USD\n"
        "fits    yes\n"
        "price   p/letters\n"
        "\n"
        "BUDGET                      LIMIT                       USED  HELD  LEFT\n"
        "tenant acme (free), USD     0.001 (warned from 0.0005)  0     0     0.001\n"
        "tenant acme (free), tokens  500                         0     0     500\n"
    )


async def test_options_are_those_of_generate(served: Served) -> None:
    two = json.loads((await run(served, "four", "--raw", "--n", "2", "-n", "5", "--json", "-m", "letters")).stdout)
    assert (two["expected_output_tokens"], two["max_new_tokens"]) == (10, 5)
    chat = json.loads((await run(served, "four", "--system", "Be brief.", "--json", "-m", "letters")).stdout)
    assert chat["input_tokens"] > 13
    too_long = await run(served, "four", "-n", "4000", "-m", "letters")
    assert "fits    no: the budgets and limits would refuse it now" in too_long.stdout
    wrong = await run(served, "four", "--top-p", "2", "-m", "letters")
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error: sampling.top_p: must be")


async def test_standard_input_is_counted(served: Served) -> None:
    assert (
        json.loads((await run(served, "--raw", "--json", "-m", "letters", stdin="12345")).stdout)["input_tokens"] == 5
    )


async def test_several_prompts_are_added_up(served: Served) -> None:
    table = (await run(served, "four", "sevenal", "--raw", "-n", "10", "-m", "letters")).stdout.splitlines()
    assert table[:4] == [
        "PROMPT  INPUT  CACHED  OUTPUT  LEAST         EXPECTED      MOST",
        "1       4      0       10      0.000006 USD  0.000024 USD  0.000024 USD",
        "2       7      0       10      0.000009 USD  0.000027 USD  0.000027 USD",
        "all     11     0       20      0.000015 USD  0.000051 USD  0.000051 USD",
    ]


async def test_a_model_without_a_price_is_counted_all_the_same(served: Served) -> None:
    shown = (await run(served, "four", "--raw", "-m", "whole")).stdout
    assert "cost    nobody has a price for the model" in shown
