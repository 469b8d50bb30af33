"""Measures the time to the first token of a long prompt, cold and with its beginning in the prefix cache. Target: 10 ×.

In process, through the engine: from the call until its first token is sampled. Every pair has a beginning of its own,
never seen before; the cached prompt has the beginning of the cold one and another question at its end. Its answer must
be the one that it gets with the cache bypassed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import machine
import numpy as np
from figures import with_interval

from headrace.backends.api import BackendContext, StepModel
from headrace.backends.events import ChoiceFinish, Delta
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions
from headrace.backends.requests import GenerateRequest, ResponseOptions, Stopping, TokenIdsInput
from headrace.backends.types import Call, Principal, Prompt
from headrace.server.engine.engine import Engine

_NEW_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, required=True, help="folder of model bundles")
    parser.add_argument("--model", default="smollm2-135m", help="name of the bundle (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt (default: %(default)s)")
    parser.add_argument("--question", type=int, default=16, help="tokens at its end that differ (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=11)
    arguments = parser.parse_args()
    options = OnnxOptions(threads=arguments.threads)
    model = OnnxBackend(options, BackendContext(arguments.models_dir)).load(arguments.model)
    assert isinstance(model, StepModel)
    machine.print_header(machine.describe() | {"model": f"{model.card.name} {model.card.quantization}"})
    asyncio.run(_measure(model, arguments.tokens, arguments.question, arguments.pairs))


async def _measure(model: StepModel, num_tokens: int, num_question: int, num_pairs: int) -> None:
    dice = np.random.default_rng(0)
    engine = Engine(model, clock=time.monotonic, max_queued=8)
    colds: list[float] = []
    cacheds: list[float] = []
    hits: list[int] = []
    try:
        for pair in range(num_pairs + 1):
            cold, other = dice.integers(300, 40_000, (2, num_tokens)).tolist()
            cached = [*cold[: num_tokens - num_question], *other[num_tokens - num_question :]]
            seconds_cold, _, _ = await _ask(engine, cold, use_prefix_cache=True)
            seconds_cached, answer, num_hit = await _ask(engine, cached, use_prefix_cache=True)
            _, expected, _ = await _ask(engine, cached, use_prefix_cache=False)
            if answer != expected:
                raise SystemExit("the answer with a hit is another one")
            if pair:  # the first warms up
                colds.append(seconds_cold)
                cacheds.append(seconds_cached)
                hits.append(num_hit)
    finally:
        await engine.close()
    ratios = [cold / cached for cold, cached in zip(colds, cacheds, strict=True)]
    print(f"| prompt, tokens | cached | cold, ms | with a hit, ms | ratio, {num_pairs} pairs |\n|---|---|---|---|---|")
    seconds = " | ".join(f"{statistics.median(values) * 1e3:.1f}" for values in (colds, cacheds))
    print(f"| {num_tokens} | {statistics.median(hits):.0f} | {seconds} | {with_interval(ratios, 1)} |")


async def _ask(engine: Engine, tokens: Sequence[int], *, use_prefix_cache: bool) -> tuple[float, list[int], int]:
    """Seconds to the first token, the answer, and how many tokens were there."""
    request = GenerateRequest(
        input=TokenIdsInput(tuple(tokens)),
        stopping=Stopping(ignore_eos=True),
        response=ResponseOptions(token_ids=True),
    )
    began = time.monotonic()
    call = Call(
        request=replace(request, use_prefix_cache=use_prefix_cache),
        request_id="bench",
        arrived=began,
        principal=Principal("bench"),
        prompt=Prompt("", tuple(tokens)),
        max_new_tokens=_NEW_TOKENS,
        is_streamed=True,
    )
    answer: list[int] = []
    async with aclosing(engine.generate(call)) as events:
        async for event in events:
            if isinstance(event, Delta):
                answer += event.token_ids
            elif isinstance(event, ChoiceFinish):
                break
    assert call.meter.first_token is not None
    return call.meter.first_token - began, answer, call.meter.usage().cache_read_input_tokens or 0


if __name__ == "__main__":
    main()
