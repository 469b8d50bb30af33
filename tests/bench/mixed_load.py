"""Measures how soon voice requests get their first token beside batch work that fills the server. Target: p99 300 ms.

In process, through the engine. First the capacity: as many batch requests at once as the model runs, each followed by
the next. Then batch requests arrive at random (Poisson) at a share of that rate, alone, and once more with voice
requests beside them, of another tenant and at random, too. The time to a first token is from a call's arrival until
that token is sampled. Every prompt is random, so no cache helps.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import machine
import numpy as np
from figures import percentile
from matplotlib.figure import Figure

from headrace.backends.api import BackendContext, StepModel
from headrace.backends.events import ChoiceFinish, Delta
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions
from headrace.backends.requests import (
    GenerateRequest,
    LatencyClass,
    ResponseOptions,
    Scheduling,
    Stopping,
    TokenIdsInput,
)
from headrace.backends.types import Call, Principal, Prompt
from headrace.server.engine.engine import Engine

_TARGET = 0.3
_BATCH_PROMPT, _BATCH_NEW = (32, 256), 96
_VOICE_PROMPT, _VOICE_NEW = (20, 100), 24
_BIN_SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, required=True, help="folder of model bundles")
    parser.add_argument("--model", default="smollm2-135m", help="name of the bundle (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--load", type=float, default=0.9, help="batch, as a share of capacity (default: %(default)s)")
    parser.add_argument("--voices", type=float, default=0.5, help="voice requests a second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="of each phase (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="where to write a PNG")
    arguments = parser.parse_args()
    options = OnnxOptions(threads=arguments.threads)
    model = OnnxBackend(options, BackendContext(arguments.models_dir)).load(arguments.model)
    assert isinstance(model, StepModel)
    machine.print_header(machine.describe() | {"model": f"{model.card.name} {model.card.quantization}"})
    alone, mixed = asyncio.run(_measure(model, arguments.load, arguments.voices, arguments.seconds))
    _print_table(alone, mixed)
    if arguments.plot:
        _plot(arguments.plot, alone, mixed)


@dataclass
class Phase:
    """What happened while one kind of load was offered."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    batch_tokens: list[float] = field(default_factory=list)
    """When each came, in seconds."""
    first_tokens: list[tuple[float, float]] = field(default_factory=list)
    """When each voice request came, and what it waited."""
    num_batch: int = 0
    """Batch requests that ended."""
    num_preemptions: int = 0

    @property
    def batch_tokens_per_second(self) -> float:
        return len(self.batch_tokens) / self.seconds


async def _measure(model: StepModel, load: float, voices: float, seconds: float) -> tuple[Phase, Phase]:
    dice = np.random.default_rng(0)
    engine = Engine(model, clock=time.monotonic, max_queued=100_000)
    try:
        await _run_closed(engine, dice, Phase(min(seconds, 10)))  # warms up
        full = await _run_closed(engine, dice, Phase(seconds))
        rate = load * full.num_batch / seconds
        print(
            f"capacity: {full.num_batch / seconds:.2f} batch requests/s, {full.batch_tokens_per_second:.0f} tokens/s\n"
        )
        alone = await _run_open(engine, dice, Phase(seconds), batches=rate, voices=0)
        mixed = await _run_open(engine, dice, Phase(seconds), batches=rate, voices=voices)
    finally:
        await engine.close()
    return alone, mixed


async def _run_closed(engine: Engine, dice: np.random.Generator, phase: Phase) -> Phase:
    async def repeat() -> None:
        while time.monotonic() < phase.began + phase.seconds:
            await _run_batch(engine, dice, phase)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(engine.model.num_slots):
            tasks.create_task(repeat())
    return phase


async def _run_open(engine: Engine, dice: np.random.Generator, phase: Phase, *, batches: float, voices: float) -> Phase:
    """Both arrive until the phase is over; what has arrived is finished, and counts as far as it came in time."""
    before = engine.runner.num_preemptions

    async def offer(
        rate: float, run: Callable[[Engine, np.random.Generator, Phase], Coroutine[None, None, None]]
    ) -> None:
        async for _ in _arrivals(dice, rate, phase.began + phase.seconds):
            tasks.create_task(run(engine, dice, phase))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(offer(batches, _run_batch))
        if voices:
            tasks.create_task(offer(voices, _run_voice))
    phase.num_preemptions = engine.runner.num_preemptions - before
    return phase


async def _arrivals(dice: np.random.Generator, rate: float, end: float) -> AsyncIterator[None]:
    when = time.monotonic()
    while (when := when + dice.exponential(1 / rate)) < end:
        await asyncio.sleep(when - time.monotonic())
        yield


async def _run_batch(engine: Engine, dice: np.random.Generator, phase: Phase) -> None:
    call = _make_call(dice, LatencyClass.BATCH, _BATCH_PROMPT, _BATCH_NEW)
    async with aclosing(engine.generate(call)) as events:
        async for event in events:
            now = time.monotonic() - phase.began
            if isinstance(event, Delta) and now < phase.seconds:
                phase.batch_tokens += [now] * len(event.token_ids)
            elif isinstance(event, ChoiceFinish):
                phase.num_batch += now < phase.seconds


async def _run_voice(engine: Engine, dice: np.random.Generator, phase: Phase) -> None:
    call = _make_call(dice, LatencyClass.VOICE, _VOICE_PROMPT, _VOICE_NEW)
    async with aclosing(engine.generate(call)) as events:
        async for _ in events:
            pass
    assert call.meter.first_token is not None
    phase.first_tokens.append((call.arrived - phase.began, call.meter.first_token - call.arrived))


_numbers = itertools.count()


def _make_call(
    dice: np.random.Generator, latency_class: LatencyClass, prompt_lengths: tuple[int, int], max_new_tokens: int
) -> Call:
    ids = tuple(dice.integers(300, 40_000, dice.integers(*prompt_lengths, endpoint=True)).tolist())
    return Call(
        request=GenerateRequest(
            input=TokenIdsInput(ids),
            stopping=Stopping(ignore_eos=True),
            response=ResponseOptions(token_ids=True),
            scheduling=Scheduling(latency_class=latency_class),
        ),
        request_id=f"{latency_class.name}-{next(_numbers)}",
        arrived=time.monotonic(),
        principal=Principal(latency_class.name),
        prompt=Prompt("", ids),
        max_new_tokens=max_new_tokens,
        is_streamed=True,
    )


def _print_table(alone: Phase, mixed: Phase) -> None:
    milliseconds = [waited * 1e3 for _, waited in mixed.first_tokens]
    print("| | batch, tokens/s | voice requests | first token p50, ms | p99, ms | worst, ms | preemptions |")
    print("|---|---|---|---|---|---|---|")
    print(f"| batch alone | {alone.batch_tokens_per_second:.0f} | 0 | | | | |")
    waits = " | ".join(f"{percentile(milliseconds, percent):.0f}" for percent in (50, 99, 100))
    counts = f"{mixed.batch_tokens_per_second:.0f} | {len(milliseconds)}"
    print(f"| with voice | {counts} | {waits} | {mixed.num_preemptions} |")
    ratio = mixed.batch_tokens_per_second / alone.batch_tokens_per_second
    verdict = "met" if percentile(milliseconds, 99) <= _TARGET * 1e3 else "missed"
    print(f"\nbatch with voice / alone: {ratio:.2f}; target of {_TARGET * 1e3:.0f} ms at p99: {verdict}")


def _plot(file: Path, alone: Phase, mixed: Phase) -> None:
    figure = Figure(figsize=(11, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    upper.scatter(*zip(*((at, waited * 1e3) for at, waited in mixed.first_tokens), strict=True), s=12)
    upper.axhline(_TARGET * 1e3, color="tab:red", linewidth=1, label="target at p99")
    upper.set_ylim(bottom=0)
    upper.set_ylabel("voice: time to first token, ms")
    upper.legend(loc="upper right")
    bins = np.arange(0, mixed.seconds + _BIN_SECONDS, _BIN_SECONDS)
    for phase, name in ((alone, "alone"), (mixed, "beside voice")):
        counts, _ = np.histogram(phase.batch_tokens, bins)
        lower.step(bins[:-1], counts / _BIN_SECONDS, where="post", label=name)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("batch: tokens/s")
    lower.set_xlabel("seconds")
    lower.legend(loc="lower right")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
