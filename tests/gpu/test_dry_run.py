"""The whole command without a GPU, so that the first who has one finds no typing errors in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICK = "(operator and heads and window) or (numbers and int8 and block) or (placement and paged) or earlier"
"""One test or two of each file: all of them are a few minutes."""


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_GPU_")}
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_writes_a_report_that_says_what_it_is(tmp_path) -> None:
    path = tmp_path / "report.md"

    ran = command("--dry-run", "--model", "random", "--tests", QUICK, "--report", str(path))

    assert ran.returncode == 0, ran.stdout + ran.stderr
    report, figures = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert "A DRY RUN" in report
    assert figures["tests"]["num_passed"] >= 10
    assert figures["tests"]["failures"] == {}
    assert [way["captures"] for way in figures["measured"]] == [False, True]
    assert all(rate["tokens"] > 0 for way in figures["measured"] for rate in way["rates"])
    assert "## Targets" not in report


def test_without_a_gpu_the_command_says_what_is_missing(tmp_path) -> None:
    ran = command("--report", str(tmp_path / "report.md"), CUDA_VISIBLE_DEVICES="")

    assert ran.returncode == 2
    assert "There is nothing to run on: " in ran.stderr
    assert not list(tmp_path.iterdir())
