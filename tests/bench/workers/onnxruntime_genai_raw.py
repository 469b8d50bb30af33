"""Raw onnxruntime-genai; run it with that environment's Python.

Its batches are static on CPU: all rows of one begin and end together, and its batch is made anew for each measurement,
outside the time. It samples inside its steps: greedily here, which is in the time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
from answering import Measure, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder that its model builder made")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    answer(lambda: _load(arguments))


def _load(arguments: argparse.Namespace) -> tuple[str, Measure]:
    config = onnxruntime_genai.Config(str(arguments.model))
    threads = {"intra_op_num_threads": arguments.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = onnxruntime_genai.Model(config)
    description = (
        f"onnxruntime-genai {version('onnxruntime-genai')}, {arguments.model.name}, {arguments.threads} threads,"
        " static batches"
    )

    def measure(case: Mapping[str, Any]) -> float:
        if case["kind"] == "prefill":
            return _prefill(model, case["tokens"])
        return _decode(model, case["rows"], case["cached"], case["steps"])

    return description, measure


def _decode(model: Any, num_rows: int, num_cached: int, num_steps: int) -> float:
    """Tokens per second of ``num_steps`` steps of ``num_rows`` rows."""
    # One token from the prompts' logits, one from the warm-up, the measured ones.
    generator = _generator(model, num_rows, num_cached + num_steps + 2)
    generator.append_tokens(_prompts(num_rows, num_cached))
    generator.generate_next_token()
    generator.generate_next_token()
    began = time.perf_counter()
    for _ in range(num_steps):
        generator.generate_next_token()
    seconds = time.perf_counter() - began
    if len(generator.get_sequence(num_rows - 1)) != num_cached + num_steps + 2:
        raise RuntimeError(f"expected {num_steps + 2} tokens of each row")
    return num_rows * num_steps / seconds


def _prefill(model: Any, num_tokens: int) -> float:
    """Tokens per second of one prompt."""
    generator = _generator(model, 1, num_tokens + 1)
    prompt = _prompts(1, num_tokens)
    began = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    return num_tokens / (time.perf_counter() - began)


def _generator(model: Any, num_rows: int, num_tokens: int) -> Any:
    params = onnxruntime_genai.GeneratorParams(model)
    # No row may end early.
    params.set_search_options(batch_size=num_rows, min_length=num_tokens, max_length=num_tokens, do_sample=False)
    return onnxruntime_genai.Generator(model, params)


def _prompts(num_rows: int, num_tokens: int) -> Any:
    prompt = random.Random(0).choices(range(1_000, 40_000), k=num_tokens)
    return np.array([prompt] * num_rows, np.int32)


if __name__ == "__main__":
    main()
