"""A bundle whose graph Optimum exported, one step at a time, on ONNX Runtime's CPU provider."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headrace.backends.api import DeterminismClass, Logits, Row, Tokenizer
from headrace.backends.errors import BackendError
from headrace.backends.onnx import bundle
from headrace.backends.onnx.bundle import Manifest
from headrace.backends.onnx.exported.session import KV_DTYPE, ExportedSession
from headrace.backends.onnx.kv import KvMemory, kv_bytes_per_token
from headrace.backends.onnx.session import Session, open_session
from headrace.backends.onnx.top import CompiledLogits, OnnxLogits, Top

CHUNK_ALIGNMENT = 64


class ExportedModel:
    """A loaded bundle; implements ``api.StepModel``.

    Copies of slots, guesses and scores in chunks need a packed graph, and are not declared: the engine does without.
    """

    backend = "onnx"
    # A row's bits depend on how much padding its neighbours make.
    determinism = DeterminismClass.BEST_EFFORT
    needed_for_strict = "a packed graph, which `headrace models build` makes of the architectures that it knows"
    chunk_alignment = CHUNK_ALIGNMENT
    # At fixed places, at least the cuts are the same every time.
    max_chunk = CHUNK_ALIGNMENT + 1

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        tokenizer: Tokenizer,
        *,
        threads: int,
        num_slots: int,
        num_kv_bytes: int,
        spinning: bool,
        has_compiled_top: bool,
    ) -> None:
        """``has_compiled_top`` says whether headrace-kernels can search logits here. Raises BackendError."""
        self.card = manifest.card()
        self.tokenizer = tokenizer
        self.num_slots = num_slots
        self.num_kv_tokens = num_kv_bytes // kv_bytes_per_token(manifest, KV_DTYPE)
        self.fills_processors = threads >= len(os.sched_getaffinity(0))
        session = open_session(folder / bundle.GRAPH, threads=threads, spinning=spinning)
        outputs = {value.name: value.shape for value in session.get_outputs()}
        self._top = None if has_compiled_top else Top(folder / bundle.TOP)
        self._kv = KvMemory(
            num_layers=manifest.num_layers,
            num_slots=num_slots,
            num_kv_heads=manifest.num_kv_heads,
            capacity=manifest.context_length,
            head_size=manifest.head_size,
            num_tokens=self.num_kv_tokens,
            dtype=KV_DTYPE,
        )
        self._session: Session = ExportedSession(
            session,
            self._kv,
            num_weight_bytes=manifest.files[bundle.WEIGHTS].num_bytes,
            num_logits=outputs["logits"][-1],
        )
        self._logits = np.empty((num_slots, manifest.vocabulary_size), np.float32)
        self._warm_up()

    def reserve(self, slot: int, num_tokens: int) -> None:
        self._kv.reserve(slot, num_tokens)

    def release(self, slot: int) -> None:
        self._kv.release(slot)

    def step(self, rows: Sequence[Row]) -> Logits:
        for row in rows:
            self._kv.touch(row.slot, row.num_cached_tokens + len(row.token_ids))
        logits = self._logits[: sum(row.num_logits for row in rows)]
        self._session.run(rows, logits)
        return CompiledLogits(logits) if self._top is None else OnnxLogits(logits, self._top)

    def problem(self) -> str | None:
        return None

    def close(self) -> None:
        del self._session, self._top
        self._kv.close()

    def _warm_up(self) -> None:
        """A prompt and a decode. Raises BackendError where the graph gives what nobody could serve."""
        self.reserve(0, 3)
        self.step([Row(0, 0, [0, 0], num_logits=0)])
        logits = self.step([Row(0, 2, [0], num_logits=1)]).row(0)
        self.release(0)
        if not np.isfinite(logits).all():
            self.close()
            raise BackendError(f"the graph of model {self.card.name!r} gives logits that are not finite")
