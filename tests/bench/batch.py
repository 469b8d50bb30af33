"""Measures what GenerateBatch reaches of the raw engine: 1,000 prompts over one stream. Target: 95 %.

Raw is the step contract driven by hand (``workers/headrace_raw.py``): as many sequences as the model has slots at a
time, their prompts packed into full steps, then their decodes; nothing is sampled, no text is made. The client of
GenerateBatch runs on the same processors as the server. Both in turn, pair by pair, with the same numbers of tokens;
all prompts differ.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path

import machine
from figures import with_interval
from servers import running_all
from worker import Worker

from headrace.client import AsyncClient, HeadraceError

_RAW = Path(__file__).parent / "workers" / "headrace_raw.py"
_WARM_UP_PROMPTS = 32
_WARM_UP_FIRST = 10**9
"""Far from the others: a generator of random numbers is the same for a number and its negative."""
_SECONDS_TO_START = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="of the server, HOST:PORT")
    parser.add_argument("--serve", required=True, metavar="COMMAND", help="the server to run meanwhile")
    parser.add_argument("--models-dir", type=Path, required=True, help="folder of model bundles, for the raw engine")
    parser.add_argument("--model", default="smollm2-135m", help="name of the bundle (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    raw = [sys.executable, str(_RAW), "--models-dir", str(arguments.models_dir), "--model", arguments.model]
    with running_all([arguments.serve]), Worker("raw", raw) as worker:
        machine.print_header(machine.describe() | {"raw": worker.description})
        ratios = asyncio.run(_measure(worker, arguments))
    print(f"\nGenerateBatch / raw engine: {with_interval(ratios)}")


async def _measure(worker: Worker, arguments: argparse.Namespace) -> list[float]:
    print("| pair | raw, s | GenerateBatch, s | ratio |\n|---|---|---|---|", flush=True)
    ratios = []
    async with AsyncClient(arguments.address) as client:
        await _until_ready(client)
        await _run(client, arguments, first=_WARM_UP_FIRST, count=_WARM_UP_PROMPTS)
        case = {"kind": "batch", "tokens": arguments.prompt_tokens, "steps": arguments.new_tokens}
        worker.measure({**case, "prompts": _WARM_UP_PROMPTS})
        for pair in range(arguments.pairs):
            raw_seconds = worker.measure({**case, "prompts": arguments.prompts})
            batch_seconds = await _run(client, arguments, first=pair * arguments.prompts, count=arguments.prompts)
            ratios.append(raw_seconds / batch_seconds)
            print(f"| {pair + 1} | {raw_seconds:.1f} | {batch_seconds:.1f} | {ratios[-1]:.3f} |", flush=True)
    return ratios


async def _until_ready(client: AsyncClient) -> None:
    give_up = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            await client.generate("the", max_new_tokens=1)
        except HeadraceError:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(0.5)
        else:
            return


async def _run(client: AsyncClient, arguments: argparse.Namespace, *, first: int, count: int) -> float:
    """Seconds from the first prompt sent to the last answer. ``first`` is the number of the first prompt."""
    prompts = [
        random.Random(number).choices(range(1_000, 40_000), k=arguments.prompt_tokens)
        for number in range(first, first + count)
    ]
    began, num_tokens = time.monotonic(), 0
    async with client.generate_batch(
        prompts, model=arguments.model, max_new_tokens=arguments.new_tokens, ignore_eos=True, temperature=0
    ) as answers:
        async for _, answer in answers:
            if isinstance(answer, HeadraceError):
                raise answer
            num_tokens += answer.report.usage.output_tokens or 0
    seconds = time.monotonic() - began
    if num_tokens != count * arguments.new_tokens:
        raise RuntimeError(f"expected {count * arguments.new_tokens} tokens, got {num_tokens}")
    return seconds


if __name__ == "__main__":
    main()
