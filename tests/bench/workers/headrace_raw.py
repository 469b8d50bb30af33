"""Raw headrace: a bundle of the built-in ``onnx`` backend, driven through the step contract.

Run it with headrace's Python. A step computes the logits of every row; sampling is not in the time.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from answering import Measure, answer

from headrace.backends.api import BackendContext, PrefixModel, Row, StepModel
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models-dir", type=Path, required=True, help="folder of model bundles")
    parser.add_argument("--model", default="smollm2-135m", help="name of the bundle (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "int8"))
    arguments = parser.parse_args()
    answer(lambda: _load(arguments))


def _load(arguments: argparse.Namespace) -> tuple[str, Measure]:
    options = OnnxOptions(threads=arguments.threads, kv_cache_dtype=arguments.kv_cache_dtype)
    model = OnnxBackend(options, BackendContext(arguments.models_dir)).load(arguments.model)
    assert isinstance(model, PrefixModel)
    description = (
        f"headrace {version('headrace')}, onnxruntime {version('onnxruntime')}, {model.card.name}"
        f" {model.card.quantization}, cache {arguments.kv_cache_dtype}, {model.determinism.name},"
        f" {arguments.threads} threads"
    )

    def measure(case: Mapping[str, Any]) -> float:
        if case["kind"] == "prefill":
            return _prefill(model, case["tokens"])
        if case["kind"] == "batch":
            return _batch(model, case["prompts"], case["tokens"], case["steps"])
        return _decode(model, case["rows"], case["cached"], case["steps"])

    return description, measure


def _decode(model: PrefixModel, num_rows: int, num_cached: int, num_steps: int) -> float:
    """Tokens per second of ``num_steps`` steps of ``num_rows`` rows."""
    slots, prompt = range(num_rows), _tokens(num_cached)
    # All have the same prompt: copies of one, each in memory of its own, but for the end that is not a whole cut.
    num_copied = (num_cached - 2) // model.chunk_alignment * model.chunk_alignment
    for slot in slots:
        model.reserve(slot, num_cached + 1 + num_steps)
        if slot and num_copied:
            model.copy_prefix(0, slot, num_copied)
        _run_prompt(model, slot, prompt, num_copied if slot else 0)

    def step(position: int) -> None:
        model.step([Row(slot, position, [42], num_logits=1) for slot in slots])

    step(num_cached)
    began = time.perf_counter()
    for i in range(num_steps):
        step(num_cached + 1 + i)
    seconds = time.perf_counter() - began
    for slot in slots:
        model.release(slot)
    return num_rows * num_steps / seconds


def _prefill(model: StepModel, num_tokens: int) -> float:
    """Tokens per second of one prompt."""
    prompt = _tokens(num_tokens)
    model.reserve(0, num_tokens)
    began = time.perf_counter()
    _run_prompt(model, 0, prompt)
    seconds = time.perf_counter() - began
    model.release(0)
    return num_tokens / seconds


def _batch(model: StepModel, num_prompts: int, num_tokens: int, num_steps: int) -> float:
    """Seconds for so many prompts, each followed by ``num_steps`` tokens; as many at a time as there are slots."""
    began = time.perf_counter()
    for first in range(0, num_prompts, model.num_slots):
        slots = range(min(model.num_slots, num_prompts - first))
        for slot in slots:
            model.reserve(slot, num_tokens + num_steps)
        at_once = max(1, model.max_chunk // num_tokens)
        for i in range(0, len(slots), at_once):
            some = slots[i : i + at_once]
            model.step([Row(slot, 0, _tokens(num_tokens, first + slot), num_logits=1) for slot in some])
        for i in range(num_steps - 1):  # the first token is chosen after the prompt
            model.step([Row(slot, num_tokens + i, [42], num_logits=1) for slot in slots])
        for slot in slots:
            model.release(slot)
    return time.perf_counter() - began


def _run_prompt(model: StepModel, slot: int, prompt: Sequence[int], position: int = 0) -> None:
    """Runs a prompt, from ``position`` on, in the largest chunks that the contract allows."""
    size = model.max_chunk // model.chunk_alignment * model.chunk_alignment
    while position < len(prompt):
        end = min(position + size, len(prompt))
        if len(prompt) - end == 1:
            end = len(prompt) if end + 1 - position <= model.max_chunk else end - model.chunk_alignment
        model.step([Row(slot, position, prompt[position:end], num_logits=int(end == len(prompt)))])
        position = end


def _tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1_000, 40_000), k=count)


if __name__ == "__main__":
    main()
