"""Who waits for a slot, and whose turn it is. Pure: no clock, no model."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from headrace.server.engine.sequence import Sequence

Level = tuple[int, int]
"""Latency class and priority, negative; the least comes first."""


@dataclass(frozen=True, slots=True)
class Load:
    """What some sequences ask for."""

    num_sequences: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    """That they may have at most."""

    def __add__(self, other: Load) -> Load:
        return Load(
            self.num_sequences + other.num_sequences,
            self.num_prompt_tokens + other.num_prompt_tokens,
            self.num_new_tokens + other.num_new_tokens,
        )


class TokenCounters:
    """How many tokens each tenant has been served lately: the Virtual Token Counter of "Fairness in Serving Large
    Language Models" (arXiv 2401.00588).

    A tenant is active while it has sequences that wait or run. One that becomes active is lifted to the least of those
    that are: time in which it asked for nothing gives it no claim. Idle ones are remembered only while that matters,
    and none once nobody is active.
    """

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._num_sequences: Counter[str] = Counter()
        """Of the active tenants."""

    def __getitem__(self, tenant: str) -> int:
        """Of an active tenant."""
        return self._counters[tenant]

    def __len__(self) -> int:
        """Tenants that are remembered."""
        return len(self._counters)

    def enter(self, tenant: str) -> None:
        """It has one more sequence."""
        if tenant not in self._num_sequences:
            least = min((self._counters[active] for active in self._num_sequences), default=0)
            self._counters = {
                other: count
                for other, count in self._counters.items()
                if other in self._num_sequences or count > least  # others would be lifted to that
            }
            self._counters.setdefault(tenant, least)
        self._num_sequences[tenant] += 1

    def leave(self, tenant: str) -> None:
        """It has one sequence less."""
        self._num_sequences[tenant] -= 1
        if not self._num_sequences[tenant]:
            del self._num_sequences[tenant]
        if not self._num_sequences:
            self._counters.clear()

    def charge(self, tenant: str, num_tokens: int) -> None:
        """An active tenant was served."""
        self._counters[tenant] += num_tokens


class FairQueue:
    """Sequences wait by latency class and priority. Of equals comes first whose tenant has the smallest counter; of one
    tenant's, who came first.
    """

    def __init__(self, counters: TokenCounters) -> None:
        self._counters = counters
        self._levels: dict[Level, dict[str, _Line]] = {}
        """Of each level the tenants that have somebody there."""
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """In no order."""
        for lines in self._levels.values():
            for line in lines.values():
                yield from line.sequences

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        if not self._levels:
            return None
        lines = self._levels[min(self._levels)]
        tenant = min(lines, key=self._counters.__getitem__)
        return next(iter(lines[tenant].sequences))

    def append(self, sequence: Sequence) -> None:
        """Behind its tenant's others of its level. The tenant must be active."""
        self._line(sequence).add(sequence)
        self._num_waiting += 1

    def put_back(self, sequence: Sequence) -> None:
        """Before its tenant's others of its level: it has run before."""
        line = self._line(sequence)
        line.add(sequence)
        line.sequences.move_to_end(sequence, last=False)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        level, tenant = _level(sequence), sequence.tenant
        lines = self._levels[level]
        lines[tenant].remove(sequence)
        if not lines[tenant].sequences:
            del lines[tenant]
        if not lines:
            del self._levels[level]
        self._num_waiting -= 1

    def load_before(self, sequence: Sequence) -> Load:
        """What surely comes before one that would be appended: all that is of a more urgent level, and its tenant's own
        of the same.
        """
        level, load = _level(sequence), Load()
        for other, lines in self._levels.items():
            for tenant, line in lines.items():
                if other < level or (other == level and tenant == sequence.tenant):
                    load += line.load
        return load

    def _line(self, sequence: Sequence) -> _Line:
        return self._levels.setdefault(_level(sequence), {}).setdefault(sequence.tenant, _Line())


@dataclass(slots=True)
class _Line:
    """One tenant's sequences of one level, in order."""

    sequences: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    load: Load = Load()

    def add(self, sequence: Sequence) -> None:
        self.sequences[sequence] = None
        self.load += Load(1, sequence.num_prompt_tokens, sequence.max_new_tokens)

    def remove(self, sequence: Sequence) -> None:
        del self.sequences[sequence]
        self.load += Load(-1, -sequence.num_prompt_tokens, -sequence.max_new_tokens)


def _level(sequence: Sequence) -> Level:
    scheduling = sequence.call.request.scheduling
    return int(scheduling.latency_class), -scheduling.priority
