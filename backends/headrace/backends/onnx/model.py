"""A bundle that is served: its graph, one step at a time, on ONNX Runtime's CPU provider."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headrace.backends.api import DeterminismClass, Logits, Row, Tokenizer
from headrace.backends.errors import BackendError
from headrace.backends.onnx import bundle, fused_session, stock_session
from headrace.backends.onnx.bundle import Manifest, Operators
from headrace.backends.onnx.fused_session import FusedSession
from headrace.backends.onnx.kv import KvMemory, kv_bytes_per_token
from headrace.backends.onnx.probe import probe
from headrace.backends.onnx.session import Session, check_stock_operators, open_session
from headrace.backends.onnx.stock_session import StockSession
from headrace.backends.onnx.top import CompiledLogits, OnnxLogits, Top

logger = logging.getLogger(__name__)

MAX_CHUNK = 128
CHUNK_ALIGNMENT = 16
MAX_DRAFTS = 64
"""Beyond that a guess costs as much as any other token: there is nothing to gain."""
MAX_SCORES = 256
_MAX_LOGITS_BYTES = 64 * 2**20
"""Of the rows that chunks want: 64 of a vocabulary of 262,144. Memory that is touched when texts are scored."""


_NEEDED_ON_STOCK = "the compiled operators: headrace-kernels, a processor with AVX2, weights of int8 or int4"
_NEEDED_ON_COMPILED = "a processor on which the compiled operators give the same bits in every kind of step"


class OnnxModel:
    """A loaded bundle; implements ``api.PrefixModel``."""

    backend = "onnx"
    rewinds = True

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
        operators: Path | None,
        num_spare_slots: int = 0,
        int8_cache: bool = False,
    ) -> None:
        """``operators`` is the library of compiled ones; a bundle that has no graph for them does without.

        ``int8_cache`` needs them. Raises BackendError.
        """
        self.card = manifest.card()
        self.tokenizer = tokenizer
        self.num_slots = num_slots
        self.num_spare_slots = num_spare_slots
        self.max_chunk = MAX_CHUNK
        self.chunk_alignment = CHUNK_ALIGNMENT
        fused = operators is not None and bundle.FUSED in manifest.files
        if int8_cache and not fused:
            raise BackendError(
                f'model {manifest.name!r}: kv_cache_dtype = "int8" needs the compiled operators, for which a bundle of '
                f'{manifest.quantization} has no graph: build it as int8 or int4, or leave kv_cache_dtype at "auto"'
            )
        if not fused:
            check_stock_operators(manifest.name)
        session = open_session(
            folder / (bundle.FUSED if fused else bundle.GRAPH),
            threads=threads,
            spinning=spinning,
            operators=operators if fused else None,
            operator_options=fused_session.OPERATOR_OPTIONS_INT8 if int8_cache else None,
        )
        dtype = np.dtype(np.int8 if int8_cache else fused_session.KV_DTYPE if fused else stock_session.KV_DTYPE)
        self.num_kv_tokens = num_kv_bytes // kv_bytes_per_token(manifest, dtype)
        logger.info(
            "model %s runs on %s; its cache holds %d tokens in %s",
            manifest.name,
            _compiled_operators() if fused else "ONNX Runtime's own operators",
            self.num_kv_tokens,
            dtype.name,
        )
        self.fills_processors = threads >= len(os.sched_getaffinity(0))
        self._top = Top(folder / bundle.TOP) if operators is None else None
        self._kv = KvMemory(
            num_layers=manifest.num_layers,
            num_slots=num_slots + num_spare_slots,
            num_kv_heads=manifest.num_kv_heads,
            capacity=manifest.context_length,
            head_size=manifest.head_size,
            num_tokens=self.num_kv_tokens,
            dtype=dtype,
        )
        self._session: Session = FusedSession(session, self._kv) if fused else StockSession(session, self._kv)
        self.max_scores = min(MAX_SCORES, _MAX_LOGITS_BYTES // (4 * manifest.vocabulary_size))
        num_rows = num_slots + max(MAX_DRAFTS, self.max_scores)
        self._logits = np.empty((num_rows, manifest.vocabulary_size), np.float32)
        kind: Operators = "stock" if not fused else "compiled_int8" if int8_cache else "compiled"
        self.determinism = self._prove(manifest, kind)
        if self.determinism is DeterminismClass.BEST_EFFORT:
            # At fixed places, at least the cuts are the same every time.
            self.chunk_alignment = 4 * CHUNK_ALIGNMENT
            self.max_chunk = self.chunk_alignment + 1
        self.mixes = self.decodes_like_chunks = self.determinism is DeterminismClass.STRICT
        self.max_drafts = MAX_DRAFTS if self.mixes else 0
        self.needed_for_strict = _NEEDED_ON_COMPILED if fused else _NEEDED_ON_STOCK

    def reserve(self, slot: int, num_tokens: int) -> None:
        self._kv.reserve(slot, num_tokens)

    def release(self, slot: int) -> None:
        self._kv.release(slot)

    def truncate(self, slot: int, num_cached_tokens: int, num_tokens: int) -> None:  # noqa: ARG002  # rows say it too
        self._kv.resize(slot, num_tokens)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        self._kv.copy(source, target, num_tokens)

    def step(self, rows: Sequence[Row]) -> Logits:
        for row in rows:
            self._kv.touch(row.slot, row.num_cached_tokens + len(row.token_ids))
        logits = self._logits[: sum(row.num_logits for row in rows)]
        maxima = self._session.run(rows, logits)
        return CompiledLogits(logits, maxima) if self._top is None else OnnxLogits(logits, self._top)

    def problem(self) -> str | None:
        return None

    def close(self) -> None:
        del self._session, self._top
        self._kv.close()

    def _prove(self, manifest: Manifest, operators: Operators) -> DeterminismClass:
        """What holds here and held where the bundle was built. Warms the graph up on the way."""
        found = probe(self, manifest.vocabulary_size, mixes=operators != "stock")
        recorded = None if manifest.determinism is None else manifest.determinism.classes.get(operators)
        if recorded is None or DeterminismClass[recorded] is found:
            return found
        logger.warning(
            "model %s is %s on this processor, but was %s where it was built: it is served as the lesser",
            manifest.name,
            found.name,
            recorded,
        )
        return min(found, DeterminismClass[recorded])


def _compiled_operators() -> str:
    import headrace_kernels

    return f"compiled operators ({headrace_kernels.instruction_set()})"
