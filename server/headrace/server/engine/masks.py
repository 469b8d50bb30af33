"""Which tokens the constraints of a step's sequences allow."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from headrace.server.engine.constraint import NUM_EXTRA_TOKENS, Constraint

_WORD_BITS = 32
_MIN_ROWS = 16
_NUM_THREADS = 1
"""A mask takes some 20 to 100 µs, so many are done before a step is."""

_BYTES = np.arange(256, dtype=np.uint8)
_CEILINGS = np.where(np.unpackbits(_BYTES[:, None], axis=1, bitorder="little"), np.inf, -np.inf).astype(np.float32)
"""[256, 8]: for each byte of a mask what the logits of its eight tokens can be at most."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The masks of one sequence: for row ``row`` of a step's logits, and for the row after each of its ``guesses``."""

    constraint: Constraint
    row: int
    guesses: Sequence[int] = ()
    """Each is what the constraint allows after those before it."""


@dataclass(frozen=True, slots=True)
class TokenMask:
    """What one row may become. Valid until the next step."""

    bits: NDArray[np.uint32]
    """[ceil(vocabulary / 32)], the lowest bit first."""
    num_tokens: int
    scratch: NDArray[np.float32]
    """[8 * bytes of ``bits``], anything."""
    also: int | None = None
    """A token that may come, too."""

    def apply(self, row: NDArray[np.float32]) -> None:
        """Makes what must not come impossible, in place. A row of logits may be wider than the tokenizer's vocabulary,
        or narrower: what only one of them knows cannot come.
        """
        num_known = min(self.num_tokens, row.size)
        also = None if self.also is None or self.also >= row.size else row[self.also]
        # Made anew, so many bytes would come from the system each time. Clipping never happens; checking takes a copy.
        _CEILINGS.take(self.bits.view(np.uint8), axis=0, out=self.scratch.reshape(-1, 8), mode="clip")
        np.minimum(row[:num_known], self.scratch[:num_known], out=row[:num_known])
        row[num_known:] = -np.inf
        if also is not None:
            row[self.also] = also


class Masks:
    """The masks of one step after the other. Belongs to the runner's thread; computing lets go of Python's lock."""

    def __init__(self, vocabulary_size: int, *, beside_model: bool) -> None:
        """``beside_model``: whether to compute while the model runs. Where its threads have every processor, one more
        would stop one of them, and all others wait for that: two to three times what a mask takes.
        """
        self._beside_model = beside_model
        self._num_tokens = vocabulary_size
        self._num_words = -(-(vocabulary_size + NUM_EXTRA_TOKENS) // _WORD_BITS)
        self._bits = np.empty((_MIN_ROWS, self._num_words), np.uint32)
        self._scratch = np.empty(self._num_words * _WORD_BITS, np.float32)
        self._known: set[int] = set()
        """Rows whose masks are there, or on their way."""
        self._pending: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None

    def begin(self, wanted: Sequence[Wanted]) -> None:
        """Forgets the last step's masks and starts to compute this one's. Until ``wait`` nobody else may use the
        constraints.
        """
        self._known.clear()
        if not wanted or not self._beside_model:
            return
        self._known = {row for one in wanted for row in range(one.row, one.row + 1 + len(one.guesses))}
        self._make_room(max(self._known) + 1)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
            self._executor = LLExecutor(_NUM_THREADS)
        self._pending = self._thread.submit(self._compute, wanted)

    def wait(self) -> None:
        """Until what ``begin`` started is done."""
        pending, self._pending = self._pending, None
        if pending is not None and pending.exception() is not None:
            self._known.clear()  # each will be asked for by itself, so that the one that fails does so alone

    def of(self, constraint: Constraint, row: int, *, also: int | None = None) -> TokenMask:
        """The mask of a row; computed now, if ``begin`` was not asked for it. Raises as ``Constraint.check`` does."""
        if row not in self._known:
            self._make_room(row + 1)
            bits = self._bits[row]
            constraint.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            self._known.add(row)
        constraint.check()
        return TokenMask(self._bits[row], self._num_tokens, self._scratch, also)

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def _make_room(self, num_rows: int) -> None:
        if num_rows > len(self._bits):
            more = np.empty((2 * num_rows, self._num_words), np.uint32)
            more[: len(self._bits)] = self._bits
            self._bits = more

    def _compute(self, wanted: Sequence[Wanted]) -> None:
        assert self._executor is not None
        where = (self._bits.ctypes.data, self._bits.strides[0], len(self._bits))
        if plain := [(one.constraint.matcher, one.row) for one in wanted if not one.guesses]:
            self._executor.unsafe_compute_mask_ptr(plain, *where)
        if guessed := [(one.constraint.matcher, one.row, list(one.guesses)) for one in wanted if one.guesses]:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(guessed, *where)
