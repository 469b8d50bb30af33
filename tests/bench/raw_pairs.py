"""Compares two raw engines, without server or client, in interleaved pairs: A, B, A, B, …

Each side is a worker in a process of its own (workers/), which loads its model once and then measures the cases that
it is asked for. A case's ratio is the median over pairs of A / B, so what slows the machine for a while slows both.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import machine
from figures import median_interval, spread, with_interval
from worker import Worker

CASES = {
    "b1": {"kind": "decode", "rows": 1, "cached": 20, "steps": 60},
    "b8": {"kind": "decode", "rows": 8, "cached": 20, "steps": 30},
    "b32": {"kind": "decode", "rows": 32, "cached": 20, "steps": 12},
    "b32@128": {"kind": "decode", "rows": 32, "cached": 128, "steps": 12},
    "b32@500": {"kind": "decode", "rows": 32, "cached": 500, "steps": 8},
    "b8@2000": {"kind": "decode", "rows": 8, "cached": 2000, "steps": 8},
    "pp512": {"kind": "prefill", "tokens": 512},
}
"""Decodes: ``rows`` sequences with ``cached`` tokens each take ``steps`` steps. Prefill: one prompt of ``tokens``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in "ab":
        parser.add_argument(
            f"--{side}", required=True, metavar="NAME=COMMAND", help=f"side {side.upper()}: a worker's command line"
        )
    parser.add_argument("--pairs", type=int, default=11, help="pairs for each case (default: 11)")
    parser.add_argument("--cases", default=",".join(CASES), help="which cases (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement there")
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: no case {', '.join(sorted(unknown))}; there is {', '.join(CASES)}")

    facts = machine.describe()
    with _start(parser, arguments.a) as a, _start(parser, arguments.b) as b:
        facts |= {a.name: a.description, b.name: b.description}
        machine.print_header(facts)
        print(header(a.name, b.name), flush=True)
        measured = {}
        for case in cases:
            measured[case] = measure(a, b, case, arguments.pairs)
            print(row(case, measured[case]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "cases": measured}, indent=1))


def _start(parser: argparse.ArgumentParser, side: str) -> Worker:
    name, equals, command = side.partition("=")
    if not equals:
        parser.error(f"{side!r}: must be NAME=COMMAND")
    return Worker(name, shlex.split(command))


def measure(a: Worker, b: Worker, case: str, num_pairs: int) -> dict[str, Any]:
    """Runs one case: the tokens per second of every run of either side, and their ratio."""
    for side in (a, b):
        side.measure(CASES[case])  # warm-up
    rates = [(a.measure(CASES[case]), b.measure(CASES[case])) for _ in range(num_pairs)]
    ratios = [one / other for one, other in rates]
    return {
        "runs": {a.name: [pair[0] for pair in rates], b.name: [pair[1] for pair in rates]},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "ratio_interval_95": median_interval(ratios),
    }


def header(a: str, b: str) -> str:
    return f"| case | {a}, tokens/s | {b}, tokens/s | {a} / {b} | noise |\n|---|---|---|---|---|"


def row(case: str, measured: dict[str, Any]) -> str:
    of_a, of_b = measured["runs"].values()
    noise = f"±{spread(of_a):.0%}, ±{spread(of_b):.0%}"
    medians = f"{statistics.median(of_a):.0f} | {statistics.median(of_b):.0f}"
    return f"| {case} | {medians} | {with_interval(measured['ratios'])} | {noise} |"


if __name__ == "__main__":
    main()
