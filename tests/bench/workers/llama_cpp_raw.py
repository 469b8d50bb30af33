"""Raw llama.cpp, through the C interface that llama-cpp-python carries; run it with that environment's Python.

A step computes the logits of every row; sampling is not in the time.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import random
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
from answering import Measure, answer, measuring

_NUM_SEQUENCES = 32
_SEQUENCE_TOKENS = 512
"""Of a sequence, where a case needs no more."""
_BATCH_TOKENS = 2048
_RUN_TOKENS = 512

Entry = tuple[int, int, int, bool]
"""Token id, position, sequence, whether its logits are wanted."""


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _log_nothing(level: int, text: bytes, data: object) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True, help="the model's file")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    answer(lambda: _load(arguments))


def _load(arguments: argparse.Namespace) -> tuple[str, Measure]:
    llama_cpp.llama_log_set(_log_nothing, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(arguments.gguf).encode(), llama_cpp.llama_model_default_params())
    engine = _Engine(model, arguments.threads)
    description = (
        f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}, {arguments.gguf.name},"
        f" {arguments.threads} threads; {llama_cpp.llama_print_system_info().decode()}"
    )

    return description, measuring(engine)


class _Engine:
    """A context with a cache for each of the sequences; another one where a case needs longer ones."""

    def __init__(self, model: Any, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._shape = (0, 0)
        self._context: Any = None
        self._memory: Any = None

    def decode(self, num_rows: int, num_cached: int, num_steps: int) -> float:
        """Tokens per second of ``num_steps`` steps of ``num_rows`` rows."""
        self._make_room(num_rows, num_cached + 1 + num_steps)
        llama_cpp.llama_memory_clear(self._memory, True)
        self._run(_entries(_tokens(num_cached), sequence=0))
        for sequence in range(1, num_rows):
            # A copy of its own, made before the next step: the warm-up.
            llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

        def step(position: int) -> None:
            self._run([(42, position, sequence, True) for sequence in range(num_rows)])

        step(num_cached)
        began = time.perf_counter()
        for i in range(num_steps):
            step(num_cached + 1 + i)
        return num_rows * num_steps / (time.perf_counter() - began)

    def prefill(self, num_tokens: int) -> float:
        """Tokens per second of one prompt."""
        self._make_room(1, num_tokens)
        llama_cpp.llama_memory_clear(self._memory, True)
        prompt = _entries(_tokens(num_tokens), sequence=0)
        began = time.perf_counter()
        self._run(prompt)
        return num_tokens / (time.perf_counter() - began)

    def _make_room(self, num_rows: int, num_tokens: int) -> None:
        """Makes a context in which ``num_rows`` sequences can have ``num_tokens`` each, unless there is one."""
        shape = (_NUM_SEQUENCES, _SEQUENCE_TOKENS)
        if num_tokens > _SEQUENCE_TOKENS:
            shape = (num_rows, math.ceil(num_tokens / 256) * 256)
        if shape == self._shape:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = shape[0]
        params.n_ctx = shape[0] * shape[1]
        params.n_batch = _BATCH_TOKENS
        params.n_ubatch = _RUN_TOKENS
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._shape = shape

    def _run(self, entries: Sequence[Entry]) -> None:
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wants_logits
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_synchronize(self._context)
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")


def _entries(prompt: Sequence[int], sequence: int) -> list[Entry]:
    return [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)]


def _tokens(count: int) -> list[int]:
    return random.Random(0).choices(range(1_000, 40_000), k=count)


if __name__ == "__main__":
    main()
