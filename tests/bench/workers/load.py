"""The load: streams that each send a request as soon as the last is answered, in a process of its own.

Run by end_to_end.py and memory.py, with headrace's Python. See ``targets.py`` for what can be put under load.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from answering import Measure, answer

sys.path.insert(0, str(Path(__file__).parents[1]))

from targets import Target, connected
from workload import Answer, prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="KIND:WHERE")
    arguments = parser.parse_args()
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            answer(lambda: _load(runner, stack, arguments.target))
        finally:
            runner.run(stack.aclose())


def _load(runner: asyncio.Runner, stack: AsyncExitStack, target_name: str) -> tuple[str, Measure]:
    target = runner.run(stack.enter_async_context(connected(target_name)))

    def measure(case: Mapping[str, Any]) -> dict[str, Any]:
        return runner.run(_run(target, **case))

    return f"{target_name}: {runner.run(target.describe())}", measure


async def _run(
    target: Target, *, streams: int, requests: int, prompt_tokens: int, new_tokens: int, first_prompt: int
) -> dict[str, Any]:
    """Runs ``requests`` requests over ``streams`` streams. Prompts are numbered from ``first_prompt``."""
    numbers = itertools.islice(itertools.count(first_prompt), requests)
    answers: list[Answer] = []

    async def stream() -> None:
        for number in numbers:
            one = Answer(time.monotonic())
            answers.append(one)
            await target.generate(prompt(number, prompt_tokens), new_tokens, one)

    began = time.monotonic()
    await asyncio.gather(*(stream() for _ in range(streams)))
    seconds = time.monotonic() - began
    if any(one.num_output_tokens != new_tokens for one in answers):
        lengths = sorted({one.num_output_tokens for one in answers})
        raise RuntimeError(f"expected {new_tokens} new tokens in every answer, got {lengths}")
    return {
        "tokens_per_second": sum(one.num_output_tokens for one in answers) / seconds,
        "seconds": seconds,
        "times_to_first_token": [one.time_to_first_token for one in answers],
        "gaps": [gap for one in answers for gap in one.gaps],
        "input_tokens": statistics.median(one.num_input_tokens for one in answers),
    }


if __name__ == "__main__":
    main()
