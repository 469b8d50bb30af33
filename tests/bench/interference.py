"""Measures how far a long prompt stretches the gaps between the tokens of running streams.

While 8 streams run, a prompt of 2,000 tokens arrives. Before: the gaps of the 8 until then. During: those that end
while the long prompt waits for its first token. Limit: a gap at most 3 times as long as before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import machine
from figures import percentile, with_interval
from servers import running_all
from targets import Target, connected
from workload import Answer, prompt

_WARM_UP_TOKENS = 8
"""Tokens of each stream that do not count yet: prompts of other streams are still run."""
_LONGEST_STREAM = 600
_PROMPT_TOKENS = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, metavar="KIND:WHERE", help="as in end_to_end.py")
    parser.add_argument("--serve", action="append", default=[], metavar="COMMAND", help="a server to run meanwhile")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--long-prompt-tokens", type=int, default=2000)
    parser.add_argument("--tokens-before", type=int, default=40, help="tokens of a stream before the long prompt")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every repetition there")
    arguments = parser.parse_args()
    facts = machine.describe()
    with running_all(arguments.serve):
        repeats = asyncio.run(_measure(arguments, facts))
    print("| figure | median [95 % interval] |\n|---|---|")
    for name, values in _columns(repeats).items():
        print(f"| {name} | {with_interval(values)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "repeats": repeats}, indent=1))


async def _measure(arguments: argparse.Namespace, facts: dict[str, str]) -> list[dict[str, float]]:
    async with connected(arguments.target) as target:
        facts["target"] = f"{arguments.target}: {await target.describe()}"
        machine.print_header(facts)
        return [await _interfere(target, arguments, number) for number in range(arguments.repeats)]


async def _interfere(target: Target, arguments: argparse.Namespace, number: int) -> dict[str, float]:
    """One repetition; the figures are in milliseconds, and ratios to the median gap before."""
    first_prompt = number * (arguments.streams + 1)
    answers = [Answer(time.monotonic()) for _ in range(arguments.streams)]
    streams = [
        asyncio.create_task(target.generate(prompt(first_prompt + i, _PROMPT_TOKENS), _LONGEST_STREAM, one))
        for i, one in enumerate(answers)
    ]
    try:
        await _until_all_have(answers, _WARM_UP_TOKENS, streams)
        settled = time.monotonic()
        await _until_all_have(answers, _WARM_UP_TOKENS + arguments.tokens_before, streams)
        long = Answer(time.monotonic())
        await target.generate(prompt(first_prompt + arguments.streams, arguments.long_prompt_tokens), 1, long)
        if any(stream.done() for stream in streams):
            raise RuntimeError(f"a stream ended during the long prompt: {_LONGEST_STREAM} tokens were too few")
    finally:
        for stream in streams:
            stream.cancel()
        for stream in streams:
            with suppress(asyncio.CancelledError):
                await stream
    before = _gaps(answers, settled, long.sent)
    during = _gaps(answers, long.sent, long.arrivals[0])
    usual = statistics.median(before)
    return {
        "gap before, p50, ms": usual * 1e3,
        "gap before, max, ms": max(before) * 1e3,
        "gap during, p50, ms": statistics.median(during) * 1e3,
        "gap during, p99, ms": percentile(during, 99) * 1e3,
        "gap during, max, ms": max(during) * 1e3,
        "stretch: p50 during / p50 before": statistics.median(during) / usual,
        "stretch: p99 during / p50 before": percentile(during, 99) / usual,
        "stretch: max during / p50 before": max(during) / usual,
        "stretch: max during / max before": max(during) / max(before),
        "long prompt, time to first token, ms": long.time_to_first_token * 1e3,
    }


async def _until_all_have(answers: Sequence[Answer], count: int, streams: Sequence[asyncio.Task[None]]) -> None:
    while any(len(one.arrivals) < count for one in answers):
        for stream in streams:
            if stream.done():
                await stream
                raise RuntimeError("a stream ended too early")
        await asyncio.sleep(0.01)


def _gaps(answers: Sequence[Answer], begin: float, end: float) -> list[float]:
    """The gaps of all streams that end between two times."""
    return [
        later - earlier
        for one in answers
        for earlier, later in zip(one.arrivals, one.arrivals[1:], strict=False)
        if begin < later <= end
    ]


def _columns(repeats: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    return {name: [repeat[name] for repeat in repeats] for name in repeats[0]}


if __name__ == "__main__":
    main()
