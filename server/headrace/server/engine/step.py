"""What the scheduler tells the engine: what to run now, and what becomes of the model's slots."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of a prompt, from what is cached up to ``end``."""

    sequence: Sequence
    end: int


@dataclass(frozen=True, slots=True)
class Start:
    """A sequence got a slot, which may not be its own any more when the step is run."""

    sequence: Sequence
    slot: int
    num_resumed_tokens: int = 0
    """So many of its tokens are in the slot, which was retained; 0: it is empty."""


@dataclass(frozen=True, slots=True)
class Preempt:
    """A sequence waits again; what becomes of its slot comes next."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Copy:
    """A sequence begins with ``num_tokens`` of another slot."""

    source: int
    target: int
    num_tokens: int
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Keep:
    """A slot is nobody's any more, and only its first ``num_tokens`` count."""

    slot: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Release:
    """A slot is empty."""

    slot: int


SlotChange = Start | Preempt | Copy | Keep | Release
"""What the model has to be told, in order."""


@dataclass(slots=True)
class Step:
    """What to run now: first ``decodes``, one token each; then ``chunks``. ``changes`` come before both."""

    changes: list[SlotChange] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def started(self) -> list[Sequence]:
        """Those that got their slots just now."""
        return [change.sequence for change in self.changes if isinstance(change, Start)]

    def __bool__(self) -> bool:
        return bool(self.changes or self.decodes or self.chunks)
