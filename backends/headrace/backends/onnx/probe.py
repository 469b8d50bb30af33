"""Finds out what of a sequence's bits this processor and runtime keep, in the shapes that serving uses."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

from headrace.backends.api import DeterminismClass, Row, StepModel

_LENGTH = 87
_NUM_DECODES = 2
_NUM_GUESSES = 7


def probe(model: StepModel, vocabulary_size: int, *, mixes: bool) -> DeterminismClass:
    """Runs made-up sequences on empty slots: whole, cut, beside others, token by token. ``mixes`` says whether decodes
    may share a step with chunks, and carry guesses: without that nothing is STRICT.

    BIT_EXACT: the same bits however a prompt is cut, and whoever runs beside it. STRICT: also whether tokens come one
    by one, in a chunk or as guesses.
    """
    tokens = [(i * i * 7919 + 104_729) % vocabulary_size for i in range(_LENGTH)]
    slots = range(min(4, model.num_slots))
    with _reserved(model, slots):
        alone = _answer(model, tokens, [0, _LENGTH], 0, [])
        exact = [
            _answer(model, tokens, [0, 64, _LENGTH], 0, slots[1:]) == alone,
            _answer(model, tokens, [0, 16, 48, _LENGTH], slots[-1], slots[:-1]) == alone,
        ]
        if not all(exact):
            return DeterminismClass.BEST_EFFORT
        return DeterminismClass.STRICT if mixes and _is_strict(model, tokens, slots) else DeterminismClass.BIT_EXACT


def _answer(
    model: StepModel, tokens: Sequence[int], cuts: Sequence[int], slot: int, neighbours: Sequence[int]
) -> list[bytes]:
    """The bits of the logits after a prompt in chunks, and after each of two decodes."""
    seen = []
    for start, end in itertools.pairwise(cuts):
        rows = [Row(slot, start, tokens[start:end], num_logits=1)]
        rows += [Row(n, 0, tokens[n : n + 5 + 9 * n], num_logits=1) for n in neighbours]
        seen.append(_bits(model, rows)[0])
    for position in range(_LENGTH, _LENGTH + _NUM_DECODES):
        rows = [Row(slot, position, [tokens[0]], num_logits=1)]
        rows += [Row(n, 5 + 9 * n, [tokens[n]], num_logits=1) for n in neighbours]
        seen.append(_bits(model, rows)[0])
    return seen[-1 - _NUM_DECODES :]


def _is_strict(model: StepModel, tokens: Sequence[int], slots: Sequence[int]) -> bool:
    """Whether decodes, and guesses beside a chunk, give and leave what chunks do."""
    tokens, slot, neighbours = tokens[:48], slots[0], slots[1:]

    def end() -> bytes:
        return _bits(model, [Row(slot, 32, tokens[32:], num_logits=1)])[0]

    whole = _bits(model, [Row(slot, 0, tokens, num_logits=1)])[0]
    _bits(model, [Row(slot, 0, tokens[:16], num_logits=1)])
    decoded = [_bits(model, [Row(slot, i, tokens[i : i + 1], num_logits=1)])[0] for i in range(16, 32)]
    if end() != whole:
        return False
    checked: list[bytes] = []
    step = 1 + _NUM_GUESSES
    for start in range(16, 32, step):
        rows = [Row(slot, start, tokens[start : start + step], num_logits=1 + _NUM_GUESSES)]
        rows += [Row(n, 0, tokens[n : n + 5 + 9 * n], num_logits=1) for n in neighbours]
        checked += _bits(model, rows)[:step]
    return checked == decoded and end() == whole


def _bits(model: StepModel, rows: Sequence[Row]) -> list[bytes]:
    """The bits of a step's logits."""
    logits = model.step(rows)
    return [logits.row(i).tobytes() for i in range(sum(row.num_logits for row in rows))]


@contextlib.contextmanager
def _reserved(model: StepModel, slots: Sequence[int]) -> Iterator[None]:
    for slot in slots:
        model.reserve(slot, _LENGTH + _NUM_DECODES)
    try:
        yield
    finally:
        for slot in slots:
            model.release(slot)
