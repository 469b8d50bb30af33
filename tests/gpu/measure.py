"""How fast a model is on the device: its steps alone, and streams through the engine. No network, no gRPC."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from headrace.backends.api import Row
from headrace.backends.onnx.bundle import WEIGHTS
from headrace.backends.onnx.paged_model import PagedModel
from headrace.server.engine.engine import Engine
from tests.gpu.rig import Bundle, Rig, kv_bytes, random_tokens
from tests.gpu.streams import Stream, generate

_ROOM = 4
"""How much larger the cache is than what runs at once: for what is over and kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    streams: tuple[int, ...]
    prompt: int
    """Tokens of each stream's prompt."""
    new: int
    """Tokens that each stream asks for."""
    steps: int
    """Decodes in a row, of the steps alone."""
    first_prompt: int
    """Tokens of the prompts whose first token is waited for."""
    first_tokens: int
    """How many of them."""
    copied: int
    """Bytes that are read, and written, to find the bandwidth of the memory."""


FULL = Sizes(streams=(1, 8, 64, 256), prompt=128, new=256, steps=100, first_prompt=512, first_tokens=30, copied=2**30)
SMALL = Sizes(streams=(1, 3), prompt=16, new=8, steps=4, first_prompt=64, first_tokens=2, copied=2**20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Of so many streams."""

    streams: int
    step_tokens: float
    """Tokens/s of the steps alone, with the choice of the largest logit."""
    tokens: float
    """Tokens/s of the engine: all output over all the time, prompts and all."""
    decode_tokens: float
    """Tokens/s of the engine between the last stream's first token and the first stream's last."""
    first_token: float
    """Seconds to a stream's first token, the median, where all come at once."""
    limit: float
    """Tokens/s at which the memory would do nothing but read weights, keys and values."""


def measure(rig: Rig, bundle: Bundle, sizes: Sizes, *, captures: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures of a model; ``captures``: with decodes as CUDA graphs."""
    bandwidth = copy_bandwidth(rig, sizes.copied)
    say(f"memory: {bandwidth / 1e9:,.0f} GB/s of a copy, read and written")
    rates = []
    for streams in sizes.streams:
        rate = _rate(rig, bundle, sizes, streams, bandwidth, captures=captures)
        say(
            f"{streams} streams: {rate.tokens:,.0f} tokens/s, {rate.decode_tokens:,.0f} while all run, steps alone "
            f"{rate.step_tokens:,.0f}, limit {rate.limit:,.0f}; first token {1000 * rate.first_token:.1f} ms"
        )
        rates.append(asdict(rate))
    prefill = _prefill(rig, bundle, sizes)
    say(f"prompts: {prefill:,.0f} tokens/s")
    first = asyncio.run(_first_tokens(rig, bundle, sizes, captures=captures))
    say(f"first token of {sizes.first_prompt} tokens: {1000 * statistics.median(first):.1f} ms")
    return {
        "captures": captures,
        "bandwidth": bandwidth,
        "rates": rates,
        "prefill_tokens": prefill,
        "first_token": statistics.median(first),
        "first_token_slowest": max(first),
    }


def copy_bandwidth(rig: Rig, size: int) -> float:
    """Bytes/s, those read and those written, of a node that does as good as nothing else."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "copy", tensors[:1], tensors[1:])
    model = helper.make_model(body, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    with tempfile.TemporaryDirectory() as folder:
        session = rig.session(model, Path(folder))
    arrays = [
        ort.OrtValue.ortvalue_from_numpy(np.ones(size // 4, np.float32), rig.device.name, rig.device.index)
        for _ in range(2)
    ]
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", arrays[0])
    binding.bind_ortvalue_output("y", arrays[1])
    seconds = [_seconds(lambda: session.run_with_iobinding(binding)) for _ in range(20)]
    return 2 * size / statistics.median(seconds[5:])


def _rate(rig: Rig, bundle: Bundle, sizes: Sizes, streams: int, bandwidth: float, *, captures: bool) -> Rate:
    def opened() -> PagedModel:
        return _open(rig, bundle, streams, sizes.prompt + max(sizes.new, sizes.steps) + 1, captures=captures)

    model = opened()
    step_seconds = _step_seconds(model, bundle, sizes, streams)
    _check_captures(model, captures=captures)
    model = opened()
    read, began = asyncio.run(_streams(model, bundle, sizes, streams))
    _check_captures(model, captures=captures)
    ends = [stream.arrivals[-1] for stream in read]
    all_began, any_ended = max(stream.arrivals[0] for stream in read), min(ends)
    between = sum(all_began < arrival <= any_ended for stream in read for arrival in stream.arrivals)
    manifest = bundle.manifest
    seen = sizes.prompt + sizes.new // 2
    step_bytes = manifest.files[WEIGHTS].num_bytes + streams * seen * kv_bytes(manifest)
    return Rate(
        streams=streams,
        step_tokens=streams / step_seconds,
        tokens=sum(len(stream.tokens) for stream in read) / (max(ends) - began),
        decode_tokens=between / (any_ended - all_began) if any_ended > all_began else 0.0,
        first_token=statistics.median(stream.first_token_seconds for stream in read),
        limit=streams * (bandwidth / step_bytes),
    )


def _step_seconds(model: PagedModel, bundle: Bundle, sizes: Sizes, streams: int) -> float:
    """Of one step of decodes, the median."""
    manifest = bundle.manifest
    prompts = [random_tokens(manifest, sizes.prompt, seed=i) for i in range(streams)]
    for slot, prompt in enumerate(prompts):
        model.reserve(slot, sizes.prompt + sizes.steps)
        model.step([Row(slot, 0, prompt, num_logits=1)])
    tokens, seconds = [prompt[-1] for prompt in prompts], []
    for place in range(sizes.prompt, sizes.prompt + sizes.steps):
        began = time.perf_counter()
        logits = model.step([Row(slot, place, [token], num_logits=1) for slot, token in enumerate(tokens)])
        tokens = logits.greedy(range(streams)).tolist()
        seconds.append(time.perf_counter() - began)
    model.close()
    return statistics.median(seconds[len(seconds) // 4 :])


def _check_captures(model: PagedModel, *, captures: bool) -> None:
    """A model goes on without CUDA graphs if it must: what is then measured is not what it is called."""
    if model.captures != captures:
        raise RuntimeError("a decode could not be captured as a CUDA graph; the log of the model says why")


async def _streams(model: PagedModel, bundle: Bundle, sizes: Sizes, streams: int) -> tuple[list[Stream], float]:
    """All at once, after a first time that is not counted; and when they began."""
    engine = Engine(model, clock=time.monotonic, max_queued=4 * streams)
    try:
        for turn in range(2):
            manifest = bundle.manifest
            prompts = [random_tokens(manifest, sizes.prompt, seed=1000 * turn + i) for i in range(streams)]
            began = time.monotonic()
            read = await asyncio.gather(*(generate(engine, prompt, sizes.new) for prompt in prompts))
    finally:
        await engine.close()
    return read, began


async def _first_tokens(rig: Rig, bundle: Bundle, sizes: Sizes, *, captures: bool) -> list[float]:
    """Seconds to the first token of prompts that come one after another; the first few are not counted."""
    manifest = bundle.manifest
    model = _open(rig, bundle, 8, sizes.first_prompt + 2, captures=captures)
    engine = Engine(model, clock=time.monotonic, max_queued=8)
    try:
        prompts = [random_tokens(manifest, sizes.first_prompt, seed=5000 + i) for i in range(3 + sizes.first_tokens)]
        seconds = [(await generate(engine, prompt, 2)).first_token_seconds for prompt in prompts]
    finally:
        await engine.close()
    return seconds[3:]


def _prefill(rig: Rig, bundle: Bundle, sizes: Sizes) -> float:
    """Tokens/s of the longest chunk."""
    model = _open(rig, bundle, 1, min(2048, bundle.manifest.context_length))
    length = min(model.max_chunk, bundle.manifest.context_length) - 1
    seconds = []
    for turn in range(2 + sizes.first_tokens // 2):
        prompt = random_tokens(bundle.manifest, length, seed=turn)
        model.reserve(0, length)
        seconds.append(_seconds(lambda prompt=prompt: model.step([Row(0, 0, prompt, num_logits=1)]).greedy([0])))
        model.release(0)
    model.close()
    return length / statistics.median(seconds[2:])


def _open(rig: Rig, bundle: Bundle, streams: int, tokens: int, *, captures: bool = False) -> PagedModel:
    """With room for ``streams`` sequences of ``tokens`` tokens, in whole blocks, several times over."""
    per_stream = 256 * (-(-tokens // 256) + 1)
    return rig.open(
        bundle,
        num_slots=streams,
        num_spare_slots=streams,
        num_tokens=_ROOM * streams * per_stream + 1024,
        captures=captures,
    )


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
