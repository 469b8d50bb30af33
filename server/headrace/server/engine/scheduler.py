"""Decides which sequences run next, and in what slots. Pure: no I/O, no clock, no model."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from headrace.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model can hold, and how a prompt may be cut (``StepModel``)."""

    num_slots: int
    num_kv_tokens: int
    max_chunk: int
    chunk_alignment: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of a prompt, from what is cached up to ``end``."""

    sequence: Sequence
    end: int


@dataclass(slots=True)
class Step:
    """What to run now: first ``decodes``, one token each; then ``chunks``. ``started`` got their slots just now."""

    started: list[Sequence] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.started or self.decodes or self.chunks)


class Scheduler:
    """Sequences wait in order of latency class, priority and arrival, then run until they are removed.

    A sequence starts when there is a free slot and room for all the tokens it can ever have, so it never has to stop
    for want of memory; none overtakes one that waits for room. Slots are given lowest first, which keeps a
    batch's slots close to each other.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._order = itertools.count()
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._running: dict[Sequence, None] = {}
        """In order of start."""
        self._free_slots = list(range(limits.num_slots))
        self._num_free_tokens = limits.num_kv_tokens

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running()
        yield from self.waiting()

    def running(self) -> list[Sequence]:
        """Sequences with a slot, in order of start."""
        return list(self._running)

    def waiting(self) -> list[Sequence]:
        """Sequences without a slot, in no order."""
        return [sequence for _, sequence in self._waiting]

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_reserved_tokens(self) -> int:
        return self._limits.num_kv_tokens - self._num_free_tokens

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Its ``num_tokens_reserved`` must fit an empty cache."""
        if sequence.num_tokens_reserved > self._limits.num_kv_tokens:
            raise RuntimeError("a sequence that can never fit was queued. This is a bug.")
        scheduling = sequence.call.request.scheduling
        rank = (int(scheduling.latency_class), -scheduling.priority, next(self._order))
        heapq.heappush(self._waiting, (rank, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, waiting or running; its slot is free at once."""
        if sequence.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
            return
        del self._running[sequence]
        heapq.heappush(self._free_slots, sequence.slot)
        self._num_free_tokens += sequence.num_tokens_reserved
        sequence.slot = None

    def schedule(self, chunk_budget: int) -> Step:
        """The next step. Prompts get at most ``chunk_budget`` tokens of it, the oldest first, and at least one chunk.

        A sequence whose reader is too slow stands still until it has caught up.
        """
        step = Step(started=self._start())
        for sequence in self._running:
            if sequence.num_tokens_to_run > 1:
                if chunk_budget > 0:
                    end = self._cut(sequence, chunk_budget)
                    chunk_budget -= end - sequence.num_cached_tokens
                    step.chunks.append(Chunk(sequence, end))
            elif not sequence.stream.is_full:
                step.decodes.append(sequence)
        return step

    def _start(self) -> list[Sequence]:
        started = []
        while self._waiting and self._free_slots:
            sequence = self._waiting[0][1]
            if sequence.num_tokens_reserved > self._num_free_tokens:
                break
            heapq.heappop(self._waiting)
            sequence.slot = heapq.heappop(self._free_slots)
            self._num_free_tokens -= sequence.num_tokens_reserved
            self._running[sequence] = None
            started.append(sequence)
        return started

    def _cut(self, sequence: Sequence, budget: int) -> int:
        """Where the next chunk of a prompt ends: at its end, or at a multiple of the alignment that leaves more than
        one token (a chunk of one token takes another path through attention, and would give other bits).
        """
        align, longest = self._limits.chunk_alignment, self._limits.max_chunk
        start, total = sequence.num_cached_tokens, len(sequence.tokens)
        room = max(align, min(budget, longest) // align * align)
        if total - start <= room:
            return total
        end = (start + room) // align * align
        if total - end != 1:
            return end
        return total if end - start == align else end - align
