"""The events of one run for many readers, each of which begins with the first and goes at its own pace.

The run adds events; who reads them comes and goes. For one event loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from headrace.server.accounting.answers import AnswerEvent, size_of


class LeftBehind(Exception):
    """Events that a reader did not take are gone."""


@dataclass(eq=False, slots=True)
class Reader:
    """One that reads the events."""

    position: int = 0
    """Of the event that it takes next, or has and is busy with."""
    is_busy: bool = False
    left_behind: bool = False


@dataclass(eq=False, slots=True)
class Broadcast:
    """The events so far, without the ``StreamEnd``."""

    events: list[AnswerEvent] = field(default_factory=list)
    size: int = 0
    """Bytes of ``events``, about."""
    kept: bool = True
    """Whether all events are there, for whoever comes later. Otherwise there are those that somebody has yet to
    take."""
    readers: set[Reader] = field(default_factory=set)
    done: bool = False
    """Whether no event will come any more."""
    error: Exception | None = None
    """What the run ended with, if it did not come to its end."""
    _first: int = 0
    """Number of the first of ``events``; more than 0 only where they are not kept."""
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    # --- the run's side

    def add(self, event: AnswerEvent) -> int:
        """Adds an event; returns its bytes."""
        size = size_of(event)
        self.events.append(event)
        self.size += size
        self.notify()
        return size

    async def wanted(self, *, ahead: int | None = None) -> None:
        """Returns when the next event is wanted: where all are kept, as soon as no more than ``ahead`` wait for the
        reader that is furthest; where they are not, when all readers ask for it.
        """
        while self.readers and self._is_enough(ahead):
            await self._changed()

    def drop(self) -> int:
        """Lets go of the events that are there; returns their bytes."""
        freed = self.size
        self._first, self.size = self._end, 0
        self.events.clear()
        return freed

    def finish(self, error: Exception | None = None) -> None:
        self.done, self.error = True, error
        self.notify()

    def notify(self) -> None:
        """Wakes all that wait for a change."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    # --- the readers' side

    async def next(self, reader: Reader) -> AnswerEvent | None:
        """The event after that which the reader has got last; ``None`` at the end. Raises LeftBehind, or what the run
        ended with.
        """
        if reader.is_busy:
            reader.is_busy = False
            reader.position += 1
            self.notify()
        while not (reader.left_behind or reader.position < self._end or self.done):
            await self._changed()
        if reader.left_behind:
            raise LeftBehind
        if reader.position < self._end:
            reader.is_busy = True
            return self.events[reader.position - self._first]
        if self.error is not None:
            raise self.error
        return None

    # ---

    @property
    def _end(self) -> int:
        return self._first + len(self.events)

    def _is_enough(self, ahead: int | None) -> bool:
        positions = [reader.position for reader in self.readers]
        if self.kept:
            return ahead is not None and self._end - max(positions) > ahead
        return min(positions) < self._end

    async def _changed(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future
