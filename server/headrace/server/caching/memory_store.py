"""Answers in this process's memory, up to a number of bytes; what was not used for longest goes first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from headrace.server.accounting.clock import Clock
from headrace.server.caching.entries import StoredAnswer

SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: StoredAnswer
    size: int
    expires_at: int


class MemoryStore:
    """For one event loop."""

    def __init__(self, *, max_bytes: int, clock: Clock) -> None:
        self.is_shared = False
        self.num_bytes = 0
        self.num_failures = 0
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        """The one that was used last is last."""

    async def get(self, key: bytes) -> StoredAnswer | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_at <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.answer

    async def put(self, key: bytes, answer: StoredAnswer, *, seconds: float) -> None:
        self._drop(key)
        size = answer.size
        if size > self._max_bytes:
            return
        while self.num_bytes + size > self._max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = _Entry(answer, size, self._clock() + round(seconds * SECOND))
        self.num_bytes += size

    async def close(self) -> None:
        self._entries.clear()
        self.num_bytes = 0

    def _drop(self, key: bytes) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self.num_bytes -= entry.size
