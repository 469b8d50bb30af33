"""Measures services from a client's side: streams that each ask for 64 tokens after a unique prompt of about 120, and
send the next request as soon as one is answered. The load is a process of its own, on the same processors.

Two targets are compared in interleaved pairs: A, B, A, B, … with the same prompts. A ratio is the median over pairs of
A / B. The other figures are over everything that was measured of a target.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from figures import median_interval, percentile, spread, with_interval
from servers import running_all
from worker import Worker

_LOAD = Path(__file__).parent / "workers" / "load.py"
HEADER = "| streams | target | tokens/s | noise | TTFT p50 / p99, ms | gap p50 / p99, ms |\n|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        metavar="NAME=KIND:WHERE",
        help="one target or two; KIND is grpc (HOST:PORT), openai (HOST:PORT) or engine (MODELS_DIR)",
    )
    parser.add_argument(
        "--serve", action="append", default=[], metavar="COMMAND", help="a server to run meanwhile; any number"
    )
    parser.add_argument("--streams", default="1,8,32", help="numbers of streams (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=11, help="pairs for each number of streams (default: 11)")
    parser.add_argument("--requests", type=int, default=2, help="requests of a stream in a run, 4 in all at least")
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement there")
    arguments = parser.parse_args()
    targets = [target.partition("=") for target in arguments.target]
    if len(targets) > 2 or not all(where for _, _, where in targets):
        parser.error("--target: one or two, each NAME=KIND:WHERE")

    facts = machine.describe()
    measured: dict[int, Any] = {}
    with running_all(arguments.serve):
        workers = [load_on(name, where) for name, _, where in targets]
        try:
            facts |= {worker.name: worker.description for worker in workers}
            facts["workload"] = f"prompts of {arguments.prompt_tokens} words, {arguments.new_tokens} new tokens, greedy"
            machine.print_header(facts)
            print(HEADER, flush=True)
            first_prompt = 0
            for streams in map(int, arguments.streams.split(",")):
                case = case_of(streams, arguments.requests, arguments.prompt_tokens, arguments.new_tokens)
                measured[streams] = measure(workers, case, arguments.pairs, first_prompt)
                print(rows(streams, measured[streams]), flush=True)
                first_prompt += (arguments.pairs + 1) * case["requests"]
        finally:
            for worker in workers:
                worker.close()
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "streams": measured}, indent=1))


def case_of(streams: int, requests: int = 2, prompt_tokens: int = 120, new_tokens: int = 64) -> dict[str, int]:
    """What a load is told to run, but for its prompts; ``requests`` are those of each stream, 4 in all at least."""
    return {
        "streams": streams,
        "requests": max(4, requests * streams),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
    }


def load_on(name: str, target: str) -> Worker:
    """The process that puts load on a target; it is there once the target answers."""
    return Worker(name, [sys.executable, str(_LOAD), target])


def measure(workers: Sequence[Worker], case: dict[str, int], num_pairs: int, first_prompt: int) -> dict[str, Any]:
    """Measures one number of streams: every run of each target, and the ratios of two."""
    runs: dict[str, list[Any]] = {worker.name: [] for worker in workers}
    for number in range(num_pairs + 1):
        for worker in workers:
            result = worker.measure({**case, "first_prompt": first_prompt + number * case["requests"]})
            if number > 0:  # the first is the warm-up
                runs[worker.name].append(result)
    if len(workers) == 1:
        return {"runs": runs}
    pairs = list(zip(*runs.values(), strict=True))
    rates = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
    waits = [_median_wait(a) / _median_wait(b) for a, b in pairs]
    return {
        "runs": runs,
        "ratios": rates,
        "ratio": statistics.median(rates),
        "ratio_interval_95": median_interval(rates),
        "ttft_ratios": waits,
        "ttft_ratio": statistics.median(waits),
        "ttft_ratio_interval_95": median_interval(waits),
    }


def rows(streams: int, measured: dict[str, Any]) -> str:
    """A row for each target, and one for the ratios: of tokens/s, and of the median time to first token of a run."""
    lines = []
    for name, results in measured["runs"].items():
        rates = [result["tokens_per_second"] for result in results]
        waits = [wait for result in results for wait in result["times_to_first_token"]]
        gaps = [gap for result in results for gap in result["gaps"]]
        lines.append(
            f"| {streams} | {name} | {statistics.median(rates):.0f} | ±{spread(rates):.0%}"
            f" | {_milliseconds(waits)} | {_milliseconds(gaps)} |"
        )
    if "ratios" in measured:
        lines.append(
            f"| {streams} | **{' / '.join(measured['runs'])}** | **{with_interval(measured['ratios'])}** |"
            f" | p50 {with_interval(measured['ttft_ratios'])} | |"
        )
    return "\n".join(lines)


def _median_wait(result: dict[str, Any]) -> float:
    return percentile(result["times_to_first_token"], 50)


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{percentile(seconds, 50) * 1e3:.1f} / {percentile(seconds, 99) * 1e3:.1f}"


if __name__ == "__main__":
    main()
