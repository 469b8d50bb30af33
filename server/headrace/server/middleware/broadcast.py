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
    _read: asyncio.Future[None] | None = None
    """Done when the run, which waits for it, is to go on."""
    _enough: int | None = None
    """Events that it is still ahead then."""
    _added: list[asyncio.Future[None]] = field(default_factory=list)
    """Done when there is another event, or none will come: readers wait for them."""

    # --- the run's side

    def add(self, event: AnswerEvent) -> int:
        """Adds an event; returns its bytes."""
        size = size_of(event)
        self.events.append(event)
        self.size += size
        if self._added:
            self._wake_readers()
        return size

    def is_wanted(self, *, ahead: int | None = None) -> bool:
        """Whether the next event is wanted: where all are kept, as long as no more than ``ahead`` wait for the reader
        that is furthest; where they are not, when all readers ask for it.
        """
        if not self.readers or (self.kept and ahead is None):
            return True
        if self.kept:
            return self._end - max(reader.position for reader in self.readers) <= (ahead or 0)
        return min(reader.position for reader in self.readers) >= self._end

    async def wanted(self, *, ahead: int | None = None) -> None:
        """Returns when the next event is wanted. If it is not now, a half of those ``ahead`` are wanted then: to be
        woken for each would cost too much.
        """
        if self.is_wanted(ahead=ahead):
            return
        self._enough = None if ahead is None else ahead // 2
        while not self.is_wanted(ahead=self._enough):
            self._read = asyncio.get_running_loop().create_future()
            await self._read

    def drop(self) -> int:
        """Lets go of the events that are there; returns their bytes."""
        freed = self.size
        self._first, self.size = self._end, 0
        self.events.clear()
        return freed

    def finish(self, error: Exception | None = None) -> None:
        self.done, self.error = True, error
        self._wake_readers()

    # --- the readers' side

    async def next(self, reader: Reader) -> AnswerEvent | None:
        """The event after that which the reader has got last; ``None`` at the end. Raises LeftBehind, or what the run
        ended with.
        """
        if reader.is_busy:
            reader.is_busy = False
            reader.position += 1
            self._wake_run()
        while not (reader.left_behind or reader.position < self._end or self.done):
            future = asyncio.get_running_loop().create_future()
            self._added.append(future)
            await future
        if reader.left_behind:
            raise LeftBehind
        if reader.position < self._end:
            reader.is_busy = True
            return self.events[reader.position - self._first]
        if self.error is not None:
            raise self.error
        return None

    def leave(self, reader: Reader) -> None:
        self.readers.discard(reader)
        self._wake_run()

    # ---

    @property
    def _end(self) -> int:
        return self._first + len(self.events)

    def _wake_run(self) -> None:
        if self._read is not None and not self._read.done() and self.is_wanted(ahead=self._enough):
            self._read.set_result(None)

    def _wake_readers(self) -> None:
        added, self._added = self._added, []
        for future in added:
            if not future.done():
                future.set_result(None)
