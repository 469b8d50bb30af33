"""Sequences as an engine runs them on a step-wise model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.backends.api import Row, StepModel

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Line:
    """A sequence: a prompt, the tokens that follow it, and the logits after the prompt and after each of them, when it
    runs alone.
    """

    prompt: list[int]
    later: list[int]
    alone: list[Floats]


@contextmanager
def reserved(model: StepModel, *slots: int, num_tokens: int) -> Iterator[None]:
    """Slots with room for as many tokens, or for their share of what there is."""
    share = max(1, model.num_kv_tokens // len(slots))
    taken: list[int] = []
    try:
        for slot in slots:
            model.reserve(slot, min(num_tokens, share, model.card.context_length))
            taken.append(slot)
        yield
    finally:
        for slot in taken:
            model.release(slot)


def capacity(model: StepModel) -> int:
    """Tokens that one sequence can have."""
    return min(model.card.context_length, model.num_kv_tokens)


def room(lines: Sequence[Line]) -> int:
    """Tokens that the longest of them has."""
    return max(len(line.prompt) + len(line.later) for line in lines)


def shortest_cut(model: StepModel) -> int:
    """The first place to cut a prompt; a chunk has two tokens at least."""
    return model.chunk_alignment * (2 if model.chunk_alignment == 1 else 1)


def feed(model: StepModel, slot: int, start: int, tokens: Sequence[int], cuts: Sequence[int] = ()) -> Floats:
    """Runs a prompt alone; the logits after its last token."""
    row = np.empty(0, np.float32)
    for begin, end in itertools.pairwise([0, *cuts, len(tokens)]):
        last = end == len(tokens)
        logits = model.step([Row(slot, start + begin, tokens[begin:end], num_logits=int(last))])
        if last:
            row = np.array(logits.row(0))
    return row


def feed_cut(model: StepModel, slot: int, tokens: Sequence[int]) -> Floats:
    """Runs a prompt of any length alone, cut as an engine cuts it."""
    align, longest, length = model.chunk_alignment, model.max_chunk, len(tokens)
    cuts: list[int] = []
    while length - (cuts[-1] if cuts else 0) > longest:
        end = (cuts[-1] if cuts else 0) + longest // align * align
        cuts.append(end if length - end != 1 else end - align)
    return feed(model, slot, 0, tokens, cuts)


def decode(model: StepModel, slot: int, start: int, tokens: Sequence[int]) -> list[Floats]:
    """Appends tokens one by one, alone; the logits after each."""
    return [feed(model, slot, start + i, [token]) for i, token in enumerate(tokens)]


def longest_chunk(cuts: Sequence[int], length: int) -> int:
    return max(end - start for start, end in itertools.pairwise([0, *cuts, length]))


def distance(a: Floats, b: Floats) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b))
