"""Raw OpenVINO GenAI: its continuous batching, stepped by hand; run it with that environment's Python.

The library samples inside its steps: greedily here, which is in the time. Its cache is uint8 unless told otherwise.
Every row has a prompt of its own, the same in each run, so that prefix caching spares all runs but the first the time
to compute it; a prompt whose time is measured never comes twice.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from answering import Measure, answer, measuring

_MAX_ROWS = 32
_MAX_RUN_TOKENS = 16384
"""So that all prompts of a case run in one step, and are done when the time begins."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True, help="the model's file (Q8_0)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    answer(lambda: _load(arguments))


def _load(arguments: argparse.Namespace) -> tuple[str, Measure]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_seqs = _MAX_ROWS
    scheduler.max_num_batched_tokens = _MAX_RUN_TOKENS
    scheduler.enable_prefix_caching = True
    properties = {"INFERENCE_NUM_THREADS": arguments.threads}
    engine = _Engine(openvino_genai.ContinuousBatchingPipeline(arguments.gguf, scheduler, "CPU", properties))
    description = f"openvino-genai {version('openvino-genai')}, {arguments.gguf.name}, {arguments.threads} threads"

    return description, measuring(engine)


class _Engine:
    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._ids = itertools.count()
        self._seeds = itertools.count(_MAX_ROWS)

    def decode(self, num_rows: int, num_cached: int, num_steps: int) -> float:
        """Tokens per second of ``num_steps`` steps of ``num_rows`` rows."""
        # One token from the prompts' step, one from the warm-up, the measured ones, and one for the end.
        handles = [self._add(num_cached, num_steps + 3, seed=row) for row in range(num_rows)]
        self._pipeline.step()
        self._pipeline.step()
        self._read(handles, expected=2)
        began = time.perf_counter()
        for _ in range(num_steps):
            self._pipeline.step()
        seconds = time.perf_counter() - began
        self._read(handles, expected=num_steps)
        self._finish()
        return num_rows * num_steps / seconds

    def prefill(self, num_tokens: int) -> float:
        """Tokens per second of one prompt."""
        handle = self._add(num_tokens, 1, seed=next(self._seeds))
        began = time.perf_counter()
        self._pipeline.step()
        seconds = time.perf_counter() - began
        self._read([handle], expected=1)
        self._finish()
        return num_tokens / seconds

    def _add(self, num_tokens: int, max_new_tokens: int, *, seed: int) -> Any:
        config = openvino_genai.GenerationConfig(max_new_tokens=max_new_tokens, ignore_eos=True, do_sample=False)
        prompt = np.array([random.Random(seed).choices(range(1_000, 40_000), k=num_tokens)], np.int64)
        return self._pipeline.add_request(next(self._ids), openvino.Tensor(prompt), config)

    def _read(self, handles: list[Any], expected: int) -> None:
        """Takes what was generated, and makes sure that every step gave every row its token."""
        for handle in handles:
            count = 0
            while handle.can_read():
                count += sum(len(output.generated_ids) for output in handle.read().values())
            if count != expected:
                raise RuntimeError(f"expected {expected} tokens of each row, got {count}")

    def _finish(self) -> None:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


if __name__ == "__main__":
    main()
