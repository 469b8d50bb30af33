"""``headrace usage``, ``receipt`` and ``budget`` against a real server with a ledger."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import signal
import sys
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


async def run(served: Served, *args: str, who: str = "a") -> Result:
    """Runs the program as somebody whom the server knows by a key."""
    options = ["--address", f"127.0.0.1:{served.server.port}", "--api-key", who]
    with capture_logs():  # they would go to the same standard output
        return await asyncio.to_thread(CliRunner().invoke, cli, [*args, *options])


async def test_usage_is_a_table_with_a_sum(served: Served) -> None:
    await served.generate("a")
    await served.generate("a", model="whole")
    assert (await run(served, "usage")).stdout == (
        "MODEL    CALLS  CANCELLED  FAILED  INPUT  CACHED  OUTPUT  CHARGE\n"
        "letters  1      0          0       4      0       3       0.00001 USD\n"
        "whole    1      0          0       4      0       3       0 USD\n"
        "all      2      0          0       8      0       6       0.00001 USD\n"
    )
    by_two = (await run(served, "usage", "--by", "tenant,day", "--model", "letters", who="o")).stdout.splitlines()
    assert [line.split()[:3] for line in by_two[1:]] == [["acme", "2026-11-23", "1"], ["all", "1", "0"]]


async def test_usage_as_csv_has_a_column_for_each_count(served: Served) -> None:
    await served.generate("a")
    text = (await run(served, "usage", "--by", "day,key", "--csv")).stdout
    [row] = csv.DictReader(io.StringIO(text))
    assert (row["day"], row["key_id"], row["requests"], row["charge"]) == ("2026-11-23", "", "1", "0.000010000")
    assert (row["cost"], row["currency"]) == ("", "USD")
    assert set(row) > {"cached_requests", "cache_write_input_tokens", "reasoning_output_tokens"}


async def test_usage_as_json_is_one_object(served: Served) -> None:
    await served.generate("a")
    report = json.loads((await run(served, "usage", "--json", "--from", "2026-11-01", "--to", "2026-11-30")).stdout)
    assert report["rows"][0]["totals"]["charge_nanos"] == 10_000
    assert report["currency"] == "USD"


async def test_usage_is_drawn(served: Served, tmp_path: Path) -> None:
    await served.generate("a")
    file = tmp_path / "usage.svg"
    assert (await run(served, "usage", "--by", "model,day", "--plot", str(file))).exit_code == 0
    assert "letters 2026-11-23" in file.read_text()


async def test_a_plot_that_cannot_be_written_is_an_error_in_one_line(served: Served, tmp_path: Path) -> None:
    await served.generate("a")
    file = tmp_path / "none" / "usage.png"
    result = await run(served, "usage", "--plot", str(file))
    assert (result.exit_code, result.stderr) == (1, f"error: cannot write {file}: No such file or directory\n")


async def watched(served: Served, num_lines: int, *args: str) -> list[str]:
    """The first lines that the program writes, which Ctrl-C then ends."""
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from headrace.cli.main import main; main()", "usage", "--watch", *args),
        *("--address", f"127.0.0.1:{served.server.port}", "--api-key", "a"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert program.stdout is not None
    async with asyncio.timeout(60):
        lines = [(await program.stdout.readline()).decode().rstrip() for _ in range(num_lines)]
        program.send_signal(signal.SIGINT)
        assert await program.wait() == 130
    return lines


async def test_usage_can_be_watched_until_ctrl_c(served: Served) -> None:
    await served.generate("a", request_id="first")
    await served.generate("a", request_id="second")
    first, second = await watched(served, 2, "--after", "0")
    assert (first.split()[0], second.split()[0]) == ("1", "2")
    assert second.split()[1:4] == ["2026-11-23T12:00:00Z", "acme", "letters"]
    assert second.endswith("4 in  3 out  0.00001 USD  second")
    [as_json] = await watched(served, 1, "--after", "1", "--json")
    assert json.loads(as_json)["settled_at"] == "2026-11-23T12:00:00Z"


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("--by", "week"), "there is tenant, key, model, day"),
        (("--csv", "--json"), "--csv or --json, not both"),
        (("--by", "day,day"), "day is there twice"),
        (("--watch", "--csv"), "--watch goes with"),
        (("--watch", "--by", "day"), "--watch goes with"),
        (("--after", "3"), "--after needs --watch"),
        (("--plot", "usage.txt"), "must end in .pdf, .png, .svg"),
    ],
)
def test_options_that_cannot_be_are_usage_errors(args: tuple[str, ...], problem: str) -> None:
    result = CliRunner().invoke(cli, ["usage", *args, "--address", "127.0.0.1:1"])
    assert result.exit_code == 2
    assert problem in result.stderr


async def test_a_day_that_cannot_be_is_an_error_in_one_line(served: Served) -> None:
    result = await run(served, "usage", "--from", "yesterday")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: first_day: must be a day such as 2026-11-01, got 'yesterday'")


async def test_a_receipt_is_shown_by_its_request_id(served: Served) -> None:
    await served.generate("a", request_id="mine")
    facts = dict(line.split("  ", 1) for line in (await run(served, "receipt", "mine")).stdout.splitlines())
    facts = {label: text.strip() for label, text in facts.items()}
    assert (facts["state"], facts["outcome"], facts["model"]) == ("posted", "completed", "letters")
    assert facts["charge"] == "0.00001 USD by p/letters"
    assert (facts["held for it"], facts["began"]) == ("0.00001 USD, 7 tokens", "2026-11-23T12:00:00Z")
    assert "key" not in facts
    assert json.loads((await run(served, "receipt", "mine", "--json")).stdout)["state"] == "posted"


async def test_a_receipt_that_there_is_not_is_an_error(served: Served) -> None:
    result = await run(served, "receipt", "other")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the ledger has no call 'other' of tenant 'acme' [request")


async def test_a_budget_is_shown_with_what_is_left(served: Served) -> None:
    await served.generate("a")
    assert (await run(served, "budget")).stdout == (
        "BUDGET                    LIMIT                       USED     HELD  LEFT\n"
        "tenant acme (free), USD     0.001 (warned from 0.0005)  0.00001  0     0.00099\n"
        "tenant acme (free), tokens  500                         7        0     493\n"
        "The month ends at 2026-12-01T00:00:00Z.\n"
    ).replace("BUDGET                    ", "BUDGET                      ")
    one = json.loads((await run(served, "budget", "--tenant", "basic", "--json", who="o")).stdout)
    assert (one["tenant"], one["tokens"]["left"], one["resets_at"]) == ("basic", 500, "2026-12-01T00:00:00Z")
