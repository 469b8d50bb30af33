"""Measures what speculation gains: tokens/s with it and without, on tasks whose answers copy from their prompts and on
free text. Targets: 1.8 × on a single stream of copying tasks; 0.97 × at least anywhere.

In process: two engines, one that speculates, take turns with one model and the same prompts. Every answer must be the
same from both.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import machine
from copying import COPYING, FREE
from figures import with_interval

from headrace.backends.api import BackendContext, StepModel
from headrace.backends.events import Delta
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    GenerateRequest,
    ResponseOptions,
    Role,
    Sampling,
    Stopping,
)
from headrace.backends.types import Call, Principal, Prompt
from headrace.server.engine.engine import Engine

_KINDS: Mapping[str, tuple[Sequence[str], float]] = {
    "copying": (COPYING, 0.0),
    "free text": (FREE, 0.0),
    "free text, temperature 0.8": (FREE, 0.8),
}
"""Name: prompts and temperature."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, required=True, help="folder of model bundles")
    parser.add_argument("--model", default="smollm2-135m", help="name of the bundle (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", default="1,8,32", help="at once (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="at most, of an answer (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--draft-model", help="name of a bundle that guesses where the text does not tell")
    arguments = parser.parse_args()
    backend = OnnxBackend(OnnxOptions(threads=arguments.threads), BackendContext(arguments.models_dir))
    model = _load(backend, arguments.model)
    facts = {"model": f"{model.card.name} {model.card.quantization}"}
    draft_model = _load(backend, arguments.draft_model) if arguments.draft_model else None
    if draft_model is not None:
        facts["draft model"] = f"{draft_model.card.name} {draft_model.card.quantization}"
    machine.print_header(machine.describe() | facts)
    streams = [int(count) for count in arguments.streams.split(",")]
    asyncio.run(_measure(model, draft_model, streams, arguments.new_tokens, arguments.pairs))


def _load(backend: OnnxBackend, name: str) -> StepModel:
    model = backend.load(name)
    assert isinstance(model, StepModel)
    return model


async def _measure(
    model: StepModel, draft_model: StepModel | None, streams: Sequence[int], new_tokens: int, num_pairs: int
) -> None:
    plain = Engine(model, clock=time.monotonic, max_queued=1000, prefix_cache=False, speculation=False)
    drafting = Engine(model, clock=time.monotonic, max_queued=1000, prefix_cache=False, draft_model=draft_model)
    print("| streams | prompts | plain, tokens/s | with drafts | ratio | drafts accepted |\n|---|---|---|---|---|---|")
    try:
        for num_streams, (kind, (prompts, temperature)) in itertools.product(streams, _KINDS.items()):
            runs: dict[Engine, list[_Run]] = {plain: [], drafting: []}
            for pair in range(num_pairs + 1):
                for engine, measured in runs.items():
                    measured.append(await _run(engine, prompts, temperature, num_streams, new_tokens, pair))
                if runs[plain][-1].answers != runs[drafting][-1].answers:
                    raise SystemExit("an answer with drafts is another one")
            before, after = runs[plain][1:], runs[drafting][1:]  # the first pair warms up
            ratios = [b.tokens_per_second / a.tokens_per_second for a, b in zip(before, after, strict=True)]
            accepted = sum(run.num_accepted for run in after)
            drafted = accepted + sum(run.num_rejected for run in after)
            speeds = " | ".join(with_interval([run.tokens_per_second for run in side], 0) for side in (before, after))
            share = f"{100 * accepted / drafted:.0f} % of {drafted}" if drafted else "none drafted"
            print(f"| {num_streams} | {kind} | {speeds} | {with_interval(ratios)} | {share} |", flush=True)
    finally:
        await asyncio.to_thread(plain.runner.join)  # the model is closed once
        await drafting.close()


@dataclass(frozen=True, slots=True)
class _Run:
    """All prompts of a kind, or as many as there are streams, once."""

    answers: list[list[int]]
    tokens_per_second: float
    num_accepted: int
    num_rejected: int


async def _run(
    engine: Engine, prompts: Sequence[str], temperature: float, num_streams: int, new_tokens: int, seed: int
) -> _Run:
    """Every stream takes the next prompt as soon as it is done with one."""
    calls = [
        _call(engine, prompts[i % len(prompts)], temperature, new_tokens, seed * 1000 + i)
        for i in range(max(num_streams, len(prompts)))
    ]
    answers: list[list[int]] = [[] for _ in calls]
    left = iter(zip(calls, answers, strict=True))

    async def stream() -> None:
        for call, answer in left:
            async with aclosing(engine.generate(call)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        answer += event.token_ids

    began = time.monotonic()
    await asyncio.gather(*(stream() for _ in range(num_streams)))
    seconds = time.monotonic() - began
    usages = [call.meter.usage() for call in calls]
    return _Run(
        answers,
        sum(map(len, answers)) / seconds,
        sum(usage.accepted_draft_tokens or 0 for usage in usages),
        sum(usage.rejected_draft_tokens or 0 for usage in usages),
    )


def _call(engine: Engine, question: str, temperature: float, new_tokens: int, seed: int) -> Call:
    chat = ChatInput((ChatMessage(Role.USER, question),))
    encoding = engine.model.tokenizer.encode_chat(chat)
    request = GenerateRequest(
        input=chat,
        sampling=Sampling(temperature=temperature),
        stopping=Stopping(max_new_tokens=new_tokens),
        response=ResponseOptions(token_ids=True),
        seed=seed,
    )
    return Call(
        request=request,
        request_id="bench",
        arrived=time.monotonic(),
        principal=Principal("bench"),
        prompt=Prompt(encoding.text, tuple(encoding.ids)),
        max_new_tokens=new_tokens,
        is_streamed=True,
    )


if __name__ == "__main__":
    main()
