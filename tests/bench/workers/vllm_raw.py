"""Raw vLLM for CPUs: its engine stepped by hand, without its server; run it with that environment's Python.

The library samples inside its steps: greedily here, which is in the time. Scheduling is in this process, and the model
in another, as in its server. Every row has a prompt of its own, the same in each run, so that prefix caching spares all
runs but the first the time to compute it; a prompt whose time is measured never comes twice.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import time
from importlib.metadata import version
from typing import Any

from answering import Measure, answer, measuring

_MAX_ROWS = 32
_MAX_TOKENS = 4096
"""Of one sequence."""
_MAX_RUN_TOKENS = 16384
"""So that all prompts of a case run in one step, and are done when the time begins."""
_CACHE_GIB = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument(
        "--dtype", default="float32", help="bfloat16 where the processor has AVX-512 (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    answer(lambda: _load(arguments))


def _load(arguments: argparse.Namespace) -> tuple[str, Measure]:
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    # Read when the library is imported.
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM

    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        skip_tokenizer_init=True,
        max_model_len=_MAX_TOKENS,
        max_num_seqs=_MAX_ROWS,
        max_num_batched_tokens=_MAX_RUN_TOKENS,
        enable_prefix_caching=True,
        # In this process it could not bind its threads.
        distributed_executor_backend="mp",
    )
    engine = _Engine(llm.llm_engine)
    description = f"vllm-cpu {version('vllm-cpu')}, {arguments.dtype}, {arguments.threads} threads"

    return description, measuring(engine)


class _Engine:
    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._ids = itertools.count()
        self._seeds = itertools.count(_MAX_ROWS)

    def decode(self, num_rows: int, num_cached: int, num_steps: int) -> float:
        """Tokens per second of ``num_steps`` steps of ``num_rows`` rows."""
        for row in range(num_rows):
            # One token from the prompts' step, one from the warm-up, the measured ones, and one for the end.
            self._add(num_cached, num_steps + 3, seed=row)
        self._step(num_rows)
        self._step(num_rows)
        began = time.perf_counter()
        for _ in range(num_steps):
            self._step(num_rows)
        seconds = time.perf_counter() - began
        self._finish()
        return num_rows * num_steps / seconds

    def prefill(self, num_tokens: int) -> float:
        """Tokens per second of one prompt."""
        self._add(num_tokens, 1, seed=next(self._seeds))
        began = time.perf_counter()
        self._step(1)
        seconds = time.perf_counter() - began
        self._finish()
        return num_tokens / seconds

    def _add(self, num_tokens: int, max_new_tokens: int, *, seed: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = random.Random(seed).choices(range(1_000, 40_000), k=num_tokens)
        self._engine.add_request(str(next(self._ids)), {"prompt_token_ids": prompt}, params)

    def _step(self, num_rows: int) -> None:
        """One step, and makes sure that it gave every row its token."""
        outputs = self._engine.step()
        count = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
        if count != num_rows:
            raise RuntimeError(f"expected a token of each of {num_rows} rows, got {count}")

    def _finish(self) -> None:
        while self._engine.has_unfinished_requests():
            self._engine.step()


if __name__ == "__main__":
    main()
