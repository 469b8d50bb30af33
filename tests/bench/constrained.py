"""Measures what it costs to keep outputs in a shape: tokens/s of 8 streams whose output must be valid under a JSON
schema, against the same streams without one. Target: 0.9 × at least. With speculation, which guesses what the schema
forces, it should gain.

In process: engines take turns with one model and the same prompts. Every answer has the same number of tokens: the
schema asks for more than there is room for, and the free answers go on after the end of sequence.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path

import machine
from figures import with_interval

from headrace.backends.api import BackendContext, StepModel
from headrace.backends.events import Delta
from headrace.backends.formats import JsonSchemaFormat, OutputFormat
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

_QUESTION = "Invent people for a novel that is set in {}, and write them down as JSON."
_PLACES = ("Lisbon", "Kyoto", "Lagos", "Oslo", "Lima", "Hanoi", "Quebec", "Cairo")
_SCHEMA = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "first_name": {"type": "string", "maxLength": 30},
            "last_name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "occupation": {"enum": ["baker", "engineer", "fisher", "nurse", "teacher", "none"]},
            "description": {"type": "string", "maxLength": 200},
            "is_married": {"type": "boolean"},
        },
        "required": ["first_name", "last_name", "age", "occupation", "description", "is_married"],
        "additionalProperties": False,
    },
}
_SCHEMA_FORMAT = JsonSchemaFormat(json.dumps(_SCHEMA))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, required=True, help="folder of model bundles")
    parser.add_argument("--model", default="smollm2-135m", help="name of the bundle (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--pairs", type=int, default=11)
    arguments = parser.parse_args()
    backend = OnnxBackend(OnnxOptions(threads=arguments.threads), BackendContext(arguments.models_dir))
    model = backend.load(arguments.model)
    assert isinstance(model, StepModel)
    machine.print_header(machine.describe() | {"model": f"{model.card.name} {model.card.quantization}"})
    asyncio.run(_measure(model, arguments))


async def _measure(model: StepModel, arguments: argparse.Namespace) -> None:
    plain = Engine(model, clock=time.monotonic, max_queued=1000, prefix_cache=False, speculation=False)
    guessing = Engine(model, clock=time.monotonic, max_queued=1000, prefix_cache=False)
    sides: Mapping[str, tuple[Engine, OutputFormat | None]] = {
        "free": (plain, None),
        "JSON schema": (plain, _SCHEMA_FORMAT),
        "free, speculation": (guessing, None),
        "JSON schema, speculation": (guessing, _SCHEMA_FORMAT),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for pair in range(arguments.pairs + 1):
            for name, (engine, output_format) in sides.items():
                speeds[name].append(await _run(engine, output_format, arguments, pair))
    finally:
        await plain.stop()
        await guessing.close()
    print("| streams | output | tokens/s | ratio to free |\n|---|---|---|---|")
    free = speeds["free"][1:]  # the first pair warms up
    for name, found in speeds.items():
        ratios = [speed / other for speed, other in zip(found[1:], free, strict=True)]
        print(f"| {arguments.streams} | {name} | {with_interval(found[1:], 0)} | {with_interval(ratios)} |")


async def _run(engine: Engine, output_format: OutputFormat | None, arguments: argparse.Namespace, seed: int) -> float:
    """Tokens per second of all streams, prefill included."""
    calls = [_call(engine, output_format, arguments, i, seed * 1000 + i) for i in range(arguments.streams)]

    async def read(call: Call) -> int:
        async with aclosing(engine.generate(call)) as events:
            return sum([len(event.token_ids) async for event in events if isinstance(event, Delta)])

    began = time.monotonic()
    counts = await asyncio.gather(*map(read, calls))
    seconds = time.monotonic() - began
    if set(counts) != {arguments.new_tokens}:
        raise SystemExit(f"answers have {sorted(set(counts))} tokens, not {arguments.new_tokens}")
    return sum(counts) / seconds


def _call(
    engine: Engine, output_format: OutputFormat | None, arguments: argparse.Namespace, number: int, seed: int
) -> Call:
    chat = ChatInput((ChatMessage(Role.USER, _QUESTION.format(_PLACES[number % len(_PLACES)])),))
    encoding = engine.model.tokenizer.encode_chat(chat)
    request = GenerateRequest(
        input=chat,
        sampling=Sampling(temperature=arguments.temperature),
        stopping=Stopping(max_new_tokens=arguments.new_tokens, ignore_eos=output_format is None),
        output_format=output_format,
        response=ResponseOptions(token_ids=True),
        seed=seed,
    )
    return Call(
        request=request,
        request_id="bench",
        arrived=time.monotonic(),
        principal=Principal("bench"),
        prompt=Prompt(encoding.text, tuple(encoding.ids)),
        max_new_tokens=arguments.new_tokens,
        is_streamed=True,
    )


if __name__ == "__main__":
    main()
