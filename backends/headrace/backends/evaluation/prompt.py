"""Runs prompts through the step contract as serving does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

from headrace.backends.api import Row, StepModel


@contextmanager
def reserved(model: StepModel, num_slots: int, num_tokens: int) -> Iterator[range]:
    """Slots with room for ``num_tokens`` each."""
    with ExitStack() as stack:
        for slot in range(num_slots):
            model.reserve(slot, num_tokens)
            stack.callback(model.release, slot)
        yield range(num_slots)


def run_prompt(model: StepModel, slot: int, token_ids: Sequence[int]) -> None:
    """Runs a prompt alone, in the largest chunks that the model takes."""
    for start, end in pairwise(cuts(len(token_ids), max_chunk=model.max_chunk, alignment=model.chunk_alignment)):
        model.step([Row(slot, start, token_ids[start:end], num_logits=int(end == len(token_ids)))])


def cuts(num_tokens: int, *, max_chunk: int, alignment: int) -> list[int]:
    """Where the chunks of a prompt begin and end: at multiples of the alignment, never so that one token is left."""
    size = max_chunk // alignment * alignment
    places = [0]
    while (rest := num_tokens - places[-1]) > 0:
        if rest > max_chunk:
            rest = size - alignment if rest - size == 1 else size
        places.append(places[-1] + rest)
    return places
