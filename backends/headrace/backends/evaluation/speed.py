"""Quick figures of speed and memory: enough to compare models that are loaded side by side. ``headrace bench`` and
tests/bench measure with care.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from headrace.backends.api import Row, StepModel
from headrace.backends.evaluation.prompt import reserved, run_prompt

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 512
CACHED_TOKENS = 32
"""Tokens of each sequence before its decodes are timed."""
_STEPS = {1: 48, 8: 24, 32: 10}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians."""

    decode_tokens_per_second: dict[int, float]
    """By batch: over all its sequences, without sampling."""
    prefill_tokens_per_second: float
    """Of one prompt of ``PROMPT_TOKENS``."""


def measure_speed(
    models: Sequence[StepModel], token_ids: Sequence[int], *, repeats: int, progress: Callable[[float], None]
) -> tuple[Speed, ...]:
    """Measures every case on one model after the other, then all again, ``repeats`` times: what slows the machine for a
    while slows all.

    Prompts are cut from ``token_ids``, at least ``PROMPT_TOKENS``. Models have a slot for each row of the largest
    batch. ``progress`` is told how much is done, 0 to 1.
    """
    prompt = list(token_ids[:PROMPT_TOKENS])
    cases = [*(partial(_decode, prompt=prompt[:CACHED_TOKENS], num_rows=batch) for batch in BATCHES)]
    cases.append(partial(_prefill, prompt=prompt))
    rates: list[list[list[float]]] = [[[] for _ in cases] for _ in models]
    for repeat in range(repeats):
        for i, case in enumerate(cases):
            for j, model in enumerate(models):
                rates[j][i].append(case(model))
            progress((repeat + (i + 1) / len(cases)) / repeats)
    medians = [[statistics.median(of_case) for of_case in of_model] for of_model in rates]
    return tuple(
        Speed(
            decode_tokens_per_second=dict(zip(BATCHES, of_decodes, strict=True)), prefill_tokens_per_second=of_prefill
        )
        for *of_decodes, of_prefill in medians
    )


def _decode(model: StepModel, prompt: Sequence[int], num_rows: int) -> float:
    num_steps = _STEPS[num_rows]
    with reserved(model, num_rows, len(prompt) + 1 + num_steps) as slots:
        for slot in slots:
            run_prompt(model, slot, prompt)

        def step(position: int) -> None:
            model.step([Row(slot, position, [prompt[-1]], num_logits=1) for slot in slots])

        step(len(prompt))  # the first of a batch makes what the others use
        began = time.perf_counter()
        for i in range(num_steps):
            step(len(prompt) + 1 + i)
        return num_rows * num_steps / (time.perf_counter() - began)


def _prefill(model: StepModel, prompt: Sequence[int]) -> float:
    with reserved(model, 1, len(prompt)) as (slot,):
        began = time.perf_counter()
        run_prompt(model, slot, prompt)
        return len(prompt) / (time.perf_counter() - began)


def resident_bytes() -> int:
    """Memory of this process that is resident, with what it maps of files; what it has freed is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * resource.getpagesize()
